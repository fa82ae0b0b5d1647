"""Pictures as plain SVG: no kernel, no network and no plotting library is needed to see them.

Every picture is drawn on a light card of its own, so that it reads the same in light and dark themes, and
carries its text form for screen readers and terminals.
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass

INK = "#1f2933"
MUTED = "#627283"
FROZEN = "#d5dde5"
OLD = "#f2b36f"
NEW = "#6fb7f2"
OFF = "#eef1f4"
FONT = "font-family='Helvetica, Arial, sans-serif'"


@dataclass(frozen=True)
class Figure:
    """A picture with its text form. Shows itself in a notebook.

    >>> print(Figure("<svg></svg>", "a picture of nothing"))
    a picture of nothing
    """

    svg: str
    text: str

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict[str, str]:
        return {"image/svg+xml": self.svg, "text/plain": self.text}

    def __repr__(self) -> str:
        return self.text


class Canvas:
    """Collects shapes; coordinates are pixels from the top left."""

    def __init__(self, width: int, height: int):
        self.width, self.height = width, height
        self.shapes: list[str] = []

    def box(self, x: float, y: float, width: float, height: float, fill: str, *, dashed: bool = False) -> None:
        dash = " stroke-dasharray='4 3'" if dashed else ""
        self.shapes.append(
            f"<rect x='{x:g}' y='{y:g}' width='{width:g}' height='{height:g}' rx='4' fill='{fill}' "
            f"stroke='{INK}' stroke-width='1'{dash}/>"
        )

    def text(self, x: float, y: float, text: str, *, size: int = 13, anchor: str = "middle", color: str = INK) -> None:
        self.shapes.append(
            f"<text x='{x:g}' y='{y:g}' font-size='{size}' text-anchor='{anchor}' fill='{color}' {FONT}>"
            f"{html.escape(text)}</text>"
        )

    def arrow(self, x1: float, y1: float, x2: float, y2: float) -> None:
        self.shapes.append(
            f"<line x1='{x1:g}' y1='{y1:g}' x2='{x2:g}' y2='{y2:g}' stroke='{INK}' stroke-width='1.5' "
            "marker-end='url(#head)'/>"
        )

    def figure(self, text: str) -> Figure:
        head = (
            "<defs><marker id='head' viewBox='0 0 8 8' refX='7' refY='4' markerWidth='7' markerHeight='7' "
            f"orient='auto'><path d='M0 0 L8 4 L0 8 z' fill='{INK}'/></marker></defs>"
        )
        svg = (
            f"<svg xmlns='http://www.w3.org/2000/svg' width='{self.width}' height='{self.height}' "
            f"viewBox='0 0 {self.width} {self.height}' role='img'><title>{html.escape(text)}</title>{head}"
            f"<rect width='{self.width}' height='{self.height}' rx='8' fill='#fbfcfd'/>{''.join(self.shapes)}</svg>"
        )
        return Figure(svg, text)


def hotswap() -> Figure:
    """What hotswapping is: new values in the same model."""
    canvas = Canvas(660, 250)
    for left, word, fill, name in ((20, "before", OLD, "reverse"), (350, "after", NEW, "pig_latin")):
        canvas.box(left, 46, 290, 130, "#ffffff")
        canvas.text(left + 145, 32, f"{word} the swap", size=14)
        canvas.box(left + 14, 66, 120, 90, FROZEN)
        canvas.text(left + 74, 107, "base model")
        canvas.text(left + 74, 125, "frozen", size=11, color=MUTED)
        canvas.box(left + 156, 66, 120, 90, fill)
        canvas.text(left + 216, 96, "adapter")
        canvas.text(left + 216, 114, "“default”")
        canvas.text(left + 216, 138, f"values of {name}", size=12)
    canvas.arrow(312, 111, 346, 111)
    canvas.text(165, 202, "hotswap  →  pawstoh", size=14)
    canvas.text(495, 202, "hotswap  →  otswaphay", size=14)
    canvas.text(
        330,
        232,
        "Same model object, same base weights, same adapter name. Only the adapter's values are new.",
        color=MUTED,
    )
    return canvas.figure(
        "A model before and after a hotswap. The base model is frozen and the same in both. The adapter keeps its "
        "name, default; only its values change, from those of reverse to those of pig_latin."
    )


def lora(in_features: int = 128, out_features: int = 128, rank: int = 8, alpha: float = 16) -> Figure:
    """LoRA in one picture: a frozen matrix, and beside it two thin ones and a factor."""
    canvas = Canvas(660, 240)
    canvas.text(40, 120, "y  =", size=16)
    canvas.box(80, 50, 130, 130, FROZEN)
    canvas.text(145, 112, "W", size=20)
    canvas.text(145, 132, "frozen", size=11, color=MUTED)
    canvas.text(145, 202, f"{out_features} × {in_features}", size=12, color=MUTED)
    canvas.text(236, 120, "x   +", size=16)
    canvas.box(268, 98, 78, 34, "#ffffff")
    canvas.text(307, 120, "scaling", size=14)
    canvas.text(307, 152, f"alpha / rank = {alpha:g} / {rank}", size=11, color=MUTED)
    canvas.text(362, 120, "·", size=18)
    canvas.box(382, 50, 30, 130, NEW)
    canvas.text(397, 120, "B", size=18)
    canvas.text(397, 202, f"{out_features} × {rank}", size=12, color=MUTED)
    canvas.text(430, 120, "·", size=18)
    canvas.box(448, 98, 130, 34, NEW)
    canvas.text(513, 121, "A", size=18)
    canvas.text(513, 152, f"{rank} × {in_features}", size=12, color=MUTED)
    canvas.text(600, 120, "x", size=16)
    full, low = out_features * in_features, rank * (out_features + in_features)
    canvas.text(330, 228, f"W has {full:,} numbers; B and A together {low:,}.", color=MUTED)
    return canvas.figure(
        f"LoRA: y = W x + scaling * B A x. W is frozen, {out_features} by {in_features}. B is {out_features} by "
        f"{rank}, A is {rank} by {in_features}, scaling is alpha / rank = {alpha:g} / {rank} = {alpha / rank:g}. "
        f"W has {full:,} numbers, B and A have {low:,}."
    )


def bars(title: str, values: Mapping[str, float], unit: str) -> Figure:
    """A bar chart for a handful of figures, the number beside each bar."""
    left, right, row, top = 190, 90, 34, 48
    canvas = Canvas(660, top + row * len(values) + 14)
    canvas.text(330, 28, title, size=15)
    largest = max(values.values())
    for number, (label, value) in enumerate(values.items()):
        y = top + row * number
        width = max((canvas.width - left - right) * value / largest, 1)
        canvas.text(left - 10, y + 18, label, anchor="end")
        canvas.box(left, y + 3, width, 22, NEW if number == 0 else OLD)
        canvas.text(left + width + 8, y + 18, f"{value:.3g} {unit}", anchor="start")
    listed = ", ".join(f"{label} {value:.3g} {unit}" for label, value in values.items())
    return canvas.figure(f"{title}: {listed}")
