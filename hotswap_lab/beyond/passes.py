"""PEFT's methods, and the passes of a plan in their order.

A pass gets the plan, adds decisions or refusals, and writes nothing to the model. LoRA alone needs only those of
``hotswap_lab.core``. The others are about PEFT's other methods, and about cases that few adapters meet. Slots and plans
take both lists: ``make_plan(slot_for(METHODS, ...), adapter, passes=PASSES)``.
"""

from ..core import checks, planner
from ..core.method import Method
from ..core.planner import Pass, stop_if_refused
from . import base_values, decide, shards
from .general import General
from .lora import FullLora

#: a slot uses the first method that accepts its adapter's config
METHODS: tuple[Method, ...] = (FullLora(), General())

PASSES: tuple[Pass, ...] = (
    # checks of the configs and files, before any tensor is compared
    planner.check_configs,
    checks.check_prefixes,
    planner.keep_sources_apart,
    decide.check_arrow,
    decide.check_magnitudes,
    checks.note_other_base,
    base_values.note_vocabulary,
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
    checks.correct_fan_in_fan_out,
    checks.note_missing_targets,
    base_values.check_embeddings,
    shards.check_shards,
    planner.check_compiled,
    planner.retarget_config,
    planner.check_that_it_does_something,
)
