"""Charts and stored pictures: valid, with a text form; bars are as long as their values."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from exercises import assert_is_svg_with_a_text_form

from hotswap_lab import figures
from hotswap_lab.figures import palette

PICTURES = sorted((Path(figures.__file__).parent / "pictures").glob("*.svg"))
SVG = "{http://www.w3.org/2000/svg}"
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


@pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.stem)
def test_stored_pictures_are_valid_svg_with_a_text_form(path):
    assert_is_svg_with_a_text_form(figures.drawing(path.stem))


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
