"""Everything in LoRA besides plain A and B: grouped convolutions, DoRA's magnitudes, biases.

Tests: ``tests/beyond/test_lora_kinds.py`` and ``tests/beyond/test_off.py``.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.lora.variants import DoraConv1dVariant, DoraConv2dVariant, DoraConv3dVariant, DoraLinearVariant

from ..core.adapter import LOST_ORIGINALS
from ..core.errors import Refusal, listing, refusal
from ..core.host import Config, TunerLayer, modules_in
from ..core.journal import Journal
from ..core.lora_method import Lora
from ..core.method import Method
from ..core.prepared import is_marked_off
from ..core.slot import Slot
from ..core.state_dict_hooks import look_after
from ..core.tensors import SlotTensor
from . import configs
from .base_values import kept_originals, lost_originals
from .shards import spread

# ---- grouped convolutions


@dataclass(eq=False)
class GroupedTensor(SlotTensor):
    """A ``lora_A`` or ``lora_B`` of a grouped convolution.

    Each group uses a share of the rank components. ``lora_B`` has only ``rank / groups`` entries along its rank axis.
    ``lora_A`` has one block for each group. Each block is padded by itself, so that every group keeps its own
    components.
    """

    #: the number of groups
    rank_step: int = 1

    @property
    def _share(self) -> int:
        return self.rank_step if self.rank_axis else 1

    @property
    def capacity(self) -> int:
        return self.rank_of(self.parameter.shape)

    def rank_of(self, shape: Sequence[int]) -> int:
        return super().rank_of(shape) * self._share

    def shape_for(self, rank: int) -> tuple[int, ...]:
        return super().shape_for(rank // self._share)

    def split(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self.rank_axis else tensor.unflatten(0, (self.rank_step, -1))

    def _narrow(self, padded: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        return self.split(padded).narrow(1, start // self.rank_step, (stop - start) // self.rank_step)


def _rare_kinds(layer: TunerLayer, adapter_name: str, tensors: list[SlotTensor]) -> list[SlotTensor]:
    """The tensors of a layer, with :class:`GroupedTensor` for grouped convolutions, and with DoRA's magnitude."""
    step = getattr(layer.get_base_layer(), "groups", 1)
    if step > 1:
        tensors = [
            tensor if tensor.rank_axis is None else GroupedTensor(**vars(tensor), rank_step=step) for tensor in tensors
        ]
    if adapter_name in layer._modules.get("lora_magnitude_vector", ()):
        owner = layer.lora_magnitude_vector[adapter_name]
        tensors = [*tensors, SlotTensor(MAGNITUDE, f"{MAGNITUDE}.{adapter_name}.weight", owner, "weight")]
    return tensors


# ---- magnitudes and biases

#: variants whose only tensor besides A and B is a magnitude
DORA = (DoraLinearVariant, DoraConv1dVariant, DoraConv2dVariant, DoraConv3dVariant)


#: DoRA's magnitude: one number for each output (arXiv 2402.09353)
MAGNITUDE = "lora_magnitude_vector"


class _Offable:
    """A mixin for a variant of DoRA, which computes the same as the base layer where the magnitude is zero.

    DoRA's magnitude sets the norms of the weights. The norms of the base weights would mean "no adapter here", but only
    until those change. A magnitude of zero would remove the layer, so no adapter has it, and it can mean "off", like
    zeros in A and B. The forward checks the value, so a compiled graph does, too.
    """

    def forward(self, module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **given: Any) -> Any:
        is_on = module.lora_magnitude_vector[active_adapter].weight.any().to(result.device)
        return torch.where(is_on, super().forward(module, active_adapter, x, result, **given), result)

    def __reduce__(self) -> tuple:
        return offable, (type(self).hotswap_original,)


@functools.cache
def offable(original: type) -> Any:
    """A variant of DoRA that can be off. All layers share it, because variants have no state."""
    return type(original.__name__, (_Offable, original), {"hotswap_original": original})()


def zero_magnitudes(tensors: Mapping[str, torch.Tensor]) -> Iterator[Refusal]:
    """Refuse magnitudes that would turn DoRA off."""
    if zero := [key for key, magnitude in tensors.items() if MAGNITUDE in key and not magnitude.any()]:
        yield refusal("magnitude_zero", count=len(zero), keys=listing(zero, 2))


def forget_norms(slot: Slot, config: Config, journal: Journal) -> None:
    """Clear DoRA's cache of values computed from the weights (``peft.tuners.lora.dora.ENABLE_DORA_CACHING``)."""
    host, adapter_name = slot.host, slot.adapter_name
    if not (getattr(config, "use_dora", False) or getattr(host.configs[adapter_name], "use_dora", False)):
        return
    for _, layer in modules_in(host.base):
        if adapter_name in getattr(layer, "lora_magnitude_vector", ()):
            cache = layer.lora_magnitude_vector[adapter_name].__dict__.get("_dora_cache", {})
            journal.remove(cache, *cache)


# ---- the method


class Beyond(Method):
    """The methods that LoRA and all other PEFT methods share."""

    judge: ClassVar[Callable[..., Any]] = staticmethod(configs.judge)

    def follow(self, slot: Slot, config: Config, journal: Journal) -> None:
        """Record on a config which originals are lost, look after state dicts, and clear caches."""
        # this swap doesn't change the base weights
        vars(config)[LOST_ORIGINALS] = lost_originals(slot.host, slot.adapter_name)
        look_after(slot, config, journal)
        forget_norms(slot, config, journal)

    def not_scaled(self, slot: Slot) -> str | None:
        """Describe an adapter that can't be scaled completely; None if it can."""
        kept = kept_originals(slot.host.base, slot.adapter_name)
        with_base = "an adapter that came with base weights of its own, which would stay" if kept else None
        return configs.not_scaled(slot.config) or with_base


class FullLora(Beyond, Lora):
    """LoRA with everything that PEFT's configs can ask for."""

    variants: ClassVar[tuple[type, ...]] = (*Lora.variants, *DORA)
    unknown: ClassVar[Callable[..., Any]] = staticmethod(configs.unknown)
    extra_state: ClassVar[Callable[..., Any]] = staticmethod(configs.extra_state)

    def tensors_of(self, layer: torch.nn.Module, adapter_name: str) -> list[SlotTensor] | None:
        # AdaLoRA's layers inherit from LoRA's, but have other tensors
        tensors = None if isinstance(layer, AdaLoraLayer) else super().tensors_of(layer, adapter_name)
        return None if tensors is None else spread(_rare_kinds(layer, adapter_name, tensors))

    def turn(self, layer: TunerLayer, adapter_name: str, on: bool, journal: Journal) -> None:
        """Make a magnitude or bias trainable only where the adapter is on and its A or B is trainable.

        A and B need no change: while both are zero, their gradients are zero. Those of a magnitude or bias are not.
        """
        tables = layer._modules
        if not on:
            self.make_offable(layer, adapter_name, journal)
        if adapter_name not in tables["lora_A"] and adapter_name not in tables["lora_embedding_A"]:
            return
        # BD-LoRA's lora_B has no attribute ``bias``
        has_bias = getattr(tables["lora_B"]._modules.get(adapter_name), "bias", None) is not None
        if has_bias or adapter_name in tables["lora_magnitude_vector"]._modules:
            tensors = self.tensors_of(layer, adapter_name) or []
            trained = on and any(tensor.parameter.requires_grad for tensor in tensors if tensor.rank_axis is not None)
            for tensor in tensors:
                if tensor.rank_axis is None and tensor.parameter.requires_grad != trained:
                    journal.set_attribute(tensor.parameter, "requires_grad", trained)
        # with lora_bias set, PEFT's merging fails on a base layer that has no bias, even if the adapter's is zero
        journal.set_item(layer.lora_bias, adapter_name, on and has_bias)

    def make_offable(self, layer: TunerLayer, adapter_name: str, journal: Journal) -> None:
        variant = layer.lora_variant.get(adapter_name)
        if isinstance(variant, DORA) and not isinstance(variant, _Offable):  # the one of embeddings is a subclass
            journal.set_item(layer.lora_variant, adapter_name, offable(type(variant)))

    def no_room(self, slot: Slot, ranks: Mapping[str, int]) -> Iterator[Refusal]:
        base, name = slot.host.base, slot.adapter_name
        layers = {layer.path: layer for layer in slot.layers}
        active = [layer for layer in slot.layers if not is_marked_off(layer.module, name)]
        tensors = {f"{layer.path}.{tensor.key}": tensor.parameter for layer in active for tensor in layer.tensors}
        yield from zero_magnitudes(tensors)
        for path, rank in ranks.items():
            if pointless := [*configs.pointless_rank(rank, path, base.get_submodule(path))]:
                yield from pointless
                return
            if path in layers and rank % (groups := layers[path].tensors[0].rank_step):
                kind, next_rank = type(layers[path].module).__name__, -(-rank // groups) * groups
                yield refusal(
                    "target_rank_not_for_groups", kind=kind, groups=groups, rank=rank, path=path, next_rank=next_rank
                )
