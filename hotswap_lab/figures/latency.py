"""A picture of calls over time: the duration of each, and those that compiled.

Tests: ``tests/figures/test_figures.py``.
"""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from . import Canvas, Figure
from .palette import ACTIVE, BASE, INK, MUTED, WHITE, WRONG

#: the drawing of a kind of call: its name in the legend, its color, and a path around its position
MARKS = {
    "call": ("a call", BASE, "m-4 0 a4 4 0 1 0 8 0 a4 4 0 1 0 -8 0 z"),
    "compile": ("first compile", WHITE, "m-5 -5 h10 v10 h-10 z"),
    "recompile": ("recompile", WRONG, "m0 -8 l8 14 h-16 z"),
}


def readable(seconds: float) -> str:
    """Format a time in s or ms.

    >>> readable(2.0), readable(0.0123), readable(0.0000456)
    ('2 s', '12.3 ms', '0.0456 ms')
    """
    return f"{seconds:.3g} s" if seconds >= 0.9995 else f"{seconds * 1000:.3g} ms"


def strip(label: str, seconds: Sequence[float]) -> str:
    """Return the last of some times and their median, with a dot for each on a line from 0, as HTML.

    >>> strip("swap", [0.001, 0.002]).partition("<svg")[0]
    '<span>swap 2 ms, median of 2: 1.5 ms '
    """
    slowest = max(seconds)
    dots = "".join(f"<circle cx='{4 + 92 * time / slowest:.4g}' cy='7' r='3' opacity='.5'/>" for time in seconds)
    line = f"<svg width='100' height='14' fill='{ACTIVE}'><path d='M4 7h92M4 3v8' stroke='{MUTED}'/>{dots}</svg>"
    median = f", median of {len(seconds)}: {readable(statistics.median(seconds))}" if len(seconds) > 1 else ""
    return f"<span>{label} {readable(seconds[-1])}{median} {line}</span>"


def timeline(title: str, watches: Mapping[str, Any]) -> Figure:
    """Draw the latency of every recorded call on one logarithmic scale, with a panel for each watch.

    A new label among a watch's calls counts as a swap. First compiles and recompiles differ from other calls in color
    and shape.

    Parameters
    ----------
    watches:
        Objects with the ``calls`` and ``summary`` of a ``RecompileWatch``, by the panels' names.

    >>> from hotswap_lab import RecompileWatch
    >>> watch = RecompileWatch()
    >>> _ = watch.call("reverse", sum, [1, 2]), watch.call("sort", sum, [3, 4])
    >>> print(timeline("Latency", {"prepared": watch}))  # doctest: +ELLIPSIS
    Latency. prepared: 2 calls, 1 swap, 0 compiled, 0 recompiles, other calls ... ms in the median.
    """
    left, width, top, height, gap = 62, 578, 58, 130, 58
    canvas = Canvas(660, top + len(watches) * (height + gap) - gap + 44)
    canvas.text(330, 26, title, size=15)
    exponents = [math.log10(call.seconds) for watch in watches.values() for call in watch.calls]
    low, high = math.floor(min(exponents)), max(math.ceil(max(exponents)), math.floor(min(exponents)) + 1)
    decade = height / (high - low)
    for name, watch in watches.items():
        canvas.text(left, top - 22, name, anchor="start")
        for exponent in range(low, high + 1):
            y = top + (high - exponent) * decade
            canvas.line(left, y, left + width, y, BASE)
            canvas.text(left - 8, y + 4, readable(10.0**exponent), size=11, anchor="end", color=MUTED)
        x, step = left, width / len(watch.calls)
        for label, group in itertools.groupby(watch.calls, lambda call: call.label):
            if x > left:
                canvas.line(x, top - 14, x, top + height, MUTED, dashed=True)
            start = x
            for call in group:
                y, kind = top + (high - math.log10(call.seconds)) * decade, _kind(call)
                _mark(canvas, x + step / 2, y, kind)
                if kind != "call":
                    canvas.text(x + step / 2 + 11, y + 5, readable(call.seconds), size=11, anchor="start")
                x += step
            canvas.text((start + x) / 2, top - 5, label, size=11, color=MUTED)
        top += height + gap
    for number, (kind, (text, _, _)) in enumerate(MARKS.items()):
        _mark(canvas, left + 6 + number * 110, canvas.height - 22, kind)
        canvas.text(left + 18 + number * 110, canvas.height - 18, text, size=11, anchor="start", color=MUTED)
    canvas.text(left + 348, canvas.height - 18, "dashed line: a swap", size=11, anchor="start", color=MUTED)
    canvas.text(left + width, canvas.height - 18, "calls, in order →", size=11, anchor="end", color=MUTED)
    return canvas.figure(" ".join([f"{title}.", *(f"{name}: {_summary(watch)}." for name, watch in watches.items())]))


def _mark(canvas: Canvas, x: float, y: float, kind: str) -> None:
    _, color, path = MARKS[kind]
    canvas.shapes.append(f"<path class='{kind}' d='M{x:.1f} {y:.1f} {path}' fill='{color}' stroke='{INK}'/>")


def _kind(call: Any) -> str:
    if call.recompiles:
        return "recompile"
    return "compile" if call.compilations else "call"


def _summary(watch: Any) -> str:
    swaps = sum(call.label != before.label for before, call in itertools.pairwise(watch.calls))
    parts = [f"{len(watch.calls)} calls", f"{swaps} swap{'' if swaps == 1 else 's'}", watch.summary]
    compiling = [call for call in watch.calls if call.compilations]
    parts += [f"{call.label} {readable(call.seconds)} with a {_kind(call)}" for call in compiling]
    others = [call.seconds for call in watch.calls if not call.compilations]
    median = [f"other calls {statistics.median(others) * 1000:.2g} ms in the median"] if others else []
    return ", ".join([*parts, *median])
