"""Exercises and pictures: a right solution is accepted, a wrong one is told apart, everything has a text form."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest
from exercises import assert_is_svg_with_a_text_form, assert_tells_right_from_wrong

from hotswap_lab import demo, hotswap_adapter
from hotswap_lab.figures import palette
from hotswap_lab.lessons import figures, start, uncompiled

SVG = "{http://www.w3.org/2000/svg}"


def by_hand(model, tensors):
    for key, tensor in tensors.items():
        model.get_parameter(key.replace(".weight", ".default.weight")).data.copy_(tensor)


def new_tensors(model, tensors):
    """Right values, new addresses."""
    for key, tensor in tensors.items():
        model.get_parameter(key.replace(".weight", ".default.weight")).data = tensor.clone()


def difference(old, new):
    paths = [{key.removeprefix("base_model.model.").partition(".lora_")[0] for key in each} for each in (old, new)]
    return paths[0] - paths[1]


def symmetric(old, new):
    return difference(old, new) | difference(new, old)


def reload(model):
    model.delete_adapter("default")
    model.load_adapter(demo.adapter_path("shout"), "default")
    model.set_adapter("default")


SOLUTIONS = {
    "make_it_shout": (
        start.make_it_shout,
        lambda model: hotswap_adapter(model, demo.adapter_path("shout"), "default"),
        [lambda model: None, lambda model: hotswap_adapter(model, demo.adapter_path("sort"), "default"), reload],
    ),
    "swap_by_hand": (uncompiled.swap_by_hand, by_hand, [lambda model, tensors: None, new_tensors]),
    "layers_to_turn_off": (
        uncompiled.layers_to_turn_off,
        difference,
        [
            lambda old, new: set(),
            lambda old, new: difference(new, old),
            lambda old, new: set(old) - set(new),
            symmetric,
        ],
    ),
}


@pytest.mark.parametrize("name", SOLUTIONS)
def test_right_and_wrong_solutions(name, capsys):
    assert_tells_right_from_wrong(*SOLUTIONS[name], capsys)


def test_a_failed_check_gives_one_answer_away_and_says_how_many_more_differ(capsys):
    uncompiled.layers_to_turn_off.check(lambda old, new: set())
    out = capsys.readouterr().out
    assert out == (
        "Not yet.\n  reverse to shout\n    yours:    0 layers\n    expected: 14 layers\n  and 2 more that differ\n"
    )


def test_an_error_in_the_readers_code_is_one_line(capsys):
    def broken(model):
        raise KeyError("nope")

    start.make_it_shout.check(broken)
    assert "yours:    KeyError: 'nope' (line 2 of broken: raise KeyError(\"nope\"))" in capsys.readouterr().out


FIGURES = {
    "bars": figures.bars("Time & <space>", {"ours": 2.0, "PEFT": 14.5}, "ms"),
    "bars, with a base": figures.bars("Time", {"not prepared": 2.0, "prepared": 3.0}, "ms", base={"not prepared"}),
    "counts": figures.counts(
        "Swaps", {"PEFT <load>": 1.0, "ours": 0.3, "copy": 0.0001}, base={"copy"}, note="here & now"
    ),
    "bars, limited": figures.bars("One swap", {"1 <slow>": 16.0, "2 fast": 0.8, "3 copy": 0.4}, "ms", limit=0.4),
}


@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_valid_svg_with_a_text_form(name):
    assert_is_svg_with_a_text_form(FIGURES[name])


def widths(figure, *colors):
    bars = [each for each in ElementTree.fromstring(figure.svg).iter(f"{SVG}rect") if each.get("rx") == "4"]
    return [float(bar.get("width")) for bar in bars if bar.get("fill") in colors]


def test_bars_are_as_long_as_their_values():
    first, second = widths(FIGURES["bars"], palette.OURS, palette.PEFT)
    assert first / second == pytest.approx(2.0 / 14.5, rel=1e-3)


def test_a_count_is_a_row_of_blocks():
    assert repr(FIGURES["counts"]) == (
        "Swaps, in the time of one PEFT <load> (1000.0 ms): PEFT <load> 1, ours 3, copy 10,000. here & now"
    )
    paths = list(ElementTree.fromstring(FIGURES["counts"].svg).iter(f"{SVG}path"))[1:]
    assert [path.get("fill") for path in paths] == [palette.PEFT, palette.OURS, palette.BASE]
    starts = [[float(each.split()[0]) for each in path.get("d").split("M")[1:]] for path in paths]
    assert [len(each) for each in starts] == [1, 3, 1]  # blocks of less than a pixel are drawn as one
    assert starts[1][1] - starts[1][0] == pytest.approx(0.3 * (660 - 220 - 90), rel=1e-3)


def test_a_limit_is_marked_in_every_bar():
    figure = FIGURES["bars, limited"]
    whole = widths(figure, palette.OURS)
    assert [width / whole[0] for width in whole] == pytest.approx([1, 0.8 / 16, 0.4 / 16], rel=1e-3)
    assert widths(figure, palette.BASE) == [whole[-1]] * 3
    assert repr(figure) == "One swap: 1 <slow> 16 ms, 2 fast 0.8 ms, 3 copy 0.4 ms. 0.4 ms is the limit"
