"""Chapter 08: which request had which row of a batch."""

import itertools
from collections.abc import Sequence

from ..figures import Canvas, Figure
from ..figures.palette import MUTED, OFF, light


def timetable(calls: Sequence[Sequence[tuple[int, str] | None]], title: str) -> Figure:
    """Draw which request had which row of the batch, with a column for each call of the model.

    Parameters
    ----------
    calls:
        For each call, for each row, the number of the request and its adapter; None for a free row.

    Examples
    --------
    >>> print(timetable([[(0, "sort"), (1, "shout")], [(0, "sort"), (2, "sort")]], "Two rows"))
    Two rows: 2 calls of the model. Row 0: request 0 (sort). Row 1: requests 1 (shout), 2 (sort)
    """
    # columns of few calls are not stretched, so that two pictures can be compared
    left, top, width, height = 60, 74, min(580 / len(calls), 64), 26
    adapters = dict.fromkeys(each[1] for call in calls for each in call if each)
    rows = list(zip(*calls, strict=True))
    canvas = Canvas(660, top + height * len(rows) + 26)
    title += f": {len(calls)} calls of the model"
    canvas.text(330, 26, title, size=15)
    for number, adapter in enumerate(adapters):
        canvas.box(left + 116 * number, 42, 16, 16, light(adapter))
        canvas.text(left + 116 * number + 22, 55, adapter, anchor="start")
    for call in [1, *range(5, len(calls) + 1, 5)]:
        canvas.text(left + width * (call - 0.5), canvas.height - 8, f"call {call}", size=11, color=MUTED)
    told = []
    for number, row in enumerate(rows):
        y, start, served = top + height * number, 0, []
        canvas.text(left - 10, y + 18, f"row {number}", size=12, anchor="end", color=MUTED)
        canvas.box(left, y + 2, width * len(calls), height - 4, OFF, dashed=True)
        for request, run in itertools.groupby(row):
            length = len(list(run))
            if request is not None:
                canvas.box(left + width * start, y + 2, width * length, height - 4, light(request[1]))
                named = f"{request[0]} {request[1]}"
                shown = named if 6.2 * len(named) <= width * length else str(request[0])
                canvas.text(left + width * (start + length / 2), y + 18, shown, size=12)
                served.append(f"{request[0]} ({request[1]})")
            start += length
        what = "request" if len(served) == 1 else "requests"
        told.append(f"Row {number}: {f'{what} ' + ', '.join(served) if served else 'free'}")
    return canvas.figure(f"{title}. {'. '.join(told)}")
