"""Strength: scales the effect of an adapter, from off to beyond what it was trained for."""

from .change import Change
from .errors import listing, refused
from .prepared import is_off
from .settings import settings_of
from .slot import Slot, SlotLayer, begin_change
from .writing import write_scalings

#: the highest strength; times a scaling, it is still finite in float32
MOST = 1e30


def change_strength(slot: Slot, strength: float) -> Change:
    """Return the change that sets the scaling of each layer to its trained value times ``strength``."""
    name, room = slot.adapter_name, slot.room
    if slot.is_merged:
        raise refused("merged_no_strength", adapter_name=name)
    check_strength(strength, slot)
    if room is not None:
        return room.change_strength(strength)
    change = begin_change(slot)
    values = [strength * _trained(slot, layer) for layer in slot.layers]
    write_scalings(change, [layer.module.scaling for layer in slot.layers], name, values)
    return change


def check_scalable(slot: Slot) -> None:
    """Refuse adapters whose effect is not proportional to a scaling."""
    if reason := slot.method.not_scaled(slot):
        raise refused("no_strength", adapter_name=slot.adapter_name, found=reason)


def check_strength(strength: object, slot: Slot) -> None:
    """Refuse values that can't be a strength, and adapters that can't have one."""
    if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not abs(strength) <= MOST:
        raise refused("strength_is_no_number", strength=strength)
    check_scalable(slot)


def strength_of(slot: Slot) -> float:
    """Return the strength that all layers have; refuse layers with different ones."""
    if not slot.method.is_lora or slot.method.unknown(slot.config):
        check_scalable(slot)
    name = slot.adapter_name
    on = [layer for layer in slot.layers if not is_off(layer.module, name, layer.tensors) and _trained(slot, layer)]
    strengths = {round(float(layer.module.scaling[name]) / _trained(slot, layer), 6) for layer in on}
    if len(strengths) > 1:
        raise refused("different_strengths", adapter_name=name, strengths=listing(sorted(strengths)))
    return strengths.pop() if strengths else 1.0


def _trained(slot: Slot, layer: SlotLayer) -> float:
    return settings_of(layer.module, slot.adapter_name).scaling
