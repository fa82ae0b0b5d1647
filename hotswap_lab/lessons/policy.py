"""Chapter 11: a policy that learns while it answers."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from ..figures import Canvas, Figure
from ..figures.palette import ACTIVE, INK, MUTED, OFF, WRONG
from ..pools.rows import Row
from .exercise import Exercise

#: the height of one panel of curves, and where its drawing begins and ends
HEIGHT, LEFT, RIGHT = 92, 80, 540


def curves(title: str, panels: Mapping[str, Mapping[str, Sequence[float]]], strip: Mapping[str, str] = {}) -> Figure:
    """Draw numbers by step in panels, one below the other; under them the words of ``strip``, each with its label.

    Parameters
    ----------
    panels:
        For each panel its curves, two at most: the numbers of each step by the curve's name.

    Examples
    --------
    >>> curves("A run", {"reward": {"": [0.5, 1.0]}}, {"step 0": "up", "step 1": "UP"})
    A run. reward from 0.5 to 1. step 0: up. step 1: UP
    """
    canvas, told = Canvas(660, 50 + HEIGHT * len(panels) + (46 if strip else 0)), [title]
    canvas.text(330, 28, title, size=15)
    for number, (what, named) in enumerate(panels.items()):
        top, bottom = 46 + HEIGHT * number, 46 + HEIGHT * number + HEIGHT - 16
        most = max(max(map(max, named.values())), 1e-9)
        canvas.box(LEFT, top, RIGHT - LEFT, bottom - top, OFF)
        canvas.text(LEFT - 10, top + 42, what, anchor="end")
        canvas.text(LEFT - 10, bottom, "0", size=11, anchor="end", color=MUTED)
        for (name, values), color in zip(named.items(), (ACTIVE, WRONG), strict=False):
            width = (RIGHT - LEFT) / max(len(values) - 1, 1)
            points = [(LEFT + width * n, bottom - (bottom - top) * each / most) for n, each in enumerate(values)]
            for one, other in itertools.pairwise(points):
                canvas.line(*one, *other, color, width=3)
            text = f"{values[-1]:.2g} {name}".strip()
            canvas.text(RIGHT + 6, points[-1][1] + 5, text, anchor="start", color=INK, size=12)
            told.append(f"{what} {name}".strip() + f" from {values[0]:.2g} to {values[-1]:.2g}")
    canvas.text((LEFT + RIGHT) / 2, bottom + 13, "steps →", size=11, color=MUTED)
    for number, (label, word) in enumerate(strip.items()):
        x, y = 30 + 600 * (number + 0.5) / len(strip), 46 + HEIGHT * len(panels) + 16
        canvas.text(x, y, word, bold=True)
        canvas.text(x, y + 18, label, size=11, color=MUTED)
        told.append(f"{label}: {word}")
    return canvas.figure(". ".join(told))


# --- exercise: two tricks in one batch ---------------------------------------------------------------------------


@Exercise
def two_tricks(solution):
    """Return the advantage of each answer among those to its prompt by the same policy as it is now."""
    rewards = {"shout": lambda text: float(text.isupper()), "short": lambda text: -float(len(text))}
    now = {"shout": 5, "short": 2}
    loud, quiet, old = Row("shout", 5, 1.0), Row("short", 2, 1.0), Row("shout", 4, 1.0)
    for what, rows, prompts, texts, expected in (
        ("one policy, two prompts", [loud] * 4, ["a", "a", "b", "b"], ["A", "a", "b", "b"], [0.5, -0.5, 0, 0]),
        ("a reward for each policy", [quiet] * 2, ["ab", "ab"], ["AB", "a"], [-0.5, 0.5]),
        ("two policies, one prompt", [loud, quiet] * 2, ["a"] * 4, ["A", "A", "a", "aaa"], [0.5, 1, -0.5, -1]),
        ("an answer of an older version", [loud, old, loud], ["a"] * 3, ["A", "A", "a"], [0.5, 0, -0.5]),
        ("no answer that counts", [old, old], ["a"] * 2, ["A", "a"], [0, 0]),
    ):
        yield what, [float(each) for each in solution(rows, prompts, texts, rewards, now)], [float(e) for e in expected]
