"""Charts and stored pictures: valid, with a text form that has their numbers; as long and marked as their values."""

from __future__ import annotations

import itertools
import xml.etree.ElementTree as ElementTree

import pytest
from exercises import assert_is_svg_with_a_text_form

from hotswap_lab import RecompileWatch, figures
from hotswap_lab.figures import palette
from hotswap_lab.figures.latency import MARKS, timeline
from hotswap_lab.lessons.rows import timetable
from hotswap_lab.watch import Call, Compilation

SVG = "{http://www.w3.org/2000/svg}"


def a_watch(*calls):
    """A watch as if it had noted calls: label, seconds, kind of compilation or None."""
    watch = RecompileWatch()
    for label, seconds, kind in calls:
        compilations = [Compilation(kind, call=label)] if kind else []
        watch.calls.append(Call(label, seconds, compilations))
        watch.compilations += compilations
    return watch


SLOW = a_watch(("a", 5.0, "compile"), ("a", 0.001, None), ("b", 2.0, "recompile"), ("b", 0.003, None))
FAST = a_watch(("a", 6.0, "compile"), ("a", 0.001, None), ("b", 0.002, None), ("b", 0.003, None))
#: each with its text form
FIGURES = {
    "bars": (
        figures.bars("Time & <space>", {"ours": 2.0, "PEFT": 14.5}, "ms", base={"nothing"}),
        "Time & <space>: ours 2 ms, PEFT 14.5 ms",
    ),
    "of one": (figures.bars("Read", {"a": 1, "b": 2.0}, "files"), "Read: a 1 file, b 2 files"),
    "timeline": (
        timeline("Latency", {"not <prepared>": SLOW, "prepared": FAST}),
        "Latency. not <prepared>: 4 calls, 1 swap, 1 compiled, 1 recompile, a 5 s with a compile, b 2 s with a "
        "recompile, other calls 2 ms in the median. prepared: 4 calls, 1 swap, 1 compiled, 0 recompiles, a 6 s with "
        "a compile, other calls 2 ms in the median.",
    ),
}


@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_valid_svg_with_a_text_form(name):
    figure, text = FIGURES[name]
    assert_is_svg_with_a_text_form(figure)
    assert repr(figure) == text


def parts(figure, kind):
    return list(ElementTree.fromstring(figure.svg).iter(f"{SVG}{kind}"))


def test_bars_are_as_long_as_their_values():
    bars = [bar for bar in parts(FIGURES["bars"][0], "rect") if bar.get("rx") == "4"]
    ours, theirs = (float(bar.get("width")) for bar in bars if bar.get("fill") in (palette.OURS, palette.PEFT))
    assert ours / theirs == pytest.approx(2.0 / 14.5, rel=1e-3)


def test_the_timeline_marks_each_call_by_shape_and_by_colour_inside_of_the_picture():
    figure = FIGURES["timeline"][0]
    marks = [each for each in parts(figure, "path") if each.get("class") in MARKS]
    by_kind = {kind: [each for each in marks if each.get("class") == kind] for kind in MARKS}
    # the calls, and one each in the legend
    assert {kind: len(each) for kind, each in by_kind.items()} == {"call": 5 + 1, "compile": 2 + 1, "recompile": 1 + 1}
    root = ElementTree.fromstring(figure.svg)
    for x, y in (map(float, each.get("d")[1:].split()[:2]) for each in marks):
        assert 0 <= x <= float(root.get("width"))
        assert 0 <= y <= float(root.get("height"))
    # what follows the place where it is
    shapes = {(kind, each.get("d").partition(" m")[2]) for kind, marks in by_kind.items() for each in marks}
    assert len(shapes) == len({shape for _, shape in shapes}) == 3
    assert len({each[0].get("fill") for each in by_kind.values()}) == 3


def test_the_timeline_is_logarithmic():
    figure = timeline("Latency", {"all": a_watch(*(("a", seconds, None) for seconds in (0.001, 0.01, 0.1, 1.0)))})
    heights = [float(each.get("d").split()[1]) for each in parts(figure, "path") if each.get("class") == "call"][:4]
    steps = [below - above for below, above in itertools.pairwise(heights)]
    assert steps == pytest.approx([steps[0]] * 3, abs=0.2)
    assert steps[0] > 0


def test_a_timetable_cuts_no_name_and_counts_its_calls():
    """Where a request's adapter doesn't fit, only its number is drawn."""
    table = timetable([[(0, "sort")]] * 12, "Rows")
    ticks = {each.text: float(each.get("x")) for each in parts(table, "text") if each.text.startswith("call ")}
    assert ticks == {f"call {call}": pytest.approx(60 + 580 / 12 * (call - 0.5), abs=0.1) for call in (1, 5, 10)}
    assert ">13 reverse<" in timetable([[(13, "reverse")], [(4, "shout")]], "Rows").svg
    assert ">13<" in timetable([[(n, "sort")] for n in range(20)], "Rows").svg
