"""Strength: scales the effect of an adapter, from off to beyond what it was trained for."""

from __future__ import annotations

import functools
from typing import Any

import torch

from .change import Change, apply
from .engine import Engine
from .errors import listing, refuse
from .host import find_host, name_in
from .journal import Journal
from .lora import Lora, settings_of
from .prepared import is_off
from .slot import Slot, SlotLayer, change_of, slot_for
from .tensors import is_prepared

#: the highest strength; times a scaling, it is still finite in float32
MOST = 1e30


def set_strength(engine: Engine, model: torch.nn.Module, strength: float, adapter_name: str | None = None) -> None:
    """Set how strongly an adapter acts: its trained scaling times ``strength``, in every layer.

    Strengths don't add up: each call starts from the trained scaling. A swap sets the strength back to 1. It is
    never saved. A prepared model is never recompiled by this.

    Parameters
    ----------
    model:
        A model with the adapter, compiled or not.
    strength:
        0 gives the base model's output, 1 the adapter as it was trained; anything between, beyond or below is possible.
    adapter_name:
        The adapter's name in the model. It must not be merged. Default: the only adapter in the model.

    Raises
    ------
    HotswapError
        If there is no such adapter, it is merged, the strength is not a finite number, or the adapter is more than
        LoRA: a DoRA magnitude, a saved module, trained tokens or biases would stay at full strength.

    Examples
    --------
    >>> from hotswap_lab import demo, set_strength
    >>> model, tokenizer = demo.load("reverse")
    >>> set_strength(model, 0)
    >>> demo.ask(model, tokenizer, "hotswap")      # the base model copies
    'hotswap'
    >>> set_strength(model, 1)
    >>> demo.ask(model, tokenizer, "hotswap")
    'pawstoh'
    """
    adapter_name = name_in(model, adapter_name)
    host = find_host(model, adapter_name)
    with engine.lock.held(host.base):
        slot = slot_for(engine, host, adapter_name)
        if slot.is_merged:
            raise refuse("merged_no_strength", adapter_name=adapter_name)
        check_strength(strength, slot)
        room: Any = slot.room
        apply([_change_strength(slot, strength) if room is None else room.change_strength(strength)])


def _change_strength(slot: Slot, strength: float) -> Change:
    """The change that sets the strength layer by layer, for a slot without a room."""
    name, change = slot.adapter_name, change_of(slot)
    for layer in slot.layers:
        scaling, value = layer.module.scaling, strength * _trained(slot, layer)
        if is_prepared(layer.module, name):
            change.copy(scaling[name], torch.tensor(value, dtype=torch.float64, device="cpu"))
        else:
            change.steps.append(functools.partial(Journal.set_item, table=scaling, key=name, value=value))
    return change


def check_scalable(slot: Slot) -> None:
    """Refuse adapters whose effect is not proportional to a scaling."""
    if found := slot.method.not_scaled(slot):
        raise refuse("no_strength", adapter_name=slot.adapter_name, found=found)


def check_strength(strength: object, slot: Slot) -> None:
    """Refuse values that are no strength, and adapters that can't have one."""
    if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not abs(strength) <= MOST:
        raise refuse("strength_is_no_number", strength=strength)
    check_scalable(slot)


def get_strength(engine: Engine, model: torch.nn.Module, adapter_name: str | None = None) -> float:
    """The strength that :func:`set_strength`, or PEFT's ``set_scale`` and ``scale_layer``, gave to an adapter.

    Raises
    ------
    HotswapError
        If there is no such adapter, or its layers have different strengths.

    Examples
    --------
    >>> from hotswap_lab import demo, get_strength, set_strength
    >>> model, _ = demo.load("reverse")
    >>> set_strength(model, 0.25)
    >>> get_strength(model)
    0.25
    """
    adapter_name = name_in(model, adapter_name)
    slot = slot_for(engine, find_host(model, adapter_name), adapter_name)
    if not isinstance(slot.method, Lora):
        check_scalable(slot)
    strengths = {
        round(float(layer.module.scaling[adapter_name]) / _trained(slot, layer), 6)
        for layer in slot.layers
        if not is_off(layer.module, adapter_name, layer.tensors) and _trained(slot, layer)
    }
    if len(strengths) > 1:
        raise refuse("different_strengths", adapter_name=adapter_name, strengths=listing(sorted(strengths)))
    return strengths.pop() if strengths else 1.0


def _trained(slot: Slot, layer: SlotLayer) -> float:
    return settings_of(layer.module, slot.adapter_name).scaling
