"""A picture of a comparison with a fresh load: a tile for each layer, gray where it is equal.

Tests: ``tests/test_verify.py``.
"""

import re
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from . import Canvas, Figure, area
from .palette import BASE, INK, MUTED, RIGHT, WHITE, WRONG, mix
from .tiles import rows_and_columns, split

#: a layer's path, the share by which its tensors differ (0 to 1), and other differences in words
Layer = tuple[str, float, Sequence[str]]


def equality(verdicts: Mapping[str, Any]) -> Figure:
    """Draw verdicts next to each other, with a tile for each layer: the more its tensors differ, the redder.

    A row is a block of the model, a column a kind of layer. "≠" marks a difference that isn't in a tensor. Below are
    the differences in words.

    Parameters
    ----------
    verdicts:
        Objects with the ``layers`` and ``mismatches`` of a :class:`Verification`, by their titles. A single one may
        have an empty title.

    >>> from hotswap_lab import demo, verify_hotswap
    >>> verdict = verify_hotswap(demo.load("sort")[0], demo.adapter_path("sort"))
    >>> print(equality({"one": verdict, "other": verdict}))
    one: Equal to a fresh load. other: Equal to a fresh load
    """
    paths = [path for verdict in verdicts.values() for path, *_ in verdict.layers]
    rows, columns = rows_and_columns(paths)
    space, top = min(520, 690 // len(verdicts) - 20), 82 if len(verdicts) > 1 else 64
    width, height = min(46, space // len(columns)), min(30, 360 // len(rows))
    pitch, bottom, texts = width * len(columns) + 20, top + 24 + height * len(rows), []
    canvas = Canvas(max(46 + pitch * len(verdicts), 470), bottom)
    for row, name in enumerate(rows):
        canvas.text(38, top + height * (row + 0.5) + 4, _last(name), size=min(height, 12), anchor="end", color=MUTED)
    for number, (title, verdict) in enumerate(verdicts.items()):
        left, head = 46 + pitch * number, f"{'Equal' if verdict else 'Not equal'} to a fresh load"
        color = RIGHT if verdict else WRONG
        canvas.text(left, top - 56, title, size=15, anchor="start", bold=True)
        canvas.text(left, top - 38, head, anchor="start", color=color, bold=True)
        texts.append(f"{title}: {head}" if title else str(verdict))
        for column, name in enumerate(columns if width > 28 else ()):
            canvas.text(left + width * (column + 0.5), top - 8, _last(name), size=12, color=MUTED)
        for path, share, tags in verdict.layers:
            block, kind = split(path)
            x, y = left + width * columns.index(kind), top + height * rows.index(block)
            label = "; ".join([f"{path}: tensors differ by {share:.2g} of their size", *tags])
            fill = mix(WRONG, 0.3 + 0.7 * share) if share else BASE
            tile = f"<rect {area(x, y, width - 2, height - 2)} fill='{fill}'>"
            canvas.shapes.append(f"{tile}<title>{escape(label)}</title></rect>")
            if tags:
                canvas.text(x + width / 2 - 1, y + height / 2 + 4, "≠", color=WHITE if share > 0.5 else INK)
        for number_of_line, line in enumerate(_lines(verdict, min(64, space // 6))):
            canvas.text(left, bottom + 18 * number_of_line, line, size=12, anchor="start", color=color)
            canvas.height = max(canvas.height, bottom + 18 * (number_of_line + 1))
    return canvas.figure(". ".join(texts))


def _lines(verdict: Any, width: int) -> list[str]:
    """The differences in words: in the config, in tensors, and others with the numbers of their layers."""
    counts = Counter(tag for *_, tags in verdict.layers for tag in tags)
    lines = [line for line in verdict.mismatches if line.startswith("config.") or ": " not in line]
    lines = [re.sub(", such as (?!the base).*", "", line) for line in lines]
    lines += (f"≠ {tag} ({count} of {len(verdict.layers)} layers)" for tag, count in counts.items())
    return [part for line in lines for part in textwrap.wrap(line, width)][:12]


def _last(name: str) -> str:
    return name.rpartition(".")[2].removesuffix("_proj")
