"""The benchmark: that it measures what it says, each way of it; never how fast anything is."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch
from lengths import long

from hotswap_lab import bench, demo
from hotswap_lab.bench import MEMCPY, Report, Row, Scene, Settings, Timing, Way, main, make_base, run, ways_of

TINY = Settings(model="tiny", ranks=(2, 4), n=3, threads=1)
PEFTS = ("PEFT load + set + delete", "PEFT hotswap, disk", "PEFT hotswap, state dict")
PREPARED = ("hotswap_lab, disk, prepared", "hotswap_lab, state dict, prepared", "hotswap_lab, Adapter, prepared")
WAYS = (*PEFTS, "hotswap_lab, disk", *PREPARED, "hotswap_lab, pool", MEMCPY)


@pytest.fixture(scope="module")
def report() -> Report:
    return run(TINY)


@pytest.fixture
def scene(tmp_path) -> Scene:
    base = make_base(TINY)
    return Scene(base, TINY, bench.save_adapters(base, 4, str(tmp_path)))


# ---- the table


def test_every_way_is_timed_for_every_rank_and_all_of_ours_are_right(report):
    assert [(row.part.partition(":")[0], row.way) for row in report.rows] == [
        (f"rank {rank}", way) for rank in TINY.ranks for way in WAYS
    ]
    for row in report.rows:
        assert row.state == "right" or (row.way in PEFTS and row.state == "refused"), row
        assert row.timing is None or (row.timing.n == TINY.n and 0 < row.timing.minimum <= row.timing.median)
    assert report.ok
    # hidden 32, intermediate 64, 2 of 4 heads for keys and values, 2 layers, float32
    nbytes = 2 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64)) * 2 * 4
    assert f": 28 tensors, {nbytes / 1000:.3g} kB per adapter, " in report.rows[0].part


def test_text_json_and_picture_hold_everything(report):
    lines = str(report).splitlines()
    assert lines[0] == report.machine
    for word in ("cores", "thread", "Python", "torch", "peft"):
        assert word in lines[0]
    assert "model='tiny'" in lines[1]
    assert lines[-1].startswith("waited for a core ")
    for row in report.rows:
        last = next(each for each in report.rows if each.part == row.part and each.way == MEMCPY).timing
        (line,) = (each for each in lines[lines.index(row.part) :][: len(WAYS) + 2] if each.startswith(f"{row.way} "))
        median, minimum, n = row.timing
        numbers = f"{1000 * median:,.3f}", f"{1000 * minimum:,.3f}", str(n), f"{median / last.median:,.2f}"
        assert tuple(line.removeprefix(row.way).split()) == numbers
    found = json.loads(report.to_json())
    assert found["settings"]["n"] == TINY.n
    assert [Timing(**row["timing"]) for row in found["rows"]] == [row.timing for row in report.rows]
    texts = [element.text for element in ElementTree.fromstring(report.figure().svg).iter() if element.text]
    assert {report.machine, *WAYS} <= {*texts}


def test_wrong_and_refused_are_said():
    rows = (
        Row("rank 4", "PEFT hotswap, disk", "refused", note="no such thing"),
        Row("rank 4", "hotswap_lab, disk", "wrong", Timing(0.002, 0.001, 3)),
        Row("rank 4", MEMCPY, "right", Timing(0.001, 0.001, 3)),
    )
    report = Report("a machine", TINY, rows)
    assert not report.ok
    assert Report("a machine", TINY, (rows[0], rows[2])).ok  # what PEFT refuses is no fault of ours
    assert str(report).splitlines()[5].split() == ["PEFT", "hotswap,", "disk", "(refused)", "no", "such", "thing"]
    assert "hotswap_lab, disk (wrong)" in str(report)
    assert report.figure().text.endswith("hotswap_lab, disk (wrong) 1, memcpy of the same bytes 2. a machine")


# ---- whether the check can tell


def test_a_way_that_does_nothing_is_always_behind_or_raises_is_told_apart(scene, monkeypatch):
    def refuse(number):
        raise ValueError("not today\nand more")

    monkeypatch.setattr(scene, "settings", Settings(model="tiny", n=1))
    pool = ways_of(scene)["hotswap_lab, pool"]()
    ways = {
        "pool": pool,
        "nothing": scene.way(scene.load(), lambda number: None),
        "behind": pool._replace(swap=lambda number: pool.swap(1 - number)),
        "raises": Way(refuse, bool),
        "copies nothing": scene.copying(9)._replace(swap=lambda number: None),
    }
    rows = {row.way: (row.state, row.note, row.timing is None) for row in scene.measure("a part", ways)}
    wrong = ("wrong", "", False)
    refused = ("refused", "not today", True)
    assert list(rows.values()) == [("right", "", False), wrong, wrong, refused, wrong]


def test_every_call_swaps_and_the_timed_ones_swap_alike(scene):
    calls = []
    way = Way(calls.append, lambda number: True)
    scene.measure("a part", {"noted": way})
    assert calls == [1, 0, 1] + [0, 1] * TINY.n


def test_the_ways_take_turns_and_the_garbage_collector_waits():
    calls = []
    timings = bench.in_rounds({name: lambda name=name: calls.append(name) for name in "ab"}, n=bench.PER_ROUND + 1)
    turn = 2 * bench.PER_ROUND  # an uncounted call goes before each timed one
    assert "".join(calls) == "a" * turn + "b" * turn + "aabb"
    assert {timing.n for timing in timings.values()} == {bench.PER_ROUND + 1}


def test_only_the_timed_calls_count():
    seconds = itertools.cycle((0.05, 0))
    timing = bench.in_rounds({"": lambda: time.sleep(next(seconds))}, n=3)[""]
    assert timing.minimum <= timing.median < 0.02


# ---- settings


@pytest.mark.parametrize("dtype", ["bfloat16", long("float16")])
def test_half_precision_stays_half_precision(dtype):
    full, half = (
        run(Settings(model="tiny", layers=1, ranks=(4,), dtype=each, n=1, threads=1)).rows
        for each in ("float32", dtype)
    )
    assert {row.state for row in half} == {"right"}
    assert full[0].part.startswith("rank 4: 14 tensors, 8.19 kB per adapter")
    assert half[0].part.startswith("rank 4: 14 tensors, 4.1 kB per adapter")


def test_shapes_of_models():
    with torch.device("meta"):
        config = make_base(Settings(device="meta")).config
    sizes = (config.hidden_size, config.intermediate_size, config.num_hidden_layers)
    assert sizes == (576, 1536, 30)
    assert (config.num_attention_heads, config.num_key_value_heads) == (9, 3)


def test_threads_are_given_back():
    before, said = torch.get_num_threads(), []
    settings = Settings(model="tiny", layers=1, ranks=(2,), n=1, threads=before + 1)
    run(settings, lambda text: said.append(torch.get_num_threads()))
    assert set(said) == {before + 1}
    assert torch.get_num_threads() == before


# ---- rows


@pytest.mark.parametrize("rotated", [True, long(False)])
def test_rows_that_are_wrong_are_said(monkeypatch, rotated):
    """All is right; unless the pool gives the rows the adapters of their neighbors."""
    assign = bench.AdapterPool.assign
    if rotated:
        monkeypatch.setattr(bench.AdapterPool, "assign", lambda pool, names: assign(pool, [*names[1:], *names[:1]]))
    monkeypatch.setattr(bench, "pick_backend", lambda: "eager")
    rows = run(Settings(model="tiny", layers=1, ranks=(2,), n=1, threads=1, rows=True)).rows[len(WAYS) :]
    ours = ["hotswap_lab, rows, eager", "PEFT adapter_names, eager", "one adapter for all, eager"]
    assert [row.way for row in rows] == [*ours, *ours, "hotswap_lab, assign", MEMCPY]
    for row in rows:
        assert (row.state == "wrong") == (rotated and "hotswap_lab" in row.way), row
        assert row.timing.n == 1
    assert [row.part.partition(": ")[2] for row in rows[::3]] == [
        "forward of 8 rows with 8 adapters, 1 tokens each",
        "forward of 8 rows with 8 adapters, 32 tokens each",
        rows[-1].part.partition(": ")[2],
    ]


# ---- cold starts


def test_the_row_of_a_cold_start_is_that_of_the_worst_process():
    fast, slow = dict(first=9.0, state="right", note="imports 8.0 s"), dict(first=11.0, state="wrong", note="oh")
    refused = dict(state="refused", note="no such file")
    row = bench.start_row(bench.EAGER, [fast, slow])
    assert (row.state, row.timing, row.note) == ("wrong", Timing(10.0, 9.0, 2), "oh")
    row = bench.start_row(bench.EAGER, [fast, refused, slow])
    assert (row.state, row.timing, row.note) == ("refused", None, "no such file")


def test_a_wrong_answer_of_a_cold_start_is_said(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench, "ANSWERS", len(demo.adapter_names()))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    swap = bench.AdapterPool.swap
    for leaves_out, state in (("", "right"), ("sort", "wrong")):
        monkeypatch.setattr(
            bench.AdapterPool, "swap", lambda pool, name, out=leaves_out: name == out or swap(pool, name)
        )
        bench.start(bench.EAGER, str(tmp_path), str(time.time()))
        found = json.loads(capsys.readouterr().out)
        assert (found["state"], found["first"] > 0) == (state, True)


def test_a_cold_start_that_fails_is_refused_with_its_reason(monkeypatch):
    tried: list = []
    result = SimpleNamespace(returncode=0, stdout='a line\n{"state": "right"}\n', stderr="")
    monkeypatch.setattr(subprocess, "run", lambda command, env, **_: tried.append((command[3], env)) or result)
    monkeypatch.setenv("CXX", "g++")
    assert bench.in_process(bench.EAGER, "") == {"state": "right"}
    result.returncode, result.stderr = 1, "Traceback\nNo compiler"
    rows = bench.measure_starts(rounds=1)
    assert [(row.way, row.state, row.note) for row in rows] == [(way, "refused", "No compiler") for way in bench.STARTS]
    assert [way for way, _ in tried[1:]] == [*bench.STARTS]
    assert len({env["TORCHINDUCTOR_CACHE_DIR"] for _, env in tried}) == len(tried)
    assert not tried[-1][1]["CXX"]
    assert shutil.which("g++", path=tried[-1][1]["PATH"]) is None
    result.returncode, result.stderr = -9, ""
    assert bench.in_process(bench.EAGER, "")["note"] == "the process ended with status -9"


@pytest.mark.long
def test_cold_starts(capsys):
    """Every way in processes of their own, as a user runs it."""
    assert main(["--cold", "1", "--threads", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "model='demo'" in lines[1]
    for way, line in zip(bench.STARTS, lines[-len(bench.STARTS) :], strict=True):
        assert line.startswith(f"{way}  ")
        assert line.endswith(" 0 recompiles")


# ---- as a user runs it


@pytest.mark.long
def test_in_the_terminal(tmp_path):
    file = tmp_path / "bench.json"
    options = ["--model", "tiny", "--rank", "2", "--n", "1", "--threads", "1", "--json", str(file)]
    done = subprocess.run(
        [sys.executable, "-m", "hotswap_lab.bench", *options], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "rank 2: making two adapters, timing each way 1 times\n"
    found = json.loads(file.read_text())
    assert done.stdout.startswith(found["machine"])
    for row in found["rows"]:
        assert f" {row['timing']['median'] * 1000:,.3f} " in done.stdout


def test_wrong_swaps_end_in_an_error(monkeypatch, capsys):
    wrong = Report("a machine", TINY, (Row("rank 4", "hotswap_lab, pool", "wrong"),))
    monkeypatch.setattr(bench, "run", lambda settings, say: wrong)
    assert main([]) == 1


# ---- the picture

PICTURES_FOLDER = Path(__file__).parents[1] / "notebooks" / "pictures"


@pytest.fixture(scope="module")
def measured() -> Report:
    """The measurement that README shows."""
    return Report.from_json((PICTURES_FOLDER / "bench.json").read_text())


def test_the_picture_and_the_table_of_readme_are_one_measurement(measured):
    assert measured.ok
    for name, form in PICTURES.items():
        assert (PICTURES_FOLDER / f"{name}.svg").read_text() == measured.figure(*form).svg + "\n", name
    readme = (PICTURES_FOLDER.parents[1] / "README.md").read_text()
    table = re.search(r"^\| one swap \|.*\n\|.*\n((?:\|.*\n)+)", readme, re.MULTILINE).group(1)
    ways = ["PEFT load + set + delete", "PEFT hotswap, disk", "hotswap_lab, disk", "hotswap_lab, disk, prepared"]
    for way, line in zip([*ways, "hotswap_lab, pool", MEMCPY], table.splitlines(), strict=True):
        shown = re.findall(r"([\d.]+) ms", line)
        medians = [1000 * row.timing.median for row in measured.rows if row.way == way]
        decimals = [len(each.partition(".")[2]) for each in shown]
        assert shown == [f"{each:.{places}f}" for each, places in zip(medians, decimals, strict=True)], way


def test_the_picture_is_to_scale_and_counts_what_is_finished(measured):
    medians = {row.way: row.timing.median for row in measured.rows if row.part == measured.rows[0].part}
    for name, (width, is_dark) in PICTURES.items():
        figure = measured.figure(width, is_dark)
        root = ElementTree.fromstring(figure.svg)
        whole = medians["PEFT load + set + delete"]
        for way, label in IN_PICTURE.items():
            count = int(whole / medians[way])
            assert f"{label} {count:,}" in figure.text
        starts = [
            float(each)
            for path in list(root.iter(f"{SVG}path"))[2:]
            for each in re.findall(r"M([\d.]+) ", path.get("d"))
        ]
        assert len(starts) == sum(int(whole / medians[way]) for way in IN_PICTURE), name
        sizes = {int(each.get("font-size")) for each in root.iter(f"{SVG}text")}
        assert min(sizes) >= 12
        assert ("#fbfcfd" in figure.svg) == (not is_dark)


def test_the_answers_of_the_picture_are_the_models(measured):
    model, tokenizer = demo.load("reverse")
    texts = [each.text for each in ElementTree.fromstring(measured.figure(390).svg).iter(f"{SVG}text")]
    for name in demo.adapter_names():
        hotswap_adapter(model, demo.adapter_path(name), "default")
        assert texts[texts.index(name) + 1] == demo.ask(model, tokenizer, "hotswap")
