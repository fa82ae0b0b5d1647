"""A picture of all layers of a model: a tile for each, in the color of the adapter where it changes the weight."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

import torch

from . import Canvas, Figure
from .palette import BASE, INK, MUTED, OFF, adapter_color, mix
from .png import address, png

#: cells along each side of a large tile, their pixels, and the pixels between two tiles
CELLS, PIXELS, GAP = 14, 3, 6
#: the most rows and columns of large tiles, and of any tiles
LARGE, MOST = (6, 10), (36, 48)
TINTS = 32


@dataclass(frozen=True)
class Tile:
    """One layer. ``cells`` is the root mean square of what the adapter adds there, in equal parts of the weight."""

    path: str
    cells: torch.Tensor
    says: str


@dataclass(frozen=True)
class Counts:
    """How many numbers there are, and, if compared, how many of the base's and of the adapter's are new."""

    base: int
    adapter: int
    padding: int
    changed: tuple[int, int] | None = None

    @property
    def lines(self) -> tuple[str, str]:
        base, adapter = f"base: {self.base:,} numbers", f"adapter: {self.adapter:,} numbers"
        if self.changed is not None:
            new = "all" if self.changed[1] == self.adapter else f"{self.changed[1]:,} of them"
            base, adapter = f"{base}, {self.changed[0]:,} of them changed", f"{adapter}, {new} new"
        return base, adapter + (f", and {self.padding:,} of padding" if self.padding else "")


def drawn(tiles: Sequence[Tile], name: str, strength: float, answer: str, counts: Counts, text: str) -> Figure:
    """Draw tiles in the color of the adapter ``name``, with the answer and a bar of all numbers below.

    The strongest color is that of the largest change at strength 1.
    """
    color = INK if name == "off" else adapter_color(name)
    rows, columns = (_Axis([split(tile.path)[axis] for tile in tiles], most) for axis, most in enumerate(MOST))
    is_large = bool(tiles) and tiles[0].cells.numel() > 1
    height, width = (
        CELLS * PIXELS if is_large else min(30, px // len(axis.labels)) for px, axis in ((300, rows), (600, columns))
    )
    gap, turned = GAP if is_large else 2, 0
    if columns.longest * 7 > width + gap:
        turned = -60
    left, top = 20 + 7 * rows.longest, 38 + (6 * columns.longest if turned else 18)
    right, bottom = left + len(columns.labels) * (width + gap), top + len(rows.labels) * (height + gap)
    canvas = Canvas(max(right + 14, 460), bottom + 34 * bool(answer) + 66)
    canvas.text(
        left,
        24,
        f"{name} is in the model" if name != "off" else "the adapter is off",
        size=15,
        anchor="start",
        color=color,
    )
    for at, label in enumerate(columns.labels):
        x = left + at * (width + gap) + width / 2
        canvas.text(x, top - 6, label, size=12, anchor="start" if turned else "middle", color=MUTED, turned=turned)
    for at, label in enumerate(rows.labels):
        y = top + at * (height + gap) + height / 2 + 4
        canvas.text(left - 8, y, label, size=min(12, height), anchor="end", color=MUTED)
    groups: dict[tuple[int, int], list[Tile]] = {}
    for tile in tiles:
        row, column = split(tile.path)
        groups.setdefault((rows.at[row], columns.at[column]), []).append(tile)
    largest = max((float(tile.cells.max()) for tile in tiles), default=0) / (abs(strength) or 1) or 1
    tints = [BASE, *(mix(color, 0.2 + 0.8 * tint / TINTS) for tint in range(TINTS))]
    for (row, column), group in groups.items():
        cells = torch.stack([tile.cells for tile in group]).square().mean(0).sqrt()
        pixels = ((cells / largest).sqrt() * TINTS).ceil().clamp(0, TINTS).int().tolist()
        area = f"x='{left + column * (width + gap)}' y='{top + row * (height + gap)}' width='{width}' height='{height}'"
        if is_large:
            image = f"<image {area} style='image-rendering:pixelated' href='{address(png(pixels, tints))}'/>"
            canvas.shapes.append(image)
        fill = "none" if is_large else tints[pixels[0][0]]
        says = escape("; ".join(tile.says for tile in group[:3])) + " ..." * (len(group) > 3)
        canvas.shapes.append(f"<rect {area} fill='{fill}' pointer-events='all'><title>{says}</title></rect>")
    if answer:
        canvas.text(left, bottom + 26, answer, size=18, anchor="start", color=color)
    y, x, sizes = canvas.height - 62, left, (counts.base, counts.adapter, counts.padding)
    for size, fill in zip(sizes, (BASE, color, OFF), strict=True):
        part = size * (canvas.width - left - 20) / max(sum(sizes), 1)
        canvas.shapes.append(f"<rect x='{x:.5g}' y='{y}' width='{part:.5g}' height='12' fill='{fill}'/>")
        x += part
    for number, (line, ink) in enumerate(zip(counts.lines, (INK, color), strict=True)):
        canvas.text(left, y + 30 + 17 * number, line, size=12, anchor="start", color=ink)
    return canvas.figure(text)


def split(path: str) -> tuple[str, str]:
    """A layer's block, and its path in the block.

    >>> split("model.layers.0.self_attn.q_proj"), split("blocks.1.to_out.0")
    (('model.layers.0', 'self_attn.q_proj'), ('blocks.1', 'to_out.0'))
    """
    block, column = re.fullmatch(r"((?:.*\.)?\d+(?=\.[^.]*[^.\d]))?\.?(.*)", path).groups()
    return block or "", column


class _Axis:
    """The rows, or the columns: each name's number, and labels. More than ``most`` are grouped with their neighbors."""

    def __init__(self, names: Iterable[str], most: int):
        names = [*dict.fromkeys(names)]
        step = max(-(-len(names) // most), 1)
        self.at = {name: number // step for number, name in enumerate(names)}
        self.labels = _short(names)[::step] or [""]
        self.longest = max(map(len, self.labels))


def _short(names: Sequence[str]) -> list[str]:
    """As many of the last parts of each name as tell them all apart.

    >>> _short(["self_attn.q_proj", "mlp.up_proj"]), _short(["layers.0", "layers.1"])
    (['q', 'up'], ['0', '1'])
    """
    are_blocks, short = all(name[-1:].isdigit() for name in names), names
    for count in range(1, max((name.count(".") for name in names), default=0) + 2):
        short = [".".join(name.split(".")[-count:]) for name in names]
        if len({*short}) == len(names) and (are_blocks or not any(map(str.isdigit, short))):
            break
    return [name.removesuffix("_proj") for name in short]
