"""What a plan comes to, layer by layer."""

from __future__ import annotations

import torch

from .change import Change, clear_gradient
from .journal import Journal
from .plan import Action, Plan
from .shadow import attach
from .state_view import set_padded, write_settings


def change_layer_by_layer(plan: Plan) -> Change:
    """The change where each tensor lies by itself, and layers may be added."""
    slot, name = plan.slot, plan.slot.adapter_name
    adds = Action.ADD in [layer.action for layer in plan.layers]
    # layers that have just been added are not among those of the slot; and what is in a room is written as a whole
    change = Change(slot, plan.config, slot_after=None if adds or slot.room is not None else slot)
    scalings: dict[torch.device, list[tuple[torch.Tensor, float]]] = {}
    for layer in plan.layers:
        for write in layer.tensors:
            write.target.write(write.source, change, write.fixed_size)
        scaling = layer.layer.module.scaling[name]
        if layer.settings is not None and isinstance(scaling, torch.Tensor):
            scalings.setdefault(scaling.device, []).append((scaling, layer.settings.scaling))
    for device, pairs in scalings.items():
        # on a GPU, one tensor for all of them
        values = torch.tensor([value for _, value in pairs], dtype=pairs[0][0].dtype, device=device)
        change.copies += zip([target for target, _ in pairs], values.unbind(), strict=True)
    change.steps.append(lambda journal: _write_layers(plan, journal))
    return change


def _write_layers(plan: Plan, journal: Journal) -> None:
    slot, name = plan.slot, plan.slot.adapter_name
    for layer in plan.layers:
        module = layer.layer.module
        for tensor in layer.layer.tensors:
            if (parameter := tensor.owner._parameters[tensor.name]).grad is not None:
                clear_gradient(parameter, journal)
            if tensor.off is not None:
                journal.clear(slot.method.cache_of(module, name))
        if isinstance(module.scaling[name], torch.Tensor):
            set_padded(module, name, journal)
    layers, settings = [each.layer for each in plan.layers], [each.settings for each in plan.layers]
    write_settings(slot, layers, settings, journal)
    for layer in plan.layers:
        if layer.action is Action.ADD:
            attach(slot, layer.layer, journal)
