"""The table as a bar chart."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..lessons.figures import FROZEN, MUTED, NEW, OFF, OLD, Canvas, Figure
from .rows import MEMCPY, Row, Size
from .settings import Settings
from .times import readable


def bars(title: str, machine: str, settings: Settings, sizes: Sequence[Size], table: Sequence[Row]) -> Figure:
    """The medians on a logarithmic scale, one panel for each rank."""
    left, right, top, height, gap = 250, 96, 74, 24, 52
    timed = {size: [row for row in table if row.rank == size.rank and row.timing] for size in sizes}
    seconds = [row.timing.median for rows in timed.values() for row in rows]
    # one decade more to the left, so that the shortest bar can be seen
    low, high = math.floor(math.log10(min(seconds))) - 1, math.ceil(math.log10(max(seconds)))
    canvas = Canvas(760, top + sum(len(rows) * height + gap for rows in timed.values()) - gap + 56)
    width = canvas.width - left - right
    canvas.text(canvas.width / 2, 28, f"{title}: {settings.model}, {settings.dtype}", size=15)
    y = top
    for size, rows in timed.items():
        canvas.text(left, y - 8, str(size), size=12, anchor="start", color=MUTED)
        for decade in range(low, high + 1):
            x = left + width * (decade - low) / (high - low)
            canvas.shapes.append(
                f"<line x1='{x:.1f}' y1='{y}' x2='{x:.1f}' y2='{y + len(rows) * height}' stroke='{FROZEN}'/>"
            )
            canvas.text(x, y + len(rows) * height + 14, readable(10.0**decade), size=10, color=MUTED)
        for number, row in enumerate(rows):
            length = width * (math.log10(row.timing.median) - low) / (high - low)
            canvas.text(left - 8, y + number * height + 16, row.cells[0], size=12, anchor="end")
            canvas.box(left, y + number * height + 3, length, height - 6, _color(row.way))
            label = readable(row.timing.median)
            canvas.text(left + length + 6, y + number * height + 16, label, size=12, anchor="start")
        y += len(rows) * height + gap
    canvas.text(canvas.width / 2, canvas.height - 12, machine, size=10, color=MUTED)
    listed = ". ".join(
        f"{size}: " + ", ".join(f"{row.cells[0]} {readable(row.timing.median)}" for row in rows)
        for size, rows in timed.items()
    )
    return canvas.figure(f"{title}, median of {settings.n}, logarithmic scale. {listed}. Measured on {machine}.")


def _color(way: str) -> str:
    if way == MEMCPY:
        return OFF
    return OLD if way.startswith("PEFT") else NEW
