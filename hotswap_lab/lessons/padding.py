"""Chapter 02: one size of memory for adapters of every rank."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .. import demo
from ..files.reading import Adapter
from ..swap import prepare_model_for_compiled_hotswap, resolve_slot
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
