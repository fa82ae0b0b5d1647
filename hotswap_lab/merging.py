"""Adapters that are merged into base weights: what can't be swapped then, and what can't be worked out."""

from __future__ import annotations

from collections.abc import Iterable

from peft.tuners.mixed import MixedModel
from peft.tuners.tuners_utils import BaseTunerLayer

from .errors import Refusal, listing
from .host import Host
from .slot import SlotLayer


def merged(adapter_name: str) -> Refusal:
    """Why an adapter that is merged can't be swapped, in PEFT's words."""
    return Refusal(
        f"Cannot hot-swap adapter '{adapter_name}' because it is currently merged into the base weights.",
        found="base weights that contain the old adapter",
        expected="an unmerged adapter: unmerging after a swap would subtract the wrong weights",
        next_step="call model.unmerge_adapter() (diffusers: unfuse_lora()) first",
    )


def merged_beside(adapter_name: str, others: Iterable[str]) -> Refusal:
    """Why a swap that goes by the base weights has to wait until they are the base model's own again."""
    return Refusal(
        f"Cannot hot-swap adapter '{adapter_name}' while {listing(map(repr, others))} is merged into the base weights.",
        found="base weights that contain another adapter",
        expected="the base model's own weights: what this swap writes is worked out from them",
        next_step="call model.unmerge_adapter() (diffusers: unfuse_lora()) first",
    )


def merged_where_read(host: Host, layers: Iterable[SlotLayer]) -> list[str]:
    """The adapters that are merged into base weights which turning these layers off goes by."""
    off = [layer.module for layer in layers if any(tensor.off is not None for tensor in layer.tensors)]
    if off and isinstance(host.tuner, MixedModel):
        # layers of other methods may be around these
        read = {id(module.get_base_layer()) for module in off}
        tuners = (module for module in host.base.modules() if isinstance(module, BaseTunerLayer))
        off = [module for module in tuners if id(module.get_base_layer()) in read]
    return sorted({name for module in off for name in module.merged_adapters})
