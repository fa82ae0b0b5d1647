"""Planner: makes a plan from an adapter and a slot. It compares both and writes nothing.

Most of its functions are passes: each gets the plan and adds what it finds, or returns another plan to go on with.
Reasons against a swap are collected up to the next :func:`stop_if_refused`, so that the user sees them together.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch

from . import lora
from .adapter import Adapter
from .added_layers import adaptable, build_added_layers
from .checks import check_containers, check_prefixes, correct_fan_in_fan_out, note_missing_targets, note_other_base
from .compiled import blind_spot, compiled_in, frozen, guards_are_skipped
from .errors import HotswapError, Refusal, listing, refusal
from .host import Config, canonical_path, kind_of
from .loaded import FITS, with_bases
from .lora_method import Lora
from .memory import conflicting_writes, overlaps_in, overwritten, own_tensors
from .method import Method
from .plan import Action, LayerPlan, Plan
from .settings import settings_for
from .slot import Expected, Slot, SlotLayer, copy_of, expected_of, own_keys_of
from .tensors import are_interchangeable
from .wrappers import embeddings_of

#: gets an unfinished plan. Adds to it and returns None, or returns another plan to go on with
Pass = Callable[[Plan], Plan | None]


def only_for(applies: Callable[[Slot, bool], object]) -> Callable[[Pass], Pass]:
    """A decorator of passes that find something only in some slots; ``applies`` is asked once for each slot.

    Its second argument is whether this process is one of several, which may change.
    """

    def marked(of_plan: Any) -> Pass:
        of_plan.only_for = applies
        return of_plan

    return marked


def stop_if_refused(plan: Plan) -> None:
    """Skip the passes that follow if one of those before has refused something."""
    plan.is_decided = bool(plan.refusals)


# ---- the configs


def misfits(slot: Slot, adapter: Adapter, in_graph: bool = False) -> list[Refusal]:
    """The reasons why an adapter can't replace the loaded one, or share a compiled graph with it (``in_graph``)."""
    loaded, new = slot.config, adapter.config
    if loaded.peft_type != new.peft_type:
        old, kind, label = kind_of(loaded), kind_of(new), adapter.label
        return [refusal("other_peft_type", old=old, kind=kind, label=label, adapter_name=slot.adapter_name)]
    if not in_graph:
        return [*slot.method.judge(new, "new")]
    # one of a family: which one?
    return [
        replace(judged, found=f"{adapter.label}: {judged.found}") for judged in slot.method.judge(new, "new", loaded)
    ]


def check_configs(plan: Plan) -> None:
    """Refuse an adapter of another type than the loaded one, and configs that no fresh load accepts."""
    slot, loaded, new = plan.slot, plan.slot.config, plan.adapter.config
    # a refusal is decided anew: it may come from an error that has passed
    if loaded.peft_type != new.peft_type or not slot.once_for(new, _is_accepted):
        plan.refusals += misfits(slot, plan.adapter)
    if not slot.once_for(loaded, _is_accepted):
        plan.refusals += slot.method.judge(loaded, "loaded")


def _is_accepted(slot: Slot, config: Config) -> bool:
    """Whether a config is refused neither as the new one nor as the loaded one."""
    return not [*slot.method.judge(config, "new"), *slot.method.judge(config, "loaded")]


def complete_config(plan: Plan) -> None:
    """Complete the config as a fresh load does."""
    plan.config = lora.complete(copy_of(plan.adapter.config), plan.slot.host)
    plan.config.inference_mode = plan.slot.config.inference_mode


def check_slot(plan: Plan) -> None:
    """Refuse merged weights, layers that can't be written to, and configs that name no layers."""
    if plan.slot.is_merged:
        plan.refuse("merged", adapter_name=plan.slot.adapter_name)
    for layer, reason in plan.slot.obstacles:
        plan.refuse("layer_not_plain", path=layer.path, reason=reason)
    if plan.check_targets and plan.config.target_modules is None:
        plan.refuse("no_target_modules")


def check_that_it_is_plain(plan: Plan) -> None:
    """Refuse layers of which plain LoRA doesn't know enough: PEFT saves the base weights of embeddings with them."""
    embeddings = embeddings_of(plan.slot.host.base)
    for layer in plan.slot.layers:
        if layer.module in embeddings:
            plan.refuse("more_than_core", role="loaded", fields=f"{layer.path}, an embedding")
        if getattr(layer.module.get_base_layer(), "groups", 1) > 1:
            plan.refuse("more_than_core", role="loaded", fields=f"{layer.path}, a convolution in groups")


def keep_sources_apart(plan: Plan) -> None:
    """Copy the adapter's tensors that are in the model's memory. Refuse those that an earlier swap has overwritten."""
    adapter, slot = plan.adapter, plan.slot
    if adapter.is_folder or not (own := own_tensors(slot, adapter.tensors)):
        return
    plan.refusals += overwritten(slot, own)
    copies = {key: tensor.detach().clone() for key, tensor in own.items()}
    plan.adapter = replace(adapter, tensors={**adapter.tensors, **copies})


# ---- layer by layer


Tensors = dict[str, torch.Tensor]


def plan_layers(plan: Plan) -> None:
    """Plan all layers of the slot, and put the tensors that none of them takes into ``plan.unknown``."""
    slot, tensors = plan.slot, _by_own_key(plan, plan.adapter.tensors, plan.slot.own_keys)
    expected = slot.once_for(plan.config, expected_of)
    for layer, wanted, before, prepared in zip(slot.layers, expected, plan.ranks_before, plan.prepared, strict=True):
        _plan_layer(plan, tensors, layer, wanted, before, Action.PAD if prepared else Action.RESIZE)
    plan.unknown = tensors


def _by_own_key(plan: Plan, named: Mapping[str, torch.Tensor], own_keys: Mapping[str, str]) -> Tensors:
    """Tensors by their own keys in the base model. Two tensors for one key are refused unless they are equal."""
    tensors: Tensors = {}
    for key, tensor in named.items():
        if (own := own_keys.get(key)) is None:
            short = canonical_path(key)
            own = own_keys.get(short, short)
        if own in tensors and not are_interchangeable(tensor, tensors[own]):
            plan.refuse("two_values_for_one", key=key, own=own)
        tensors[own] = tensor
    return tensors


def _plan_layer(
    plan: Plan, tensors: Tensors, layer: SlotLayer, expected: Expected, before: int | None, if_resized: Action
) -> None:
    """Plan one layer, and take its tensors out of ``tensors``; ``if_resized`` is the action for another rank."""
    action, settings, sources, shapes = if_resized, expected.settings, [], []
    for key in layer.keys:
        source = tensors.pop(key, None)
        sources.append(source)
        shapes.append(None if source is None else source.shape)
    if shapes == expected.shapes and (expected.is_targeted or not plan.check_targets):
        if settings.rank == layer.tensors[0].capacity and action is not Action.ADD:
            action = Action.COPY
    elif shapes == [None] * len(shapes):
        action, settings = Action.OFF, None
    else:
        plan.refusals.append(_what_is_wrong(plan, layer, shapes, expected))
        return
    plan.layers.append(LayerPlan(layer, action, before, settings, tuple(sources), expected.is_targeted))


def _what_is_wrong(plan: Plan, layer: SlotLayer, shapes: list[torch.Size | None], expected: Expected) -> Refusal:
    """The refusal of tensors whose shapes don't fit the layer."""
    path, rank = layer.path, expected.settings.rank
    found = list(zip(layer.tensors, shapes, strict=True))
    if missing := [target.key for target, shape in found if shape is None]:
        of_layer = listing(target.key for target in layer.tensors)
        return refusal("layer_incomplete", path=path, missing=listing(missing), tensors=of_layer)
    if plan.check_targets and not expected.is_targeted:
        return refusal("layer_not_targeted", path=path, target_modules=plan.adapter.config.target_modules)
    for target, shape in found:
        where, wanted = f"{path}.{target.key}", target.shape_for(rank)
        if shape is None or shape == wanted:
            continue
        if target.fits(shape):
            return refusal("rank_disagrees", path=path, where=where, shape=tuple(shape), expected=wanted, rank=rank)
        return refusal("other_shape", path=path, where=where, shape=tuple(shape), expected=wanted, rank=rank)
    return refusal("rank_not_for_groups", path=path, rank=rank, step=layer.tensors[0].rank_step)


# ---- tensors that no layer of the slot took


def plan_leftovers(plan: Plan) -> None:
    """Plan the tensors that no layer of the slot took: add their layers, or refuse their keys."""
    tensors = plan.unknown
    if not tensors:
        return
    base, name, adds = plan.slot.host.base, plan.slot.adapter_name, plan.add_layers
    paths = sorted({path for key in tensors if (path := adaptable(base, key)) is not None})
    if paths and adds and not plan.compiled:
        _add_layers(plan, paths)
        tensors, paths = plan.unknown, []
    if not tensors:
        return
    unknown = [key for key in plan.adapter.tensors if canonical_path(key) in tensors]
    there = {layer.path for layer in plan.slot.layers}
    paths = [path for path in paths if path not in there]  # of the others, a tensor is unknown
    where, keys = listing(paths, 3), listing(unknown, 4)
    if not paths:
        plan.refuse("unexpected_keys", keys=keys, count=len(tensors), adapter_name=name)
    elif adds:
        plan.refuse("compiled_lacks_layers", count=len(paths), paths=where)
    elif plan.compiled:
        plan.refuse("unexpected_layers_compiled", count=len(paths), paths=where, adapter_name=name)
    else:
        plan.refuse("unexpected_layers", count=len(paths), paths=where, adapter_name=name)


def _add_layers(plan: Plan, paths: list[str]) -> None:
    slot, tensors = plan.slot, plan.unknown
    try:
        ranks = {path: settings_for(plan.config, path).rank for path in paths}
        added = build_added_layers(slot, plan.config, ranks)
    except HotswapError as error:
        plan.refusals += error.refusals
        plan.unknown = {}  # they are refused already
        return
    plan.unknown = _by_own_key(plan, tensors, own_keys_of(added))
    for layer, expected in zip(added, expected_of(slot, plan.config, added), strict=True):
        _plan_layer(plan, plan.unknown, layer, expected, None, Action.ADD)


# ---- when the action of each layer is known


@only_for(overlaps_in)
def keep_targets_apart(plan: Plan) -> None:
    """Refuse different values for tensors that overlap in the model."""
    planned = {tensor: layer for layer in plan.layers for tensor in layer.layer.tensors}
    for group in overlaps_in(plan.slot):
        values: dict[torch.nn.Parameter, torch.Tensor] = {}
        differ = False
        for tensor in group:
            value = tensor.parameter.detach()  # another adapter's, which two that were loaded from one dict share
            if layer := planned.get(tensor):
                source = layer.sources[layer.layer.tensors.index(tensor)]
                value = torch.zeros_like(value) if source is None else source
                if layer.action is Action.PAD:
                    value = tensor.padded(value, tensor.capacity)
            differ |= not are_interchangeable(values.setdefault(tensor.parameter, value), value)
        # a parameter that changes its shape gets memory of its own
        stay = [(target, value) for target, value in values.items() if target.shape == value.shape]
        if differ or conflicting_writes(stay):
            paths = listing(dict.fromkeys(planned[tensor].path for tensor in group if tensor in planned), 3)
            plan.refuse("targets_overlap", paths=paths, adapter_name=plan.slot.adapter_name)


def check_capacity(plan: Plan) -> None:
    """Refuse ranks that a prepared layer has no room for, all of them in one refusal."""
    if not (padded := [layer for layer in plan.layers if layer.action is Action.PAD]):
        return
    ranks = [(layer.rank_after or 0, layer.layer.tensors[0].capacity or 0, layer.path) for layer in padded]
    if lacking := [rank for rank in ranks if rank[0] > rank[1]]:
        highest, room, path = max(lacking, key=lambda rank: rank[0])
        plan.refuse("rank_above_room", count=len(lacking), highest=highest, path=path, room=room)


def check_compiled(plan: Plan) -> None:
    """Refuse a swap that a compiled graph would not notice."""
    # a compiled function around the model leaves no trace in it
    may_go_unnoticed = frozen or (guards_are_skipped() and not plan.writes_values_only)
    if not plan.compiled and not plan.is_prepared and not may_go_unnoticed:
        return
    base = plan.slot.host.base
    if reason := blind_spot(base, plan.compiled, plan.is_prepared and plan.writes_values_only):
        plan.refuse("compiled_would_not_notice", reason=reason)


def retarget_config(plan: Plan) -> None:
    """Make the config name exactly the layers that the tensors are for, so that a saved copy loads as it is."""
    if plan.check_targets:
        return
    config, on = plan.config, [layer for layer in plan.layers if layer.settings is not None]
    named = None
    if config.target_modules is not None:
        named = [layer for layer in plan.layers if lora.is_targeted(config, layer.path)]
    if named != on:
        lora.retarget(config, [layer.path for layer in on], plan.slot.host.base)


def check_that_it_does_something(plan: Plan) -> None:
    """Refuse an adapter whose tensors are for no layer of the slot."""
    is_on = any(layer.settings is not None for layer in plan.layers)
    if plan.adapter.tensors and not is_on and not plan.refusals:
        keys, paths = [repr(key) for key in plan.adapter.tensors], [repr(layer.path) for layer in plan.slot.layers]
        plan.refuse("nothing_for_any_layer", keys=listing(keys, 2), paths=listing(paths, 2))


# ---- all of it

#: the methods of models whose adapters are plain LoRA
LORA: tuple[Method, ...] = (Lora(),)
#: the passes that decide a swap of plain LoRA, in the order in which they run
LORA_PASSES: tuple[Pass, ...] = (
    check_configs,
    check_prefixes,
    keep_sources_apart,
    note_other_base,
    stop_if_refused,
    complete_config,
    check_slot,
    check_that_it_is_plain,
    stop_if_refused,
    plan_layers,
    plan_leftovers,
    keep_targets_apart,
    check_capacity,
    check_containers,
    correct_fan_in_fan_out,
    note_missing_targets,
    check_compiled,
    retarget_config,
    check_that_it_does_something,
)


def make_plan(
    slot: Slot,
    adapter: Adapter,
    *,
    passes: Iterable[Pass],
    add_layers: bool = False,
    check_targets: bool = True,
    base_weights: Mapping[str, torch.Tensor] | None = None,
) -> Plan:
    """Decide a swap. Reads the slot and the adapter, writes nothing, raises nothing: see ``Plan.refusals``.

    Parameters
    ----------
    slot, adapter:
        The place of the loaded adapter, and the adapter to put there. One without tensors turns off every layer.
    passes:
        The steps that decide it, in this order: those of the methods that the slot was found with, such as
        :data:`LORA_PASSES`, or all of :mod:`hotswap_lab.beyond.passes`.
    add_layers:
        Whether layers that the slot lacks are added (not possible in a compiled model) rather than refused.
    check_targets:
        Whether the adapter's config must name the layers that its tensors belong to, as a fresh load demands.
    base_weights:
        Original values of base weights that the loaded adapter has overwritten, by name.
    """
    compiled = compiled_in(slot.host.root, slot.modules)
    plan = Plan(slot, adapter, adapter.config, compiled, add_layers, check_targets, base_weights)
    is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    for one_pass in passes:
        applies = getattr(one_pass, "only_for", None)
        if applies is None or slot.once(applies, is_distributed):
            plan = one_pass(plan) or plan
        if plan.is_decided:
            break
    if plan.refusals:
        plan.refusals[:] = with_bases(slot, adapter.config, plan.refusals)
        plan.notes[:] = [note.removesuffix(FITS) for note in plan.notes]
    return plan
