"""Chapter 08: the requests in the rows of a batch.

Tests: ``tests/figures/test_figures.py``.
"""

import itertools
from collections.abc import Sequence

from ..figures import Canvas, Figure
from ..figures.palette import MUTED, OFF, light


def timetable(calls: Sequence[Sequence[tuple[int, str] | None]], title: str) -> Figure:
    """Draw the request in each row of a batch, with a column for each call of the model.

    Parameters
    ----------
    calls:
        For each call and row, the number of the request and its adapter; None for a free row.

    Examples
    --------
    >>> print(timetable([[(0, "sort"), (1, "shout")], [(0, "sort"), (2, "sort")]], "Two rows"))
    Two rows: 2 calls of the model. Row 0: request 0 (sort). Row 1: requests 1 (shout), 2 (sort)
    """
    # columns of few calls are not stretched, so that two pictures can be compared
    left, top, width, height = 60, 74, min(580 / len(calls), 64), 26
    adapters = dict.fromkeys(request[1] for call in calls for request in call if request)
    rows = list(zip(*calls, strict=True))
    canvas = Canvas(660, top + height * len(rows) + 26)
    title += f": {len(calls)} calls of the model"
    canvas.text(330, 26, title, size=15)
    for number, adapter in enumerate(adapters):
        canvas.box(left + 116 * number, 42, 16, 16, light(adapter))
        canvas.text(left + 116 * number + 22, 55, adapter, anchor="start")
    for call in [1, *range(5, len(calls) + 1, 5)]:
        canvas.text(left + width * (call - 0.5), canvas.height - 8, f"call {call}", size=11, color=MUTED)
    texts = []
    for number, row in enumerate(rows):
        y, start, requests = top + height * number, 0, []
        canvas.text(left - 10, y + 18, f"row {number}", size=12, anchor="end", color=MUTED)
        canvas.box(left, y + 2, width * len(calls), height - 4, OFF, dashed=True)
        for request, run in itertools.groupby(row):
            length = len(list(run))
            if request is not None:
                canvas.box(left + width * start, y + 2, width * length, height - 4, light(request[1]))
                label = f"{request[0]} {request[1]}"
                shown = label if 6.2 * len(label) <= width * length else str(request[0])
                canvas.text(left + width * (start + length / 2), y + 18, shown, size=12)
                requests.append(f"{request[0]} ({request[1]})")
            start += length
        noun = "request" if len(requests) == 1 else "requests"
        texts.append(f"Row {number}: {noun} {', '.join(requests)}" if requests else f"Row {number}: free")
    return canvas.figure(f"{title}. {'. '.join(texts)}")
