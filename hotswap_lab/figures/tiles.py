"""A picture of all layers of a model: a tile for each, in the color of the adapter where it changes the weight."""

import re
import struct
import textwrap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape

import torch

from . import Canvas, Figure, area
from .palette import BASE, CARD, INK, MUTED, adapter_color, mix
from .png import address, png

#: cells along each side of a large tile, from one tile to the next, and the pixels of a cell
CELLS, PITCH, PIXELS = 14, 17, 2
#: the same of a small tile, which has one tint
SMALL = (6, 7)
#: the most rows and columns of large tiles, and the most tiles that say their numbers
LARGE, FEW = (6, 10), 60
#: the ends of the steps of the scale but the last one, which has none: shares of the weight's own size
STEPS = (0.03, 0.1, 0.3, 1.0)
#: padding: neither the base nor the adapter
HATCH = (
    "<defs><pattern id='hatch' width='5' height='5' patternUnits='userSpaceOnUse' patternTransform='rotate(45)'>"
    f"<rect width='5' height='5' fill='{CARD}'/><rect width='2.5' height='5' fill='{MUTED}'/></pattern></defs>"
)


@dataclass(frozen=True)
class Tile:
    """One layer. ``cells`` is the size of what the adapter adds there, in equal parts of the weight, as a share of it.

    The size of numbers is their root mean square. ``says`` has the tile's own numbers.
    """

    path: str
    cells: torch.Tensor
    says: str


def drawn(
    tiles: Sequence[Tile],
    name: str,
    title: str,
    counts: Mapping[str, int],
    previous: tuple[str, Collection[str]] = ("", ()),
    answers: Sequence[tuple[str, str, str, bytes | None]] = (),
    text: str = "",
) -> Figure:
    """Draw tiles in the color of the adapter ``name``; below them the scale, answers, and a bar of all numbers.

    ``counts`` says how many numbers there are of each kind: of the base, of the adapter, and of padding.
    ``previous`` is an adapter and the paths of its layers, which get an outline in its color. An answer has a label,
    its adapter, and text, or a PNG.
    """
    color = INK if name == "off" else adapter_color(name)
    rows, columns = ([*dict.fromkeys(split(tile.path)[axis] for tile in tiles)] or [""] for axis in (0, 1))
    # cells of a tile and up to the next one, and pixels from one tile to the next
    n, pitch, step = CELLS, PITCH, PITCH * PIXELS
    if not tiles or len(tiles[0].cells) == 1:
        n, pitch, step = *SMALL, min(18, 480 / len(columns), max(300 / len(rows), 6))
    size, row_labels, column_labels = n * step / pitch, _short(rows), _short(columns)
    turned = -60 if (longest := max(map(len, column_labels))) * 7 > step else 0
    left, top = max(20 + 7 * max(map(len, row_labels)), 46), 62 + (6 * longest if turned else 0)
    right, y = left + len(columns) * step, top + len(rows) * step
    beyond = 4 * len(column_labels[-1]) if turned else 0
    canvas = Canvas(max(int(right) + 12 + beyond, 300), 0)  # whose height is known at the end
    add, word = canvas.shapes.append, partial(canvas.text, size=12, anchor="start")
    add(HATCH)
    word(12, 22, title, size=14, color=color, bold=True)
    word(12, top - 6, "block", color=MUTED)
    word((left + right) / 2, 40, "layer", anchor="middle", color=MUTED)
    every = max(int(-(-12 // step)), 1)  # as many labels as there is room for
    for at, label in [*enumerate(column_labels)][::every]:
        anchor = "start" if turned else "middle"
        word(left + at * step + size / 2, top - 6, label, anchor=anchor, color=MUTED, turned=turned)
    for at, label in [*enumerate(row_labels)][::every]:
        word(left - 8, top + at * step + size / 2 + 4, label, anchor="end", color=MUTED)
    tints = [BASE, *(mix(color, (number + 1) / (len(STEPS) + 1)) for number in range(len(STEPS) + 1))]
    cells, spots = torch.full((len(rows) * pitch, len(columns) * pitch), len(tints), device="cpu"), []
    for tile in tiles:
        row, column = (names.index(part) for names, part in zip((rows, columns), split(tile.path), strict=True))
        shades = (tile.cells > 0).int() + torch.bucketize(tile.cells, torch.tensor(STEPS, device="cpu"))
        cells[row * pitch : row * pitch + n, column * pitch : column * pitch + n] = shades
        place = partial(area, left + column * step, top + row * step, size, size)
        says, here = f"{tile.path}: {tile.says}", f"{column_labels[column]} in block {row_labels[row]}: {tile.says}"
        # the text has its font where it is shown, by widgets/live.css
        told = f"<text x='12' y='{y + 12:g}' fill='{INK}' visibility='hidden'>{escape(here)}</text>"
        inside = f"<title>{escape(says)}</title><rect {place()} fill='none' pointer-events='all'/>{told}"
        spots.append(f"<g class='hotswap-tile' tabindex='{-1 if spots else 0}' role='img'>{inside}</g>")
        if tile.path in previous[1]:
            spots.append(f"<rect {place(2)} fill='none' stroke='{adapter_color(previous[0])}' stroke-dasharray='3 2'/>")
    whole, image = area(left, top, right - left, y - top), address(png(cells.tolist(), [*tints, CARD]))
    add(f"<image {whole} style='image-rendering:pixelated' href='{image}'/>")
    canvas.shapes += spots if len(tiles) <= FEW else []
    y, part, labels = y + 32, (canvas.width - 24) / len(tints), ["0", *(f"<{100 * each:g}%" for each in STEPS), "more"]
    dashed = f"; dashed: {previous[0]}" if previous[1] and len(tiles) <= FEW else ""
    word(12, y, f"share of the weight's own size{dashed}", color=MUTED)
    for at, (tint, label) in enumerate(zip(tints, labels, strict=True)):
        add(f"<rect {area(12 + at * part, y + 6, part - 2, 10)} fill='{tint}'/>")
        word(11 + (at + 0.5) * part, y + 29, label, anchor="middle", color=MUTED)
    y += 40
    for label, where, said, image in answers:
        word(12, y + 14, label, color=MUTED)
        y += 18
        if image:
            pixels, lines = struct.unpack(">II", image[16:24])
            shown = min(pixels, canvas.width - 24)
            add(f"<image {area(12, y + 4, shown, shown * lines / pixels)} href='{address(image)}'/>")
            y += 8 + shown * lines // pixels
        for line in [] if image else textwrap.wrap(said, canvas.width // 9, max_lines=8) or [""]:
            word(12, y + 20, line, size=18, color=INK if where == "off" else adapter_color(where))
            y += 24
    x, kinds = 12.0, [*zip(counts.items(), (BASE, color, "url(#hatch)"), strict=True)]
    for (_, size), fill in kinds:
        part = size * (canvas.width - 24) / max(sum(counts.values()), 1)
        add(f"<rect {area(x, y + 12, part, 10)} fill='{fill}'/>")
        x += part
    for (kind, size), fill in kinds:
        if size or kind != "padding":
            add(f"<rect {area(12, y + 30, 10, 10)} fill='{fill}'/>")
            word(28, y + 39, f"{kind}: {size:,} {'zeros' if kind == 'padding' else 'numbers'}")
            y += 16
    canvas.height = int(y) + 38
    return canvas.figure(text or title)


def split(path: str) -> tuple[str, str]:
    """A layer's block, and its path in the block.

    >>> split("model.layers.0.self_attn.q_proj"), split("down.0.attn.1.to_out.0")
    (('model.layers.0', 'self_attn.q_proj'), ('down.0.attn.1', 'to_out.0'))
    """
    block, column = re.fullmatch(r"((?:.*\.)?\d+(?=\.[^.]*[^.\d]))?\.?(.*)", path).groups()
    return block or "", column


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
