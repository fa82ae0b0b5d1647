"""Chapter 02: one size of memory for adapters of every rank."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from .. import demo
from ..bench import Timing, in_rounds
from ..engine import prepare_model_for_compiled_hotswap, resolve_slot
from ..figures import Canvas, Figure
from ..figures.palette import ADAPTER, BASE, INK, MUTED, OFF
from ..files.reading import Adapter
from .exercise import Exercise


def padded(a: torch.Tensor, b: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Padding in PyTorch's own words: what the exercises are checked against.

    >>> padded(torch.ones(1, 1), torch.ones(1, 1), 2)
    (tensor([[1.],
            [0.]]), tensor([[1., 0.]]))
    """
    more = rank - a.shape[0]
    return F.pad(a, (0, 0, 0, more)), F.pad(b, (0, more))


@Exercise
def pad(solution):
    """Return A and B of a higher rank: the adapter's own values first, zeros in the rest. About 3 lines."""
    dtypes = set()
    # inputs and outputs of different number, so that a mixed-up axis shows
    for inputs, outputs, own, rank in ((3, 4, 2, 4), (5, 2, 1, 3)):
        generator = torch.Generator().manual_seed(rank)
        # half precision: padding must not turn it into float32, which would take twice the memory
        a = torch.randint(1, 5, (own, inputs), generator=generator).half()
        b = torch.randint(1, 5, (outputs, own), generator=generator).half()
        yours = solution(a.clone(), b.clone(), rank)
        for name, mine, expected in zip("AB", yours, padded(a, b, rank), strict=True):
            yield f"{name} of rank {own} in {rank}", mine.int().tolist(), expected.int().tolist()
            dtypes.add(mine.dtype)
    yield "the dtypes", dtypes, {torch.float16}


@Exercise
def bytes_held(solution):
    """Return the bytes of an adapter's tensors, own and in a model prepared for a rank. About 5 lines."""
    # `sort` has three ranks, so one factor for the whole adapter does not do
    for name, rank in (("double", 32), ("reverse", 8), ("sort", 64)):
        model, _ = demo.load(name)
        own = nbytes(model)
        prepare_model_for_compiled_hotswap(model, target_rank=rank)
        yours = solution(Adapter.load(demo.adapter_path(name)).tensors, rank)
        yield f"{name} in rank {rank}: own, held", yours, (own, nbytes(model))


def nbytes(model: torch.nn.Module) -> int:
    """The bytes of the adapter's tensors in a model, padding included.

    >>> nbytes(demo.load("reverse")[0])
    352256
    """
    return sum(tensor.parameter.nbytes for tensor in resolve_slot(model, "default").tensors)


def forward_times(models: Mapping[str, torch.nn.Module], *, words: int = 32, n: int = 25) -> dict[str, Timing]:
    """How long a forward call takes in each of some demo models, over ``words`` words in one batch.

    The models take turns, so that something else that the machine does in between hits all of them alike.

    >>> times = forward_times({"reverse": demo.load("reverse")[0]}, words=1, n=5)
    >>> times["reverse"].n, times["reverse"].minimum > 0
    (5, True)
    """
    inputs = demo.load_tokenizer()(["hotswap>"] * words, return_tensors="pt")
    calls = {name: lambda model=model: model(**inputs, use_cache=False) for name, model in models.items()}
    with torch.inference_mode():
        return in_rounds(calls, n)


CELL = 34


def picture(a: torch.Tensor, b: torch.Tensor, rank: int) -> Figure:
    """Small matrices of whole numbers, padded to ``rank``, with their product."""
    (own, inputs), outputs = a.shape, b.shape[0]
    padded_a, padded_b = padded(a, b, rank)
    height = CELL * max(rank, outputs)
    canvas = Canvas(60 + CELL * (rank + 2 * inputs) + 120, height + 118)
    middle, x = 50 + height / 2, 30.0
    for name, matrix, (rows_own, columns_own), fill, sign in (
        ("B", padded_b, b.shape, ADAPTER, "·"),
        ("A", padded_a, a.shape, ADAPTER, "="),
        ("B @ A", padded_b @ padded_a, (outputs, inputs), BASE, ""),
    ):
        rows, columns = matrix.shape
        top = middle - rows * CELL / 2
        canvas.text(x + columns * CELL / 2, top - 14, name, size=15)
        for row, column in torch.ones_like(matrix).nonzero().tolist():
            is_own = row < rows_own and column < columns_own
            left, up = x + column * CELL, top + row * CELL
            canvas.box(left, up, CELL, CELL, fill if is_own else OFF, dashed=not is_own)
            number = str(matrix[row, column].item())
            canvas.text(left + CELL / 2, up + CELL / 2 + 5, number, color=INK if is_own else MUTED)
        canvas.text(x + columns * CELL / 2, top + rows * CELL + 20, f"{rows} × {columns}", size=12, color=MUTED)
        x += columns * CELL + 60
        if sign:
            canvas.text(x - 30, middle + 6, sign, size=20)
    for x, fill, text in ((30, ADAPTER, f"the adapter's own, rank {own}"), (230, OFF, f"padding up to rank {rank}")):
        canvas.box(x, canvas.height - 30, 16, 16, fill, dashed=fill == OFF)
        canvas.text(x + 24, canvas.height - 17, text, size=12, anchor="start", color=MUTED)
    return canvas.figure(
        f"Padding. B is {outputs} by {rank}: its first {own} columns are the adapter's own, the rest are zeros. "
        f"A is {rank} by {inputs}: its first {own} rows are the adapter's own, the rest are zeros. "
        f"B @ A is {outputs} by {inputs}, the same as without padding."
    )
