"""The door between the engine and the other methods: what :mod:`hotswap_lab.core.methods` asks, answered."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from types import ModuleType

import torch
from peft import PeftType
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer

from ..core import methods
from ..core.adapter import Adapter
from ..core.change import Change
from ..core.decide import Draft
from ..core.errors import Refusal
from ..core.layers import have_same_values
from ..core.plan import Plan
from ..core.shadow import adaptable
from ..core.slot import Slot
from . import general
from .base_values import check_embeddings, kept_originals
from .decide import changes_form, former_layers, is_beyond, plan_with_donor, turns_embeddings_off
from .prepare import decide_general


class Beyond(methods.Rest):
    """All methods of PEFT: it loads the new adapter beside the model, and the two are compared."""

    method: ModuleType = general
    paddable: Collection[PeftType] = general.PADDABLE

    def knows(self, layer: torch.nn.Module) -> bool:
        return isinstance(layer, AdaLoraLayer)  # LoRA by its class, but with other tensors

    def takes(self, draft: Draft) -> bool:
        return is_beyond(draft)

    def plan(self, draft: Draft) -> Plan:
        return plan_with_donor(draft)

    def instead(self, draft: Draft) -> Plan | None:
        if changes_form(draft) or turns_embeddings_off(draft):
            return plan_with_donor(draft.afresh())
        if has_strange_leftovers(draft) and (plan := plan_with_donor(draft.afresh())).ok:
            return plan
        return None

    def check(self, draft: Draft) -> None:
        check_embeddings(draft)

    def take_base_weights(self, draft: Draft, tensors: dict[str, torch.Tensor]) -> None:
        """PEFT saves embedding weights beside their LoRA. They are fine as long as they are the base model's own."""
        for key in [key for key in tensors if ".lora_" not in key]:
            if (weight := _base_weight(draft, key)) is None or weight.shape != tensors[key].shape:
                continue
            if not have_same_values(weight, tensors.pop(key)):
                draft.refuse("other_base_weights", key=key)

    def former_layers(self, slot: Slot) -> frozenset[str]:
        return former_layers(slot.host.base, slot.adapter_name)

    def not_scaled(self, slot: Slot) -> str | None:
        kept = kept_originals(slot.host.base, slot.adapter_name)
        return "an adapter that came with base weights of its own, which would stay" if kept else None

    def prepare(self, slot: Slot, target_rank: int | None, family: Iterable[Adapter]) -> tuple[Change, list[Refusal]]:
        return decide_general(slot, target_rank, family)


def has_strange_leftovers(draft: Draft) -> bool:
    """Whether what no layer took may mean something to PEFT: names of older models, other base weights."""
    if not draft.left or draft.compiled or draft.is_prepared:
        return False
    base = draft.slot.host.base
    return any(
        adaptable(base, key) is None and not _is_unchanged_base_weight(draft, key, value)
        for key, value in draft.left.items()
    )


def _is_unchanged_base_weight(draft: Draft, key: str, value: torch.Tensor) -> bool:
    weight = _base_weight(draft, key)
    return weight is not None and weight.shape == value.shape and have_same_values(weight, value)


def _base_weight(draft: Draft, key: str) -> torch.Tensor | None:
    """The base model's weight of this name, whether or not its layer has an adapter, here or in the file."""
    path, _, name = key.rpartition(".")
    path = path.removesuffix(".base_layer")
    try:
        module = draft.slot.host.base.get_submodule(path)
    except AttributeError:
        return None
    module = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return module._parameters.get(name, module._buffers.get(name))


methods.rest = Beyond()
