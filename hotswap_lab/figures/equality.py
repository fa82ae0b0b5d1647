"""A picture of a comparison with a fresh load: a tile for each layer, gray where it is equal."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Sequence
from html import escape

from . import Canvas, Figure, area
from .palette import BASE, MUTED, RIGHT, WHITE, WRONG, mix
from .tiles import split

#: a layer's path, by which share its tensors differ (0 to 1), and what else differs, in words
Layer = tuple[str, float, Sequence[str]]


def equality(layers: Sequence[Layer], is_equal: bool, mismatches: Sequence[str], text: str) -> Figure:
    """Draw a tile for each layer: red by as much as its tensors differ, with "≠" if something else does.

    A row is a block of the model, a column a kind of layer. Below is what differs, in words.
    """
    rows, columns = ([*dict.fromkeys(split(path)[axis] for path, *_ in layers)] or [""] for axis in (0, 1))
    wide, high = min(46, 520 // len(columns)), min(30, 360 // len(rows))
    left = {name: 46 + wide * at for at, name in enumerate(columns)}
    top = {name: 64 + high * at for at, name in enumerate(rows)}
    counts, bottom = Counter(tag for *_, tags in layers for tag in tags), 88 + high * len(rows)
    lines = [line for line in mismatches if line.startswith("config.") or ": " not in line]
    lines = [*lines, *(f"≠ {tag} ({count} of {len(layers)} layers)" for tag, count in counts.items())]
    lines = [part for line in lines for part in textwrap.wrap(line, 64, subsequent_indent="  ")][:10]
    canvas = Canvas(max(66 + wide * len(columns), 440), bottom + 18 * len(lines))
    verdict, color = ("Equal", RIGHT) if is_equal else ("Not equal", WRONG)
    canvas.text(20, 26, f"{verdict} to a fresh load", size=15, anchor="start", color=color, bold=True)
    for name, x in left.items():
        canvas.text(x + wide / 2, 56, _last(name) if wide > 28 else "", size=12, color=MUTED)
    for name, y in top.items():
        canvas.text(38, y + high / 2 + 4, _last(name), size=min(high, 12), anchor="end", color=MUTED)
    for path, share, tags in layers:
        y, x = (places[name] for places, name in zip((top, left), split(path), strict=True))
        says, fill = (
            f"{path}: tensors differ by {share:.2g} of their size",
            mix(WRONG, 0.3 + 0.7 * share) if share else BASE,
        )
        place = area(x, y, wide - 2, high - 2)
        canvas.shapes.append(f"<rect {place} fill='{fill}'><title>{escape('; '.join([says, *tags]))}</title></rect>")
        if tags:
            canvas.text(x + wide / 2 - 1, y + high / 2 + 4, "≠", color=WHITE if share else WRONG)
    for at, line in enumerate(lines):
        canvas.text(20, bottom + 18 * at, line, size=12, anchor="start", color=color)
    return canvas.figure(text)


def _last(name: str) -> str:
    return name.rpartition(".")[2].removesuffix("_proj")
