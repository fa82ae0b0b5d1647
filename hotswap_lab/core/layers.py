"""One layer after the other: which tensors of the adapter are its own, whether they fit, what is written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from . import methods
from .compiled import COMPILED
from .errors import Refusal, listing, refusal
from .host import PEFT_PREFIX, canonical_path
from .parts import SlotTensor
from .plan import Action, LayerPlan, TensorPlan
from .shadow import adaptable, build_shadow_layers
from .slot import Expected, SlotLayer
from .state_view import rank_before

if TYPE_CHECKING:
    from .decide import Draft


def plan_layers(draft: Draft) -> dict[str, torch.Tensor]:
    """Plans all layers of the slot. Returns the tensors that none of them took, by their names in the base model."""
    slot, tensors = draft.slot, _by_canonical_key(draft)
    for layer, expected, fixed in zip(slot.layers, slot.expect(draft.config), draft.fixed, strict=True):
        before = rank_before(layer.module, slot.adapter_name, layer.tensors[0])
        _plan_layer(draft, layer, expected, tensors, before, fixed)
    return tensors


def _by_canonical_key(draft: Draft) -> dict[str, torch.Tensor]:
    """The adapter's tensors by their names in the base model; refuses two for one."""
    tensors: dict[str, torch.Tensor] = {}
    for key, tensor in draft.adapter.tensors.items():
        plain = key.startswith(PEFT_PREFIX) and COMPILED not in key
        short = key[len(PEFT_PREFIX) :] if plain else canonical_path(key)
        if short in tensors:
            draft.refuse("tensor_named_twice", short=short)
        tensors[short] = tensor
    return tensors


def _plan_layer(
    draft: Draft,
    layer: SlotLayer,
    expected: Expected,
    tensors: dict[str, torch.Tensor],
    before: int | None,
    fixed: bool,
    action: Action | None = None,
) -> None:
    """Plans one layer; ``action`` overrides what the shapes would say. Takes what belongs to it out of ``tensors``."""
    found = [key for names in layer.keys for key in names if key in tensors]
    if not found:
        writes = tuple([TensorPlan(target, None) for target in layer.tensors])
        draft.layers.append(LayerPlan(layer, Action.OFF, before, None, writes))
        return
    taken = {key: tensors.pop(key) for key in found}
    if reason := _what_is_wrong(draft, layer, taken, expected):
        draft.refusals.append(reason)
        return
    rank = expected.settings.rank
    if action is None:
        action = Action.COPY if rank == layer.tensors[0].capacity else Action.PAD if fixed else Action.RESIZE
    if len(found) > len(layer.tensors):  # a shared layer, named twice
        found = [next(key for key in names if key in taken) for names in layer.keys]
    writes = tuple([TensorPlan(target, taken[key], fixed) for target, key in zip(layer.tensors, found, strict=True)])
    draft.layers.append(LayerPlan(layer, action, before, expected.settings, writes))


def _what_is_wrong(
    draft: Draft, layer: SlotLayer, taken: dict[str, torch.Tensor], expected: Expected
) -> Refusal | None:
    """Why these tensors can't be those of the layer, or None."""
    rank, missing, wrong = expected.settings.rank, [], None
    for target, names in zip(layer.tensors, layer.keys, strict=True):
        source, first = None, ""
        for key in names:
            if key not in taken:
                continue
            if source is None:
                source, first = taken[key], key
            elif not have_same_values(taken[key], source):
                wrong = wrong or refusal("two_values_for_shared", first=first, second=key, path=layer.path)
        if source is None:
            missing.append(target.key)
        elif wrong is None:
            shape, axis = target.owner._parameters[target.name].shape, target.rank_axis
            if axis is not None:
                shape = (*shape[:axis], rank // target.groups, *shape[axis + 1 :])
            if source.shape != shape:
                wrong = _wrong_shape(layer, target, source.shape, rank)
    if missing:
        of_layer = listing(target.key for target in layer.tensors)
        return refusal("layer_incomplete", path=layer.path, missing=listing(missing), tensors=of_layer)
    if draft.check_targets and not expected.targeted:
        return refusal("layer_not_targeted", path=layer.path, target_modules=draft.adapter.config.target_modules)
    if wrong is None and rank % (step := draft.slot.method.rank_step(layer.module)):
        return refusal("rank_not_for_groups", path=layer.path, rank=rank, step=step)
    return wrong


def _wrong_shape(layer: SlotLayer, target: SlotTensor, shape: torch.Size, rank: int) -> Refusal:
    where = f"{layer.path}.{target.key}"
    if not target.fits(shape):
        text = _shape_text(target)
        return refusal("other_shape", path=layer.path, where=where, shape=tuple(shape), expected=text)
    return refusal("rank_disagrees", path=layer.path, where=where, rank=target.rank_of(shape), rank_of_config=rank)


def have_same_values(live: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether writing ``other`` to ``live`` would change nothing."""
    return live.shape == other.shape and torch.equal(live.detach(), other.detach().to(live.device, live.dtype))


def _shape_text(target: SlotTensor) -> str:
    sizes = [str(size) for size in target.parameter.shape]
    if target.rank_axis is not None:
        sizes[target.rank_axis] = "rank" if target.groups == 1 else f"rank/{target.groups}"
    return f"({', '.join(sizes)})"


def resize_what_is_off(draft: Draft) -> None:
    """Gives the layers that are turned off the adapter's new rank where all others get it.

    PEFT's ``add_weighted_adapter`` adds the adapters up by the ranks of their configs, on every layer that has them.
    """
    if draft.refusals or draft.slot.is_sharded or Action.RESIZE not in [plan.action for plan in draft.layers]:
        return
    ranks = {plan.settings.rank for plan in draft.layers if plan.settings}
    of_slot = zip(draft.layers, draft.slot.expect(draft.config), draft.fixed, strict=False)  # added layers come last
    for number, (plan, expected, fixed) in enumerate(of_slot):
        rank = expected.settings.rank
        # any other rank may be as large as a damaged config says
        if plan.action is not Action.OFF or fixed or rank not in ranks:
            continue
        if rank % draft.slot.method.rank_step(plan.layer.module) == 0:
            draft.layers[number] = replace(plan, tensors=tuple(_zeros_of(plan.layer.tensors, rank)))


def _zeros_of(targets: Sequence[SlotTensor], rank: int) -> Iterator[TensorPlan]:
    for target in targets:
        if target.rank_axis is None:
            yield TensorPlan(target, None)
        else:  # a single zero, repeated without taking memory
            yield TensorPlan(target, target.parameter.detach().new_zeros(()).expand(target.shape_for(rank)))


# ---- what no layer of the slot took


def plan_leftovers(draft: Draft, tensors: dict[str, torch.Tensor]) -> None:
    """Plans what no layer of the slot took: base weights that were saved too, layers to add, unknown keys."""
    if not tensors:
        return
    methods.rest.take_base_weights(draft, tensors)
    paths = _layers_of(draft, tensors)
    if paths and (draft.add_layers or set(paths) <= set(methods.rest.former_layers(draft.slot))):
        _add_layers(draft, paths, tensors)
        paths = _layers_of(draft, tensors)
    if not tensors:
        return
    keys = _as_peft_keys(draft, tensors)
    if paths:
        next_step = "load first the adapter that targets most layers"
        if draft.compiled:
            next_step = "before compiling, call prepare_model_for_compiled_hotswap with this adapter among `adapters`"
        elif not draft.add_layers:
            next_step = f"pass add_layers=True to add them, or {next_step}"
        found = f"tensors for {len(paths)} layers that the loaded adapter lacks: {listing(paths, 3)}"
    else:
        next_step = "check that both adapters were made for the same base model, or pass key_mapping"
        found = f"{len(keys)} keys that name no layer of the base model"
    expected = f"tensors only for layers of the loaded adapter {draft.slot.adapter_name!r}"
    draft.refuse("unexpected_keys", keys=listing(keys, 4), found=found, expected=expected, next_step=next_step)


def _layers_of(draft: Draft, tensors: dict[str, torch.Tensor]) -> list[str]:
    """The paths of layers of the base model that the tensors are for."""
    return sorted({path for key in tensors if (path := adaptable(draft.slot.host.base, key)) is not None})


def _add_layers(draft: Draft, paths: list[str], tensors: dict[str, torch.Tensor]) -> None:
    slot = draft.slot
    if draft.compiled:
        draft.refuse("compiled_lacks_layers", count=len(paths), paths=listing(paths, 3))
        for key in [key for key in tensors if adaptable(slot.host.base, key) is not None]:
            del tensors[key]  # their reason is given
        return
    try:
        shadows = build_shadow_layers(slot, draft.config, paths)
    except Exception as error:
        draft.refuse("layers_not_addable", error=error)
        return
    for layer in shadows:
        if reason := slot.method.unsupported_layer(layer.module, slot.adapter_name, layer.tensors):
            draft.refuse("layer_not_plain", path=layer.path, reason=reason)
        [expected] = slot.expected_of([layer], draft.config)
        _plan_layer(draft, layer, expected, tensors, None, False, Action.ADD)


def _as_peft_keys(draft: Draft, tensors: dict[str, torch.Tensor]) -> list[str]:
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
