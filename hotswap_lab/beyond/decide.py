"""Planning swaps that change more than values and ranks, or whose method is not LoRA.

PEFT loads the new adapter next to the model, and the two are compared. The swap writes the differences.

Tests: ``tests/beyond/test_every_method.py``, ``tests/beyond/test_neighbours.py`` and ``tests/beyond/test_pairs.py``.
"""

import contextlib
import copy
import functools
import json
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig, PeftType

from ..core.adapter import LOST_ORIGINALS
from ..core.change import Change, clear_gradients
from ..core.errors import listing
from ..core.host import canonical_path
from ..core.journal import Journal
from ..core.lora import HEADS
from ..core.memory import overlaps_in
from ..core.plan import Plan
from ..core.planner import adaptable, check_compiled, misfits, only_for
from ..core.slot import Slot, SlotLayer, begin_change
from ..core.tensors import have_same_values, is_prepared
from ..core.wrappers import inside, is_wrapper
from ..core.writing import write_scalings
from .base_values import ORIGINALS, base_weight, change_base_values, kept_originals, lost_originals
from .configs import extra_state, form_for
from .difference import Graft, difference
from .fresh_adapter import FreshAdapter, load_fresh_adapter
from .general import General
from .guards import device_with_values
from .lora import MAGNITUDE, zero_magnitudes
from .shards import check_parallel_training, holds_shards
from .targets import TARGETS, Targets, find_targets, keep_targets

#: attribute of a base model: for each adapter, the paths of modules that had it before and may have it again
PREVIOUS_LAYERS = "hotswap_previous_layers"
IN_TIME = "before compiling, prepare the model with this adapter among `adapters`; or swap before that"


# ---- is it such a swap?


def plan_beyond(plan: Plan) -> Plan | None:
    """Plan the swap with a fresh load if one of the two adapters is more than LoRA, or of another method."""
    slot, originals = plan.slot, plan.slot.host.base.__dict__.get(ORIGINALS, {})
    # in an unprepared model, this also unwraps embeddings that are turned off, which PEFT would save
    is_restored = plan.base_weights and (slot.room is None or lost_originals(slot.host, slot.adapter_name))
    loaded, new = slot.config, plan.adapter.config
    has_more = slot.once_for(loaded, _has_extra_state) or slot.once_for(new, _has_extra_state)
    if originals.get(slot.adapter_name) or is_restored or has_more or slot.once_for(new, _needs_more):
        return plan_with_fresh_load(plan)
    return None


def _has_extra_state(slot: Slot, config: PeftConfig) -> bool:
    return isinstance(slot.method, General) or bool(extra_state(config))


def _needs_more(slot: Slot, config: PeftConfig) -> bool:
    """Whether an adapter with this config, which has no extra state, is more than LoRA in this model."""
    heads = HEADS.get(config.task_type)
    if heads and any(path.endswith(heads) for path, _ in slot.walk):
        return True
    # a special layer is always an obstacle, so the others need not be checked
    return any(slot.method.is_special(layer.module, slot.adapter_name) for layer, _ in slot.obstacles)


def _layers_of_another_form(slot: Slot, config: PeftConfig) -> list[SlotLayer]:
    """The layers whose kinds of tensors differ from those of an adapter with this config."""
    dora, bias = form_for(config)
    has_magnitude = any(tensor.key == MAGNITUDE for tensor in slot.tensors)
    return [layer for layer in slot.layers if len(layer.tensors) != 2 + dora + bias or has_magnitude != dora]


def take_base_weights(plan: Plan) -> None:
    """Accept base weights in the file that equal the live model's, because PEFT saves those of adapted embeddings."""
    tensors, base = plan.unknown, plan.slot.host.base
    for key in [key for key in tensors if ".lora_" not in key]:
        weight = base_weight(base, key)
        fits = weight is not None and weight.shape == tensors[key].shape
        if fits and not have_same_values(weight, tensors.pop(key)):
            plan.refuse("other_base_weights", key=key)
    paths = {path for key in tensors if (path := adaptable(base, key)) is not None}
    # layers that had the adapter before may get it again without add_layers
    if paths and paths <= previous_layers(base, plan.slot.adapter_name):
        plan.add_layers = True


def plan_another_form(plan: Plan) -> Plan | None:
    """Plan the swap with a fresh load if layers get other tensors, or if the adapter is removed from layers."""
    slot = plan.slot
    if others := slot.once_for(plan.config, _layers_of_another_form):
        keys = {slot.own_keys.get(name, name) for name in map(canonical_path, plan.adapter.tensors)}
        # tensors are added to a layer or removed from it: DoRA's magnitude, a bias
        if any(layer.keys[0] in keys for layer in others):
            return plan_with_fresh_load(plan)
    is_free = plan.unknown and not plan.compiled and not plan.is_prepared and not plan.refusals
    return other if is_free and has_strange_leftovers(plan) and (other := plan_with_fresh_load(plan)).ok else None


def has_strange_leftovers(plan: Plan) -> bool:
    """Whether PEFT may know keys that fit no layer: names of older models, base weights with different values."""
    base = plan.slot.host.base
    strange = {key: value for key, value in plan.unknown.items() if adaptable(base, key) is None}
    weights = {key: base_weight(base, key) for key in strange}
    return any(weights[key] is None or not have_same_values(weights[key], value) for key, value in strange.items())


# ---- the plan and its change


@dataclass(eq=False)
class FreshPlan(Plan):
    """A plan that is decided by a comparison with a fresh load."""

    #: everything to write
    graft: Graft = field(default_factory=Graft)
    #: the targets for later adapters with the same config
    targets: Targets | None = None

    @property
    def writes_values_only(self) -> bool:
        return self.graft.writes_values_only

    @property
    def nbytes(self) -> int:
        return self.graft.nbytes

    def build_change(self) -> Change:
        """Build the change that writes the graft to the live model."""
        slot, graft = self.slot, self.graft
        stays = graft.writes_values_only and not isinstance(slot.method, General)
        change = begin_change(slot, self.config, slot if stays else None)
        for target, source in (*graft.copies, *graft.base.copies):
            change.copy(target, source)
        tables, values = [table for table, _ in graft.scalings], [value for _, value in graft.scalings]
        write_scalings(change, tables, slot.adapter_name, values)
        change.resizes += [(old, new.to(old.device, old.dtype, copy=True).contiguous()) for old, new in graft.resizes]
        # cloned, because the change overwrites the base model's values
        originals = {name: value.detach().clone() for name, value in graft.base.originals.items()}
        written = [*graft.parameters, *(target for target, _ in graft.base.copies)]
        change.steps += [functools.partial(clear_gradients, written), *graft.steps]
        change.steps.append(functools.partial(_note, self, originals))
        if slot.room is not None:  # nothing else is written there
            change.steps.append(functools.partial(slot.room.note_swap, self.config))
        return change


def _note(plan: FreshPlan, originals: dict[str, torch.Tensor], journal: Journal) -> None:
    """Record the originals, targets, previous layers and added layers on the model for the next swap."""
    host, name, graft = plan.slot.host, plan.slot.adapter_name, plan.graft
    notes = host.base.__dict__
    clear_gradients([parameter for parameter, _ in graft.requires_grad], journal)
    for parameter, value in graft.requires_grad:
        journal.set_attribute(parameter, "requires_grad", value)
    journal.set_item(notes, ORIGINALS, {**notes.get(ORIGINALS, {}), name: originals})
    plan.config.__dict__[LOST_ORIGINALS] = graft.base.lost
    keep_targets(plan.slot, plan.targets, plan.config, journal)
    if graft.unwrapped:
        previous = previous_layers(host.base, name).union(graft.unwrapped)
        journal.set_item(notes, PREVIOUS_LAYERS, {**notes.get(PREVIOUS_LAYERS, {}), name: previous})
    names = getattr(host.tuner, "targeted_module_names", None)
    if graft.added and names is not None:
        journal.set_attribute(host.tuner, "targeted_module_names", [*dict.fromkeys([*names, *graft.added])])


def previous_layers(base: torch.nn.Module, adapter_name: str) -> frozenset[str]:
    """The paths of layers that a swap removed the adapter from, and may add it to again without ``add_layers``."""
    return base.__dict__.get(PREVIOUS_LAYERS, {}).get(adapter_name, frozenset())


def plan_with_fresh_load(begun: Plan) -> FreshPlan:
    """Plan a swap by comparing the live model with a fresh load of the new adapter, whatever was planned so far."""
    config = copy.deepcopy(begun.adapter.config)
    plan = FreshPlan(
        begun.slot,
        begun.adapter,
        config,
        begun.compiled,
        begun.add_layers,
        begun.check_targets,
        begun.base_weights,
        notes=begun.notes,
        warnings=begun.warnings,
        is_decided=True,
    )
    slot, name = plan.slot, plan.slot.adapter_name
    if holds_shards(slot.host.base):
        plan.refuse("sharded_beyond")
        return plan
    plan.config.inference_mode = slot.config.inference_mode
    if not plan.check_targets and getattr(plan.config, "target_modules", "") is None:
        plan.config.target_modules = copy.copy(slot.config.target_modules)
    wrappers = filter(is_wrapper, slot.host.base.modules())
    merged = {merged_name for wrapper in wrappers for merged_name in getattr(wrapper, "merged_adapters", ())}
    if name in merged:
        plan.refuse("merged", adapter_name=name)
    plan.graft, plan.targets = _decide(plan, merged - {name})
    graft, plan.layers = plan.graft, plan.graft.layers
    if not graft.writes_values_only:
        differences, count = listing(graft.differences, 3), len(graft.differences)
        if plan.compiled:
            plan.refuse("compiled_other_kind", count=count, found=differences)
        elif any(is_prepared(layer.module, name) for layer in slot.layers):
            # the advice that prepare_model_for_compiled_hotswap would give for this adapter
            reasons = [] if isinstance(slot.method, General) else misfits(slot, plan.adapter, in_graph=True)
            next_step = reasons[0].next_step if reasons else IN_TIME
            plan.refuse("prepared_other_kind", count=count, found=differences, next_step=next_step)
        check_parallel_training(plan, len(graft.layers), "another shape at the model")
    check_compiled(plan)
    return plan


def _decide(plan: Plan, others_merged: set[str]) -> tuple[Graft, Targets | None]:
    """The writes of a swap, and the targets for later adapters with the same config. Adds refusals to the plan."""
    slot, adapter, host, config = plan.slot, plan.adapter, plan.slot.host, plan.config
    name = slot.adapter_name
    if _layers_of_base(config) != _layers_of_base(slot.config):
        plan.refuse("other_layer_replication", found=_layers_of_base(config), expected=_layers_of_base(slot.config))
        return Graft(), None
    known: Targets | None = host.base.__dict__.get(TARGETS, {}).get(name)
    is_usual = not (kept_originals(host.base, name) or slot.once(overlaps_in))
    may_restore = plan.base_weights and lost_originals(host, name)
    if known and is_usual and not may_restore and known.fit(slot, adapter):
        plan.config, graft = known.completed(config), known.graft_of(adapter)
        graft.base.lost = lost_originals(host, name)
        return graft, known
    if isinstance(slot.method, General) and others_merged:
        # most methods compute initial values from the base weights: singular vectors, clusters, a copy
        plan.refuse("merged_beside", adapter_name=name, others=listing(map(repr, sorted(others_merged))))
        return Graft(), None
    try:
        with slot.write_mode(), device_with_values():
            fresh = load_fresh_adapter(slot, config, adapter.tensors)
    except Exception as error:
        plan.cause = error
        if head := _head_of_other_labels(plan):
            key, labels, own = head
            plan.refuse("other_labels", key=key, labels=labels, own=own)
            return Graft(), None
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        plan.refuse("not_loadable", kind=type(error).__name__, lines=" ".join(lines[:3]))
        return Graft(), None
    plan.config = fresh.config
    if _depends_on_class(plan, fresh):
        return Graft(), None
    _check_complete(plan, fresh)
    graft, previous = difference(plan, fresh), previous_layers(host.base, name)
    if (added := [path for path in graft.added if path not in previous]) and not plan.add_layers:
        plan.refuse("lacks_layers", count=len(added), added=listing(added, 3), name=name)
    twins = fresh.twins
    live = {name: fresh.twin.live_of[id(twin)] for name, twin in twins.items()}
    graft.base = change_base_values(plan, fresh.base_values, live)
    paths = [path for path in live if path.endswith("bias") or path in fresh.base_values]
    changed = [path for path in paths if live[path].requires_grad != twins[path].requires_grad]
    graft.requires_grad += [(live[path], twins[path].requires_grad) for path in changed]
    return graft, None if plan.refusals else find_targets(slot, adapter, fresh, graft)


def _head_of_other_labels(plan: Plan) -> tuple[str, int, int] | None:
    """The key of a classifier's weight for a different number of labels than the model's, and both numbers; or None."""
    base, names = plan.slot.host.base, "|".join(HEADS.get(plan.adapter.config.task_type, ()))
    for key, tensor in plan.adapter.tensors.items():
        match = names and re.fullmatch(rf"((?:.*\.)?(?:{names}))\.(.+)", canonical_path(key))
        if not match:
            continue
        with contextlib.suppress(AttributeError):  # the model has no such head
            head: Any = base.get_submodule(match[1])
            own = (inside(head) if is_wrapper(head) else head).get_parameter(match[2])
            if tensor.shape[1:] == own.shape[1:] and len(tensor) != len(own) == base.config.num_labels:
                return key, len(tensor), len(own)
    return None


def _layers_of_base(config: PeftConfig) -> str:
    """The config's ``layer_replication`` as JSON: the layers of the base model that PEFT repeats.

    No swap can rearrange the layers. Only the config of the loaded adapter shows a model's arrangement.
    """
    return json.dumps(getattr(config, "layer_replication", None) or None, default=str)


def _depends_on_class(plan: Plan, fresh: FreshAdapter) -> bool:
    """Refuse an adapter for which a fresh load has a class that computes differently from the live model's."""
    host, config = plan.slot.host, fresh.config
    live, wanted = type(host.carrier), type(fresh.model)
    by_class = config.is_prompt_learning or config.peft_type == PeftType.POLY
    if host.is_peft_model and live is not wanted and (by_class or getattr(config, "alora_invocation_tokens", None)):
        plan.refuse("other_task", found=live.__name__, expected=wanted.__name__, task_type=config.task_type)
        return True
    is_prompt = config.peft_type == PeftType.ADAPTION_PROMPT
    if is_prompt and (len(host.configs) > 1 or not getattr(host.carrier.base_model, "_enabled", True)):
        plan.refuse("adaption_prompt", configs=listing(host.configs))
        return True
    return False


def _check_complete(plan: Plan, fresh: FreshAdapter) -> None:
    if fresh.unexpected:
        targets = f"target_modules={getattr(plan.adapter.config, 'target_modules', None)!r}"
        keys, count = listing(fresh.unexpected, 4), len(fresh.unexpected)
        plan.refuse("keys_ignored", keys=keys, count=count, targets=targets)
    if fresh.missing:
        plan.refuse("adapter_incomplete", missing=listing(fresh.missing, 3))


# ---- checks


@only_for(lambda slot, _: not slot.is_plain)
def check_magnitudes(plan: Plan) -> None:
    """Refuse an adapter with a magnitude of zero, which marks a layer where DoRA is off."""
    plan.refusals += zero_magnitudes(plan.adapter.tensors)


def check_arrow(plan: Plan) -> None:
    """Refuse to swap an expert of an Arrow router, which would keep prototypes computed from the old expert."""
    configs = plan.slot.host.configs
    if routers := [name for name in configs if getattr(configs[name], "arrow_config", None)]:
        plan.refuse("expert_of_arrow_router", adapter_name=plan.slot.adapter_name, routers=listing(map(repr, routers)))
