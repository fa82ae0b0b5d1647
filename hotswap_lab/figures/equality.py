"""A picture of a comparison with a fresh load: a tile for each layer, gray where it is equal."""

import re
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from . import Canvas, Figure, area
from .palette import BASE, INK, MUTED, RIGHT, WHITE, WRONG, mix
from .tiles import split

#: a layer's path, by which share its tensors differ (0 to 1), and what else differs, in words
Layer = tuple[str, float, Sequence[str]]


def equality(verdicts: Mapping[str, Any]) -> Figure:
    """Draw verdicts next to each other, each with a tile for each layer: red by as much as its tensors differ.

    A row is a block of the model, a column a kind of layer. "≠": something else than a tensor differs. Below is what
    differs, in words.

    Parameters
    ----------
    verdicts:
        By their titles, each a :class:`Verification`, or anything else with its ``layers`` and ``mismatches``. One
        alone may have an empty title.

    >>> from hotswap_lab import demo, verify_hotswap
    >>> verdict = verify_hotswap(demo.load("sort")[0], demo.adapter_path("sort"))
    >>> print(equality({"one": verdict, "other": verdict}))
    one: Equal to a fresh load. other: Equal to a fresh load
    """
    every = [path for verdict in verdicts.values() for path, *_ in verdict.layers]
    rows, columns = ([*dict.fromkeys(split(path)[axis] for path in every)] or [""] for axis in (0, 1))
    room, top = min(520, 690 // len(verdicts) - 20), 82 if len(verdicts) > 1 else 64
    wide, high = min(46, room // len(columns)), min(30, 360 // len(rows))
    pitch, bottom, told = wide * len(columns) + 20, top + 24 + high * len(rows), []
    canvas = Canvas(max(46 + pitch * len(verdicts), 470), bottom)
    for at, name in enumerate(rows):
        canvas.text(38, top + high * (at + 0.5) + 4, _last(name), size=min(high, 12), anchor="end", color=MUTED)
    for number, (title, verdict) in enumerate(verdicts.items()):
        left, head = 46 + pitch * number, f"{'Equal' if verdict else 'Not equal'} to a fresh load"
        color = RIGHT if verdict else WRONG
        canvas.text(left, top - 56, title, size=15, anchor="start", bold=True)
        canvas.text(left, top - 38, head, anchor="start", color=color, bold=True)
        told.append(f"{title}: {head}" if title else str(verdict))
        for at, name in enumerate(columns):
            canvas.text(left + wide * (at + 0.5), top - 8, _last(name) if wide > 28 else "", size=12, color=MUTED)
        for path, share, tags in verdict.layers:
            block, kind = split(path)
            x, y = left + wide * columns.index(kind), top + high * rows.index(block)
            says = "; ".join([f"{path}: tensors differ by {share:.2g} of their size", *tags])
            fill, place = mix(WRONG, 0.3 + 0.7 * share) if share else BASE, area(x, y, wide - 2, high - 2)
            canvas.shapes.append(f"<rect {place} fill='{fill}'><title>{escape(says)}</title></rect>")
            if tags:
                canvas.text(x + wide / 2 - 1, y + high / 2 + 4, "≠", color=WHITE if share > 0.5 else INK)
        for at, line in enumerate(_lines(verdict, min(64, room // 6))):
            canvas.text(left, bottom + 18 * at, line, size=12, anchor="start", color=color)
            canvas.height = max(canvas.height, bottom + 18 * (at + 1))
    return canvas.figure(". ".join(told))


def _lines(verdict: Any, width: int) -> list[str]:
    """What differs: in the config, in tensors (the tiles say in which), and in how many layers what else does."""
    counts = Counter(tag for *_, tags in verdict.layers for tag in tags)
    lines = [line for line in verdict.mismatches if line.startswith("config.") or ": " not in line]
    lines = [re.sub(", such as (?!the base).*", "", line) for line in lines]
    lines += (f"≠ {tag} ({count} of {len(verdict.layers)} layers)" for tag, count in counts.items())
    return [part for line in lines for part in textwrap.wrap(line, width)][:12]


def _last(name: str) -> str:
    return name.rpartition(".")[2].removesuffix("_proj")
