"""The unit of a swap: one tensor of one adapter."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from .change import Change

#: on a prepared layer: the prefix of the buffer that holds an adapter's scaling, before the adapter's name
SCALING = "hotswap_scaling_"
#: the attribute of a layer with the adapters that are turned off there
OFF_ATTRIBUTE = "hotswap_off"
#: the attribute that lists a layer's prepared adapters: their own rank is ``layer.r``, whatever their tensors' size
PREPARED_ATTRIBUTE = "hotswap_prepared"
#: the attribute that lists adapters whose ``lora_variant`` belongs to a room: copies and other processes lack it
ROOM_ATTRIBUTE = "hotswap_in_room"


@dataclass(eq=False)
class SlotTensor:
    """The place of one tensor of an adapter in a model.

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
    size_attribute:
        The attribute of ``owner`` that repeats the rank (``out_features`` of a ``lora_A``), or None.
    """

    key: str
    named_key: str
    owner: Any
    name: str
    rank_axis: int | None = None
    size_attribute: str | None = None

    #: whether this process holds only a part of the parameter
    is_shard: ClassVar[bool] = False
    #: the number that a rank must be divisible by; if it is not 1, rank components are not stacked along one axis
    rank_step: ClassVar[int] = 1

    @property
    def memory(self) -> torch.Tensor:
        """The part of the parameter that this process holds. Writes to it reach the parameter."""
        return self.parameter

    @property
    def is_zero(self) -> bool:
        """Whether :attr:`memory` is zero, or the values that accelerate keeps elsewhere; False if neither can be seen.

        On the meta device without accelerate, there are no values anywhere that could be lost.
        """
        memory: torch.Tensor = self.memory
        if memory.is_meta:
            hook = getattr(self.owner, "_hf_hook", None)  # one, or several in a row
            maps = [getattr(one, "weights_map", None) for one in getattr(hook, "hooks", [hook])]
            values = next(filter(None, maps), None)
            if values is None:
                return hook is None
            memory = values[self.name]
        return not memory.any()

    def write(self, source: torch.Tensor | None, change: Change, fixed_size: bool) -> None:
        """Have ``change`` write ``source``, as in an adapter's file, to the parameter; None means "no adapter"."""
        parameter = self.owner._parameters[self.name]
        if source is None:
            change.zero(parameter)
        elif source.shape == parameter.shape:
            if source.dtype == parameter.dtype and source.device == parameter.device:
                change.copies.append((parameter, source))
            else:
                change.copy(parameter, source)
        elif not fixed_size:
            # always a copy: a model that shared memory with the caller's state dict would change with it
            self.resize(source.detach().to(parameter.device, parameter.dtype, copy=True).contiguous(), change)
        else:
            rank = self.rank_of(source.shape)
            change.copy(self.own(parameter, rank), self.split(source))
            change.zero(self.padding(parameter, rank))

    def resize(self, fresh: torch.Tensor, change: Change) -> None:
        """Have ``change`` give the parameter new memory, for another rank."""
        change.resizes.append((self.owner._parameters[self.name], fresh))
        change.tables.append(self.owner._parameters)
        if self.size_attribute:
            change.sizes.append((self.owner, self.size_attribute, self.rank_of(fresh.shape)))

    @property
    def parameter(self) -> torch.nn.Parameter:
        return self.owner._parameters[self.name]

    @property
    def capacity(self) -> int | None:
        """The rank that the parameter has room for; more than the adapter's own rank where it is padded."""
        # rank_of(parameter.shape) inlined, because every swap does this for each layer
        return None if self.rank_axis is None else self.owner._parameters[self.name].shape[self.rank_axis]

    def rank_of(self, shape: Sequence[int]) -> int | None:
        """The rank that a tensor of this shape would have here."""
        return None if self.rank_axis is None else shape[self.rank_axis]

    def shape_for(self, rank: int | None) -> tuple[int, ...]:
        """The parameter's shape if it had this rank."""
        shape, axis = self.owner._parameters[self.name].shape, self.rank_axis
        return tuple(shape) if axis is None or rank is None else (*shape[:axis], rank, *shape[axis + 1 :])

    def obstacle(self) -> str | None:
        """The reason why a write to :attr:`memory` would not be enough, or None."""

    def own(self, padded: torch.Tensor, rank: int | None) -> torch.Tensor:
        """The view of ``padded`` that an adapter of this rank fills, laid out as :meth:`split` lays it out."""
        return self._narrow(padded, 0, rank)

    def padding(self, padded: torch.Tensor, rank: int | None) -> torch.Tensor:
        """The view of ``padded`` that an adapter of this rank leaves over, which must be zero."""
        return self._narrow(padded, rank, self.rank_of(padded.shape))

    def split(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor``, with more axes where the rank components are not stacked along one."""
        return tensor

    def _narrow(self, padded: torch.Tensor, start: int | None, stop: int | None) -> torch.Tensor:
        axis = self.rank_axis
        return padded if axis is None or start is None or stop is None else padded.narrow(axis, start, stop - start)

    def padded(self, tensor: torch.Tensor, rank: int | None) -> torch.Tensor:
        """A copy of ``tensor`` with zeros up to this rank."""
        padded = tensor.new_zeros(self.shape_for(rank))
        self.own(padded, self.rank_of(tensor.shape)).copy_(self.split(tensor))
        return shared_as([tensor], padded)

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether ``shape`` differs from the tensor's at most in its rank."""
        return len(shape) == self.parameter.ndim and self.shape_for(self.rank_of(shape)) == tuple(shape)


def is_shared(tensor: torch.Tensor) -> bool:
    """Whether a tensor is in memory that other processes may share, as after ``model.share_memory()``."""
    return tensor.device.type == "cpu" and tensor.is_shared()


def shared_as(tensors: Iterable[torch.Tensor], fresh: torch.Tensor) -> torch.Tensor:
    """``fresh``, in shared memory if one of ``tensors`` is."""
    return fresh.share_memory_() if any(map(is_shared, tensors)) else fresh


def is_prepared(layer: torch.nn.Module, adapter_name: str) -> bool:
    """Whether the adapter's tensors on this layer must keep their sizes: graphs read their values at each call."""
    if adapter_name in layer.__dict__.get(PREPARED_ATTRIBUTE, ()):
        return True
    scaling = layer.__dict__.get("scaling")  # a plain table: perhaps PEFT has prepared the layer
    return isinstance(scaling, dict) and isinstance(scaling.get(adapter_name), torch.Tensor)


def named_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters and buffers of a model, shared ones by each of their names."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


# ---- the values of tensors


def are_interchangeable(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are equal in shape, dtype and values."""
    return one.dtype == other.dtype and have_same_values(one, other)


def have_same_values(live: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether writing ``other`` to ``live`` would change nothing; never if one of them is on the meta device."""
    has_values = live.shape == other.shape and not (live.is_meta or other.is_meta)
    return has_values and torch.equal(live.detach(), other.detach().to(live.device, live.dtype))


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all values are finite. Those of integer tensors, such as indices, always are.

    A finite sum shows it. A sum of very large finite weights may overflow, so then each element is checked.

    >>> is_finite(torch.tensor([3e38, 3e38])), is_finite(torch.tensor([3e38, torch.inf]))
    (True, False)
    >>> is_finite(torch.ones(2, dtype=torch.float8_e5m2)), is_finite(torch.tensor([torch.nan]).to(torch.float8_e5m2))
    (True, False)
    """
    if not tensor.is_floating_point():
        return True
    tensor = tensor.detach()
    if tensor.dtype.itemsize == 1:  # PyTorch can't sum 8-bit floats
        tensor = tensor.float()
    dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return math.isfinite(tensor.sum(dtype=dtype).item()) or bool(tensor.isfinite().all())
