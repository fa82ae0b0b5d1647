"""The benchmark: that it measures what it says, each way of it; never how fast anything is."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import safetensors.torch
import torch
from lengths import long

from hotswap_lab import bench
from hotswap_lab.bench import Report, Row, Scene, Settings, Way, cold, make_base, rows, run, ways
from hotswap_lab.bench.__main__ import main
from hotswap_lab.bench.report import MEMCPY, PEFT_STATE_DICT, Size, Start
from hotswap_lab.bench.timing import PER_ROUND, Timing, machine

TINY = Settings(model="tiny", ranks=(2, 4), n=3)
PEFTS = ("PEFT load + set + delete", "PEFT hotswap, disk", PEFT_STATE_DICT)
OURS = (
    "hotswap_lab, disk",
    "hotswap_lab, disk, prepared",
    "hotswap_lab, state dict, prepared",
    "hotswap_lab, Adapter, prepared",
    "hotswap_lab, pool",
)


@pytest.fixture(scope="module")
def report() -> Report:
    return run(TINY)


@pytest.fixture
def scene(tmp_path) -> Scene:
    return Scene(make_base(TINY), TINY, rank=4, folder=str(tmp_path))


def own_bytes(rank: int, layers: int = 2) -> int:
    """What an adapter takes: hidden 32, intermediate 64, 2 of 4 heads for keys and values, float32."""
    per_layer = 2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64)
    return layers * per_layer * rank * 4


def by_name(report: Report, name: str) -> list[dict]:
    return [extra.values for extra in report.extras if extra.name == name]


# ---- the table


def test_all_ways_are_there_and_ours_are_right(report):
    assert [(row.rank, row.way) for row in report.rows] == [
        (rank, way) for rank in TINY.ranks for way in (*PEFTS, *OURS, MEMCPY)
    ]
    for row in report.rows:
        assert row.state == "right" or (row.way in PEFTS and row.state == "refused"), row
    assert report.ok


def test_numbers(report):
    for timing in (row.timing for row in report.rows if row.timing is not None):
        assert timing.n == TINY.n
        assert 0 < timing.minimum <= timing.median
    small, large = report.sizes
    assert (small.rank, large.rank, small.tensors) == (2, 4, 28)
    assert (small.nbytes, large.nbytes) == (own_bytes(2), own_bytes(4))
    # packed, each tensor starts at a cache line, and there are scalings
    assert small.nbytes <= small.packed_nbytes < 1.5 * small.nbytes


def test_as_text(report):
    lines = str(report).splitlines()
    assert lines[0] == report.machine
    assert lines[0].startswith(machine().split(", ")[0])
    assert "tiny, float32, cpu" in lines[1]
    header = next(line for line in lines if line.startswith("way"))
    for word in ("median ms", "min ms", "n", "x memcpy"):
        assert word in header
    for way in (*PEFTS, *OURS, MEMCPY):
        assert sum(line.startswith(f"{way} ") for line in lines) == len(TINY.ranks), way
    pool, copying = (report.timing(way, TINY.ranks[0]).median for way in (OURS[-1], MEMCPY))
    first = next(line for line in lines if line.startswith(OURS[-1]))
    assert first.endswith(f" {pool / copying:,.2f}")


def test_wrong_and_refused_are_said():
    rows = (
        Row(4, "PEFT hotswap, disk", "refused", note="no such thing"),
        Row(4, "hotswap_lab, disk", "wrong", Timing(0.002, 0.001, 3)),
        Row(4, MEMCPY, "right", Timing(0.001, 0.001, 3)),
    )
    report = Report("a machine", TINY, (Size(4, 28, 100, 200),), rows)
    assert not report.ok
    assert "PEFT hotswap, disk refused: no such thing" in str(report)
    assert "hotswap_lab, disk (wrong)" in str(report)
    assert report.figure().text.endswith("hotswap_lab, disk (wrong) 1, memcpy of the same bytes 2. a machine")
    assert "PEFT hotswap, disk" not in report.figure().text


def test_json_and_the_picture_hold_everything(report):
    found = json.loads(report.to_json())
    assert found["machine"] == report.machine
    assert [Timing(**row["timing"]) for row in found["rows"]] == [row.timing for row in report.rows]
    assert [extra["text"] for extra in found["extras"]] == [extra.text for extra in report.extras]
    assert all(extra["values"] for extra in found["extras"])
    assert found["settings"]["n"] == TINY.n
    texts = [element.text for element in ElementTree.fromstring(report.figure().svg).iter() if element.text]
    assert {report.machine, *(row.label for row in report.rows if row.rank == TINY.ranks[0])} <= {*texts}


# ---- whether the check can tell


def test_a_way_that_does_nothing_or_is_always_behind_is_wrong(scene):
    assert scene.way("nothing", scene.load(), lambda number: None).check() == ("wrong", "")
    way = ways.pool_way(scene)
    assert way.check() == ("right", "")
    assert dataclasses.replace(way, swap=lambda number: way.swap(1 - number)).check() == ("wrong", "")


def test_a_way_that_raises_is_refused_and_not_timed(scene, monkeypatch):
    def refuse(number):
        raise ValueError("not today\nand more")

    monkeypatch.setattr(ways, "make_ways", lambda scene: [ways.memcpy_way(scene), Way("PEFT x", refuse, bool)])
    copying, other = ways.measure_ways(scene)
    assert (other.state, other.note, other.timing) == ("refused", "not today", None)
    assert copying.state == "right"


def test_every_call_really_swaps(scene):
    calls = []
    way = Way("noted", calls.append, lambda number: True)
    assert way.check() == ("right", "")
    bench.in_rounds({"noted": way.alternating("cpu")}, n=7)
    assert all(before != after for before, after in itertools.pairwise(calls))
    assert len(calls) == 2 + 2 * 7


def test_the_ways_take_turns():
    calls = []
    timings = bench.in_rounds({name: lambda name=name: calls.append(name) for name in "ab"}, n=PER_ROUND + 1)
    turn = 2 * PER_ROUND  # an uncounted call goes before each timed one
    assert "".join(calls) == "a" * turn + "b" * turn + "aabb"
    assert {timing.n for timing in timings.values()} == {PER_ROUND + 1}


@pytest.mark.parametrize("threads", [1, 2])
def test_waiting_for_a_core_is_said(threads):
    torch.set_num_threads(threads)
    for after, busy in ((5.0, False), (1000.0, True)):
        (extra,) = bench.say_of_waiting(4, 5.0, after, seconds=1.0)
        assert (extra.rank, "TOO BUSY" in extra.text) == (4, busy)
        assert ("--threads 1" in extra.text) == (busy and threads > 1)  # no advice for who has followed it
    assert bench.say_of_waiting(4, 0, 0, seconds=1.0) == []  # nobody counts


# ---- shapes


@pytest.mark.parametrize("dtype", ["bfloat16", long("float16")])
def test_half_precision_stays_half_precision(dtype):
    report = run(Settings(model="tiny", layers=1, ranks=(2,), target_rank=4, dtype=dtype, n=1))
    assert {row.state for row in report.rows} == {"right"}
    assert report.sizes[0].nbytes == own_bytes(rank=2, layers=1) // 2


def test_room_for_more_does_not_make_a_swap_larger(tmp_path):
    settings = dataclasses.replace(TINY, target_rank=64)
    wide = Scene(make_base(settings), settings, rank=4, folder=str(tmp_path))
    assert wide.size.packed_nbytes < 1.5 * wide.size.nbytes
    assert ways.disk_way(wide, "disk", wide.load_prepared()).check() == ("right", "")


def test_shapes_of_models():
    with torch.device("meta"):
        config = make_base(Settings(device="meta")).config
    sizes = (config.hidden_size, config.intermediate_size, config.num_hidden_layers)
    assert sizes == (576, 1536, 30)
    assert (config.num_attention_heads, config.num_key_value_heads) == (9, 3)
    assert len(make_base(Settings(model="demo", layers=1)).model.layers) == 1


@pytest.mark.parametrize(
    "wrong",
    [dict(ranks=()), dict(n=0), dict(model="gpt"), dict(ranks=(8,), target_rank=4), dict(layers=0), dict(cold=-1)],
)
def test_settings_that_make_no_sense(wrong):
    with pytest.raises(ValueError, match="must"):
        Settings(**wrong)


def test_threads_are_given_back():
    before, said = torch.get_num_threads(), []
    settings = Settings(model="tiny", layers=1, ranks=(2,), n=1, threads=before + 1)
    run(settings, lambda text: said.append(torch.get_num_threads()))
    assert set(said) == {before + 1}
    assert torch.get_num_threads() == before


# ---- the further measurements


@pytest.mark.long
def test_compiled():
    # one layer and no code generation: what is tested here is what is counted
    report = run(Settings(model="tiny", layers=1, ranks=(2,), n=1, tokens=4, compiled=True, backend="aot_eager"))
    first = {values["way"]: values for values in by_name(report, "first output")}
    assert first["hotswap_lab, pool"]["recompiles"] == first["hotswap_lab, disk, prepared"]["recompiles"] == 0
    assert first["PEFT load + set + delete"]["recompiles"] == first["PEFT load + set + delete"]["calls"] == 2
    assert {values["state"] for values in first.values()} == {"right"}
    assert [values["kind"] for values in by_name(report, "forward")] == ["eager", "aot_eager"]
    assert all(values["ratio"] > 0 for values in by_name(report, "forward"))
    assert "0 recompiles in 2 calls" in str(report)


@pytest.mark.long
def test_rows():
    report = run(Settings(model="tiny", layers=1, ranks=(2,), n=1, rows=True, backend="eager"))
    forwards = by_name(report, "rows")
    assert [values["tokens"] for values in forwards] == [1, 32]
    assert {values["state"] for values in forwards} == {"right"}
    for values in forwards:
        assert set(values["timings"]) == {"one adapter", "rows", "PEFT adapter_names"}
        for name, ratio in values["ratios"].items():
            assert ratio == values["timings"]["rows"].median / values["timings"][name].median
    (assigning,) = by_name(report, "assigning")
    assert assigning["ratio"] == assigning["timings"]["assign"].median / assigning["timings"]["memcpy"].median
    assert assigning["nbytes"] >= 8 * report.sizes[0].nbytes
    assert "rows, 8 with 8 adapters, 1 tokens each, eager: " in str(report)
    assert report.ok


def test_rows_that_are_wrong_are_said(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "NAMES", [*"10234567"])
    settings = dataclasses.replace(TINY, layers=1, n=1, backend="eager")
    scene = Scene(make_base(settings), settings, rank=4, folder=str(tmp_path))
    pool = rows.rows_pool(scene)
    assert pool.names[0] == "1"
    pool.assign([*"01234567"])
    extra = rows._forward(scene, pool, rows._named(scene), 1)
    assert "WRONG" in extra.text
    assert not Report("a machine", TINY, (), (), (extra,)).ok


# ---- cold starts


def test_cold_starts_as_text_and_as_json():
    result = dict(first=9.0, last=10.0, importing=8.0, right=True, recompiles=0)
    slower = {**result, "first": 11.0}
    starts = (
        cold.summarize(cold.EAGER, [result, slower]),
        cold.summarize(cold.SAVED, [result, {**result, "right": False, "recompiles": 2}], made=70.0),
        cold.summarize(cold.AHEAD, [result, {"note": "no such file"}]),
    )
    report = Report("a machine", Settings(model="demo", cold=2), (), (), starts=starts)
    lines = str(report).splitlines()
    assert lines[0] == "a machine"
    assert lines[-3].split() == ["eager", "10.00", "9.00", "10.00", "10.00", "8.00", "2", "0"]
    assert lines[-2].startswith(f"{cold.SAVED} (wrong) ")
    assert lines[-2].split()[-2:] == ["2", "70.00"]
    assert lines[-1] == f"{cold.AHEAD} refused: no such file"
    assert not report.ok
    found = json.loads(report.to_json())["starts"]
    assert Timing(**found[0]["first"]) == starts[0].first == Timing(10.0, 9.0, 2)
    assert [each["state"] for each in found] == ["right", "wrong", "refused"]
    assert dataclasses.replace(report, starts=starts[:1]).ok


def test_a_wrong_answer_of_a_cold_start_is_said(monkeypatch, capsys):
    def save_others(folder):
        save_logits(folder)
        logits = safetensors.torch.load_file(f"{folder}/{cold.LOGITS}")
        names = [*logits]
        # so that a tolerance of 0.001 can tell any two
        assert all((logits[a] - logits[b]).abs().max() > 1 for a, b in itertools.combinations(names, 2))
        logits[names[-1]][..., -1] += 0.01
        safetensors.torch.save_file(logits, f"{folder}/{cold.LOGITS}")

    def here(task, way, folder):
        return {**cold.answer(way, folder, time.time()), "importing": 0.0}

    save_logits = cold.save_logits
    monkeypatch.setattr(cold, "WAYS", (cold.EAGER,))
    monkeypatch.setattr(cold, "ANSWERS", len(bench.cold.demo.adapter_names()))
    monkeypatch.setattr(cold, "in_process", here)
    options = ["--cold", "1", "--threads", "1", "--quiet"]
    assert main(options) == 0
    assert "(wrong)" not in capsys.readouterr().out
    monkeypatch.setattr(cold, "save_logits", save_others)
    assert main(options) == 1
    assert "eager (wrong) " in capsys.readouterr().out


def test_a_cold_start_that_fails_is_refused_with_its_reason(monkeypatch):
    def fail(command, env, **_):
        tried.append((command[3:5], env))
        return SimpleNamespace(returncode=0, stdout='a line\n{"note": "no compiler"}\n')

    tried: list = []
    monkeypatch.setattr(subprocess, "run", fail)
    monkeypatch.setattr(cold, "save_logits", lambda folder: None)
    monkeypatch.setenv("CXX", "g++")
    starts = cold.measure_starts(rounds=1)
    assert starts == [Start(way, "refused", note="no compiler") for way in cold.WAYS]
    tasks = [("make", cold.CACHE), ("make", cold.PACKAGE), ("answer", cold.EAGER), ("answer", cold.EMPTY)]
    assert [tuple(task) for task, _ in tried] == tasks
    assert len({env["TORCHINDUCTOR_CACHE_DIR"] for _, env in tried}) == len(tried)
    cold.in_process("answer", cold.AHEAD, "")
    env = tried[-1][1]
    assert "CXX" not in env
    assert shutil.which("g++", path=env["PATH"]) is None
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=-9, stdout=""))
    assert cold.in_process("answer", cold.EAGER, "") == {"note": "the process ended with status -9"}


@pytest.mark.long
def test_cold_starts(monkeypatch):
    """Without those that compile with a cache, which take minutes."""
    monkeypatch.setattr(cold, "WAYS", (cold.EAGER, cold.EMPTY, cold.AHEAD))
    report = run(Settings(threads=1, cold=1))
    assert [start.way for start in report.starts] == [*cold.WAYS]
    for start in report.starts:
        assert (start.state, start.recompiles, start.note) == ("right", 0, "")
        assert 0 < start.importing.median < start.first.median < start.last.median
        assert (start.made is None) == (start.way in (cold.EAGER, cold.EMPTY))
    assert report.ok


# ---- as a user runs it


@pytest.mark.long
def test_in_the_terminal(tmp_path):
    json_file, plot_file = tmp_path / "bench.json", tmp_path / "bench.svg"
    options = ["--model", "tiny", "--layers", "1", "--rank", "2", "--n", "1", "--threads", "1", "--quiet"]
    done = subprocess.run(
        [sys.executable, "-m", "hotswap_lab.bench", *options, "--json", str(json_file), "--plot", str(plot_file)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    found = json.loads(json_file.read_text())
    assert done.stdout.startswith(found["machine"])
    for row in found["rows"]:
        assert f" {row['timing']['median'] * 1000:.3f} " in done.stdout
    assert "1 thread," in done.stdout.splitlines()[0]
    assert ElementTree.parse(plot_file).getroot().tag.endswith("svg")


def test_wrong_options_and_wrong_swaps_end_in_an_error(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        main(["--n", "0"])
    assert "must be 1 or more" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--cold", "--plot", "starts.svg"])
    assert "--cold measures none" in capsys.readouterr().err
    wrong = Report("a machine", TINY, (), (Row(4, "hotswap_lab, pool", "wrong"),))
    monkeypatch.setattr("hotswap_lab.bench.__main__.run", lambda settings, say: wrong)
    assert main([]) == 1
