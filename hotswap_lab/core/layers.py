"""One layer after the other: which tensors of the adapter are its own, whether they fit, what is written."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace

import torch

from .compiled import COMPILED
from .draft import Draft
from .errors import listing
from .host import PEFT_PREFIX, canonical_path
from .parts import LayerSettings, SlotTensor
from .plan import Action, LayerPlan, TensorPlan
from .prepared import has_fixed_size
from .sameness import have_same_values
from .slot import SlotLayer
from .state_view import rank_before


def by_canonical_key(draft: Draft) -> dict[str, torch.Tensor]:
    """The adapter's tensors by their names in the base model; refuses two for one."""
    tensors: dict[str, torch.Tensor] = {}
    for key, tensor in draft.adapter.tensors.items():
        plain = key.startswith(PEFT_PREFIX) and COMPILED not in key
        short = key[len(PEFT_PREFIX) :] if plain else canonical_path(key)
        if short in tensors:
            draft.refuse(
                "The adapter names one tensor twice.",
                found=f"two keys that both mean {short!r}",
                expected="each tensor once, with or without the prefix 'base_model.model.'",
                next_step="remove one of them",
            )
        tensors[short] = tensor
    return tensors


def plan_layers(draft: Draft, tensors: dict[str, torch.Tensor]) -> None:
    """:func:`plan_layer` for all layers of the slot.

    Only what is just as the config says is decided here. All else takes the long way, which finds the words for it.
    """
    slot, name = draft.slot, draft.slot.adapter_name
    of_slot = zip(slot.layers, slot.keys, slot.expect(draft.config), draft.fixed, strict=True)
    for layer, keys, expected, fixed in of_slot:
        before = rank_before(layer.module, name, layer.tensors[0])
        found = [key for options in keys for key in options if key in tensors]
        if not found:
            writes = tuple([TensorPlan(target, None) for target in layer.tensors])
            draft.layers.append(LayerPlan(layer, Action.OFF, before, None, writes))
        elif (
            (expected.targeted or not draft.check_targets)
            and len(found) == len(keys)
            and all(map(operator.contains, keys, found))
            and _are_of_rank(expected.settings.rank, layer, [tensors[key].shape for key in found])
        ):
            capacity = layer.tensors[0].capacity
            sources = map(tensors.pop, found)
            writes = tuple(map(TensorPlan, layer.tensors, sources, [fixed] * len(found)))
            action = Action.COPY if expected.settings.rank == capacity else Action.PAD if fixed else Action.RESIZE
            draft.layers.append(LayerPlan(layer, action, before, expected.settings, writes))
        else:
            plan_layer(draft, layer, tensors)


def _are_of_rank(rank: int, layer: SlotLayer, shapes: list[torch.Size]) -> bool:
    """Whether tensors of these shapes fit the layer, and are of this rank."""
    for tensor, shape in zip(layer.tensors, shapes, strict=True):
        expected, axis = tensor.owner._parameters[tensor.name].shape, tensor.rank_axis
        if axis is not None:
            if rank % (tensor.groups * tensor.blocks):
                return False
            expected = (*expected[:axis], rank // tensor.groups, *expected[axis + 1 :])
        if shape != expected:
            return False
    return True


def plan_layer(
    draft: Draft,
    layer: SlotLayer,
    tensors: dict[str, torch.Tensor],
    action: Action | None = None,
) -> None:
    """Plans one layer; ``action`` overrides what the shapes would say."""
    sources = _take(draft, layer, tensors)
    name, module = draft.slot.adapter_name, layer.module
    before = None if action is Action.ADD else rank_before(module, name, layer.tensors[0])
    if all(source is None for source in sources):
        writes = tuple(TensorPlan(target, None) for target in layer.tensors)
        draft.layers.append(LayerPlan(layer, Action.OFF, before, None, writes))
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
    if draft.check_targets and not any(draft.slot.method.targets(draft.config, path) for path in layer.paths):
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
    draft.layers.append(LayerPlan(layer, action, before, settings, writes))


def resize_what_is_off(draft: Draft) -> None:
    """Gives the layers that are turned off the adapter's new rank where all others get it.

    PEFT's ``add_weighted_adapter`` adds the adapters up by the ranks of their configs, on every layer that has them.
    """
    if draft.refusals or draft.slot.is_sharded or Action.RESIZE not in [plan.action for plan in draft.layers]:
        return
    ranks = {plan.settings.rank for plan in draft.layers if plan.settings}
    of_slot = zip(draft.layers, draft.slot.expect(draft.config), draft.fixed, strict=False)  # added layers come last
    for number, (plan, expected, fixed) in enumerate(of_slot):
        if plan.action is Action.OFF and not fixed:
            rank = expected.settings.rank
            # any other rank may be as large as a damaged config says
            if rank not in ranks or rank % draft.slot.method.rank_step(plan.layer.module):
                continue
            zeros = []
            for target in plan.layer.tensors:
                parameter, source = target.owner._parameters[target.name].detach(), None
                if (axis := target.rank_axis) is not None:
                    shape = [*parameter.shape]
                    shape[axis] = rank // target.groups
                    # a single zero, repeated without taking memory
                    source = parameter.new_zeros(()).expand(shape)
                zeros.append(TensorPlan(target, source))
            draft.layers[number] = replace(plan, tensors=tuple(zeros))


def _take(draft: Draft, layer: SlotLayer, tensors: dict[str, torch.Tensor]) -> list[torch.Tensor | None]:
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


def _shapes_agree(draft: Draft, layer: SlotLayer, sources: Sequence[torch.Tensor], settings: LayerSettings) -> bool:
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
