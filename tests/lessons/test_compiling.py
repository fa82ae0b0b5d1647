"""Chapter 03: how it judges swaps, and its timeline."""

from __future__ import annotations

import itertools
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from exercises import assert_is_svg_with_a_text_form

from hotswap_lab import RecompileWatch, demo, hotswap_adapter
from hotswap_lab.lessons import compiling
from hotswap_lab.watch import Call, Compilation

pytestmark = pytest.mark.usefixtures("fresh_compiler")
SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.long
def test_a_fresh_load_judges_swaps_in_a_compiled_model():
    def compiled():
        model, _ = demo.load("reverse")
        return torch.compile(model, backend="eager", dynamic=False)

    def refuses(model, path, name):
        raise ValueError("Configs are incompatible: for use_rslora, False != True")

    assert compiling.judged(hotswap_adapter, compiled(), ["vowels_up", "shout"]) == (
        "right: vowels_up, shout\n1 recompile"
    )
    assert compiling.judged(lambda *_: None, compiled(), ["vowels_up", "reverse"]) == (
        "wrong, no error: vowels_up\nright: reverse\n0 recompiles"
    )
    assert compiling.judged(refuses, compiled(), ["vowels_up"]) == "refused (use_rslora): vowels_up\n0 recompiles"


@pytest.mark.long
def test_the_scenarios_have_both_answers_and_are_independent_of_each_other():
    config = compiling._config
    answers = [compiling.recompiles(config(compiling.OLD_CONFIG), config(new)) for new in compiling.SCENARIOS.values()]
    assert answers == [0, 1, 1, 0, 1, 0]
    # a graph that is left over from one try would hide the recompile of the next
    assert compiling.recompiles(config(compiling.OLD_CONFIG), config(compiling.SCENARIOS["r=4 alpha=16"])) == 1


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


def test_the_timeline_in_words():
    figure = compiling.timeline("Latency", {"not <prepared>": SLOW, "prepared": FAST})
    assert repr(figure) == (
        "Latency. not <prepared>: 4 calls, 1 swap, 1 compiled, 1 recompile, a 5 s with a compile, b 2 s with a "
        "recompile, other calls 2 ms in the median. prepared: 4 calls, 1 swap, 1 compiled, 0 recompiles, a 6 s with "
        "a compile, other calls 2 ms in the median."
    )
    assert ElementTree.fromstring(figure.svg)[0].text == figure.text


def test_the_timeline_marks_each_call_by_shape_and_by_colour():
    root = ElementTree.fromstring(compiling.timeline("Latency", {"not <prepared>": SLOW, "prepared": FAST}).svg)
    marks = [each for each in root.iter() if each.get("class") in compiling.MARKS]
    by_kind = {kind: [each for each in marks if each.get("class") == kind] for kind in compiling.MARKS}
    # the calls, and one each in the legend
    assert {kind: len(each) for kind, each in by_kind.items()} == {"call": 5 + 1, "compile": 2 + 1, "recompile": 1 + 1}
    # what follows the place where it is
    shapes = {kind: {each.get("d").partition(" m")[2] for each in marks} for kind, marks in by_kind.items()}
    assert len(set.union(*shapes.values())) == 3
    assert all(len(each) == 1 for each in shapes.values())
    assert len({each[0].get("fill") for each in by_kind.values()}) == 3


def test_the_timeline_is_logarithmic():
    calls = [("a", seconds, None) for seconds in (0.001, 0.01, 0.1, 1.0)]
    root = ElementTree.fromstring(compiling.timeline("Latency", {"all": a_watch(*calls)}).svg)
    marks = [each for each in root.iter(f"{SVG}path") if each.get("class") == "call"]
    heights = [float(each.get("d").split()[1]) for each in marks][: len(calls)]
    steps = [below - above for below, above in itertools.pairwise(heights)]
    assert steps == pytest.approx([steps[0]] * 3, abs=0.2)
    assert steps[0] > 0


def test_everything_in_the_timeline_is_inside_of_it():
    root = assert_is_svg_with_a_text_form(compiling.timeline("Latency", {"slow": SLOW, "fast": FAST}))
    width, height = float(root.get("width")), float(root.get("height"))
    for x, y in (map(float, each.get("d")[1:].split()[:2]) for each in root.iter() if each.get("class")):
        assert (0 <= x <= width, 0 <= y <= height) == (True, True)
