"""One meaning for each color: only the palette names one, pictures use no others, and text can be read on them."""

import re
from pathlib import Path

import pytest

import hotswap_lab
from hotswap_lab import demo
from hotswap_lab.demo import digits, voices
from hotswap_lab.figures import palette
from hotswap_lab.figures.palette import ADAPTERS, LESS, MORE, WHITE, adapter_color, light, mix

FOLDER = Path(hotswap_lab.__file__).parent
COLOR = r"#[0-9a-fA-F]{6}\b|#[0-9a-fA-F]{3}\b|rgb\(|hsl\("
#: from white to a full color, for values below and above
SHADES = {mix(color, step / 10_000, WHITE) for color in (LESS, MORE) for step in range(10_001)}
NAMED = {value for name, value in vars(palette).items() if name.isupper() and isinstance(value, str)}


def test_only_the_palette_names_a_color_and_pictures_have_no_others():
    for path in FOLDER.rglob("*.py"):
        assert path.name == "palette.py" or not re.findall(COLOR, path.read_text()), path
    for path in FOLDER.rglob("*.svg"):
        names = {*re.findall(r"\b(?:" + "|".join(demo.adapter_names()) + r")\b", path.read_text())}
        assert {*re.findall(COLOR, path.read_text())} <= NAMED | SHADES | {light(name) for name in names}, path


def luminance(color):
    parts = [int(color[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in parts]
    return sum(share * each for share, each in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(*colors):
    low, high = sorted(map(luminance, colors))
    return (high + 0.05) / (low + 0.05)


def test_text_can_be_read():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    on_cards = [palette.INK, palette.MUTED, palette.WRONG, *ADAPTERS]
    assert min(contrast(each, palette.CARD) for each in on_cards) >= 4.5
    assert contrast(palette.WHITE, palette.ACTIVE) >= 4.5
    fills = [palette.BASE, palette.OFF, palette.OURS, palette.PEFT, palette.ADAPTER]
    assert min(contrast(palette.INK, each) for each in [*fills, *map(light, demo.adapter_names())]) >= 4.5


def test_each_adapter_of_a_family_has_its_own():
    accents = {palette.BASE, palette.OURS, palette.PEFT, palette.ADAPTER}
    for names in (demo.adapter_names(), digits.names(), voices.names()):
        assert len({*map(adapter_color, names)} | accents) == len(names) + len(accents)
    assert adapter_color("someone's") in ADAPTERS
