"""One layer after the other: which tensors of the adapter are its own, whether they fit, what is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ..errors import listing
from ..host import canonical_path
from ..parts import LayerSettings, SlotTensor
from ..plan import Action, LayerPlan, TensorPlan
from ..prepared_layer import has_fixed_size
from ..sameness import have_same_values
from ..shards import has_fixed_shape, is_sharded
from ..slot import SlotLayer
from ..state_view import is_marked_off, own_rank
from .draft import Draft


def by_canonical_key(draft: Draft) -> dict[str, torch.Tensor]:
    """The adapter's tensors by their names in the base model; refuses two for one."""
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


def plan_in_room(draft: Draft, tensors: dict[str, torch.Tensor]) -> None:
    """:func:`plan_layer` for all layers of a room, which knows from earlier swaps what to expect at each of them.

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
            and (expected.targeted or not draft.check_targets)
            and [tensors[key].shape for (key,) in found] == expected.shapes
        ):
            writes = tuple(
                TensorPlan(target, tensors.pop(key), True) for target, (key,) in zip(layer.tensors, found, strict=True)
            )
            action = Action.COPY if expected.fills_up else Action.PAD
            draft.layers.append(LayerPlan(layer, action, rank_before, expected.settings, writes))
        else:
            plan_layer(draft, layer, tensors)


def plan_layer(
    draft: Draft,
    layer: SlotLayer,
    tensors: dict[str, torch.Tensor],
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
    draft.layers.append(LayerPlan(layer, action, rank_before, settings, writes))


def resize_what_is_off(draft: Draft) -> None:
    """Gives the layers that are turned off the adapter's new rank where all others get it.

    PEFT's ``add_weighted_adapter`` adds the adapters up by the ranks of their configs, on every layer that has them.
    """
    if draft.room is not None or all(plan.action is not Action.RESIZE for plan in draft.layers):
        return
    ranks = {plan.settings.rank for plan in draft.layers if plan.settings}
    for number, plan in enumerate(draft.layers):
        if plan.action is Action.OFF and not has_fixed_size(plan.layer.module, draft.slot.adapter_name):
            rank = draft.slot.method.settings_for(draft.config, plan.path).rank
            # any other rank may be as large as a damaged config says
            if rank in ranks and all(_can_have(each, rank) for each in plan.layer.tensors):
                draft.layers[number] = replace(plan, tensors=tuple(_zeros(write, rank) for write in plan.tensors))


def _can_have(target: SlotTensor, rank: int) -> bool:
    fixed = is_sharded(target.parameter) or has_fixed_shape(target.owner, target.name)
    return target.capacity is None or not (fixed or rank % (target.groups * target.blocks))


def _zeros(write: TensorPlan, rank: int) -> TensorPlan:
    target, parameter = write.target, write.target.parameter
    if target.capacity in (None, rank):
        return write
    # a single zero, repeated without taking memory
    return TensorPlan(target, parameter.detach().new_zeros(()).expand(target.shape_for(rank)))


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
