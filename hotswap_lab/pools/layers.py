"""How a layer computes with another adapter in each row of a batch.

``lora_A`` is ``[rows, rank, in]`` and ``lora_B`` is ``[rows, rank, out]``; each row of a batch is multiplied with its
own. The layers get to it as a variant of LoRA, which is how PEFT lets others compute.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from peft.tuners.lora import Conv2d, Embedding, Linear
from peft.tuners.lora.layer import LoraVariant

from ..beyond.kinds import KNOWN_VARIANTS
from ..core.errors import refuse
from ..core.parts import SlotTensor

#: what stands in the path of a layer that gets the tokens of all rows mixed
MIXED = "experts"
TRAINED = "parameters that require a gradient"


class Batch:
    """How a model's batch is made of rows; all of its layers go by it."""

    known: ClassVar[weakref.WeakValueDictionary[int, Batch]] = weakref.WeakValueDictionary()

    def __init__(self, room: Any = None, is_tiled: bool = False):
        #: whose rows they are; None in a copy of a model, which has none
        self.room = room
        self.rows: int = room.rows if room else 0
        #: diffusers repeats a batch as a whole, transformers repeats each row
        self.is_tiled = is_tiled
        #: how often a batch has each row, as was assigned; a compiled graph takes it for a constant
        self.copies: int = 1
        #: the same, as found out before a forward that is not compiled
        self.seen: int = 1
        self.number: int = max(self.known, default=0) + 1
        self.known[self.number] = self

    def __reduce__(self) -> tuple[type[Batch], tuple[()]]:
        return Batch, ()

    @property
    def size(self) -> int:
        """How many rows are assigned; 0 where all have the same adapter, and a batch may have any size."""
        return len(self.room.assigned) if self.room else 0

    def note(self, base: torch.nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Before the base model's forward: finds out how often each row is in its batch."""
        if torch.compiler.is_compiling() or not self.size:
            return
        given = [each for each in (*arguments, *named.values()) if isinstance(each, torch.Tensor) and each.ndim > 1]
        if given:
            self.seen = max(given[0].shape[0] // self.size, 1)

    def check(self, batch: int, copies: int) -> None:
        """Refuses a batch that is not made of the assigned rows."""
        text = f", each of them {copies} times" if copies > 1 else ""
        if not self.size:
            if batch > self.rows * copies:
                raise refuse("batch_above_rows", batch=batch, rows=self.rows, copies=text)
        elif batch != self.size * copies:
            raise refuse("batch_of_other_size", batch=batch, size=self.size, copies=text)

    def copies_in(self, batch: int) -> int:
        """How often a batch that a layer gets has each row."""
        if torch.compiler.is_compiling():
            return self.copies
        if not self.size:
            return batch
        # an encoder may run before each row is repeated
        copies = 1 if batch == self.size else self.seen
        self.check(batch, copies)
        return copies


@torch.library.custom_op("hotswap_lab::checked_batch", mutates_args=())
def checked_batch(scaling: torch.Tensor, number: int, batch: int, copies: int) -> torch.Tensor:
    """``scaling``, if batch and rows are what was assigned: a graph can't tell, and takes a size for a constant."""
    if (known := Batch.known.get(number)) is not None:
        known.check(batch, copies)
        known.room.check_rows()
    return scaling.clone()


@checked_batch.register_fake
def _(scaling: torch.Tensor, number: int, batch: int, copies: int) -> torch.Tensor:
    return torch.empty_like(scaling)


def times(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """``x @ weights``, matrix by matrix.

    Where each row has one token, reading the weights is what takes the time, and on a CPU a compiled sum reads them
    faster than a product of matrices.
    """
    if x.shape[1] == 1 and x.device.type == "cpu" and torch.compiler.is_compiling():
        return (x.transpose(1, 2) * weights).sum(1, keepdim=True)
    return torch.baddbmm(x.new_zeros(()), x, weights, beta=0)


@dataclass(eq=False)
class RowVariant(LoraVariant):
    """One layer's weights for all rows: ``a`` is ``[rows, rank, in]``, ``b`` ``[rows, rank, out]``.

    ``first`` is ``lora_A``, which is row 0. ``own`` are the scalings of the rows, ``[rows]``. ``trained``, ``[1]``, is
    the layer's scaling at strength 1: what set_scale or diffusers make of it, all rows are multiplied with.
    """

    a: torch.Tensor
    b: torch.Tensor
    trained: torch.Tensor
    own: torch.Tensor
    first: SlotTensor
    batch: Batch
    #: whether here is checked what holds for its likes as well
    is_gate: bool

    #: a copy of the layer computes with its own parameters
    is_of_a_room: ClassVar[bool] = True

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **_: Any
    ) -> torch.Tensor:
        if torch.is_grad_enabled() and self.first.parameter.requires_grad:
            raise refuse("rows_not_trained", adapter_name=active_adapter, found=TRAINED)
        if not torch.compiler.is_compiling():
            if self.first.parameter.data_ptr() != self.a.data_ptr():
                raise refuse("rows_lost_their_place", adapter_name=active_adapter)
            if self.is_gate and self.batch.size:
                self.batch.room.check_rows()
        copies = self.batch.copies_in(x.shape[0])
        count = x.shape[0] // copies
        scaling = self.own[:count] * (module.scaling[active_adapter] / self.trained)
        if torch.compiler.is_compiling() and self.is_gate:
            scaling = checked_batch(scaling, self.batch.number, x.shape[0], copies)
        if count > self.batch.rows:  # a graph that gets no further than the check
            return result * scaling.sum()
        if x.is_floating_point():
            x = module.lora_dropout[active_adapter](x)
        is_tiled = self.batch.is_tiled
        x = x.unflatten(0, (copies, count)).transpose(0, 1) if is_tiled else x.unflatten(0, (count, copies))
        inner = self.times_a(module, x, self.a[:count])
        scaling = scaling.to(torch.promote_types(inner.dtype, torch.float32))
        scaled = (inner.flatten(1, -2) * scaling[:, None, None]).to(inner.dtype)
        delta = times(scaled, self.b[:count])
        delta = delta.view(*inner.shape[:-1], delta.shape[-1])
        delta = (delta.transpose(0, 1) if is_tiled else delta).flatten(0, 1)
        return result + self.like_result(module, delta, result)

    def times_a(self, module: Any, x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        """``[rows, copies, ..., in]`` times A: ``[rows, copies, ..., rank]``."""
        return times(x.flatten(1, -2), a.transpose(1, 2)).view(*x.shape[:-1], a.shape[1])

    def like_result(self, module: Any, delta: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        """``[batch, ..., out]`` as the layer gives it."""
        return delta

    def refuse_sharing(self) -> None:
        raise refuse("rows_not_shared")

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: torch.Tensor) -> Any:
        raise refuse("rows_not_mergeable", adapter_name=active_adapter)

    merge_unsafe: Any = merge_safe
    unmerge: Any = merge_safe


class RowEmbedding(RowVariant):
    """The same for an embedding: ``a`` is ``[rows, rank, vocabulary]``, and looked up."""

    def times_a(self, module: Any, x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(len(x), device=x.device).view(-1, *[1] * (x.ndim - 1))
        return a.transpose(1, 2)[rows, x]

    def like_result(self, module: Any, delta: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        scale = module._get_embed_scale()
        return delta if scale is None else delta * scale.to(delta.dtype)


class RowConv2d(RowVariant):
    """The same for a convolution: what it sees at each place is one vector."""

    def times_a(self, module: Any, x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        conv = module.get_base_layer()
        seen = F.unfold(x.flatten(0, 1), conv.kernel_size, padding=conv.padding, stride=conv.stride)
        return super().times_a(module, seen.transpose(1, 2).unflatten(0, x.shape[:2]), a.flatten(2))

    def like_result(self, module: Any, delta: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        return delta.transpose(1, 2).reshape(result.shape)


KINDS: dict[type, type[RowVariant]] = {Linear: RowVariant, Embedding: RowEmbedding, Conv2d: RowConv2d}
KNOWN_VARIANTS.extend(KINDS.values())


def variant_for(layer: Any, path: str) -> type[RowVariant]:
    """How a layer computes row by row; refuses layers that can't."""
    base = layer.get_base_layer()
    plain = getattr(base, "groups", 1) == 1 and getattr(base, "padding_mode", "zeros") == "zeros"
    # PEFT's lora_A knows no dilation; and a string such as "same" is padding that unfold doesn't know
    plain = plain and set(getattr(base, "dilation", ())) <= {1} and not isinstance(getattr(base, "padding", 0), str)
    found = next((variant for kind, variant in KINDS.items() if isinstance(layer, kind)), None)
    if found is None or not plain or MIXED in path.split("."):
        raise refuse("no_rows_on_layer", path=path, kind=type(layer).__name__)
    return found
