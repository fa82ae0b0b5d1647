"""A picture of all layers of a model: a tile for each, in the color of the adapter where it changes the weight.

Tests: ``tests/widgets/test_weight_map.py``.
"""

import math
import re
import struct
import textwrap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape

import torch

from . import Canvas, Figure, area
from .palette import BASE, CARD, INK, MUTED, adapter_color, ramp
from .png import address, png

#: the cells along each side of a large tile, the cells from one tile to the next, and the pixels of a cell
CELLS, PITCH, PIXELS = 14, 17, 2
#: the first two for a small tile, which has one tint
SMALL = (6, 7)
#: the most rows and columns of large tiles, and the most tiles that show their numbers
LARGE, FEW = (6, 10), 60
#: the upper ends of the scale's steps, as shares of the weight's own size; the last step has no end
STEPS = (0.03, 0.1, 0.2, 0.5, 1.0, 2.0)
#: the most lines of an answer
MOST_LINES = 8
#: padding: neither the base nor the adapter
HATCH = (
    "<defs><pattern id='hatch' width='5' height='5' patternUnits='userSpaceOnUse' patternTransform='rotate(45)'>"
    f"<rect width='5' height='5' fill='{CARD}'/><rect width='2.5' height='5' fill='{MUTED}'/></pattern></defs>"
)


@dataclass(frozen=True)
class Tile:
    """One layer. ``cells`` is the size of the adapter's change in equal parts of the weight, as a share of its size.

    Sizes are root mean squares. ``label`` has the tile's own numbers.
    """

    path: str
    cells: torch.Tensor
    label: str


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

    ``counts`` has the numbers of parameters of the base, of the adapter, and of padding. ``previous`` is an adapter and
    the paths of its layers, which get an outline in its color. An answer has a label, its adapter, and text or a PNG.
    """
    color = INK if name == "off" else adapter_color(name)
    rows, columns = rows_and_columns([tile.path for tile in tiles])
    # the cells of a tile, the cells and the pixels from one tile to the next
    n, pitch, step = CELLS, PITCH, PITCH * PIXELS
    if not tiles or len(tiles[0].cells) == 1:
        n, pitch, step = *SMALL, min(18, 480 / len(columns), max(300 / len(rows), 6))
    size, row_labels, column_labels = n * step / pitch, _short(rows), _short(columns)
    longest = max(map(len, column_labels))
    turned = -60 if longest * 7 > step else 0
    left, top = max(20 + 7 * max(map(len, row_labels)), 46), 62 + (6 * longest if turned else 0)
    right, bottom = left + len(columns) * step, top + len(rows) * step
    overhang = 4 * len(column_labels[-1]) if turned else 0
    canvas = Canvas(max(int(right) + 12 + overhang, 300), 0)  # the height is set at the end
    add, word = canvas.shapes.append, partial(canvas.text, size=12, anchor="start")
    add(HATCH)
    word(12, 22, title, size=14, color=color, bold=True)
    word(12, top - 6, "block", color=MUTED)
    word((left + right) / 2, 40, "layer", anchor="middle", color=MUTED)
    label_every = max(math.ceil(12 / step), 1)  # fewer labels where rows are narrower than a line of text
    for at, label in [*enumerate(column_labels)][::label_every]:
        anchor = "start" if turned else "middle"
        word(left + at * step + size / 2, top - 6, label, anchor=anchor, color=MUTED, turned=turned)
    for at, label in [*enumerate(row_labels)][::label_every]:
        word(left - 8, top + at * step + size / 2 + 4, label, anchor="end", color=MUTED)
    tints = [BASE, *ramp(color)]
    cells, overlays = torch.full((len(rows) * pitch, len(columns) * pitch), len(tints), device="cpu"), []
    for tile in tiles:
        block, kind = split(tile.path)
        row, column = rows.index(block), columns.index(kind)
        shades = (tile.cells > 0).int() + torch.bucketize(tile.cells, torch.tensor(STEPS, device="cpu"))
        cells[row * pitch : row * pitch + n, column * pitch : column * pitch + n] = shades
        place = partial(area, left + column * step, top + row * step, size, size)
        # widgets/live.css sets the font of this text where it shows it
        shown = escape(f"{column_labels[column]} in block {row_labels[row]}: {tile.label}")
        inside = f"<title>{escape(f'{tile.path}: {tile.label}')}</title>"
        inside += f"<rect {place()} fill='none' pointer-events='all'/>"
        inside += f"<text x='12' y='{bottom + 12:g}' fill='{INK}' visibility='hidden'>{shown}</text>"
        overlays.append(f"<g class='hotswap-tile' tabindex='{-1 if overlays else 0}' role='img'>{inside}</g>")
        if tile.path in previous[1]:
            stroke = f"stroke='{adapter_color(previous[0])}' stroke-dasharray='3 2'"
            overlays.append(f"<rect {place(2)} fill='none' {stroke}/>")
    place, image = area(left, top, right - left, bottom - top), address(png(cells.tolist(), [*tints, CARD]))
    add(f"<image {place} style='image-rendering:pixelated' href='{image}'/>")
    canvas.shapes += overlays if len(tiles) <= FEW else []
    dashed = f"; dashed: {previous[0]}" if previous[1] and len(tiles) <= FEW else ""
    word(12, bottom + 32, f"change in % of the weight's size, up to{dashed}", color=MUTED)
    width = (canvas.width - 24) / len(tints)
    for at, (tint, label) in enumerate(zip(tints, ["0", *(f"{100 * end:g}" for end in STEPS), "more"], strict=True)):
        add(f"<rect {area(12 + at * width, bottom + 38, width - 2, 10)} fill='{tint}'/>")
        word(11 + (at + 0.5) * width, bottom + 61, label, anchor="middle", color=MUTED)
    y = _draw_answers(canvas, bottom + 72, answers)
    canvas.height = int(_draw_counts(canvas, y, counts, color)) + 38
    return canvas.figure(text or title)


def _draw_answers(canvas: Canvas, y: float, answers: Sequence[tuple[str, str, str, bytes | None]]) -> float:
    """Draw answers from ``y`` down, and return where they end."""
    for label, name, text, image in answers:
        canvas.text(12, y + 14, label, size=12, anchor="start", color=MUTED)
        y += 18
        if image:
            width, height = struct.unpack(">II", image[16:24])
            shown = min(width, canvas.width - 24)
            canvas.shapes.append(f"<image {area(12, y + 4, shown, shown * height / width)} href='{address(image)}'/>")
            y += 8 + shown * height // width
            continue
        color = INK if name == "off" else adapter_color(name)
        lines = [part for line in text.splitlines() for part in textwrap.wrap(line, canvas.width // 9)] or [""]
        for line in lines if len(lines) <= MOST_LINES else [*lines[: MOST_LINES - 1], "[...]"]:
            canvas.text(12, y + 20, line, size=18, anchor="start", color=color)
            y += 24
    return y


def _draw_counts(canvas: Canvas, y: float, counts: Mapping[str, int], color: str) -> float:
    """Draw a bar with a part for each number, and below it a legend. Return where the legend ends."""
    x, total = 12.0, max(sum(counts.values()), 1)
    fills = dict(zip(counts, (BASE, color, "url(#hatch)"), strict=True))
    for kind, count in counts.items():
        width = count * (canvas.width - 24) / total
        canvas.shapes.append(f"<rect {area(x, y + 12, width, 10)} fill='{fills[kind]}'/>")
        x += width
    for kind, count in counts.items():
        if count or kind != "padding":
            canvas.shapes.append(f"<rect {area(12, y + 30, 10, 10)} fill='{fills[kind]}'/>")
            text = f"{kind}: {count:,} {'zeros' if kind == 'padding' else 'numbers'}"
            canvas.text(28, y + 39, text, size=12, anchor="start")
            y += 16
    return y


def split(path: str) -> tuple[str, str]:
    """Split a layer's path into its block and its path in the block.

    >>> split("model.layers.0.self_attn.q_proj"), split("down.0.attn.1.to_out.0")
    (('model.layers.0', 'self_attn.q_proj'), ('down.0.attn.1', 'to_out.0'))
    """
    block, column = re.fullmatch(r"((?:.*\.)?\d+(?=\.[^.]*[^.\d]))?\.?(.*)", path).groups()
    return block or "", column


def rows_and_columns(paths: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the blocks of some layers, and their paths in the blocks, without repetitions.

    >>> rows_and_columns(["layers.0.q_proj", "layers.1.q_proj"])
    (['layers.0', 'layers.1'], ['q_proj'])
    """
    blocks, columns = zip(*map(split, paths or [""]), strict=True)
    return [*dict.fromkeys(blocks)], [*dict.fromkeys(columns)]


def _short(names: Sequence[str]) -> list[str]:
    """Shorten names to as many of their last parts as make them unique.

    >>> _short(["self_attn.q_proj", "mlp.up_proj"]), _short(["layers.0", "layers.1"])
    (['q', 'up'], ['0', '1'])
    """
    are_blocks, short = all(name[-1:].isdigit() for name in names), names
    for count in range(1, max((name.count(".") for name in names), default=0) + 2):
        short = [".".join(name.split(".")[-count:]) for name in names]
        if len({*short}) == len(names) and (are_blocks or not any(map(str.isdigit, short))):
            break
    return [name.removesuffix("_proj") for name in short]
