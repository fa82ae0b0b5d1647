"""LoRA layers that compute with a different adapter in each row of a batch.

``lora_A`` is ``[rows, rank, in]`` and ``lora_B`` is ``[rows, rank, out]``; each row of a batch is multiplied with its
own. The layers call this code as a variant of LoRA, which is PEFT's interface for that. A layer's input holds the rows
one after the other, as blocks of its first axis: ``[batch, ...]``, or ``[batch * tokens, ...]``.
:mod:`~hotswap_lab.pools.proof` shows that this is so, and that nothing mixes the rows before.

Tests: ``tests/pools/test_row_kinds.py`` and ``tests/pools/test_row_pool.py``.
"""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from peft.tuners.lora import Conv2d, Embedding, Linear
from peft.tuners.lora.layer import LoraVariant

from ..core.errors import refused
from ..core.tensors import SlotTensor
from .batch import Batch

#: a part of the path of layers whose input mixes the tokens of all rows
MIXED = "experts"
#: the attributes of a variant that compiled code reads, and the layer's buffers for them while the model is exported
READ = {name: f"hotswap_rows_{name}" for name in ("a", "b", "trained", "own")}
TRAINED = "parameters that require a gradient"


def times(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """``x @ weights``, matrix by matrix.

    If each row has one token, most of the time goes into reading the weights, and on a CPU a compiled sum reads them
    faster than a product of matrices.
    """
    if x.shape[1] == 1 and x.device.type == "cpu" and torch.compiler.is_compiling():
        return (x.transpose(1, 2) * weights).sum(1, keepdim=True)
    return torch.baddbmm(x.new_zeros(()), x, weights, beta=0)


@dataclass(eq=False)
class RowVariant(LoraVariant):
    """One layer's weights for all rows: ``a`` is ``[rows, rank, in]``, ``b`` ``[rows, rank, out]``.

    ``tensors`` are ``lora_A`` and ``lora_B``, which are row 0. ``own``, ``[rows]``, has the scalings of the rows.
    ``trained``, ``[1]``, is the layer's scaling at strength 1: a factor from ``set_scale`` or diffusers multiplies all
    rows. ``index`` is the layer's number in its slot; ``is_gate`` says that it is the first of its kind there.
    """

    a: torch.Tensor
    b: torch.Tensor
    trained: torch.Tensor
    own: torch.Tensor
    tensors: tuple[SlotTensor, ...]
    batch: Batch
    index: int
    path: str
    is_gate: bool

    #: whether the input is an index into ``a``, and not a factor of it
    looks_up: ClassVar[bool] = False

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **_: Any
    ) -> torch.Tensor:
        # pruning, for one, takes parameters out of their tables; a graph reads the pool's memory alone
        if not torch.compiler.is_compiling() and any(t.name not in t.owner._parameters for t in self.tensors):
            raise refused("rows_lost_their_place", adapter_name=active_adapter)
        if torch.is_grad_enabled() and self.tensors[0].parameter.requires_grad:
            raise refused("rows_not_trained", adapter_name=active_adapter, found=TRAINED)
        own = self.exported(module) if torch.compiler.is_exporting() else self
        strength = module.scaling[active_adapter] / own.trained
        batch, repeats = self.batch, 1
        if torch.compiler.is_compiling():
            repeats = batch.copies.tiles
            count, block = batch.blocks_of(x.shape[0])
            if count > batch.rows:  # this graph never gets past the check
                return result * strength.sum()
            a, b, scaling = own.a[:count], own.b[:count], own.own[:count] * strength
            if self.is_gate:
                scaling = batch.checked_part(scaling, x.shape[0])
        elif (weights := self._current(active_adapter, x, strength)) is not None:
            a, b, scaling = weights
            count = len(scaling)
            repeats = batch.times_of(x.shape[0]) if count > 1 else 1
            block, rest = divmod(x.shape[0], count * repeats)
            if rest:
                raise refused("rows_not_in_layer", paths=self.path, found=f"an input of shape {tuple(x.shape)}")
        else:
            return result
        if x.is_floating_point():
            x = module.lora_dropout[active_adapter](x)
        if repeats > 1:
            x = x.unflatten(0, (repeats, count, block)).transpose(0, 1).flatten(0, 2)
        x = x.unflatten(0, (count, repeats * block))
        inner = self.times_a(module, x, a)
        scaling = scaling.to(torch.promote_types(inner.dtype, torch.float32))
        delta = times((inner.flatten(1, -2) * scaling[:, None, None]).to(inner.dtype), b)
        delta = delta.view(*inner.shape[:-1], delta.shape[-1])
        if repeats > 1:
            delta = delta.unflatten(1, (repeats, block)).transpose(0, 1).flatten(0, 1)
        delta = delta.flatten(0, 1)
        return result + self.like_result(module, delta, result)

    def exported(self, module: Any) -> SimpleNamespace:
        """The attributes that compiled code reads, as buffers that an export keeps; refuses an export without these."""
        if module._buffers.keys().isdisjoint(READ.values()):
            raise refused("rows_not_exportable")
        return SimpleNamespace(**{name: module._buffers[buffer] for name, buffer in READ.items()})

    def _current(
        self, active_adapter: str, x: torch.Tensor, strength: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """The weights and scalings of all rows, outside of a graph; None if no row has an adapter on the layer."""
        batch, first = self.batch, self.tensors[0].parameter
        if (probe := batch.local.probe) is not None:
            return (*probe.weights(self), probe.mask.to(x.device)) if probe.acts(self.index, x) else None
        if batch.size and first.data_ptr() != self.a.data_ptr():
            raise refused("rows_lost_their_place", adapter_name=active_adapter)
        if not batch.differs:  # PEFT's parameters are row 0, wherever they are
            a, b = (tensor.parameter.movedim(tensor.rank_axis or 0, 0)[None] for tensor in self.tensors)
            return a, b.flatten(2), self.own[:1] * strength
        batch.check_part()
        rows = slice(batch.size)
        return (self.a[rows], self.b[rows], self.own[rows] * strength) if self.index in batch.acting else None

    def check_copying(self, adapter_name: str) -> None:
        """Refuse a copy while rows are assigned: it has the parameters alone, which are row 0, and no rows."""
        if self.batch.size:
            raise refused("rows_differ", adapter_name=adapter_name)

    def times_a(self, module: Any, x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        """``[rows, copies, ..., in]`` times A: ``[rows, copies, ..., rank]``."""
        return times(x.flatten(1, -2), a.transpose(1, 2)).view(*x.shape[:-1], a.shape[1])

    def like_result(self, module: Any, delta: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        """Turn ``[batch, ..., out]`` into the form of the layer's result."""
        return delta

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: torch.Tensor) -> Any:
        raise refused("rows_not_mergeable", adapter_name=active_adapter)

    merge_unsafe: Any = merge_safe
    unmerge: Any = merge_safe


class RowEmbedding(RowVariant):
    """A :class:`RowVariant` for an embedding: ``a``, ``[rows, rank, vocabulary]``, is indexed by the input."""

    looks_up: ClassVar[bool] = True

    def times_a(self, module: Any, x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        # an export takes len(x) for a constant
        return a.transpose(1, 2)[torch.arange(x.shape[0], device=x.device).view(-1, *[1] * (x.ndim - 1)), x]

    def like_result(self, module: Any, delta: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        scale = module._get_embed_scale()
        return delta if scale is None else delta * scale.to(delta.dtype)


class RowConv2d(RowVariant):
    """A :class:`RowVariant` for a convolution: the input patch at each position is one vector."""

    def times_a(self, module: Any, x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        conv = module.get_base_layer()
        patches = F.unfold(x.flatten(0, 1), conv.kernel_size, padding=conv.padding, stride=conv.stride)
        return super().times_a(module, patches.transpose(1, 2).unflatten(0, x.shape[:2]), a.flatten(2))

    def like_result(self, module: Any, delta: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        return delta.transpose(1, 2).reshape(result.shape)


KINDS: dict[type, type[RowVariant]] = {Linear: RowVariant, Embedding: RowEmbedding, Conv2d: RowConv2d}


def variant_for(layer: Any, path: str) -> type[RowVariant]:
    """The variant for a layer's rows; refuses layers that can't compute row by row."""
    base = layer.get_base_layer()
    is_plain = getattr(base, "groups", 1) == 1 and getattr(base, "padding_mode", "zeros") == "zeros"
    # PEFT's lora_A has no dilation; and unfold doesn't accept padding by a string such as "same"
    is_plain = (
        is_plain and set(getattr(base, "dilation", ())) <= {1} and not isinstance(getattr(base, "padding", 0), str)
    )
    variants = [variant for kind, variant in KINDS.items() if isinstance(layer, kind)]
    if not variants or not is_plain or MIXED in path.split("."):
        raise refused("no_rows_on_layer", path=path, kind=type(layer).__name__)
    return variants[0]
