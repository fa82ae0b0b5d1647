"""The engine that the package uses: the parts of a swap in the order of their use, and the public functions.

Two methods cover PEFT: LoRA (``beyond.lora`` on top of ``core.lora``) and all others (``beyond.general``). The passes
below make a plan, and :func:`hotswap_lab.core.change.apply` carries it out.
"""

from __future__ import annotations

from typing import ClassVar

from .beyond import base_values, checks, decide, general, lora, shards
from .beyond.prepare import prepare_in_place
from .core import planner, prepare, slot, strength, swap
from .core.engine import Engine
from .files import reading, saving, state_dicts
from .pipelines import patching, pipeline
from .pools import adapter_pool
from .threads import TurnLock


class Hotswap(Engine):
    """An engine with the public functions as methods."""

    hotswap_adapter = swap.hotswap_adapter
    hotswap_adapter_from_state_dict = swap.hotswap_adapter_from_state_dict
    plan_hotswap = swap.plan_hotswap
    prepare_model_for_compiled_hotswap = prepare.prepare_model_for_compiled_hotswap
    resolve_slot = slot.resolve_slot
    set_strength = strength.set_strength
    get_strength = strength.get_strength
    save_adapter = saving.save_adapter
    hotswap_pipeline = pipeline.hotswap_pipeline
    plan_pipeline_hotswap = pipeline.plan_pipeline_hotswap
    prepare_pipeline_for_compiled_hotswap = pipeline.prepare_pipeline_for_compiled_hotswap
    patch_peft = patching.patch_peft


ENGINE: Hotswap = Hotswap(
    methods=(lora.FullLora(), general.General()),
    passes=(
        # checks of the configs and files, before any tensor is compared
        (
            planner.check_configs,
            checks.check_prefixes,
            checks.keep_apart,
            checks.check_arrow,
            checks.note_other_base,
        ),
        # other methods, and LoRA with more than its layers: PEFT loads the adapter next to the model
        (decide.plan_beyond,),
        (planner.complete_config, planner.check_slot),
        # layer by layer
        (
            planner.plan_layers,
            decide.plan_another_form,
            decide.take_base_weights,
            planner.plan_leftovers,
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
        ),
    ),
    read=reading.read,
    lock=TurnLock(),
    on_config=(base_values.follow_config, state_dicts.look_after, lora.forget_norms),
    prepare_in_place=prepare_in_place,
)

hotswap_adapter = ENGINE.hotswap_adapter
hotswap_adapter_from_state_dict = ENGINE.hotswap_adapter_from_state_dict
plan_hotswap = ENGINE.plan_hotswap
prepare_model_for_compiled_hotswap = ENGINE.prepare_model_for_compiled_hotswap
resolve_slot = ENGINE.resolve_slot
set_strength = ENGINE.set_strength
get_strength = ENGINE.get_strength
save_adapter = ENGINE.save_adapter
hotswap_pipeline = ENGINE.hotswap_pipeline
plan_pipeline_hotswap = ENGINE.plan_pipeline_hotswap
prepare_pipeline_for_compiled_hotswap = ENGINE.prepare_pipeline_for_compiled_hotswap
patch_peft = ENGINE.patch_peft


class AdapterPool(adapter_pool.AdapterPool):
    __doc__ = adapter_pool.AdapterPool.__doc__

    engine: ClassVar[Engine] = ENGINE
