"""One meaning for each color: only the palette names one, pictures use no others, and text can be read on them."""

import itertools
import math
import re
from pathlib import Path

import numpy as np
import pytest
from contrast import contrast

import hotswap_lab
from hotswap_lab import demo
from hotswap_lab.demo import digits, voices
from hotswap_lab.figures import palette
from hotswap_lab.figures.palette import ADAPTERS, WHITE, adapter_color, light, mix

FOLDER = Path(hotswap_lab.__file__).parent
COLOR = r"#[0-9a-fA-F]{6}\b|#[0-9a-fA-F]{3}\b|rgb\(|hsl\("
#: from white to a full color, for values below and above
SHADES = {mix(color, step / 10_000, WHITE) for color in ("#8a4b08", "#0f766e") for step in range(10_001)}
NAMED = {value for name, value in vars(palette).items() if name.isupper() and isinstance(value, str)}


def test_only_the_palette_names_a_color_and_pictures_have_no_others():
    for path in FOLDER.rglob("*.py"):
        assert path.name == "palette.py" or not re.findall(COLOR, path.read_text()), path
    for path in FOLDER.rglob("*.svg"):
        names = {*re.findall(r"\b(?:" + "|".join(demo.adapter_names()) + r")\b", path.read_text())}
        assert {*re.findall(COLOR, path.read_text())} <= NAMED | SHADES | {light(name) for name in names}, path


def test_text_can_be_read():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    on_cards = [palette.INK, palette.MUTED, palette.WRONG, *ADAPTERS]
    assert min(contrast(each, palette.CARD) for each in on_cards) >= 4.5
    assert contrast(palette.WHITE, palette.ACTIVE) >= 4.5
    fills = [palette.BASE, palette.OFF, palette.OURS, palette.PEFT, palette.ADAPTER]
    assert min(contrast(palette.INK, each) for each in [*fills, *map(light, demo.adapter_names())]) >= 4.5


#: Machado, Oliveira and Fernandes (2009): what color-blind readers see, on linear RGB
SEEN = {
    "deuteranopia": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
    "protanopia": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
}


def lab(color, seen):
    """CIE L*a*b* of a color, as it is seen."""
    srgb = np.array([*bytes.fromhex(color[1:])]) / 255
    linear = np.array(seen) @ np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    xyz = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    share = np.array(xyz) @ linear.clip(0, 1) / [0.95047, 1, 1.08883]
    x, y, z = np.where(share > 216 / 24389, np.cbrt(share), (24389 / 27 * share + 16) / 116)
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


@pytest.mark.parametrize("how", [None, *SEEN])
def test_adapters_can_be_told_apart_by_color_blind_readers(how):
    """By the distance in CIE L*a*b*, of which 2 can just be told."""
    seen = [lab(color, SEEN.get(how, np.eye(3))) for color in ADAPTERS]
    assert min(math.dist(*pair) for pair in itertools.combinations(seen, 2)) >= 12


def test_no_adapter_looks_right_and_in_the_dark_the_base_is_not_padding():
    def distance(*colors):
        return math.dist(*(lab(color, np.eye(3)) for color in colors))

    assert min(distance(color, palette.RIGHT) for color in ADAPTERS) >= 40
    grays = [palette.DARK[color] for color in (palette.CARD, palette.OFF, palette.BASE, palette.MUTED)]
    assert min(itertools.starmap(distance, itertools.combinations(grays, 2))) >= 6


@pytest.mark.parametrize("color", ADAPTERS)
def test_the_steps_of_a_scale_can_be_told_apart(color):
    tints = [lab(tint, np.eye(3)) for tint in (palette.BASE, *palette.ramp(color))]
    assert min(itertools.starmap(math.dist, itertools.pairwise(tints))) >= 8


def test_each_adapter_of_a_family_has_its_own():
    accents = {palette.BASE, palette.OURS, palette.PEFT, palette.ADAPTER}
    for names in (demo.adapter_names(), digits.names(), voices.names()):
        assert len({*map(adapter_color, names)} | accents) == len(names) + len(accents)


def test_users_adapters_get_colors_in_the_order_they_come(monkeypatch):
    monkeypatch.setattr(palette, "_USERS", {})
    names = [f"user {number}" for number in range(len(ADAPTERS))]
    assert tuple(map(adapter_color, names)) == ADAPTERS
    assert adapter_color("user 3@2") == adapter_color("user 3") == ADAPTERS[3]
