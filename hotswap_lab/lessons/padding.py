"""Chapter 02: one size of memory for adapters of every rank."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F

from .. import demo
from ..bench.timing import Timing, measure
from ..core.adapter import Adapter
from ..core.prepare import prepare_model_for_compiled_hotswap
from ..core.slot import resolve_slot
from .exercise import Exercise, Result
from .figures import FROZEN, INK, MUTED, NEW, OFF, OLD, Canvas, Figure

# --- exercises ---------------------------------------------------------------------------------------------------


def _padded(a: torch.Tensor, b: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The truth that ``pad`` is checked against, in PyTorch's own words."""
    more = rank - a.shape[0]
    return F.pad(a, (0, 0, 0, more)), F.pad(b, (0, more))


def _pad(solution: Callable) -> list[Result]:
    results = []
    products, dtypes = [], []
    # inputs and outputs of different number, so that a mixed-up axis shows
    for inputs, outputs, own, rank in ((3, 4, 2, 4), (5, 2, 1, 3)):
        generator = torch.Generator().manual_seed(rank)
        # half precision: padding must not turn it into float32, which would take twice the memory
        a = torch.randint(1, 5, (own, inputs), generator=generator).half()
        b = torch.randint(1, 5, (outputs, own), generator=generator).half()
        yours = solution(a.clone(), b.clone(), rank)
        for name, mine, expected in zip("AB", yours, _padded(a, b, rank), strict=True):
            results.append(Result(f"{name} of rank {own} in {rank}", _numbers(mine), _numbers(expected)))
            dtypes.append(str(mine.dtype))
        products.append((_product(*yours), _numbers(b @ a)))
    return [
        *results,
        Result("the products B @ A", [yours for yours, _ in products], [expected for _, expected in products]),
        Result("the dtypes", sorted(set(dtypes)), ["torch.float16"]),
    ]


def _numbers(matrix: torch.Tensor) -> list:
    return matrix.to(torch.int64).tolist()


def _product(a: torch.Tensor, b: torch.Tensor) -> object:
    if a.shape[0] != b.shape[1]:
        return f"none: A has {a.shape[0]} rows, B has {b.shape[1]} columns"
    return _numbers(b.float() @ a.float())


pad = Exercise(
    "From `a` (own rank x inputs), `b` (outputs x own rank) and a rank at least as high, return A and B of that rank:\n"
    "`a` and `b` first, zeros in the rest of both, the same dtype. About 3 lines.",
    _pad,
)


def _bytes_held(solution: Callable) -> list[Result]:
    results = []
    # `sort` has three ranks, so one factor for the whole adapter does not do
    for name, rank in (("double", 32), ("reverse", 8), ("sort", 64)):
        model, _ = demo.load(name)
        slot = resolve_slot(model, "default")
        own = sum(tensor.parameter.nbytes for tensor in slot.tensors)
        prepare_model_for_compiled_hotswap(model, target_rank=rank)
        held = sum(tensor.parameter.nbytes for tensor in slot.tensors)
        yours = solution(Adapter.load(demo.adapter_path(name)).tensors, rank)
        results.append(Result(f"{name} in rank {rank}: own, held", yours, (own, held)))
    return results


bytes_held = Exercise(
    "From the tensors of an adapter's file (a dict of '....lora_A.weight' and '....lora_B.weight') and a target rank,\n"
    "return two numbers: the bytes of these tensors, and those that they take in a model prepared for that rank.\n"
    "About 5 lines.",
    _bytes_held,
)


# --- the price ---------------------------------------------------------------------------------------------------


def price(ranks: Sequence[int], *, words: int = 32, rounds: int = 5) -> dict[int, tuple[Timing, int]]:
    """What room for each of ``ranks`` costs: the time of a forward call, and the bytes of the adapter's tensors.

    0 stands for the model as PEFT loads it. The models take turns, so that something else that the machine does in
    between hits all of them alike.
    """
    inputs = demo.load_tokenizer()(["hotswap>"] * words, return_tensors="pt")
    models = {}
    for rank in ranks:
        models[rank], _ = demo.load("reverse")
        if rank:
            prepare_model_for_compiled_hotswap(models[rank], target_rank=rank)
    timings: dict[int, list[Timing]] = {rank: [] for rank in ranks}
    with torch.inference_mode():
        for _ in range(rounds):
            for rank, model in models.items():
                timings[rank].append(measure(lambda model=model: model(**inputs, use_cache=False), n=5))
    return {rank: (_pooled(timings[rank]), _nbytes(models[rank])) for rank in ranks}


def _pooled(timings: list[Timing]) -> Timing:
    return Timing(
        statistics.median(timing.median for timing in timings),
        min(timing.minimum for timing in timings),
        sum(timing.n for timing in timings),
    )


def _nbytes(model: torch.nn.Module) -> int:
    return sum(tensor.parameter.nbytes for tensor in resolve_slot(model, "default").tensors)


# --- pictures ----------------------------------------------------------------------------------------------------

CELL = 34


def picture(a: torch.Tensor, b: torch.Tensor, rank: int) -> Figure:
    """Small matrices of whole numbers, padded to ``rank``, with their product."""
    own, inputs = a.shape
    outputs = b.shape[0]
    padded_a, padded_b = _padded(a, b, rank)
    height = CELL * max(rank, outputs)
    canvas = Canvas(60 + CELL * (rank + 2 * inputs) + 120, height + 118)
    middle = 50 + height / 2
    x = 30.0
    parts = (
        ("B", padded_b, lambda row, column: column < own, "·"),
        ("A", padded_a, lambda row, column: row < own, "="),
        ("B @ A", padded_b @ padded_a, None, ""),
    )
    for name, matrix, is_own, sign in parts:
        rows, columns = matrix.shape
        top = middle - rows * CELL / 2
        canvas.text(x + columns * CELL / 2, top - 14, name, size=15)
        for row in range(rows):
            for column in range(columns):
                fill, color = (FROZEN, INK) if is_own is None else (NEW, INK) if is_own(row, column) else (OFF, MUTED)
                left, up = x + column * CELL, top + row * CELL
                canvas.box(left, up, CELL, CELL, fill, dashed=fill == OFF)
                canvas.text(left + CELL / 2, up + CELL / 2 + 5, f"{int(matrix[row, column])}", color=color)
        canvas.text(x + columns * CELL / 2, top + rows * CELL + 20, f"{rows} × {columns}", size=12, color=MUTED)
        x += columns * CELL
        if sign:
            canvas.text(x + 30, middle + 6, sign, size=20)
        x += 60
    canvas.box(30, canvas.height - 30, 16, 16, NEW)
    canvas.text(54, canvas.height - 17, f"the adapter's own, rank {own}", size=12, anchor="start", color=MUTED)
    canvas.box(230, canvas.height - 30, 16, 16, OFF, dashed=True)
    canvas.text(254, canvas.height - 17, f"padding up to rank {rank}", size=12, anchor="start", color=MUTED)
    return canvas.figure(
        f"Padding. B is {outputs} by {rank}: its first {own} columns are the adapter's own, the rest are zeros. "
        f"A is {rank} by {inputs}: its first {own} rows are the adapter's own, the rest are zeros. "
        f"B @ A is {outputs} by {inputs}, the same as without padding."
    )


def one_memory(ranks: Mapping[str, int], rank: int, inputs: int = 128) -> Figure:
    """Adapters of several ranks, one after the other in the same ``lora_A``."""
    canvas = Canvas(660, 250)
    width, height, top = 150, 140, 52
    for number, (name, own) in enumerate(ranks.items()):
        left = 50 + number * 205
        filled = height * own / rank
        canvas.text(left + width / 2, 34, f"{name}, rank {own}", size=14)
        canvas.box(left, top, width, height, OFF, dashed=True)
        canvas.box(left, top, width, filled, NEW)
        if own < rank:
            canvas.text(left + width / 2, top + (filled + height) / 2 + 5, f"{rank - own} rows of zeros", color=MUTED)
        if filled > 30:
            canvas.text(left + width / 2, top + filled / 2 + 5, f"{own} rows of its own")
        canvas.text(left + width / 2, top + height + 20, f"{rank} × {inputs}", size=12, color=MUTED)
        if number:
            canvas.arrow(left - 50, top + height / 2, left - 8, top + height / 2)
    canvas.text(330, 238, "The same lora_A at the same address, through two swaps.", color=MUTED)
    listed = ", ".join(f"{name} fills {own} of {rank} rows" for name, own in ranks.items())
    return canvas.figure(
        f"One lora_A of {rank} by {inputs}, at one address, through swaps: {listed}; the rest is zeros."
    )


def price_plot(prices: Mapping[int, tuple[Timing, int]]) -> Figure:
    """The result of :func:`price`: time on the left, memory on the right, the model that isn't prepared dashed."""
    canvas = Canvas(680, 300)
    ranks = [rank for rank in prices if rank]
    times = {rank: timing.median * 1000 for rank, (timing, _) in prices.items()}
    fastest = {rank: timing.minimum * 1000 for rank, (timing, _) in prices.items()}
    kilobytes = {rank: nbytes / 1000 for rank, (_, nbytes) in prices.items()}
    n = prices[0][0].n
    canvas.text(340, 28, "What room for a rank costs: the demo model with an adapter of rank 8", size=15)
    for left, title, values in ((60, "one forward call, ms", times), (400, "the adapter's tensors, kB", kilobytes)):
        panel = _Panel(canvas, left, ranks, max(values.values()), title)
        panel.level(values[0])
        if values is times:
            panel.dots([fastest[rank] for rank in ranks], OLD)
        panel.line([values[rank] for rank in ranks])
    _legend(canvas, 60, f"prepared (time: median of {n})", NEW)
    _legend(canvas, 290, "its fastest call", OLD)
    _legend(canvas, 430, "as PEFT loads it, not prepared", None)
    listed = "; ".join(
        f"{f'rank {rank}' if rank else 'not prepared'}: {times[rank]:.3g} ms, {kilobytes[rank]:,.0f} kB"
        for rank in prices
    )
    return canvas.figure(f"Time of a forward call (median of {n}) and memory of the adapter's tensors. {listed}")


def _legend(canvas: Canvas, x: float, text: str, color: str | None) -> None:
    y = canvas.height - 14
    if color is None:
        _stroke(canvas, [(x - 10, y - 4), (x + 12, y - 4)], MUTED, 1, dashed=True)
    else:
        _dot(canvas, x + 4, y - 4, color)
    canvas.text(x + 18, y, text, size=12, anchor="start", color=MUTED)


class _Panel:
    """One coordinate system: ranks to the right, values upwards from zero."""

    WIDTH, HEIGHT, TOP = 250, 160, 66

    def __init__(self, canvas: Canvas, left: float, ranks: Sequence[int], largest: float, title: str):
        self.canvas, self.left, self.ranks, self.largest = canvas, left, ranks, largest
        bottom = self.TOP + self.HEIGHT
        canvas.text(left, self.TOP - 14, title, anchor="start")
        _stroke(canvas, [(left, self.TOP), (left, bottom), (left + self.WIDTH, bottom)], INK, 1)
        for rank in ranks:
            canvas.text(self._x(rank), bottom + 16, f"{rank}", size=11, color=MUTED)
        canvas.text(left + self.WIDTH / 2, bottom + 34, "target rank", size=12, color=MUTED)
        for value in (0, largest / 2, largest):
            label = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
            canvas.text(left - 6, self._y(value) + 4, label, size=11, anchor="end", color=MUTED)

    def line(self, values: Sequence[float]) -> None:
        points = [(self._x(rank), self._y(value)) for rank, value in zip(self.ranks, values, strict=True)]
        _stroke(self.canvas, points, NEW, 2)
        self.dots(values, NEW)

    def dots(self, values: Sequence[float], color: str) -> None:
        for rank, value in zip(self.ranks, values, strict=True):
            _dot(self.canvas, self._x(rank), self._y(value), color)

    def level(self, value: float) -> None:
        y = self._y(value)
        _stroke(self.canvas, [(self.left, y), (self.left + self.WIDTH, y)], MUTED, 1, dashed=True)

    def _x(self, rank: int) -> float:
        return self.left + (self.WIDTH - 12) * rank / max(self.ranks)

    def _y(self, value: float) -> float:
        return self.TOP + self.HEIGHT * (1 - 0.92 * value / self.largest)


def _dot(canvas: Canvas, x: float, y: float, color: str) -> None:
    canvas.shapes.append(f"<circle cx='{x:.1f}' cy='{y:.1f}' r='3.5' fill='{color}' stroke='{INK}'/>")


def _stroke(
    canvas: Canvas, points: Sequence[tuple[float, float]], color: str, width: float, *, dashed: bool = False
) -> None:
    dash = " stroke-dasharray='5 4'" if dashed else ""
    listed = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    canvas.shapes.append(f"<polyline points='{listed}' fill='none' stroke='{color}' stroke-width='{width:g}'{dash}/>")
