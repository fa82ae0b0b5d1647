"""The benchmark: that it measures what it says, each way of it; never how fast anything is."""

from __future__ import annotations

import copy
import itertools
import json
import re
import shutil
import time
from pathlib import Path

import first
import nbformat
import pytest
import torch
from lengths import long

from hotswap_lab import HotswapError, bench, demo
from hotswap_lab.bench import (
    MEMCPY,
    Measured,
    Report,
    Scene,
    Settings,
    Timing,
    Way,
    main,
    make_base,
    run,
    ways_of,
)
from hotswap_lab.demo import smollm2

SMALL = dict(model="tiny", layers=1, ranks=(2,), n=1, threads=1)
PEFTS = (
    "PEFT load + set + delete",
    "PEFT set_adapter, 8 in memory",
    "PEFT hotswap, disk",
    "PEFT hotswap, state dict",
)
PREPARED = ("hotswap_lab, disk, prepared", "hotswap_lab, state dict, prepared", "hotswap_lab, Adapter, prepared")
WAYS = (*PEFTS, "hotswap_lab, disk", *PREPARED, "hotswap_lab, pool", MEMCPY)


# ---- the table, as a user asks for it


def rows_of(found: dict) -> list[Measured]:
    """The rows of a report from its JSON."""
    return [Measured(**{**row, "timing": row["timing"] and Timing(**row["timing"])}) for row in found["rows"]]


@pytest.mark.long
def test_each_way_is_timed_for_each_rank_and_all_of_ours_are_right(tmp_path, capsys, monkeypatch):
    """And text and JSON hold everything."""
    monkeypatch.setenv("COLUMNS", "80")
    file = tmp_path / "bench.json"
    before = torch.get_num_threads()
    options = f"--model tiny --rank 2 4 --n 2 --threads {before + 1} --json {file}".split()
    assert main(options) == 0
    assert torch.get_num_threads() == before
    printed, found = capsys.readouterr().out, json.loads(file.read_text())
    rows = rows_of(found)
    assert [(row.part.partition(":")[0], row.way) for row in rows] == [
        (f"rank {rank}", way) for rank in (2, 4) for way in WAYS
    ]
    lines, said = printed.splitlines(), " ".join(printed.split())
    assert said.startswith(f"{found['machine']} Settings(")
    assert all(word in found["machine"] for word in ("cores", f"{before + 1} thread", "Python", "torch", "peft"))
    assert " waited for a core " in said
    assert max(map(len, lines)) <= 80
    for row in rows:
        assert row.state == "right" or (row.way in PEFTS and row.state == "refused"), row
        (copy,) = (each.timing for each in rows if (each.part, each.way) == (row.part, MEMCPY))
        (line,) = (each for each in lines[lines.index(row.part) :][: len(WAYS) + 2] if each.startswith(f"{row.way} "))
        median, minimum, _ = row.timing
        assert 0 < minimum <= median
        numbers = [f"{1000 * median:,.3f}", f"{1000 * minimum:,.3f}", "2", f"{median / copy.median:,.2f}"]
        assert line.removeprefix(row.way).split() == numbers
    report = Report(found["machine"], Settings(**SMALL), tuple(rows))
    assert report.ok
    assert json.loads(report.to_json())["rows"] == found["rows"]


def test_wrong_and_refused_are_said(monkeypatch):
    rows = (
        Measured("rank 4", "PEFT hotswap, disk", "refused", note="no such thing"),
        Measured("rank 4", "hotswap_lab, disk", "wrong", Timing(0.002, 0.001, 3)),
        Measured("rank 4", MEMCPY, "right", Timing(0.001, 0.001, 3)),
    )
    report = Report("a machine", Settings(**SMALL), rows)
    assert Report("a machine", Settings(**SMALL), (rows[0], rows[2])).ok  # a refusal of PEFT is not our fault
    assert str(report).splitlines()[5].split() == ["PEFT", "hotswap,", "disk", "(refused)", "no", "such", "thing"]
    assert "hotswap_lab, disk (wrong)" in str(report)
    monkeypatch.setattr(bench, "run", lambda settings, say: report)
    assert main([]) == 1


# ---- whether the check can tell


@pytest.fixture
def scene(tmp_path) -> Scene:
    settings = Settings(model="tiny", n=2)
    base = make_base(settings)
    return Scene(base, settings, bench.save_adapters(base, 4, str(tmp_path)))


def test_a_way_that_does_nothing_is_always_behind_or_raises_is_told_apart(scene):
    def refuse(number):
        raise ValueError("not today\nand more")

    pool, calls = ways_of(scene)["hotswap_lab, pool"](), []
    ways = {
        "pool": pool,
        "noted": Way(calls.append, lambda number: True),
        "nothing": scene.way(scene.load(), lambda number: None),
        "behind": pool._replace(swap=lambda number: pool.swap(1 - number)),
        "raises": Way(refuse, bool),
        "copies nothing": scene.copying(9)._replace(swap=lambda number: None),
    }
    rows = {row.way: (row.state, row.note, row.timing is None) for row in scene.measure("a part", ways)}
    wrong = ("wrong", "", False)
    right, refused = ("right", "", False), ("refused", "not today", True)
    assert list(rows.values()) == [right, right, wrong, wrong, refused, wrong]
    assert calls == [1, 0, 1] + [0, 1] * 2  # every call swaps, and the timed ones swap alike


@pytest.mark.parametrize("way", WAYS)
def test_each_way_swaps_in_the_adapter_of_the_number_among_any_number_of_them(tmp_path, way):
    """README's picture has three."""
    settings = Settings(model="tiny", layers=1)
    base = make_base(settings)
    folders = [each for rank in (2, 4) for each in bench.save_adapters(base, rank, str(tmp_path / str(rank)))][:3]
    scene = Scene(base, settings, folders)
    made = ways_of(scene)[way]()
    for number in (*range(len(folders)), 0, 1):
        made.swap(number)
        assert [made.is_right(each) for each in range(3)] == [each == number for each in range(3)]


def test_the_ways_take_turns_and_only_the_timed_calls_count():
    calls, seconds = [], itertools.cycle((0.05, 0))
    ways = {name: lambda name=name: calls.append(name) for name in "ab"}
    timings = bench.in_rounds({**ways, "slow": lambda: time.sleep(next(seconds))}, n=bench.PER_ROUND + 1)
    turn = 2 * bench.PER_ROUND  # an uncounted call goes before each timed one
    assert "".join(calls) == "a" * turn + "b" * turn + "aabb"
    assert {timing.n for timing in timings.values()} == {bench.PER_ROUND + 1}
    assert timings["slow"].minimum <= timings["slow"].median < 0.02


# ---- settings


@pytest.mark.parametrize(("dtype", "size"), [long("float32", "4.1"), ("bfloat16", "2.05"), long("float16", "2.05")])
def test_half_precision_stays_half_precision(dtype, size):
    rows = run(Settings(**SMALL, dtype=dtype)).rows
    assert {row.state for row in rows} == {"right"}
    assert rows[0].part.startswith(f"rank 2: 14 tensors, {size} kB per adapter")


# ---- README's picture, its table, and chapter 05's


def test_the_picture_readme_and_chapter_05_are_one_measurement():
    """And what is said of it is so."""
    measured = json.loads((first.FOLDER / "first.json").read_text(encoding="utf-8"))
    for name, form in first.FORMS.items():
        svg = first.drawn(measured, *form).svg + "\n"
        assert (first.FOLDER / f"{name}.svg").read_text(encoding="utf-8") == svg, name
    readme, text = first.README.read_text(encoding="utf-8"), first.text_of_chapter(measured)
    assert first.with_times(readme, measured) == readme
    assert measured.get("waited", 0) <= first.MOST_WAITED
    assert f".py -->\n{first.table_of_readme(measured)}\n<!-- end of times -->" in readme
    assert first.described(measured) in readme
    assert first.TEXT.read_text(encoding="utf-8") == text
    chapter = nbformat.read(first.CHAPTER, as_version=4)
    assert first.with_output(copy.deepcopy(chapter), text) == chapter
    ways = {way: row["swap"]["median"] for way, row in measured["ways"].items()}
    disk, pool = (first.readable(ways[f"hotswap_lab, {each}"]) for each in ("disk", "pool"))
    assert f"On SmolLM2-135M it takes {disk} from disk, {pool} from memory (compiled, CPU;" in readme
    assert f"(about {first.share_of(measured)}% of a model)" in readme
    assert measured["recompiles"] == 0
    assert [measured["voices"][0]["answer"].startswith('{"topic": "Paris"'), len(measured["voices"])] == [True, 3]
    # each bar has the two numbers of README's table, and their sum
    svg = (first.FOLDER / "first.svg").read_text(encoding="utf-8")
    shown = [each for kind in first.KINDS for each in first.times_of(measured, kind).items()]
    assert len(shown) >= 5
    for label, (swap, token) in shown:
        one, other, total = map(float, re.findall(r"[\d.]+", first.summed(swap, token)))
        assert abs(one + other - total) <= 0.5
        assert f"{first.summed(swap, token)}</text>" in svg
        (row,) = (line for line in readme.splitlines() if line.startswith(f"| {label} |"))
        assert f" {first.number_of(swap)} + {first.number_of(token)} " in row
    # the text of both
    assert min(ways, key=ways.get) in ("hotswap_lab, pool", MEMCPY)
    for row in measured["ways"].values():
        assert row["first_token"]["minimum"] > 10 * measured["ways"]["hotswap_lab, pool"]["swap"]["minimum"]


@pytest.mark.long
def test_the_rows_of_chapter_05_are_ways_that_the_named_command_measures():
    """And each swaps in all of its adapters. Here with the embedded model, whose times nobody looks at."""
    folders = [demo.adapter_path(name) for name in ("reverse", "shout", "caesar")]
    scene = Scene(demo.load_base(), Settings(model="demo"), folders)
    timed = first.ways(scene, demo.load_tokenizer())
    for way in timed.keys() - {MEMCPY}:
        for number, expected in enumerate(scene.expected):
            timed[way].swap(number)
            with torch.compiler.set_stance("force_eager"):
                assert scene.is_close(scene.outputs(timed[way].chat.reader.model), expected), (way, number)
    assert timed.keys() == {way for names in first.DRAWN.values() for way in names if way} | {MEMCPY}
    cells = {cell.id: cell for cell in nbformat.read(first.CHAPTER, as_version=4).cells}
    assert "`python notebooks/pictures/first.py` measures it" in cells["voices-turns"].source
    table = cells["voices-times"].outputs[0].text.partition("first token\n")[2]
    # each with a compiled model of its own
    chats = {way: each.chat for way, each in timed.items() if way != MEMCPY and each.chat.reader.compiled}
    labels = {names[1]: label for label, names in first.DRAWN.items()}
    assert [line[:28].strip() for line in table.splitlines()] == [labels[way] for way in reversed(chats)]
    assert len({*map(id, chats.values())}) == len(chats) == 3


@pytest.mark.parametrize("waited", [0.019, 0.021])
def test_nothing_is_written_where_threads_waited_for_a_core(tmp_path, monkeypatch, waited):
    measured = json.loads((first.FOLDER / "first.json").read_text(encoding="utf-8")) | {"waited": waited}
    monkeypatch.setattr(first, "measure", lambda: measured)
    monkeypatch.setattr(first.runpy, "run_path", lambda path: {"draw_first": lambda: None})  # it starts Chromium
    for name in ("README", "CHAPTER", "TEXT"):
        monkeypatch.setattr(first, name, Path(shutil.copy(getattr(first, name), tmp_path)))
    monkeypatch.setattr(first, "FOLDER", tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    if waited > first.MOST_WAITED:
        with pytest.raises(SystemExit, match=r"2\.1% of the time.*nothing was written"):
            first.main([])
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    else:
        first.main([])
        assert json.loads((tmp_path / "first.json").read_text(encoding="utf-8")) == measured
        assert {f"{name}.svg" for name in first.FORMS} < {path.name for path in tmp_path.iterdir()}


@pytest.mark.long
def test_the_measurement_runs_smollm2():
    """For one turn: it compares each first token with a fresh load's, and the answers."""
    try:
        smollm2.find()
    except HotswapError as error:
        pytest.skip(str(error).replace("\n", " "))
    measured = first.measure(turns=1)
    assert measured["ways"].keys() == {way for names in first.DRAWN.values() for way in names if way} | {MEMCPY}
    assert {times["n"] for row in measured["ways"].values() for times in row.values()} == {len(first.VOICES)}
    assert measured["recompiles"] == 0
    for form in first.FORMS.values():
        svg = first.drawn(measured, *form).svg
        assert svg.count(" ms</text>") == 8
    assert first.with_times(first.README.read_text(encoding="utf-8"), measured)


@pytest.mark.parametrize(("option", "text"), [("--n", "0"), ("--threads", "-1"), ("--rank", "1_0")])
def test_numbers_that_are_refused(capsys, option, text):
    with pytest.raises(SystemExit, match="2"):
        main([option, text])
    assert f"argument {option}: {text} is not an integer" in capsys.readouterr().err
