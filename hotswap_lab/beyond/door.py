"""The door between the engine and the other methods: what :mod:`hotswap_lab.core.methods` asks, answered."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from peft import PeftType
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer

from ..core import methods
from ..core.layers import have_same_values
from ..core.plan import Plan
from ..core.shadow import adaptable
from ..core.slot import Slot
from . import general
from .base_values import given_up, kept_originals
from .configs import beside, complete, judge, not_scaled
from .decide import changes_form, former_layers, is_beyond, plan_with_donor
from .kinds import obstacle, turn_beside
from .prepare import decide_general, no_room


class Beyond(methods.Rest):
    """All methods of PEFT: it loads the new adapter beside the model, and the two are compared."""

    method: ModuleType = general
    paddable: Collection[PeftType] = general.PADDABLE
    takes: Any = staticmethod(is_beyond)
    plan: Any = staticmethod(plan_with_donor)
    prepare: Any = staticmethod(decide_general)
    complete: Any = staticmethod(complete)
    judge: Any = staticmethod(judge)
    no_room: Any = staticmethod(no_room)
    beside: Any = staticmethod(beside)
    obstacle: Any = staticmethod(obstacle)
    turn: Any = staticmethod(turn_beside)

    def knows(self, layer: torch.nn.Module) -> bool:
        return isinstance(layer, AdaLoraLayer)  # LoRA by its class, but with other tensors

    def instead(self, draft: Plan) -> Plan | None:
        is_free = not draft.compiled and not draft.is_prepared
        gives_up = is_free and not draft.refusals and given_up(draft)
        if changes_form(draft) or gives_up:
            return plan_with_donor(_afresh(draft))
        if is_free and has_strange_leftovers(draft) and (plan := plan_with_donor(_afresh(draft))).ok:
            return plan
        return None

    def take_leftovers(self, draft: Plan, tensors: dict[str, torch.Tensor]) -> None:
        """PEFT saves embedding weights beside their LoRA. They are fine as long as they are the base model's own."""
        for key in [key for key in tensors if ".lora_" not in key]:
            if (weight := _base_weight(draft, key)) is None or weight.shape != tensors[key].shape:
                continue
            if not have_same_values(weight, tensors.pop(key)):
                draft.refuse("other_base_weights", key=key)
        base, name = draft.slot.host.base, draft.slot.adapter_name
        paths = {path for key in tensors if (path := adaptable(base, key)) is not None}
        # where the adapter was before, it may be again without being asked for
        if paths and paths <= former_layers(base, name):
            draft.add_layers = True

    def not_scaled(self, slot: Slot) -> str | None:
        kept = kept_originals(slot.host.base, slot.adapter_name)
        with_base = "an adapter that came with base weights of its own, which would stay" if kept else None
        return not_scaled(slot.config) or with_base


def _afresh(plan: Plan) -> Plan:
    """The same swap, nothing of it decided but what was noted at first."""
    return replace(plan, config=plan.adapter.config, layers=[], refusals=[], notes=[*plan.notes], left={})


def has_strange_leftovers(draft: Plan) -> bool:
    """Whether what no layer took may mean something to PEFT: names of older models, other base weights."""
    strange = {key: value for key, value in draft.left.items() if adaptable(draft.slot.host.base, key) is None}
    weights = {key: _base_weight(draft, key) for key in strange}
    return any(weights[key] is None or not have_same_values(weights[key], value) for key, value in strange.items())


def _base_weight(draft: Plan, key: str) -> torch.Tensor | None:
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
