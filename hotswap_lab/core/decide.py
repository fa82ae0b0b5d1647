"""Decides a swap: the order in which everything is looked at."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace

import torch
from transformers.pytorch_utils import Conv1D

from ..beyond.values import changes_form, is_beyond, plan_with_donor, turns_embeddings_off
from .adapter import Adapter
from .beforehand import check_containers, check_kind, check_slot
from .compiled import compiled_parts
from .draft import Draft
from .errors import listing
from .host import find_host
from .layers import by_canonical_key, plan_layers, resize_what_is_off
from .leftovers import has_strange_leftovers, plan_leftovers
from .plan import Plan
from .slot import Slot, slot_for
from .whole import (
    check_base,
    check_capacity,
    check_compiled,
    check_embeddings,
    check_frozen,
    check_shards,
    note_missing_targets,
    retarget_config,
)


def make_plan(
    slot: Slot,
    adapter: Adapter,
    *,
    add_layers: bool = False,
    check_targets: bool = True,
    all_off: bool = False,
    base_weights: Mapping[str, torch.Tensor] | None = None,
) -> Plan:
    """Decides a swap. Reads the slot and the adapter, writes nothing, raises nothing: see ``Plan.refusals``.

    Parameters
    ----------
    slot, adapter:
        What is swapped out, and what is swapped in.
    add_layers:
        Whether layers that the slot lacks are added (not possible in a compiled model) rather than refused.
    check_targets:
        Whether the adapter's config must name the layers that its tensors belong to, as a fresh load demands.
    all_off:
        Whether an adapter without any tensors is meant to be, and turns off every layer.
    base_weights:
        Original values of base weights that the loaded adapter has overwritten, by name.
    """
    adapter, name = _apart(adapter, slot), slot.adapter_name
    options = dict(add_layers=add_layers, check_targets=check_targets, all_off=all_off, base_weights=base_weights)
    draft = Draft(
        slot,
        adapter,
        adapter.config,
        compiled_parts(slot.host.root),
        lambda: make_plan(slot_for(find_host(slot.host.root, name), name), adapter, **options),
        add_layers,
        check_targets,
        base_weights,
    )
    check_kind(draft)
    if draft.refusals:
        return draft.finish()
    try:
        return _plan_by_heart(draft, all_off)
    except NotByHeart as beyond:
        plan = plan_with_donor(draft.afresh())
        return plan if plan.ok or beyond.otherwise is None else beyond.otherwise


class NotByHeart(Exception):  # noqa: N818 - no error: another way is taken
    """PEFT must load the new adapter beside the model, so that the two can be compared.

    ``otherwise`` is the plan that holds if it can't.
    """

    def __init__(self, otherwise: Plan | None = None):
        super().__init__()
        self.otherwise = otherwise


def _plan_by_heart(draft: Draft, all_off: bool) -> Plan:
    slot, adapter, check_targets = draft.slot, draft.adapter, draft.check_targets
    if is_beyond(draft):
        raise NotByHeart
    draft.config = slot.method.resolved_config(adapter.config, slot.host)
    if check_targets and draft.config.target_modules is None:
        draft.refuse(
            "The adapter's config does not say which layers it targets.",
            found="target_modules=None, and no default for this kind of model",
            expected="the names of the layers that the tensors belong to",
            next_step="complete target_modules in adapter_config.json",
        )
        return draft.finish()
    draft.config.inference_mode = slot.config.inference_mode
    if any(isinstance(layer.module.get_base_layer(), (torch.nn.Linear, Conv1D)) for layer in slot.layers):
        # PEFT corrects this for the base model's kind of layers, as it has done in the loaded adapter's config
        draft.config.fan_in_fan_out = slot.config.fan_in_fan_out
    check_slot(draft)
    if check_targets:
        check_containers(draft)
    if draft.refusals:
        return draft.finish()
    tensors = by_canonical_key(draft)
    if changes_form(draft, tensors):
        raise NotByHeart
    plan_layers(draft, tensors)
    is_strange = has_strange_leftovers(draft, tensors)
    plan_leftovers(draft, tensors)
    if turns_embeddings_off(draft):
        raise NotByHeart
    resize_what_is_off(draft)
    check_embeddings(draft)
    check_capacity(draft)
    check_base(draft)
    check_shards(draft)
    check_frozen(draft)
    check_compiled(draft)
    if check_targets:
        note_missing_targets(draft)
    else:
        retarget_config(draft)
    if not draft.refusals and not all_off and not any(layer.settings for layer in draft.layers):
        draft.refuse(
            "Hot swapping the adapter did not succeed, it has nothing for any layer of the loaded one.",
            found=f"keys such as {listing(map(repr, adapter.tensors), 2)}",
            expected=f"keys for layers such as {listing((repr(layer.path) for layer in slot.layers), 2)}",
            next_step="check that both adapters were made for the same base model",
        )
    plan = draft.finish()
    if is_strange:
        raise NotByHeart(plan)
    return plan


def _apart(adapter: Adapter, slot: Slot) -> Adapter:
    """The adapter, with copies of those tensors that are the model's own: they would be read while they are written."""
    plain = (torch.Tensor, torch.nn.Parameter)
    if os.path.isdir(adapter.source):
        return adapter
    live = [each.parameter for each in slot.tensors if type(each.parameter) in plain and not each.parameter.is_meta]
    memory = {each.untyped_storage().data_ptr() for each in live}
    own = {
        key: tensor.detach().clone()
        for key, tensor in adapter.tensors.items()
        if type(tensor) in plain and not tensor.is_meta and tensor.untyped_storage().data_ptr() in memory
    }
    return replace(adapter, tensors={**adapter.tensors, **own}) if own else adapter
