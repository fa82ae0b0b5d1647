"""What a swap can write: one tensor of one adapter, and the scalars of one layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

if TYPE_CHECKING:
    from .change import Change


@dataclass(frozen=True, eq=False)
class SlotTensor:
    """Where one tensor of an adapter lives in a model.

    Parameters
    ----------
    key:
        The tensor's name in an adapter file, relative to its layer: ``lora_A.weight``.
    named_key:
        The same with the adapter's name, as in ``model.state_dict()``: ``lora_A.default.weight``.
    owner, name:
        The module that holds the parameter, and the parameter's name there.
    rank_axis:
        The axis along which rank components are stacked, or None.
    groups:
        By what number the rank axis is shorter than the rank: a grouped convolution's ``lora_B`` holds only
        ``rank / groups`` entries along it.
    blocks:
        How many blocks of equal size the rank axis is made of. A grouped convolution's ``lora_A`` has one for
        each group, and each of them is padded for itself, so that every group goes on seeing its own.
    size_attribute:
        The attribute of ``owner`` that repeats the rank (``out_features`` of a ``lora_A``), or None.
    off:
        Gives the value that means "no adapter here", of the parameter's shape; None where that is zero.
    """

    key: str
    named_key: str
    owner: Any
    name: str
    rank_axis: int | None
    groups: int = 1
    blocks: int = 1
    size_attribute: str | None = None
    off: Callable[[], torch.Tensor] | None = None

    #: whether this process holds only a part of the parameter
    is_shard: ClassVar[bool] = False

    @property
    def memory(self) -> torch.Tensor:
        """What this process holds of the parameter. Writes to it reach the parameter."""
        return self.parameter

    @property
    def has_fixed_shape(self) -> bool:
        """Whether somebody has noted the parameter's shape, so that it can't get another one."""
        return False

    def obstacle(self) -> str | None:
        """Why writing to the parameter would not be enough, or None."""
        return None

    def write(self, source: torch.Tensor | None, change: Change, fixed_size: bool) -> None:
        """Has ``change`` write ``source``, as in an adapter's file, to the parameter; None stands for "no adapter"."""
        parameter = self.owner._parameters[self.name]
        if source is None:
            change.copy(parameter, self.off_value())
        elif source.shape == parameter.shape:
            change.copy(parameter, source)
        elif not fixed_size:
            # always a copy: a model that shared memory with the caller's state dict would change with it
            change.resize(parameter, source.detach())
            if self.size_attribute and (axis := self.rank_axis) is not None:
                change.sizes.append((self.owner, self.size_attribute, source.shape[axis] * self.groups))
        else:
            rank = self.rank_of(source.shape)
            change.copy(self.own(parameter, rank), self.split(source))
            change.zero(self.padding(parameter, rank))

    def off_value(self) -> torch.Tensor:
        """What the parameter holds where the adapter is turned off."""
        if self.off is not None:
            return self.off()
        # a single zero, repeated without taking memory
        return self.parameter.detach().new_zeros(()).expand(self.parameter.shape)

    @property
    def parameter(self) -> torch.nn.Parameter:
        return self.owner._parameters[self.name]

    @property
    def capacity(self) -> int | None:
        """The rank that the parameter has room for; more than the adapter's own rank where it is padded."""
        # as rank_of(parameter.shape); asked for at each layer in each swap
        axis = self.rank_axis
        return None if axis is None else self.owner._parameters[self.name].shape[axis] * self.groups

    def rank_of(self, shape: Sequence[int]) -> int | None:
        """The rank that a tensor of this shape would have here."""
        return None if self.rank_axis is None else shape[self.rank_axis] * self.groups

    def shape_for(self, rank: int | None) -> tuple[int, ...]:
        """The parameter's shape if it had this rank."""
        shape = list(self.parameter.shape)
        if self.rank_axis is not None and rank is not None:
            shape[self.rank_axis] = rank // self.groups
        return tuple(shape)

    def own(self, padded: torch.Tensor, rank: int | None) -> torch.Tensor:
        """The view of ``padded`` that an adapter of this rank fills, laid out as :meth:`split` lays it out."""
        return self._narrow(padded, 0, rank)

    def padding(self, padded: torch.Tensor, rank: int | None) -> torch.Tensor:
        """The view of ``padded`` that an adapter of this rank leaves over, which must be zero."""
        return self._narrow(padded, rank, self.rank_of(padded.shape))

    def split(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor`` with one more axis for the blocks, where there are several."""
        axis = self.rank_axis
        return tensor if axis is None or self.blocks == 1 else tensor.unflatten(axis, (self.blocks, -1))

    def trimmed(self, padded: torch.Tensor, rank: int | None) -> torch.Tensor:
        """The tensor of an adapter of this rank, without the padding: as in its file."""
        part, axis = self.own(padded, rank), self.rank_axis
        return part if axis is None or self.blocks == 1 else part.flatten(axis, axis + 1)

    def padded(self, tensor: torch.Tensor, rank: int | None) -> torch.Tensor:
        """A copy of ``tensor`` with zeros up to this rank."""
        padded = tensor.new_zeros(self.shape_for(rank))
        self.own(padded, self.rank_of(tensor.shape)).copy_(self.split(tensor))
        return padded

    def _narrow(self, padded: torch.Tensor, start: int | None, stop: int | None) -> torch.Tensor:
        axis, share = self.rank_axis, self.groups * self.blocks
        if axis is None or start is None or stop is None:
            return padded
        axis += self.blocks > 1
        return self.split(padded).narrow(axis, start // share, (stop - start) // share)

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether ``shape`` differs from the tensor's at most in its rank."""
        own = list(self.parameter.shape)
        other = list(shape)
        if len(own) != len(other):
            return False
        if self.rank_axis is not None:
            own[self.rank_axis] = other[self.rank_axis]
        return own == other


#: what stands for a :class:`SlotTensor` where parameters are of another kind, such as spread over processes
KINDS: list[Any] = []


def slot_tensor(key: str, named_key: str, owner: Any, name: str, *more: Any, **kinds: Any) -> SlotTensor:
    """A :class:`SlotTensor`, of the kind that the parameter is of."""
    for kind in KINDS:
        if kind.holds(owner, name):
            return kind(key, named_key, owner, name, *more, **kinds)
    return SlotTensor(key, named_key, owner, name, *more, **kinds)


@dataclass(frozen=True)
class LayerSettings:
    """The scalars of one LoRA layer, as its config gives them.

    >>> LayerSettings(rank=4, alpha=8, use_rslora=False, dropout=0.0).scaling
    2.0
    >>> LayerSettings(rank=4, alpha=8, use_rslora=True, dropout=0.0).scaling
    4.0
    """

    rank: int
    alpha: float
    use_rslora: bool
    dropout: float

    @property
    def scaling(self) -> float:
        """The factor of ``B @ A``: alpha / rank, or alpha / sqrt(rank) for rsLoRA (arXiv 2312.03732)."""
        return self.alpha / math.sqrt(self.rank) if self.use_rslora else self.alpha / self.rank


@dataclass(frozen=True)
class WholeSettings:
    """The rank and scaling of a layer of any method, where it has them; for reports."""

    rank: int | None
    scaling: float | None
