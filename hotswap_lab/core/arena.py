"""Arena: the memory of a prepared slot, laid out so that an adapter is one piece of it.

Row ``j`` of a band holds rank component ``j`` of every tensor in it, side by side: row ``j`` of each ``lora_A``,
column ``j`` of each ``lora_B``. So an adapter of rank ``r`` is the first ``r`` rows, whatever rank the model was
prepared for: a swap copies ``r`` rows in one go, and zeroes those that only the last adapter used. The model's
parameters are strided views of this memory.

Tensors with room for another rank are in another band. What can't be split by rank component (both tensors of a
grouped convolution, whose ranks lie in blocks) is kept whole in the tail.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from .parts import SlotTensor

#: bytes; where a tensor starts in a row
CACHE_LINE = 64


@dataclass(frozen=True, eq=False)
class Place:
    """Where one tensor lies: the first element of its share of a row, or of the tail."""

    tensor: SlotTensor
    offset: int
    shape: tuple[int, ...]
    #: the axis of the rank components; None in the tail
    axis: int | None

    def view(self, memory: torch.Tensor) -> torch.Tensor:
        """The tensor in ``memory``: a band of any number of rows, or the tail."""
        start = memory.storage_offset() + self.offset
        if self.axis is None:
            return memory.as_strided(self.shape, _contiguous(self.shape), start)
        rest = [size for axis, size in enumerate(self.shape) if axis != self.axis]
        strides = list(_contiguous(rest))
        strides.insert(self.axis, memory.stride(0))
        shape = list(self.shape)
        shape[self.axis] = memory.shape[0]
        return memory.as_strided(shape, strides, start)


@dataclass(frozen=True, eq=False)
class Band:
    """Tensors with room for equally many rank components, in a matrix of that many rows."""

    memory: torch.Tensor
    places: tuple[Place, ...]

    @property
    def capacity(self) -> int:
        return self.memory.shape[0]


@dataclass(frozen=True, eq=False)
class Arena:
    """The memory of all tensors of one slot that have the same dtype and device."""

    bands: tuple[Band, ...]
    tail: torch.Tensor
    tail_places: tuple[Place, ...]

    @property
    def nbytes(self) -> int:
        return sum(band.memory.nbytes for band in self.bands) + self.tail.nbytes


def build_arena(tensors: Sequence[tuple[SlotTensor, tuple[int, ...]]], like: torch.Tensor) -> Arena:
    """An arena of zeros for tensors of these shapes.

    >>> owner = torch.nn.Linear(6, 4, bias=False)
    >>> a = SlotTensor("lora_A.weight", "lora_A.default.weight", owner, "weight", rank_axis=0)
    >>> b = SlotTensor("lora_B.weight", "lora_B.default.weight", owner, "weight", rank_axis=1)
    >>> arena = build_arena([(a, (4, 6)), (b, (3, 4))], like=owner.weight)
    >>> [band.memory.shape for band in arena.bands]
    [torch.Size([4, 48])]
    >>> views = [place.view(arena.bands[0].memory) for place in arena.bands[0].places]
    >>> [(tuple(view.shape), view.stride()) for view in views]
    [((4, 6), (48, 1)), ((3, 4), (1, 48))]
    """
    by_rows: dict[int, list[tuple[SlotTensor, tuple[int, ...]]]] = {}
    whole = []
    for tensor, shape in tensors:
        if tensor.rank_axis is None or tensor.blocks > 1 or tensor.groups > 1:
            whole.append((tensor, shape))
        else:
            by_rows.setdefault(shape[tensor.rank_axis], []).append((tensor, shape))
    line = max(CACHE_LINE // like.element_size(), 1)
    bands = tuple(_build_band(rows, members, line, like) for rows, members in sorted(by_rows.items(), reverse=True))
    places, size = _place_in_turn(((tensor, shape, math.prod(shape), None) for tensor, shape in whole), line)
    return Arena(bands, like.new_zeros(size), places)


def _build_band(rows: int, members: list, line: int, like: torch.Tensor) -> Band:
    places, pitch = _place_in_turn(
        ((tensor, shape, math.prod(shape) // rows, tensor.rank_axis) for tensor, shape in members), line
    )
    # with an even number of lines, the rows of one tensor compete for the same sets of the cache
    if pitch // line % 2 == 0:
        pitch += line
    return Band(like.new_zeros((rows, pitch)), places)


def _place_in_turn(members: Iterable[tuple], line: int) -> tuple[tuple[Place, ...], int]:
    places, offset = [], 0
    for tensor, shape, size, axis in members:
        places.append(Place(tensor, offset, tuple(shape), axis))
        offset += -(-size // line) * line
    return tuple(places), offset


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))
