"""All that decides a swap: PEFT's methods, and the passes of a plan in the order in which they run.

A pass gets the plan, adds what it finds, and writes nothing. LoRA alone needs only those of ``hotswap_lab.core``. The
others are about PEFT's other methods, and about cases that few adapters meet.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from ..core import planner
from ..core.adapter import Adapter
from ..core.compiled import compiled_in
from ..core.method import Method
from ..core.plan import Plan, change_layer_by_layer
from ..core.planner import Pass, stop_if_refused
from ..core.slot import Slot
from . import base_values, checks, decide, shards
from .general import General
from .lora import FullLora

#: a slot is of the first one that takes its adapter's config
METHODS: tuple[Method, ...] = (FullLora(), General())

PASSES: tuple[Pass, ...] = (
    # checks of the configs and files, before any tensor is compared
    planner.check_configs,
    checks.check_prefixes,
    planner.keep_sources_apart,
    checks.check_arrow,
    checks.note_other_base,
    stop_if_refused,
    # other methods, and LoRA with more than its layers: PEFT loads the adapter next to the model
    decide.plan_beyond,
    planner.complete_config,
    planner.check_slot,
    stop_if_refused,
    # layer by layer
    planner.plan_layers,
    decide.plan_another_form,
    decide.take_base_weights,
    planner.plan_leftovers,
    planner.keep_targets_apart,
    planner.check_capacity,
    checks.check_containers,
    checks.check_base,
    checks.correct_fan_in_fan_out,
    checks.note_missing_targets,
    base_values.check_embeddings,
    shards.check_shards,
    planner.check_compiled,
    planner.retarget_config,
    planner.check_that_it_does_something,
)


def make_plan(
    slot: Slot,
    adapter: Adapter,
    *,
    add_layers: bool = False,
    check_targets: bool = True,
    base_weights: Mapping[str, torch.Tensor] | None = None,
    passes: Iterable[Pass] = PASSES,
) -> Plan:
    """Decide a swap. Reads the slot and the adapter, writes nothing, raises nothing: see ``Plan.refusals``.

    Parameters
    ----------
    slot, adapter:
        The place of the loaded adapter, and the adapter to put there. One without tensors turns off every layer.
    add_layers:
        Whether layers that the slot lacks are added (not possible in a compiled model) rather than refused.
    check_targets:
        Whether the adapter's config must name the layers that its tensors belong to, as a fresh load demands.
    base_weights:
        Original values of base weights that the loaded adapter has overwritten, by name.
    passes:
        The steps that decide it, in this order.
    """
    compiled = compiled_in(slot.host.root, slot.modules)
    plan = Plan(slot, adapter, adapter.config, change_layer_by_layer, compiled, add_layers, check_targets, base_weights)
    is_distributed = shards.is_distributed()
    for each in passes:
        applies = vars(each).get("only_for")
        if applies is None or slot.once(applies, is_distributed):
            plan = each(plan) or plan
        if plan.is_decided:
            break
    return plan
