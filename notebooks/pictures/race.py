"""README's picture: how many adapters one model has had in the time that one reload takes, on an axis to scale.

hotswap-lab bench --json notebooks/pictures/bench.json
python notebooks/pictures/race.py    # draws that measurement: light and dark, for a page and for a phone
python notebooks/refresh.py --pictures  # and the PNG, for pages that show no SVG
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hotswap_lab import demo
from hotswap_lab.figures import Canvas, Figure, area
from hotswap_lab.figures.palette import BASE, DARK, MUTED, OFF, PEFT, WHITE, adapter_color

FOLDER = Path(__file__).parent
#: the ways of swapping that are drawn, and what they are called there
WAYS = {
    "PEFT load + set + delete": "PEFT: load, set, delete",
    "PEFT hotswap, disk": "PEFT hotswap",
    "hotswap_lab, disk": "hotswap_lab, from disk",
    "hotswap_lab, pool": "hotswap_lab, pool",
}
#: the files: the width, and whether it is dark
FORMS = {"race": (830, False), "race-dark": (830, True), "race-phone": (390, False), "race-phone-dark": (390, True)}
#: below this width, labels are above their bars, and the adapters in two columns
NARROW = 600


def race(
    seconds: Mapping[str, float],
    answers: Mapping[str, str],
    prompt: str,
    note: str,
    width: int = 830,
    dark: bool = False,
) -> Figure:
    """Draw each way's finished swaps, one after the other, until the first way has finished its first.

    Parameters
    ----------
    seconds:
        How long each way takes once. The first is the axis. Ways that don't begin with "PEFT" are drawn in the colors
        of the adapters, on a gray slab: one model object. The last one's first swaps are magnified.
    answers:
        What the model answers to ``prompt`` with each adapter.
    note:
        A line below: where it was measured.
    width, dark:
        In pixels, as for a phone below 600; and the theme.

    >>> print(race({"PEFT load": 1.0, "pool": 0.25}, {"shout": "HOTSWAP!"}, "hotswap", "one machine"))
    One live model. Another adapter 4 times, in the time of one reload. PEFT load 1, pool 4. one machine
    """
    whole, names, narrow = next(iter(seconds.values())), list(answers), width < NARROW
    finished = {way: int(whole / each + 1e-9) for way, each in seconds.items()}
    left, right, columns = (14, 14, 2) if narrow else (192, 30, 8)
    row, cell, scale = 46 if narrow else 40, 60 if narrow else 62, (width - left - right) / whole
    rows = -(-len(names) // columns)
    axis = (86 if narrow else 56) + row * len(seconds)
    top = axis + (50 if narrow else 56)
    canvas = Canvas(width, 0)  # whose height is known at the end
    head = f"One live model. Another adapter {list(finished.values())[-1]:,} times, in the time of one reload."
    for number, line in enumerate(textwrap.wrap(head, 40 if narrow else 90)):
        canvas.text(14, 30 + 20 * number, line, size=16 if narrow else 19, anchor="start", bold=True)

    for number, (way, count) in enumerate(finished.items()):
        y, each = axis - row * (len(seconds) - number), seconds[way] * scale
        if narrow:
            canvas.text(left, y + 2, f"{way}: {count:,}", anchor="start")
        else:
            canvas.text(left - 10, y + 23, f"{way}: {count:,}", anchor="end")
        ours = not way.startswith("PEFT")
        if ours:
            canvas.shapes.append(f"<rect {area(left, y + 5, whole * scale, 26)} fill='{BASE}'/>")
        # a stripe that is too narrow for a gap has the next adapter's color as its edge
        block = each - 1.5 if each > 6 else each
        for turn, color in enumerate(map(adapter_color, names) if ours else [PEFT]):
            starts = range(turn, count, len(names) if ours else 1)
            path = "".join(f"M{left + each * at:.5g} {y + 8}h{block:.4g}v20h-{block:.4g}z" for at in starts)
            canvas.shapes.append(f"<path fill='{color}' d='{path}'/>")

    step = next(
        size for size in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1e9) if whole * 1000 / size < (5 if narrow else 9)
    )
    last = 60 / scale  # the seconds beside the last mark
    marks = [*range(0, max(int((whole - last) * 1000), 1), int(step)), whole * 1000]
    for at in marks:
        x = left + at / 1000 * scale
        canvas.line(x, axis - 3, x, axis + 3, MUTED)
        end = at is marks[-1]
        anchor = "middle" if not (narrow and at in (0, marks[-1])) else "end" if end else "start"
        canvas.text(x, axis + 17, f"{at:.0f} ms" if end or not at else f"{at}", size=12, anchor=anchor, color=MUTED)

    # the first swaps of the last way, magnified
    width_of = (width - left - right) / columns
    reach, foot = left + min(len(names) * each, whole * scale), top + 34 * narrow
    canvas.shapes.insert(
        0, f"<path fill='{OFF}' d='M{left} {axis - 9}H{reach:.5g}L{width - right} {foot - 8}H{left}z'/>"
    )
    slab = width - left - right
    canvas.shapes.append(f"<rect {area(left, foot - 8, slab, rows * cell + 34)} fill='{BASE}'/>")
    if narrow:
        canvas.text(left, top + 18, f"the first {len(names)}, and what “{prompt}” becomes:", anchor="start")
    else:
        canvas.text(left - 10, foot + 20, f"the first {len(names)}", anchor="end")
        canvas.text(left - 10, foot + 46, f"“{prompt}” becomes", anchor="end")
    for number, (name, answer) in enumerate(answers.items()):
        x, y = left + width_of * (number % columns), foot + cell * (number // columns)
        color = adapter_color(name)
        canvas.shapes.append(f"<rect {area(x + 3, y, width_of - 6, 30)} rx='3' fill='{color}'/>")
        canvas.text(x + width_of / 2, y + 20, name, size=12, color=WHITE)
        half = len(answer) if len(answer) < 12 or narrow else -(-len(answer) // 2)
        for line, part in enumerate(filter(None, (answer[:half], answer[half:]))):
            canvas.text(x + width_of / 2, y + 45 + 13 * line, part, size=12)
    same = "the same model object, the same memory, never reloaded; each equals a fresh load"
    canvas.text(
        left + slab / 2,
        foot + rows * cell + 18,
        "one model object; each equals a fresh load" if narrow else same,
        size=12,
    )
    for number, line in enumerate(textwrap.wrap(note, 52 if narrow else 125)):
        canvas.text(14, foot + rows * cell + 44 + 15 * number, line, size=12, anchor="start", color=MUTED)
        canvas.height = foot + rows * cell + 60 + 15 * number
    listed = ", ".join(f"{way} {count:,}" for way, count in finished.items())
    figure = canvas.figure(f"{head} {listed}. {note}")
    if not dark:
        return figure
    svg = figure.svg
    for light, own in DARK.items():
        svg = svg.replace(light, own)
    return Figure(svg, figure.text)


def drawn(measured: Mapping[str, Any], width: int = 830, dark: bool = False) -> Figure:
    """The picture of a benchmark's JSON: the medians of the first rank, and what the demo answers."""
    part, settings, word = measured["rows"][0]["part"], measured["settings"], "hotswap"
    medians = {row["way"]: row["timing"]["median"] for row in measured["rows"] if row["part"] == part}
    answers = {name: demo.TASKS[name](word) for name in demo.adapter_names()}
    note = f"SmolLM2-135M's shape, {part.partition(':')[0]}, medians of {settings['n']}. {measured['machine']}."
    shown = {label: medians[way] for way, label in WAYS.items()}
    return race(shown, answers, word, f"{note} Answers: the embedded demo.", width, dark)


if __name__ == "__main__":
    measured = json.loads((FOLDER / "bench.json").read_text())
    for name, form in FORMS.items():
        (FOLDER / f"{name}.svg").write_text(drawn(measured, *form).svg + "\n", encoding="utf-8")
