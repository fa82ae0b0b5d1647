"""Planning: decides a swap. Compares an adapter with a slot, layer by layer, and writes nothing.

In this order: are both of a kind that can be swapped (``_check_kind``), is the slot in a state for it
(``_check_slot``), what happens to each of its layers (``_plan_layer``), and what is left over (``_plan_leftovers``).
Whatever speaks against the swap is collected, so that a user sees all of it at once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from .adapter import Adapter
from .base_values import kept_originals
from .compiled import blind_spot, compiled_parts, unwrap_compiled
from .errors import Refusal, listing
from .expressions import slow_to_match
from .grafting import Change, Grafting, WrapperChange, decide_graft, former_layers, wrappers_in
from .grafting.wrappers import WRAPPERS
from .host import PEFT_PREFIX, canonical_path, is_embedding
from .methods import general
from .parts import LayerSettings, SlotTensor, WholeSettings
from .plan import Action, LayerPlan, Plan, TensorPlan
from .prepared_layer import has_fixed_size
from .room import ROOMS, Room, merged
from .sameness import have_same_values
from .shadow import adaptable, build_shadow_layers
from .shards import has_fixed_shape, holds_shards, is_trained_in_parallel
from .slot import Slot, SlotLayer
from .state_view import is_marked_off, is_padded, own_rank


@dataclass
class _Draft:
    """What is known while a plan is being made."""

    slot: Slot
    adapter: Adapter
    config: PeftConfig
    #: what is compiled in the model
    compiled: list[object]
    room: Room | None
    add_layers: bool = False
    #: whether the adapter's config has to say which layers it is for; else they are those of its tensors
    check_targets: bool = True
    base_weights: Mapping[str, torch.Tensor] | None = None
    grafting: Grafting | None = None
    layers: list[LayerPlan] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def refuse(self, summary: str, found: str, expected: str, next_step: str) -> None:
        self.refusals.append(Refusal(summary, found, expected, next_step))

    def afresh(self) -> _Draft:
        """The same swap, nothing of it decided."""
        return replace(self, config=self.adapter.config, grafting=None, layers=[], refusals=[], notes=[])

    def finish(self) -> Plan:
        adds = self.grafting is not None or any(plan.action is Action.ADD for plan in self.layers)
        room = None if adds else self.room
        return Plan(
            self.slot,
            self.adapter,
            tuple(self.layers),
            self.config,
            tuple(self.refusals),
            tuple(self.notes),
            is_compiled=bool(self.compiled),
            room=room,
            grafting=self.grafting,
            replaces=self.slot.config,
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
    adapter = _apart(adapter, slot)
    room = slot.host.base.__dict__.get(ROOMS, {}).get(slot.adapter_name)
    if room is not None and room.slot is not slot:
        room = None  # a slot that somebody resolved, not one that the room has just vouched for
    draft = _Draft(
        slot, adapter, adapter.config, compiled_parts(slot.host.root), room, add_layers, check_targets, base_weights
    )
    _check_kind(draft)
    if draft.refusals:
        return draft.finish()
    if _needs_donor(draft):
        return _plan_with_donor(draft)
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
    _check_slot(draft)
    if check_targets:
        _check_containers(draft)
    if draft.refusals:
        return draft.finish()
    tensors = _by_canonical_key(draft)
    if _changes_form(draft, tensors):
        return _plan_with_donor(draft)
    if draft.room is not None:
        _plan_in_room(draft, tensors, check_targets)
    else:
        for layer in slot.layers:
            _plan_layer(draft, layer, tensors, check_targets)
    if _has_strange_leftovers(draft, tensors):
        plan = _plan_with_donor(draft.afresh())
        if plan.ok:
            return plan
    _plan_leftovers(draft, tensors, add_layers, check_targets)
    if _turns_embeddings_off(draft):
        return _plan_with_donor(draft.afresh())
    _check_capacity(draft)
    _check_shards(draft)
    _check_compiled(draft)
    if check_targets:
        _note_missing_targets(draft)
    else:
        _retarget_config(draft)
    if not draft.refusals and not all_off and not any(layer.settings for layer in draft.layers):
        draft.refuse(
            "Hot swapping the adapter did not succeed, it has nothing for any layer of the loaded one.",
            found=f"keys such as {listing(map(repr, adapter.tensors), 2)}",
            expected=f"keys for layers such as {listing((repr(layer.path) for layer in slot.layers), 2)}",
            next_step="check that both adapters were made for the same base model",
        )
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


def _check_kind(draft: _Draft) -> None:
    old, new = draft.slot.config.peft_type, draft.adapter.config.peft_type
    if old != new:
        old, new = (getattr(kind, "value", kind) for kind in (old, new))
        draft.refuse(
            f"Incompatible PEFT types found: {old} and {new}",
            found=f"an adapter of type {new}",
            expected=f"type {old}, as the adapter {draft.slot.adapter_name!r} in the model",
            next_step="PeftModel.from_pretrained(model.unload(), adapter) loads it on the same base model",
        )
        return
    draft.refusals += draft.slot.method.malformed(draft.adapter.config)
    draft.refusals += slow_to_match(draft.adapter.config, draft.slot.host.base)
    if draft.refusals:
        return
    _check_prefixes(draft)
    draft.refusals += draft.slot.method.unsupported(draft.adapter.config, "new")
    draft.refusals += draft.slot.method.unsupported(draft.slot.config, "loaded")


def _check_prefixes(draft: _Draft) -> None:
    """A fresh load ignores tensors of a file whose names lack PEFT's prefix; from memory they are taken without it."""
    adapter = draft.adapter
    is_file = os.path.isdir(adapter.source) or adapter.revision is not None
    if not is_file or not draft.slot.host.is_peft_model or adapter.config.is_prompt_learning:
        return
    if bare := [key for key in adapter.tensors if not key.startswith("base_model.")]:
        draft.refuse(
            f"Hot swapping the adapter did not succeed, unexpected keys found: {listing(bare, 4)}.",
            found=f"{len(bare)} keys without the prefix {PEFT_PREFIX!r}, which a fresh load would ignore",
            expected="keys as PEFT writes them",
            next_step="add the prefix, or pass the tensors to hotswap_adapter_from_state_dict, which needs none",
        )


def _check_slot(draft: _Draft) -> None:
    slot, name, room = draft.slot, draft.slot.adapter_name, draft.room
    if room.is_merged if room else any(name in layer.module.merged_adapters for layer in slot.layers):
        draft.refusals.append(merged(name))
    if room is None:  # what is in a room was looked at when it was prepared
        for layer in slot.layers:
            _check_layer(draft, layer)


def _needs_donor(draft: _Draft) -> bool:
    """Whether PEFT must load the new adapter beside the model, so that the two can be compared."""
    slot, method = draft.slot, draft.slot.method
    if method is general or (draft.base_weights and draft.room is None):
        return True
    if method.needs_donor(slot.config) or method.needs_donor(draft.adapter.config):
        return True
    if kept_originals(slot.host.base, slot.adapter_name):
        return True
    return draft.room is None and any(method.is_special(layer.module, slot.adapter_name) for layer in slot.layers)


def _changes_form(draft: _Draft, tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether a layer would have other tensors afterwards than it has now: DoRA's magnitude, a bias."""
    method, form = draft.slot.method, draft.slot.method.form_for(draft.config)
    return any(
        method.form_of(layer.module, draft.slot.adapter_name) != form
        for layer in draft.slot.layers
        if any(f"{path}.{layer.tensors[0].key}" in tensors for path in layer.paths)
    )


def _has_strange_leftovers(draft: _Draft, tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether what no layer took may mean something to PEFT: names of older models, other base weights."""
    if draft.refusals or not tensors or draft.compiled or _is_prepared(draft.slot):
        return False
    keys = set(tensors)
    keys -= {key for key in keys if adaptable(draft.slot.host.base, key) is not None}
    return any(not _is_unchanged_base_weight(draft, key, tensors[key]) for key in keys)


def _turns_embeddings_off(draft: _Draft) -> bool:
    """PEFT saves the weights of embeddings that are wrapped, so these layers are given up rather than turned off."""
    if draft.refusals or draft.compiled or _is_prepared(draft.slot):
        return False
    off = [plan for plan in draft.layers if plan.action is Action.OFF and plan.rank_before is not None]
    return any(is_embedding(draft.slot.host.base, plan.layer.module) for plan in off)


def _plan_with_donor(draft: _Draft) -> Plan:
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
        _check_parallel_training(draft, len(grafting.graft.changes), "the model")
    _check_compiled(draft)
    return draft.finish()


def _as_layer_plan(change: WrapperChange) -> LayerPlan:
    action = {
        Change.SHAPES: Action.RESIZE,
        Change.REMOVED: Action.OFF,
        Change.ADDED: Action.ADD,
    }.get(change.change, Action.COPY)
    settings = None if action is Action.OFF else WholeSettings(change.rank_after, change.scaling)
    return LayerPlan(SlotLayer(change.path, change.module, ()), action, change.rank_before, settings, ())


def _check_compiled(draft: _Draft) -> None:
    """Refuses a swap that a compiled graph would not notice."""
    plan = draft.finish()
    if reason := blind_spot(draft.compiled, prepared=plan.writes_values_only and _is_prepared(draft.slot)):
        draft.refuse(
            "The compiled model would go on with the old adapter.",
            found=reason,
            expected="a graph that reads the adapter's weights at each call, and guards that watch the rest",
            next_step="compile the model without this setting, after prepare_model_for_compiled_hotswap",
        )


def _is_prepared(slot: Slot) -> bool:
    return all(has_fixed_size(layer.module, slot.adapter_name) for layer in slot.layers)


def _check_capacity(draft: _Draft) -> None:
    """Refuses ranks that a prepared layer has no room for, all of them in one refusal."""
    lacking = [
        plan
        for plan in draft.layers
        if plan.action is Action.PAD and plan.settings.rank > plan.layer.tensors[0].capacity
    ]
    if lacking:
        highest = max(plan.settings.rank for plan in lacking)
        room = max(plan.layer.tensors[0].capacity for plan in lacking)
        draft.refuse(
            f"The adapter's rank is higher than the model was prepared for, at {len(lacking)} layers.",
            found=f"rank {highest}, for example at {lacking[0].path}",
            expected=f"rank {room} at most",
            next_step=f"before compiling, prepare the model (or make the pool) with target_rank={highest}",
        )


def _check_shards(draft: _Draft) -> None:
    """Refuses new shapes where somebody has noted the old ones and would go by them."""
    resized = [plan for plan in draft.layers if plan.action is Action.RESIZE]
    fixed = [plan for plan in resized if any(has_fixed_shape(each.owner, each.name) for each in plan.layer.tensors)]
    if fixed:
        draft.refuse(
            f"The rank of an adapter can't be changed while FSDP shards it, as it would at {len(fixed)} layers.",
            found=f"rank {fixed[0].rank_before} at {fixed[0].path}, and {fixed[0].rank_after} in the adapter",
            expected="the rank that was there when fully_shard was called",
            next_step="swap before fully_shard, or load this adapter into a fresh base model and shard that",
        )
    changed = [plan for plan in draft.layers if plan.action in (Action.RESIZE, Action.ADD)]
    if changed:
        _check_parallel_training(draft, len(changed), changed[0].path)


def _check_parallel_training(draft: _Draft, layers: int, where: str) -> None:
    """Refuses new parameters where gradients are averaged over processes by the old ones."""
    if is_trained_in_parallel(draft.slot.host.root, (each.parameter for each in draft.slot.tensors)):
        draft.refuse(
            f"DistributedDataParallel would no longer average the gradients of {layers} layers.",
            found=f"another shape at {where}, in parameters that are trained",
            expected="the parameters that were there when the model was wrapped",
            next_step="swap in the model itself, then wrap it in DistributedDataParallel again",
        )


def _check_layer(draft: _Draft, layer: SlotLayer) -> None:
    if reason := draft.slot.method.unsupported_layer(layer.module, draft.slot.adapter_name, layer.tensors):
        draft.refuse(
            f"The layer {layer.path} can't be swapped in place.",
            found=reason,
            expected="plain lora_A and lora_B parameters on the layer",
            next_step="load the adapter with PeftModel.from_pretrained on a fresh base model",
        )


def _by_canonical_key(draft: _Draft) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for key, tensor in draft.adapter.tensors.items():
        short = canonical_path(key)
        if short in tensors:
            draft.refuse(
                "The adapter names one tensor twice.",
                found=f"two keys that both mean {short!r}",
                expected="each tensor once, with or without the prefix 'base_model.model.'",
                next_step="remove one of them",
            )
        tensors[short] = tensor
    return tensors


def _take(draft: _Draft, layer: SlotLayer, tensors: dict[str, torch.Tensor]) -> list[torch.Tensor | None]:
    """Removes from ``tensors`` what belongs to the layer, under any of its names."""
    taken = []
    for target in layer.tensors:
        keys = [f"{path}.{key}" for path in layer.paths for key in (target.key, target.named_key)]
        found = [(key, tensors.pop(key)) for key in keys if key in tensors]
        taken.append(found[0][1] if found else None)
        for key, other in found[1:]:
            if not have_same_values(other, found[0][1]):
                draft.refuse(
                    "The adapter has two different values for one tensor.",
                    found=f"{found[0][0]!r} and {key!r} differ",
                    expected=f"one value, since both name the same parameter of {layer.path}",
                    next_step="get the adapter from a model in which these layers are shared",
                )
    return taken


def _plan_in_room(draft: _Draft, tensors: dict[str, torch.Tensor], check_targets: bool) -> None:
    """:func:`_plan_layer` for all layers of a room, which knows from earlier swaps what to expect at each of them.

    Only what is just as expected is decided here. Anything else takes the long way, which finds the words for it.
    """
    room = draft.room
    for layer, keys, before, expected in zip(
        draft.slot.layers, room.keys, room.content.settings, room.expect(draft.config), strict=True
    ):
        rank_before = None if before is None else before.rank
        found = [[key for key in options if key in tensors] for options in keys]
        if not any(found):
            writes = tuple(TensorPlan(target, None, True) for target in layer.tensors)
            draft.layers.append(LayerPlan(layer, Action.OFF, rank_before, None, writes))
        elif (
            all(len(each) == 1 for each in found)
            and (expected.targeted or not check_targets)
            and [tensors[key].shape for (key,) in found] == expected.shapes
        ):
            writes = tuple(
                TensorPlan(target, tensors.pop(key), True) for target, (key,) in zip(layer.tensors, found, strict=True)
            )
            action = Action.COPY if expected.fills_up else Action.PAD
            draft.layers.append(LayerPlan(layer, action, rank_before, expected.settings, writes))
        else:
            _plan_layer(draft, layer, tensors, check_targets)


def _plan_layer(
    draft: _Draft,
    layer: SlotLayer,
    tensors: dict[str, torch.Tensor],
    check_targets: bool,
    action: Action | None = None,
) -> None:
    """Plans one layer; ``action`` overrides what the shapes would say."""
    sources = _take(draft, layer, tensors)
    name, module = draft.slot.adapter_name, layer.module
    was_off = action is Action.ADD or is_marked_off(module, name)
    rank_before = None if was_off else own_rank(module, name, layer.tensors[0])
    if all(source is None for source in sources):
        writes = tuple(TensorPlan(target, None) for target in layer.tensors)
        draft.layers.append(LayerPlan(layer, Action.OFF, rank_before, None, writes))
        return
    if any(source is None for source in sources):
        missing = [target.key for target, source in zip(layer.tensors, sources, strict=True) if source is None]
        draft.refuse(
            f"The adapter is incomplete at {layer.path}.",
            found=f"no {listing(missing)}",
            expected=f"all of {listing(target.key for target in layer.tensors)}, or none",
            next_step="get a complete copy of the adapter",
        )
        return
    if check_targets and not any(draft.slot.method.targets(draft.config, path) for path in layer.paths):
        draft.refuse(
            f"The adapter's config does not target {layer.path}, but its tensors do.",
            found=f"target_modules={draft.adapter.config.target_modules!r}",
            expected="a config that targets every layer the file has tensors for; a fresh load would ignore these",
            next_step="correct target_modules in adapter_config.json, or remove the tensors",
        )
        return
    settings = draft.slot.method.settings_for(draft.config, layer.path)
    if not _shapes_agree(draft, layer, sources, settings):
        return
    fixed = action is not Action.ADD and has_fixed_size(module, name)
    writes = tuple(TensorPlan(target, source, fixed) for target, source in zip(layer.tensors, sources, strict=True))
    if action is None:
        same_rank = settings.rank == layer.tensors[0].capacity
        action = Action.COPY if same_rank else Action.PAD if fixed else Action.RESIZE
    draft.layers.append(LayerPlan(layer, action, rank_before, settings, writes))


def _shapes_agree(draft: _Draft, layer: SlotLayer, sources: Sequence[torch.Tensor], settings: LayerSettings) -> bool:
    for target, source in zip(layer.tensors, sources, strict=True):
        where = f"{layer.path}.{target.key}"
        if not target.fits(source.shape):
            draft.refuse(
                f"The adapter does not fit the base model at {layer.path}.",
                found=f"{where} of shape {tuple(source.shape)}",
                expected=f"shape {_shape_text(target)}",
                next_step="use an adapter that was made for this base model",
            )
            return False
        rank = target.rank_of(source.shape)
        if rank is not None and rank != settings.rank:
            draft.refuse(
                f"The adapter's tensors and its config disagree about the rank at {layer.path}.",
                found=f"{where} of rank {rank}",
                expected=f"rank {settings.rank}, as r and rank_pattern of the config say",
                next_step="pass the config that belongs to these tensors",
            )
            return False
    step = draft.slot.method.rank_step(layer.module)
    if settings.rank % step:
        draft.refuse(
            f"The rank does not fit the grouped convolution {layer.path}.",
            found=f"rank {settings.rank}",
            expected=f"a multiple of its {step} groups",
            next_step="use an adapter that was made for this base model",
        )
        return False
    return True


def _shape_text(target: SlotTensor) -> str:
    sizes = [str(size) for size in target.parameter.shape]
    if target.rank_axis is not None:
        sizes[target.rank_axis] = "rank" if target.groups == 1 else f"rank/{target.groups}"
    return f"({', '.join(sizes)})"


def _plan_leftovers(draft: _Draft, tensors: dict[str, torch.Tensor], add_layers: bool, check_targets: bool) -> None:
    """Plans what no layer of the slot took: base weights that were saved too, layers to add, unknown keys."""
    if not tensors:
        return
    _drop_unchanged_base_weights(draft, tensors)
    paths = {path for key in tensors if (path := adaptable(draft.slot.host.base, key)) is not None}
    if paths and (add_layers or paths <= former_layers(draft.slot.host.base, draft.slot.adapter_name)):
        _add_layers(draft, tensors, check_targets)
    if not tensors:
        return
    keys = _as_peft_keys(draft, tensors)
    layers = sorted({layer for key in tensors if (layer := adaptable(draft.slot.host.base, key)) is not None})
    if layers:
        next_step = "load first the adapter that targets most layers"
        if draft.compiled:
            next_step = "before compiling, call prepare_model_for_compiled_hotswap with this adapter among `adapters`"
        elif not add_layers:
            next_step = f"pass add_layers=True to add them, or {next_step}"
        found = f"tensors for {len(layers)} layers that the loaded adapter lacks: {listing(layers, 3)}"
    else:
        next_step = "check that both adapters were made for the same base model, or pass key_mapping"
        found = f"{len(keys)} keys that name no layer of the base model"
    draft.refuse(
        f"Hot swapping the adapter did not succeed, unexpected keys found: {listing(keys, 4)}.",
        found=found,
        expected=f"tensors only for layers of the loaded adapter {draft.slot.adapter_name!r}",
        next_step=next_step,
    )


def _drop_unchanged_base_weights(draft: _Draft, tensors: dict[str, torch.Tensor]) -> None:
    """PEFT saves embedding weights beside their LoRA. They are fine as long as they are the base model's own."""
    for key in [key for key in tensors if ".lora_" not in key]:
        if (weight := _base_weight(draft, key)) is None or weight.shape != tensors[key].shape:
            continue
        if not have_same_values(weight, tensors.pop(key)):
            draft.refuse(
                "The adapter comes with other base weights than the model has.",
                found=f"a different {key!r}",
                expected="the base weights that the model was loaded with",
                next_step="swap it in before the model is prepared or compiled",
            )


def _is_unchanged_base_weight(draft: _Draft, key: str, value: torch.Tensor) -> bool:
    weight = _base_weight(draft, key)
    return weight is not None and weight.shape == value.shape and have_same_values(weight, value)


def _base_weight(draft: _Draft, key: str) -> torch.Tensor | None:
    """The base model's weight of this name, whether or not its layer has an adapter, here or in the file."""
    path, _, name = key.rpartition(".")
    path = path.removesuffix(".base_layer")
    try:
        module = draft.slot.host.base.get_submodule(path)
    except AttributeError:
        return None
    module = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return module._parameters.get(name, module._buffers.get(name))


def _add_layers(draft: _Draft, tensors: dict[str, torch.Tensor], check_targets: bool) -> None:
    slot = draft.slot
    paths = sorted({path for key in tensors if (path := adaptable(slot.host.base, key)) is not None})
    if not paths:
        return
    if draft.compiled:
        draft.refuse(
            "Layers can't be added to a compiled model.",
            found=f"{len(paths)} layers that the loaded adapter lacks: {listing(paths, 3)}",
            expected="an adapter whose layers are all in the compiled graph",
            next_step="before compiling, call prepare_model_for_compiled_hotswap with this adapter among `adapters`",
        )
        for key in [key for key in tensors if adaptable(slot.host.base, key) is not None]:
            del tensors[key]  # their reason is given
        return
    try:
        shadows = build_shadow_layers(slot, draft.config, paths)
    except Exception as error:
        draft.refuse(
            "The layers that the loaded adapter lacks can't be added.",
            found=f"{type(error).__name__}: {error}",
            expected="layers that PEFT can put LoRA on",
            next_step="load this adapter with PeftModel.from_pretrained on a fresh base model",
        )
        return
    for layer in shadows:
        _check_layer(draft, layer)
        _plan_layer(draft, layer, tensors, check_targets, Action.ADD)


def _as_peft_keys(draft: _Draft, tensors: dict[str, torch.Tensor]) -> list[str]:
    """Keys as PEFT's messages show them: with prefix, adapter name and all."""
    prefix = PEFT_PREFIX if draft.slot.host.is_peft_model else ""
    name = draft.slot.adapter_name
    keys = []
    for key in tensors:
        head, _, last = key.rpartition(".")
        keys.append(
            f"{prefix}{head}.{name}.{last}" if last == "weight" and not head.endswith(f".{name}") else prefix + key
        )
    return keys


def _retarget_config(draft: _Draft) -> None:
    """Makes the config name exactly the layers that the tensors are for, so that it reloads as what it is."""
    targets = draft.slot.method.targets
    if draft.config.target_modules is None or any(
        targets(draft.config, plan.path) != (plan.settings is not None) for plan in draft.layers
    ):
        draft.config.target_modules = {plan.path for plan in draft.layers if plan.settings is not None}
        draft.config.layers_to_transform = draft.config.layers_pattern = draft.config.exclude_modules = None


def _check_containers(draft: _Draft) -> None:
    """A config that names more than layers: PEFT can't load it, so what is saved with it could not be loaded again."""

    def first_named() -> str | None:
        targets = draft.slot.method.targets
        return next((path for path in _containers(draft.slot.host.base) if targets(draft.config, path)), None)

    path = first_named() if draft.room is None else draft.room.once_for(draft.config, "containers", first_named)
    if path is None:
        return
    module = draft.slot.host.base.get_submodule(path)
    draft.refuse(
        f"Target module {path} is not supported.",
        found=f"target_modules={draft.config.target_modules!r}, which names a {type(module).__name__} too",
        expected="names of layers only: a fresh load refuses this config",
        next_step="correct target_modules in adapter_config.json",
    )


#: what PEFT puts LoRA on, also where a class of these holds modules of its own
ADAPTABLE = (torch.nn.Linear, Conv1D, torch.nn.Embedding, _ConvNd, torch.nn.MultiheadAttention)


def _containers(base: torch.nn.Module) -> Iterator[str]:
    """The paths of all modules that hold others and that no adapter can be on."""
    stack = [(name, child) for name, child in base._modules.items() if child is not None]
    while stack:
        path, module = stack.pop()
        module = unwrap_compiled(module)
        children = module._modules
        if children and not isinstance(module, (BaseTunerLayer, *WRAPPERS, *ADAPTABLE)):
            yield canonical_path(path)
            stack += [(f"{path}.{name}", child) for name, child in children.items() if child is not None]


def _note_missing_targets(draft: _Draft) -> None:
    named = [
        plan.path
        for plan in draft.layers
        if plan.action is Action.OFF and draft.slot.method.targets(draft.config, plan.path)
    ]
    if named:
        draft.notes.append(
            f"the config targets {len(named)} layers that the file has no tensors for ({listing(named, 2)}); "
            "they are turned off"
        )
