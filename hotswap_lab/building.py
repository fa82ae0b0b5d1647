"""Builds the room of a slot beside the model, and moves the model's parameters in."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from .arena import build_arena
from .errors import listing, refuse
from .journal import Journal
from .parts import LayerSettings, SlotTensor
from .room import SCALING_STEP, Content, Room
from .shards import give_shard, is_sharded
from .slot import Slot, SlotLayer
from .state_view import is_off, own_tensor


def build_room(slot: Slot, capacity: Mapping[SlotLayer, int], reserved: Collection[SlotLayer]) -> Room:
    """A room with space for these ranks, and with the slot's adapter in it; ``reserved`` layers are off.

    The model is only read.
    """
    name = slot.adapter_name
    sharded = [layer.path for layer in capacity for tensor in layer.tensors if is_sharded(tensor.parameter)]
    if sharded:
        raise refuse(
            "A model that is spread over processes can't be prepared.",
            found=f"DTensors at {listing(dict.fromkeys(sharded), 3)}",
            expected="parameters that this process holds whole",
            next_step="swap without preparing: each process writes its own shards",
        )
    groups: dict[tuple, list[tuple[SlotTensor, tuple[int, ...]]]] = {}
    for layer, rank in capacity.items():
        for tensor in layer.tensors:
            key = tensor.parameter.dtype, tensor.parameter.device
            groups.setdefault(key, []).append((tensor, tensor.shape_for(rank)))
    arenas = [build_arena(tensors, like=tensors[0][0].parameter.detach()) for tensors in groups.values()]
    settings = tuple(
        None if layer in reserved or is_off(layer.module, name) else _settings(slot, layer) for layer in capacity
    )
    dropouts = {each.dropout for each in settings if each is not None}
    content = Content(settings, max(dropouts, default=0.0), slot.config)
    scalings = []
    for device in dict.fromkeys(device for _, device in groups):
        with torch.inference_mode(False):
            scalings.append(torch.zeros((len(capacity), SCALING_STEP), device=device))
    room = Room(slot, arenas, scalings, content)
    for layer in capacity:
        for tensor in layer.tensors:
            if layer not in reserved:
                own = own_tensor(layer.module, name, tensor).detach()
                tensor.own(room.view(tensor), tensor.rank_of(own.shape)).copy_(tensor.split(own))
            elif tensor.off is not None:
                room.view(tensor).copy_(tensor.off())
    for index, layer in enumerate(capacity):
        # what the user set it to by now, not what the adapter was trained with
        room.scaling(index, layer.tensors[0].parameter.device).fill_(float(layer.module.scaling[name]))
    return room


def _settings(slot: Slot, layer: SlotLayer) -> LayerSettings:
    name, module = slot.adapter_name, layer.module
    return LayerSettings(
        rank=module.r[name],
        alpha=module.lora_alpha[name],
        use_rslora=module.use_rslora.get(name, False),
        dropout=getattr(module.lora_dropout[name], "p", 0.0),
    )


def move_in(tensor: SlotTensor, view: torch.Tensor, journal: Journal) -> bool:
    """Makes the model's parameter a view of a room's memory; the parameter stays the same object.

    Returns whether autograd notices a write to that memory by itself: whether they have one version counter.
    """
    parameter = tensor.parameter
    shared = _swap_tensors(parameter, view, journal)
    if not shared:
        give_memory(parameter, view, journal)
    if tensor.size_attribute:
        journal.set_attribute(tensor.owner, tensor.size_attribute, tensor.rank_of(view.shape))
    return shared


def _swap_tensors(parameter: torch.nn.Parameter, view: torch.Tensor, journal: Journal) -> bool:
    if parameter.is_inference() or parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
        return False
    twin = torch.nn.Parameter(view, requires_grad=parameter.requires_grad)
    twin.__dict__.update(parameter.__dict__)
    address = view.data_ptr()

    def undo() -> None:
        if parameter.data_ptr() == address:
            torch.utils.swap_tensors(parameter, twin)

    journal.record(undo)
    try:
        torch.utils.swap_tensors(parameter, twin)
    except RuntimeError:
        # a graph or a weak reference holds on to the old tensor
        return False
    return True


def give_memory(parameter: torch.nn.Parameter, fresh: torch.Tensor, journal: Journal) -> None:
    """Gives a parameter other memory, whatever shape that has."""
    if is_sharded(parameter):
        give_shard(parameter, fresh, journal)
        return
    old = parameter.data

    def undo() -> None:
        parameter.data = old

    journal.record(undo)
    # A graph over the old shape may still be alive, and with it the parameter's gradient accumulator, which would
    # refuse gradients of the new shape. PyTorch gives a parameter a new one only when its dtype or device changes.
    other_dtype = torch.float32 if parameter.dtype == torch.float64 else torch.float64
    parameter.data = torch.empty(0, dtype=other_dtype, device=parameter.device)
    parameter.data = fresh
    # autograd sees a write through .data only if it is told
    torch.autograd.graph.increment_version(parameter)
