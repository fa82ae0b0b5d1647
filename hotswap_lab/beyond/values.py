"""Swaps that change more than values and ranks: PEFT loads the adapter beside the model, and the two are compared."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..core.draft import Draft
from ..core.errors import listing
from ..core.parts import WholeSettings
from ..core.plan import Action, LayerPlan, Plan
from ..core.prepared import has_fixed_size
from ..core.slot import SlotLayer
from ..core.state_view import is_padded
from ..core.whole import check_compiled, check_parallel_training, turned_off
from ..core.words import merged
from ..shards import holds_shards
from . import general
from .base_values import kept_originals
from .decide import decide_graft
from .graft import Extent, WrapperChange
from .wrappers import wrappers_in


def is_beyond(draft: Draft) -> bool:
    """Whether one of the two adapters is more than LoRA's own tensors, or another method."""
    slot, method = draft.slot, draft.slot.method
    if method is general or (draft.base_weights and slot.room is None):
        return True
    if method.needs_donor(slot.config) or method.needs_donor(draft.adapter.config):
        return True
    if kept_originals(slot.host.base, slot.adapter_name):
        return True
    return slot.is_special


def changes_form(draft: Draft, tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether a layer would have other tensors afterwards than it has now: DoRA's magnitude, a bias."""
    form = draft.slot.method.form_for(draft.config)
    return any(
        f"{path}.{layer.tensors[0].key}" in tensors
        for layer, present in zip(draft.slot.layers, draft.slot.forms, strict=True)
        if present != form
        for path in layer.paths
    )


def turns_embeddings_off(draft: Draft) -> bool:
    """PEFT saves the weights of embeddings that are wrapped, so these layers are given up rather than turned off."""
    if draft.refusals or draft.compiled or draft.is_prepared:
        return False
    return bool(draft.slot.embeddings) and any(plan.layer in draft.slot.embeddings for plan in turned_off(draft))


def plan_with_donor(draft: Draft) -> Plan:
    """Decides a swap that changes more than values and ranks, or is of another method than LoRA."""
    slot, name = draft.slot, draft.slot.adapter_name
    if holds_shards(slot.host.base):
        draft.refuse(
            "A swap of this kind can't be done in a model that is spread over processes.",
            found="sharded parameters, and an adapter that is more than lora_A and lora_B",
            expected="plain LoRA, of which each process can write its own shards",
            next_step="load this adapter into a fresh base model and shard that",
        )
        return draft.finish()
    grafting = draft.grafting = decide_graft(
        slot,
        draft.adapter,
        add_layers=draft.add_layers,
        base_weights=draft.base_weights,
        default_targets=not draft.check_targets,
    )
    draft.config = grafting.config
    wrappers = [module for _, module in wrappers_in(slot.host.base)]
    if any(name in getattr(module, "merged_adapters", ()) for module in wrappers):
        draft.refusals.append(merged(name))
    draft.refusals += grafting.refusals
    draft.layers = [_as_layer_plan(change) for change in grafting.graft.changes]
    if not grafting.writes_values_only:
        found = listing(grafting.graft.differences, 3)
        if draft.compiled:
            draft.refuse(
                "This swap can't be done in a compiled model.",
                found=f"{len(grafting.graft.differences)} changes beyond the values of tensors: {found}",
                expected="an adapter with the same shapes, scalars and layers as the loaded one",
                next_step="swap before compiling, or load this adapter into a fresh base model and compile that",
            )
        elif any(is_padded(layer.module, name) or has_fixed_size(layer.module, name) for layer in slot.layers):
            draft.refuse(
                "This swap can't be done in a prepared model.",
                found=f"{len(grafting.graft.differences)} changes beyond what was prepared: {found}",
                expected="an adapter of the kind that the model was prepared for",
                next_step="swap before preparing, or load this adapter into a fresh base model",
            )
    if grafting.graft.resizes or grafting.graft.steps:
        check_parallel_training(draft, len(grafting.graft.changes), "another shape at the model")
    check_compiled(draft)
    return draft.finish()


def _as_layer_plan(change: WrapperChange) -> LayerPlan:
    action = {
        Extent.SHAPES: Action.RESIZE,
        Extent.REMOVED: Action.OFF,
        Extent.ADDED: Action.ADD,
    }.get(change.change, Action.COPY)
    settings = None if action is Action.OFF else WholeSettings(change.rank_after, change.scaling)
    return LayerPlan(SlotLayer(change.path, change.module, ()), action, change.rank_before, settings, ())
