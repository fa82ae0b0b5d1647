"""One layer after the other: which tensors of the adapter are its own, whether they fit, what is written."""

from __future__ import annotations

import torch

from . import methods
from .errors import HotswapError, Refusal, listing, refusal
from .host import canonical_path
from .parts import LayerSettings, SlotTensor
from .plan import Action, LayerPlan, Plan, TensorPlan
from .prepared import rank_before
from .shadow import adaptable, build_shadow_layers
from .slot import SlotLayer, expected_of

#: what an adapter's config says of a layer: its settings, and whether it targets it
Expected = tuple[LayerSettings, bool]
Tensors = dict[str, torch.Tensor]


def plan_layers(plan: Plan) -> dict[str, torch.Tensor]:
    """Plans all layers of the slot. Returns the tensors that none of them took, by their names in the base model."""
    slot, tensors = plan.slot, _by_canonical_key(plan)
    for layer, expected, fixed in zip(slot.layers, slot.once_for(plan.config, expected_of), plan.fixed, strict=True):
        _plan_layer(plan, layer, expected, tensors, fixed)
    return tensors


def _by_canonical_key(plan: Plan) -> dict[str, torch.Tensor]:
    """The adapter's tensors by their names in the base model; refuses two for one."""
    tensors: dict[str, torch.Tensor] = {}
    for key, tensor in plan.adapter.tensors.items():
        if (short := canonical_path(key)) in tensors:
            plan.refuse("tensor_named_twice", short=short)
        tensors[short] = tensor
    return tensors


def _plan_layer(
    plan: Plan, layer: SlotLayer, expected: Expected, tensors: Tensors, fixed: bool, action: Action | None = None
) -> None:
    """Plans one layer; ``action`` overrides what the shapes would say. Takes what belongs to it out of ``tensors``."""
    before = None if action else rank_before(layer.module, plan.slot.adapter_name, layer.tensors[0])
    found: list[Tensors] = []
    for names in layer.keys:
        found.append(named := {})  # several where a shared layer is named by each of its paths
        for key in names:
            if key in tensors:
                named[key] = tensors.pop(key)
    if not any(found):
        writes = tuple([TensorPlan(target, None) for target in layer.tensors])
        plan.layers.append(LayerPlan(layer, Action.OFF, before, None, writes))
        return
    settings, is_same = expected[0], expected[0].rank == layer.tensors[0].capacity
    if reason := _what_is_wrong(plan, layer, found, expected, is_same):
        plan.refusals.append(reason)
        return
    if action is None:
        action = Action.COPY if is_same else Action.PAD if fixed else Action.RESIZE
    pairs = zip(layer.tensors, found, strict=True)
    writes = tuple([TensorPlan(target, next(iter(named.values()))) for target, named in pairs])
    plan.layers.append(LayerPlan(layer, action, before, settings, writes))


def _what_is_wrong(
    plan: Plan, layer: SlotLayer, found: list[Tensors], expected: Expected, is_same: bool
) -> Refusal | None:
    """Why these tensors can't be those of the layer, or None; ``is_same`` says that it has this rank already."""
    settings, is_targeted = expected
    rank = settings.rank
    if not all(found):
        missing = listing(target.key for target, named in zip(layer.tensors, found, strict=True) if not named)
        of_layer = listing(target.key for target in layer.tensors)
        return refusal("layer_incomplete", path=layer.path, missing=missing, tensors=of_layer)
    if plan.check_targets and not is_targeted:
        return refusal("layer_not_targeted", path=layer.path, target_modules=plan.adapter.config.target_modules)
    for target, named in zip(layer.tensors, found, strict=True):
        (first, source), *others = named.items()
        for second, other in others:
            if not have_same_values(other, source):
                return refusal("two_values_for_shared", first=first, second=second, path=layer.path)
        if source.shape != (target.parameter.shape if is_same else target.shape_for(rank)):
            return _wrong_shape(layer, target, source.shape, rank)
    if not is_same and rank % (step := layer.tensors[0].rank_step):
        return refusal("rank_not_for_groups", path=layer.path, rank=rank, step=step)
    return None


def _wrong_shape(layer: SlotLayer, target: SlotTensor, shape: torch.Size, rank: int) -> Refusal:
    path, where, found, expected = layer.path, f"{layer.path}.{target.key}", tuple(shape), target.shape_for(rank)
    if target.fits(shape):
        return refusal("rank_disagrees", path=path, where=where, shape=found, expected=expected, rank=rank)
    return refusal("other_shape", path=path, where=where, shape=found, expected=expected, rank=rank)


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
    for layer, expected in zip(shadows, expected_of(slot, plan.config, shadows), strict=True):
        _plan_layer(plan, layer, expected, tensors, False, Action.ADD)
