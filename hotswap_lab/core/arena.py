"""Arena: the memory of a prepared slot, laid out so that an adapter is one piece of it.

A band is a matrix whose row ``j`` holds rank component ``j`` of every tensor in it: row ``j`` of each ``lora_A``,
column ``j`` of each ``lora_B``. So an adapter of rank ``r`` is the first ``r`` rows, regardless of the rank that the
model was prepared for: a swap copies ``r`` rows at once, and zeroes the others. The model's parameters are strided
views of this memory.

Tensors with room for another rank are in another band. Tensors that can't be split by rank component (both tensors of a
grouped convolution, whose components are stored in blocks) are kept whole, one after the other, in a tail.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .tensors import SlotTensor

#: bytes; tensors start at multiples of it in a row
CACHE_LINE = 64


@dataclass(frozen=True, eq=False)
class Span:
    """The location of one tensor: ``start`` is its first element in each row of a band, or in the tail."""

    tensor: SlotTensor
    start: int
    shape: tuple[int, ...]

    def view(self, memory: torch.Tensor) -> torch.Tensor:
        """The view of ``memory`` that is this tensor; ``memory`` is a band of any number of rows, or the tail."""
        axis = self.tensor.rank_axis
        if axis is None or memory.dim() == 1:
            return memory[self.start : self.start + math.prod(self.shape)].view(self.shape)
        share = self.shape[:axis] + self.shape[axis + 1 :]
        return memory[:, self.start : self.start + math.prod(share)].view(len(memory), *share).movedim(0, axis)


@dataclass(frozen=True, eq=False)
class Band:
    """A matrix with one row per rank component, for tensors with equal room; or the tail, which is a vector."""

    memory: torch.Tensor
    spans: tuple[Span, ...]


def build_arena(tensors: Sequence[tuple[SlotTensor, tuple[int, ...]]], like: torch.Tensor) -> list[Band]:
    """Bands of zeros for tensors of these shapes, the tail last, with the dtype and on the device of ``like``.

    >>> owner = torch.nn.Linear(6, 4, bias=False)
    >>> a = SlotTensor("lora_A.weight", "lora_A.default.weight", owner, "weight", rank_axis=0)
    >>> b = SlotTensor("lora_B.weight", "lora_B.default.weight", owner, "weight", rank_axis=1)
    >>> [band] = build_arena([(a, (4, 6)), (b, (3, 4))], like=owner.weight.detach())
    >>> band.memory.shape
    torch.Size([4, 48])
    >>> views = [span.view(band.memory) for span in band.spans]
    >>> [(tuple(view.shape), view.stride()) for view in views]
    [((4, 6), (48, 1)), ((3, 4), (1, 48))]
    >>> build_arena([(a, (4, 6))], like=owner.weight.detach())[0].memory.shape  # an odd number of lines already
    torch.Size([4, 16])
    """
    by_rows: dict[int, list[tuple[SlotTensor, tuple[int, ...]]]] = {}
    for tensor, shape in tensors:
        axis = tensor.rank_axis
        rows = 0 if axis is None or tensor.rank_step > 1 else shape[axis]
        by_rows.setdefault(rows, []).append((tensor, shape))
    return [build_band(rows, members, like) for rows, members in sorted(by_rows.items(), reverse=True)]


def build_band(
    rows: int, members: Sequence[tuple[SlotTensor, tuple[int, ...]]], like: torch.Tensor, kind: type[Span] = Span
) -> Band:
    """A band of this many rows, or the tail if ``rows`` is 0."""
    line = max(CACHE_LINE // like.element_size(), 1)
    spans, pitch = [], 0
    for tensor, shape in members:
        spans.append(kind(tensor, pitch, tuple(shape)))
        pitch += math.ceil(math.prod(shape) / (max(rows, 1) * line)) * line
    # with an even number of lines, the rows of one tensor would compete for the same sets of the cache
    if rows and pitch // line % 2 == 0:
        pitch += line
    return Band(like.new_zeros((rows, pitch) if rows else pitch), tuple(spans))
