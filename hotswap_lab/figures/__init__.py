"""Pictures as plain SVG, which need no kernel, network or plotting library.

Every picture is drawn on a light card. On a dark page, an image's lightness is inverted: the card is dark, and the
darkest parts are the lightest. Each picture has a text alternative for screen readers and terminals.
"""

import html
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .palette import BASE, CARD, INK, OURS, PEFT

FONT = "font-family='Helvetica, Arial, sans-serif'"
#: the style of a picture that is shown as an image, which can't read the page's own theme
DARK = (Path(__file__).parent / "pictures" / "dark.html").read_text("utf-8")
DASHED = " stroke-dasharray='4 3'"
#: the default style of a text
TEXT = dict(size=13, anchor="middle", color=INK, turned=0, bold=False)


@dataclass(frozen=True)
class Figure:
    """A picture with its text alternative, displayed in a notebook.

    >>> print(Figure("<svg></svg>", "a picture of nothing"))
    a picture of nothing
    """

    svg: str
    text: str

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        width, height = re.search(r" width='(\d+)' height='(\d+)'", self.svg).groups()
        return int(width), int(height)

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict[str, str]:
        return {"image/svg+xml": self.svg.replace("</title>", f"</title>{DARK}", 1), "text/plain": self.text}

    def __repr__(self) -> str:
        return self.text


def drawing(name: str) -> Figure:
    """Load a picture from the folder ``pictures``: engine, hotswap, lora, one_memory, rank_major, rows or serving.

    >>> print(drawing("lora"))  # doctest: +ELLIPSIS
    LoRA: y = W x + scaling * B A x. ...
    """
    svg = (Path(__file__).parent / "pictures" / f"{name}.svg").read_text(encoding="utf-8")
    return Figure(svg, re.search("<title>(.*)</title>", svg).group(1))


class Canvas:
    """A drawing to which shapes are added; coordinates are pixels from the top left."""

    def __init__(self, width: int, height: int):
        self.width: int = width
        self.height: int = height
        self.shapes: list[str] = []

    def box(self, x: float, y: float, width: float, height: float, fill: str, *, dashed: bool = False) -> None:
        place, dash = f"x='{x:g}' y='{y:g}' width='{width:g}' height='{height:g}'", DASHED if dashed else ""
        self.shapes.append(f"<rect {place} rx='4' fill='{fill}' stroke='{INK}' stroke-width='1'{dash}/>")

    def text(self, x: float, y: float, text: str, **style: Any) -> None:
        """Add a text. ``style`` overrides ``TEXT``; ``turned`` is in degrees."""
        size, anchor, color, turned, bold = (TEXT | style).values()  # raises if a name is misspelled
        look = f"font-size='{size}' text-anchor='{anchor}' fill='{color}' {FONT}"
        look += f" transform='rotate({turned} {x:g} {y:g})'" if turned else ""
        look += " font-weight='bold'" if bold else ""
        self.shapes.append(f"<text x='{x:g}' y='{y:g}' {look}>{html.escape(text)}</text>")

    def line(
        self, x1: float, y1: float, x2: float, y2: float, color: str, dashed: bool = False, width: float = 1
    ) -> None:
        dash, ends = DASHED if dashed else " stroke-linecap='round'", f"x1='{x1:g}' y1='{y1:g}' x2='{x2:g}' y2='{y2:g}'"
        self.shapes.append(f"<line {ends} stroke='{color}' stroke-width='{width:g}'{dash}/>")

    def figure(self, text: str) -> Figure:
        size, box = f"width='{self.width}' height='{self.height}'", f"viewBox='0 0 {self.width} {self.height}'"
        start = f"<svg xmlns='http://www.w3.org/2000/svg' {size} {box} role='img'><title>{html.escape(text)}</title>"
        return Figure(f"{start}<rect {size} rx='8' fill='{CARD}'/>{''.join(self.shapes)}</svg>", text)


def area(x: float, y: float, width: float, height: float, more: float = 0) -> str:
    """Return the attributes of a rectangle, enlarged by ``more`` pixels at each side."""
    sizes = x - more, y - more, width + 2 * more, height + 2 * more
    return " ".join(f"{name}='{size:.5g}'" for name, size in zip(("x", "y", "width", "height"), sizes, strict=True))


def bars(title: str, values: Mapping[str, float], unit: str, base: Collection[str] = ()) -> Figure:
    """Draw a bar chart of a few values, with the number next to each bar.

    Labels that begin with "PEFT" have PEFT's color.

    Parameters
    ----------
    base:
        Labels of the references for a comparison, whose bars are gray.
    """
    left, right, row, top = 220, 90, 34, 48
    canvas = Canvas(660, top + row * len(values) + 14)
    canvas.text(330, 28, title, size=15)
    scale = (canvas.width - left - right) / max(values.values())
    for number, (label, value) in enumerate(values.items()):
        y = top + row * number
        canvas.text(left - 10, y + 18, label, anchor="end")
        ours_or_peft = PEFT if label.startswith("PEFT") else OURS
        canvas.box(left, y + 3, max(value * scale, 1), 22, BASE if label in base else ours_or_peft)
        canvas.text(left + value * scale + 8, y + 18, _with_unit(value, unit), anchor="start")
    texts = [f"{label} {_with_unit(value, unit)}" for label, value in values.items()]
    return canvas.figure(f"{title}: {', '.join(texts)}")


def _with_unit(value: float, unit: str) -> str:
    is_singular = value == 1 and len(unit) > 2  # shorter ones, such as "ms", are abbreviations
    return f"{value:.3g} {unit.removesuffix('s') if is_singular else unit}"
