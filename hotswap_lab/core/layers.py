"""One layer after the other: which tensors of the adapter are its own, whether they fit, what is written."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import repeat

import torch

from . import methods
from .errors import HotswapError, Refusal, listing, refusal
from .host import canonical_path
from .parts import SlotTensor
from .plan import Action, LayerPlan, Plan
from .shadow import adaptable, build_shadow_layers
from .slot import Expected, SlotLayer, expected_of, own_keys_of

Tensors = dict[str, torch.Tensor]


def plan_layers(plan: Plan) -> Tensors:
    """Plans all layers of the slot. Returns the tensors that none of them took, by their names in the base model."""
    slot, tensors = plan.slot, _by_own_key(plan, plan.adapter.tensors, plan.slot.own_keys)
    expected = slot.once_for(plan.config, expected_of)
    for each in zip(slot.layers, expected, plan.ranks_before, plan.fixed, strict=True):
        _plan_layer(plan, tensors, *each)
    return tensors


def _by_own_key(plan: Plan, named: Mapping[str, torch.Tensor], own_keys: Mapping[str, str]) -> Tensors:
    """Tensors by their own keys in the base model; refuses two for one, unless these are the same."""
    tensors: Tensors = {}
    for key, tensor in named.items():
        own = own_keys.get(short := canonical_path(key), short)
        if own in tensors and not are_the_same(tensor, tensors[own]):
            plan.refuse("two_values_for_one", key=key, own=own)
        tensors[own] = tensor
    return tensors


def _plan_layer(
    plan: Plan,
    tensors: Tensors,
    layer: SlotLayer,
    expected: Expected,
    before: int | None,
    fixed: bool,
    action: Action | None = None,
) -> None:
    """Plans one layer; ``action`` overrides what the shapes would say. Takes what belongs to it out of ``tensors``."""
    sources = tuple(map(tensors.pop, layer.keys, repeat(None)))
    shapes = [None if source is None else source.shape for source in sources]
    settings = expected.settings
    if shapes == expected.shapes and (expected.is_targeted or not plan.check_targets):
        if action is None:
            is_same = settings.rank == layer.tensors[0].capacity
            action = Action.COPY if is_same else Action.PAD if fixed else Action.RESIZE
    elif shapes == [None] * len(shapes):
        action, settings = Action.OFF, None
    else:
        plan.refusals.append(_what_is_wrong(plan, layer, shapes, expected))
        return
    plan.layers.append(LayerPlan(layer, action, before, settings, sources))


def _what_is_wrong(plan: Plan, layer: SlotLayer, shapes: list[torch.Size | None], expected: Expected) -> Refusal:
    """Why tensors of these shapes can't be those of the layer."""
    path, rank = layer.path, expected.settings.rank
    found = list(zip(layer.tensors, shapes, strict=True))
    if missing := [target.key for target, shape in found if shape is None]:
        of_layer = listing(target.key for target in layer.tensors)
        return refusal("layer_incomplete", path=path, missing=listing(missing), tensors=of_layer)
    if plan.check_targets and not expected.is_targeted:
        return refusal("layer_not_targeted", path=path, target_modules=plan.adapter.config.target_modules)
    for target, shape in found:
        if shape is not None and shape != target.shape_for(rank):
            return _wrong_shape(layer, target, shape, rank)
    return refusal("rank_not_for_groups", path=path, rank=rank, step=layer.tensors[0].rank_step)


def _wrong_shape(layer: SlotLayer, target: SlotTensor, shape: torch.Size, rank: int) -> Refusal:
    path, where, found, expected = layer.path, f"{layer.path}.{target.key}", tuple(shape), target.shape_for(rank)
    if target.fits(shape):
        return refusal("rank_disagrees", path=path, where=where, shape=found, expected=expected, rank=rank)
    return refusal("other_shape", path=path, where=where, shape=found, expected=expected, rank=rank)


def are_the_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether it is all the same which of two tensors is taken."""
    return one.dtype == other.dtype and have_same_values(one, other)


def have_same_values(live: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether writing ``other`` to ``live`` would change nothing."""
    return live.shape == other.shape and torch.equal(live.detach(), other.detach().to(live.device, live.dtype))


# ---- what no layer of the slot took


def plan_leftovers(plan: Plan, tensors: Tensors) -> None:
    """Plans what no layer of the slot took: base weights that were saved too, layers to add, unknown keys."""
    if not tensors:
        return
    methods.rest.take_leftovers(plan, tensors)
    paths, name, adds = _layers_of(plan, tensors), plan.slot.adapter_name, plan.add_layers
    if paths and adds and not plan.compiled:
        _add_layers(plan, paths, tensors)
        paths = []
    if not tensors:
        return
    where, keys = listing(paths, 3), listing([key for key in plan.adapter.tensors if canonical_path(key) in tensors], 4)
    if not paths:
        plan.refuse("unexpected_keys", keys=keys, count=len(tensors), adapter_name=name)
    elif adds:
        plan.refuse("compiled_lacks_layers", count=len(paths), paths=where)
    elif plan.compiled:
        plan.refuse("unexpected_layers_compiled", keys=keys, count=len(paths), paths=where, adapter_name=name)
    else:
        plan.refuse("unexpected_layers", keys=keys, count=len(paths), paths=where, adapter_name=name)


def _layers_of(plan: Plan, tensors: Tensors) -> list[str]:
    """The paths of layers of the base model that the tensors are for."""
    return sorted({path for key in tensors if (path := adaptable(plan.slot.host.base, key)) is not None})


def _add_layers(plan: Plan, paths: list[str], tensors: Tensors) -> None:
    slot = plan.slot
    try:
        ranks = {path: slot.method.settings_for(plan.config, path).rank for path in paths}
        shadows = build_shadow_layers(slot, plan.config, ranks)
    except HotswapError as error:
        plan.refusals += error.refusals
        tensors.clear()  # the reason is given
        return
    own = _by_own_key(plan, tensors, own_keys_of(shadows))
    tensors.clear()
    tensors.update(own)
    for layer, expected in zip(shadows, expected_of(slot, plan.config, shadows), strict=True):
        _plan_layer(plan, tensors, layer, expected, None, False, Action.ADD)
