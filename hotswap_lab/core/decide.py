"""Decides a swap: compares an adapter with a slot and writes nothing.

Are both of a kind that can be swapped; what happens to each layer (:mod:`~hotswap_lab.core.layers`); and what is to be
said of all of it. Whatever speaks against the swap is collected, so that a user sees all of it at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from . import methods
from .adapter import Adapter
from .change import Change
from .compiled import blind_spot, compiled_parts
from .errors import Refusal, listing, refusal
from .host import PEFT_PREFIX, Config, find_host, kind_of, modules_in
from .layers import plan_layers, plan_leftovers, resize_what_is_off
from .plan import Action, Grafting, LayerPlan, Plan
from .prepared import has_fixed_size
from .slot import Slot, slot_for
from .writing import change_layer_by_layer

#: who else has something to say of a swap, once it is known what happens to each layer
CHECKS: list[Callable[[Draft], None]] = []
#: what PEFT puts LoRA on, also where a class of these holds modules of its own
ADAPTABLE = (torch.nn.Linear, Conv1D, torch.nn.Embedding, _ConvNd, torch.nn.MultiheadAttention)


@dataclass
class Draft:
    """What is known while a plan is being made."""

    slot: Slot
    adapter: Adapter
    config: Config
    #: what is compiled in the model
    compiled: list[object]
    again: Callable[[], Plan]
    add_layers: bool = False
    #: whether the adapter's config has to say which layers it is for; else they are those of its tensors
    check_targets: bool = True
    base_weights: Mapping[str, torch.Tensor] | None = None
    grafting: Grafting | None = None
    layers: list[LayerPlan] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    #: tensors that no layer of the slot took, where nothing else was wrong
    left: dict[str, torch.Tensor] = field(default_factory=dict)

    def refuse(self, which: str, /, **values: object) -> None:
        self.refusals.append(refusal(which, **values))

    @cached_property
    def fixed(self) -> list[bool]:
        """Of each layer of the slot, whether it was prepared, and so keeps its shapes."""
        name = self.slot.adapter_name
        return [has_fixed_size(layer.module, name) for layer in self.slot.layers]

    @property
    def is_prepared(self) -> bool:
        """Whether all layers keep their shapes, so that a compiled graph can go on."""
        return False not in self.fixed

    def targets(self, layer: LayerPlan) -> bool:
        return self.slot.method.targets(self.config, layer.path)

    def afresh(self) -> Draft:
        """The same swap, nothing of it decided."""
        return replace(self, config=self.adapter.config, grafting=None, layers=[], refusals=[], notes=[], left={})

    def finish(self) -> Plan:
        make_change: Callable[[Plan], Change] = change_layer_by_layer
        if self.grafting is not None:
            make_change = self.grafting.change_for
        elif self.slot.room is not None and Action.ADD not in [plan.action for plan in self.layers]:
            make_change = self.slot.room.change_for
        return Plan(
            self.slot,
            self.adapter,
            tuple(self.layers),
            self.config,
            self.again,
            make_change,
            tuple(self.refusals),
            tuple(self.notes),
            is_compiled=bool(self.compiled),
            grafting=self.grafting,
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
    options: dict[str, Any] = dict(add_layers=add_layers, check_targets=check_targets, base_weights=base_weights)
    draft = Draft(
        slot,
        adapter,
        adapter.config,
        compiled_parts(slot.host.root),
        lambda: make_plan(slot_for(find_host(slot.host.root, name), name), adapter, all_off=all_off, **options),
        **options,
    )
    _check_kind(draft)
    if draft.refusals:
        return draft.finish()
    if methods.rest.takes(draft):
        return methods.rest.plan(draft)
    return _decide(draft, all_off)


def _decide(draft: Draft, all_off: bool) -> Plan:
    _complete_config(draft)
    _check_slot(draft)
    if draft.refusals:
        return draft.finish()
    left = plan_layers(draft)
    draft.left = {} if draft.refusals else dict(left)
    plan_leftovers(draft, left)
    if (plan := methods.rest.instead(draft)) is not None:
        return plan
    resize_what_is_off(draft)
    for check in (_check_capacity, _check_base, methods.rest.check, *CHECKS, check_compiled):
        check(draft)
    if draft.check_targets:
        _note_missing_targets(draft)
    else:
        _retarget_config(draft)
    if not draft.refusals and not all_off and not any(layer.settings for layer in draft.layers):
        keys, paths = map(repr, draft.adapter.tensors), [repr(layer.path) for layer in draft.slot.layers]
        draft.refuse("nothing_for_any_layer", keys=listing(keys, 2), paths=listing(paths, 2))
    return draft.finish()


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


# ---- before the tensors are looked at


def _check_kind(draft: Draft) -> None:
    """Refuses adapters of two types, and configs that no fresh load takes either."""
    slot, new = draft.slot, draft.adapter.config
    if slot.config.peft_type != new.peft_type:
        kinds = kind_of(slot.config), kind_of(new)
        draft.refuse("other_peft_type", old=kinds[0], kind=kinds[1], adapter_name=slot.adapter_name)
        return
    draft.refusals += slot.method.malformed(new)
    if draft.refusals:
        return
    _check_prefixes(draft)
    draft.refusals += [*slot.method.unsupported(new, "new"), *slot.method.unsupported(slot.config, "loaded")]


def _check_prefixes(draft: Draft) -> None:
    """A fresh load ignores tensors of a file whose names lack PEFT's prefix; from memory they are taken without it."""
    adapter = draft.adapter
    is_file = os.path.isdir(adapter.source) or adapter.revision is not None
    if not is_file or not draft.slot.host.is_peft_model or adapter.config.is_prompt_learning:
        return
    if bare := [key for key in adapter.tensors if not key.startswith("base_model.")]:
        draft.refuse("keys_without_prefix", keys=listing(bare, 4), count=len(bare), prefix=PEFT_PREFIX)


def _complete_config(draft: Draft) -> None:
    """Makes the config what a fresh load leaves in the model."""
    slot = draft.slot
    draft.config = slot.method.resolved_config(draft.adapter.config, slot.host)
    draft.config.inference_mode = slot.config.inference_mode
    if any(isinstance(layer.module.get_base_layer(), (torch.nn.Linear, Conv1D)) for layer in slot.layers):
        # PEFT corrects this for the base model's kind of layers, as it has done in the loaded adapter's config
        draft.config.fan_in_fan_out = slot.config.fan_in_fan_out


def _check_slot(draft: Draft) -> None:
    """Refuses what can't be written to: merged weights, layers of another make; and configs that name none or more."""
    if draft.slot.is_merged:
        draft.refuse("merged", adapter_name=draft.slot.adapter_name)
    for layer, reason in draft.slot.obstacles:
        draft.refuse("layer_not_plain", path=layer.path, reason=reason)
    if draft.check_targets and draft.config.target_modules is None:
        draft.refuse("no_target_modules")
    elif draft.check_targets:
        _check_containers(draft)


def _check_containers(draft: Draft) -> None:
    """A config that names more than layers: PEFT can't load it, so what is saved with it could not be loaded again."""
    adaptable = (BaseTunerLayer, AuxiliaryTrainingWrapper, *ADAPTABLE)

    def named() -> list[tuple[str, str]]:
        targets = draft.slot.method.targets
        containers = [
            (path, type(module).__name__)
            for path, module in modules_in(draft.slot.host.base)
            if path and ".base_layer" not in path and module._modules and not isinstance(module, adaptable)
        ]
        return [each for each in containers if targets(draft.config, each[0])]

    for path, kind in draft.slot.once_for(draft.config, "containers", named)[:1]:
        draft.refuse("targets_a_container", path=path, target_modules=draft.config.target_modules, kind=kind)


# ---- when it is known what happens to each layer


def _check_capacity(draft: Draft) -> None:
    """Refuses ranks that a prepared layer has no room for, all of them in one refusal."""
    padded = [plan for plan in draft.layers if plan.action is Action.PAD]
    ranks = [(plan.rank_after or 0, plan.layer.tensors[0].capacity or 0, plan.path) for plan in padded]
    if lacking := [each for each in ranks if each[0] > each[1]]:
        highest, room, path = max(lacking)[0], max(room for _, room, _ in lacking), lacking[0][2]
        draft.refuse("rank_above_room", count=len(lacking), highest=highest, path=path, room=room)


def _check_base(draft: Draft) -> None:
    """Refuses to turn layers off by base weights that contain another adapter: DoRA's magnitude is their norm then."""
    if not draft.slot.reads_base:
        return
    off = {id(plan.layer.module.get_base_layer()) for plan in draft.layers if plan.settings is None}
    # layers of other methods may be around these
    tuners = [module for module in draft.slot.host.base.modules() if isinstance(module, BaseTunerLayer)]
    around = [module for module in tuners if id(module.get_base_layer()) in off]
    if others := sorted({name for module in around for name in module.merged_adapters}):
        draft.refuse("merged_beside", adapter_name=draft.slot.adapter_name, others=listing(map(repr, others)))


def check_compiled(draft: Draft) -> None:
    """Refuses a swap that a compiled graph would not notice."""
    if not draft.compiled and not draft.is_prepared:
        return
    if reason := blind_spot(draft.compiled, prepared=draft.is_prepared and draft.finish().writes_values_only):
        draft.refuse("compiled_would_not_notice", reason=reason)


def _note_missing_targets(draft: Draft) -> None:
    if named := [plan.path for plan in draft.layers if plan.action is Action.OFF and draft.targets(plan)]:
        draft.notes.append(
            f"the config targets {len(named)} layers that the file has no tensors for ({listing(named, 2)}); "
            "they are turned off"
        )


def _retarget_config(draft: Draft) -> None:
    """Makes the config name exactly the layers that the tensors are for, so that it reloads as what it is."""
    config = draft.config
    if config.target_modules is None or any(
        draft.targets(plan) != (plan.settings is not None) for plan in draft.layers
    ):
        config.target_modules = {plan.path for plan in draft.layers if plan.settings is not None}
        config.layers_to_transform = config.layers_pattern = config.exclude_modules = None
