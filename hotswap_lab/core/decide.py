"""Decides a swap: compares an adapter with a slot and writes nothing.

Are both of a kind that can be swapped; what happens to each layer (:mod:`~hotswap_lab.core.layers`); and what is to be
said of all of it. Whatever speaks against the swap is collected, so that a user sees all of it at once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch

from . import methods
from .adapter import Adapter
from .compiled import blind_spot, compiled_parts
from .errors import listing
from .layers import plan_layers, plan_leftovers
from .plan import Action, Plan
from .slot import Slot
from .writing import change_layer_by_layer

#: who else has something to say of a swap at first, before tensors are looked at
FIRST: list[Callable[[Plan], object]] = []
#: and once it is known what happens to each layer
CHECKS: list[Callable[[Plan], object]] = []


def make_plan(
    slot: Slot,
    adapter: Adapter,
    *,
    add_layers: bool = False,
    check_targets: bool = True,
    base_weights: Mapping[str, torch.Tensor] | None = None,
) -> Plan:
    """Decides a swap. Reads the slot and the adapter, writes nothing, raises nothing: see ``Plan.refusals``.

    Parameters
    ----------
    slot, adapter:
        What is swapped out, and what is swapped in; an adapter without tensors turns off every layer.
    add_layers:
        Whether layers that the slot lacks are added (not possible in a compiled model) rather than refused.
    check_targets:
        Whether the adapter's config must name the layers that its tensors belong to, as a fresh load demands.
    base_weights:
        Original values of base weights that the loaded adapter has overwritten, by name.
    """
    parts = compiled_parts(slot.host.root, slot.modules)
    plan = Plan(slot, adapter, adapter.config, change_layer_by_layer, parts, add_layers, check_targets, base_weights)
    # adapters of two types, and configs that no fresh load takes either
    plan.refusals += [*methods.misfits(slot, adapter), *methods.rest.judge(slot.config, "loaded")]
    for check in FIRST:
        check(plan)
    if plan.refusals:
        return plan
    return methods.rest.plan(plan) if methods.rest.takes(plan) else _decide(plan)


def _decide(plan: Plan) -> Plan:
    plan.config = methods.rest.complete(copy.deepcopy(plan.adapter.config), plan.slot.host)
    plan.config.inference_mode = plan.slot.config.inference_mode
    _check_slot(plan)
    if plan.refusals:
        return plan
    left = plan_layers(plan)
    plan.left = {} if plan.refusals else dict(left)
    plan_leftovers(plan, left)
    if (other := methods.rest.instead(plan)) is not None:
        return other
    for check in (_check_capacity, *CHECKS, check_compiled):
        check(plan)
    if not plan.check_targets:
        _retarget_config(plan)
    if not plan.refusals and plan.adapter.tensors and not any(layer.settings for layer in plan.layers):
        keys, paths = map(repr, plan.adapter.tensors), [repr(layer.path) for layer in plan.slot.layers]
        plan.refuse("nothing_for_any_layer", keys=listing(keys, 2), paths=listing(paths, 2))
    return plan


# ---- before the tensors are looked at


def _check_slot(plan: Plan) -> None:
    """Refuses what can't be written to: merged weights, layers of another make; and configs that name none."""
    if plan.slot.is_merged:
        plan.refuse("merged", adapter_name=plan.slot.adapter_name)
    for layer, reason in plan.slot.obstacles:
        plan.refuse("layer_not_plain", path=layer.path, reason=reason)
    if plan.check_targets and plan.config.target_modules is None:
        plan.refuse("no_target_modules")


# ---- when it is known what happens to each layer


def _check_capacity(plan: Plan) -> None:
    """Refuses ranks that a prepared layer has no room for, all of them in one refusal."""
    padded = [layer for layer in plan.layers if layer.action is Action.PAD]
    ranks = [(layer.rank_after or 0, layer.layer.tensors[0].capacity or 0, layer.path) for layer in padded]
    if lacking := [each for each in ranks if each[0] > each[1]]:
        highest, room, path = max(lacking)[0], max(room for _, room, _ in lacking), lacking[0][2]
        plan.refuse("rank_above_room", count=len(lacking), highest=highest, path=path, room=room)


def check_compiled(plan: Plan) -> None:
    """Refuses a swap that a compiled graph would not notice."""
    if not plan.compiled and not plan.is_prepared:
        return
    if reason := blind_spot(plan.compiled, plan.is_prepared and plan.writes_values_only):
        plan.refuse("compiled_would_not_notice", reason=reason)


def _retarget_config(plan: Plan) -> None:
    """Makes the config name exactly the layers that the tensors are for, so that it reloads as what it is."""
    config, on = plan.config, [layer for layer in plan.layers if layer.settings is not None]
    if config.target_modules is None or [layer for layer in plan.layers if plan.targets(layer)] != on:
        config.target_modules = {layer.path for layer in on}
        config.layers_to_transform = config.layers_pattern = config.exclude_modules = None
