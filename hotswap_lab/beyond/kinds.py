"""Rare kinds of LoRA's tensors: grouped convolutions, DoRA's magnitudes, biases; and what can't be written to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper, _ConvNd
from peft.tuners.lora.variants import DoraLinearVariant, _DoraConvNdVariant
from peft.utils.integrations import dequantize_module_weight

from ..core import lora
from ..core.change import ON_CONFIG
from ..core.host import Config, Host, TunerLayer, modules_in
from ..core.journal import Journal
from ..core.methods import method_of
from ..core.parts import KINDS, SlotTensor
from ..core.slot import Slot

_overlaps = torch._debug_has_internal_overlap

# ---- grouped convolutions


@dataclass(eq=False)
class GroupedTensor(SlotTensor):
    """A ``lora_A`` or ``lora_B`` of a grouped convolution.

    Each group sees a share of the rank components. ``lora_B`` holds only ``rank / groups`` entries along its rank axis.
    ``lora_A`` has one block for each group, and each of them is padded for itself, so that every group goes on seeing
    its own.
    """

    groups: int = 1

    @property
    def rank_step(self) -> int:
        return self.groups

    @property
    def _share(self) -> int:
        return self.groups if self.rank_axis else 1

    @property
    def capacity(self) -> int:
        return self.rank_of(self.parameter.shape)

    def rank_of(self, shape: Sequence[int]) -> int:
        return super().rank_of(shape) * self._share

    def shape_for(self, rank: int) -> tuple[int, ...]:
        return super().shape_for(rank // self._share)

    def split(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self.rank_axis else tensor.unflatten(0, (self.groups, -1))

    def _narrow(self, padded: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        return self.split(padded).narrow(1, start // self.groups, (stop - start) // self.groups)


def rare_kinds(layer: TunerLayer, adapter_name: str, tensors: list[SlotTensor]) -> list[SlotTensor]:
    """The tensors of a layer, with those of grouped convolutions as such, and with DoRA's magnitude."""
    if isinstance(layer, _ConvNd) and (groups := layer.get_base_layer().groups) > 1:
        tensors = [each if each.rank_axis is None else GroupedTensor(**vars(each), groups=groups) for each in tensors]
    if adapter_name in layer._modules.get("lora_magnitude_vector", ()):
        name, owner = "lora_magnitude_vector", layer.lora_magnitude_vector[adapter_name]
        tensors = [*tensors, MagnitudeTensor(name, f"{name}.{adapter_name}.weight", owner, "weight", layer=layer)]
    return tensors


KINDS.insert(0, rare_kinds)  # which may be spread over processes


# ---- magnitudes and biases


@dataclass(eq=False)
class MagnitudeTensor(SlotTensor):
    """DoRA's magnitude, one number for each output (arXiv 2402.09353)."""

    layer: TunerLayer = None

    reads_base: ClassVar[bool] = True

    def off_value(self) -> torch.Tensor:
        """The norm of the base weights: with it, and B = 0, DoRA computes what the base layer does."""
        weight, owner = dequantize_module_weight(self.layer.get_base_layer()), self.owner
        with torch.no_grad():
            return owner.get_weight_norm(weight, 0.0, 1.0).to(owner.weight.dtype).reshape(owner.weight.shape)


def reads_base(slot: Slot) -> bool:
    """Whether turning a layer off takes a look at its base weights."""
    return True in [tensor.reads_base for tensor in slot.tensors]


def forget_norms(host: Host, adapter_name: str, config: Config, journal: Journal) -> None:
    """Clears what DoRA has computed from the weights and kept (``peft.tuners.lora.dora.ENABLE_DORA_CACHING``)."""
    if not (getattr(config, "use_dora", False) or getattr(host.configs[adapter_name], "use_dora", False)):
        return
    for _, layer in modules_in(host.base):
        if adapter_name in getattr(layer, "lora_magnitude_vector", ()):
            cache = layer.lora_magnitude_vector[adapter_name].__dict__.get("_dora_cache", {})
            journal.remove(cache, *cache)


ON_CONFIG.append(forget_norms)


def turn_beside(layer: TunerLayer, adapter_name: str, on: bool, journal: Journal) -> None:
    """Lets a magnitude or bias be trained only where the adapter is on, and as A and B are.

    These two need nothing: while both are zero, neither has a gradient. A magnitude or a bias has.
    """
    if method_of(layer) is not lora or not lora.has_adapter(layer, adapter_name):
        return
    # not every module that stands for a lora_B has the attribute: BD-LoRA's has only a weight
    has_bias = getattr(layer.lora_B._modules.get(adapter_name), "bias", None) is not None
    if has_bias or adapter_name in layer.lora_magnitude_vector:
        tensors = lora.tensors_of(layer, adapter_name)
        trained = on and any(each.parameter.requires_grad for each in tensors if each.rank_axis is not None)
        for parameter in (each.parameter for each in tensors if each.rank_axis is None):
            if parameter.requires_grad != trained:
                journal.set_attribute(parameter, "requires_grad", trained)
    # PEFT's merging looks for a place to add a bias to, and fails on base layers without one, though it be zero
    journal.set_item(layer.lora_bias, adapter_name, on and has_bias)


# ---- what can't be written to

#: variants whose tensors are known
KNOWN_VARIANTS: list[type] = [type(None), DoraLinearVariant, _DoraConvNdVariant]


def is_special(layer: TunerLayer, adapter_name: str) -> bool:
    """Whether a layer of LoRA has state beyond what its tensors are known to be."""
    variant = layer.lora_variant.get(adapter_name)
    return isinstance(layer, (MultiheadAttention, ParamWrapper)) or not isinstance(variant, tuple(KNOWN_VARIANTS))


def obstacle(layer: TunerLayer, adapter_name: str, tensors: Sequence[SlotTensor]) -> str | None:
    """Why this layer of LoRA can't be written to, or None."""
    if is_special(layer, adapter_name):
        return f"a {type(layer.lora_variant.get(adapter_name, layer)).__name__}"
    if not tensors:
        return "a lora_A and a lora_B that are no parameters, as FullyShardedDataParallel (FSDP1) leaves them"
    for tensor in tensors:
        parameter = tensor.owner._parameters.get(tensor.name)
        if parameter is None:
            return f"a parametrized or replaced {tensor.named_key}"
        if parameter.is_meta:
            if hasattr(tensor.owner, "_hf_hook"):
                # where the hook keeps it, nobody would look for a change
                return (
                    f"a {tensor.named_key} that accelerate keeps elsewhere between calls: swap after "
                    "accelerate.hooks.remove_hook_from_submodules(model), then offload the model again"
                )
            return f"a {tensor.named_key} without data (on the meta device)"
        if tensor.is_shard and (reason := tensor.obstacle()):
            return f"a {tensor.named_key} {reason}"
        plain = type(parameter) is torch.nn.Parameter and type(parameter.data) is torch.Tensor
        if not plain and not tensor.is_shard:
            return f"a {tensor.named_key} of type {type(parameter.data).__name__}"
        if not parameter.is_contiguous() and _overlaps(tensor.memory) == 1:
            return f"an expanded {tensor.named_key}, whose values share memory"
    return None
