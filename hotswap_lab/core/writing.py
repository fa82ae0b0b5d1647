"""What a plan comes to, layer by layer."""

from __future__ import annotations

from functools import partial
from itertools import compress, zip_longest

from .change import Change, clear_gradients
from .journal import Journal
from .plan import Action, Plan
from .prepared import PADDED_ATTRIBUTE, mark, write_settings
from .shadow import attach
from .slot import room_left_by


def change_layer_by_layer(plan: Plan) -> Change:
    """All that a plan writes: in a room that all layers have, or where each tensor lies by itself."""
    slot, room = plan.slot, plan.slot.room
    adds = Action.ADD in [layer.action for layer in plan.layers]
    if room is not None and not adds:
        change = room.change_around([layer.settings for layer in plan.layers], plan.config)
        for layer in plan.layers:
            room.write(layer.layer, layer.rank_after, layer.sources, change)
        return change
    # layers that have just been added are not among those of the slot
    change = Change(slot, plan.config, slot_after=None if adds else slot)
    if (left := room_left_by(slot)) is not None:
        change.steps.append(partial(left.leave, is_lost=room is None))
    for layer in plan.layers:
        for target, source in zip(layer.layer.tensors, layer.sources, strict=True):
            target.write(source, change, layer.action is Action.PAD)
    for layer in compress(plan.layers, plan.fixed):
        if layer.settings is not None:
            scaling = layer.layer.module.scaling[slot.adapter_name]
            change.copies.append((scaling, scaling.new_full((), layer.settings.scaling)))
    change.steps.append(lambda journal: _write_layers(plan, journal))
    return change


def _write_layers(plan: Plan, journal: Journal) -> None:
    slot, name = plan.slot, plan.slot.adapter_name
    clear_gradients(slot.parameters, journal)
    for layer in compress(plan.layers, plan.fixed):
        mark(layer.layer.module, PADDED_ATTRIBUTE, name, True, journal)
    write_settings(slot, [each.layer for each in plan.layers], [each.settings for each in plan.layers], journal)
    # layers that are added come last, and are not prepared
    floats = [
        (each.layer.module.scaling, settings.scaling)
        for each, fixed in zip_longest(plan.layers, plan.fixed)
        if (settings := each.settings) and not fixed
    ]
    journal.set_items([table for table, _ in floats], name, [scaling for _, scaling in floats])
    for layer in plan.layers:
        if layer.action is Action.ADD:
            attach(slot, layer.layer, journal)
