"""Telling: the code that writes what a layer is told about an adapter besides its weights.

These are its scaling, and its settings: rank, alpha, flags and dropout. Whatever the slot is, and whichever code plans
the swap, a wrong scaling after a swap comes from here, or from the values that were passed. Settings have one more
writer: a comparison with a fresh load (:mod:`hotswap_lab.beyond.difference`) writes all tables as it finds them there.
"""

from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import torch

from .change import Change
from .journal import Journal
from .lora import write_dropout
from .prepared import keep_off
from .settings import SCALAR_TABLES, OfLayers
from .slot import Slot, SlotLayer
from .tensors import OFF_ATTRIBUTE


def write_scalings(change: Change, targets: Sequence[Any], name: str, values: Sequence[float] | torch.Tensor) -> None:
    """Have ``change`` write scalings.

    ``targets`` are layers' tables of scalings, with an entry for the adapter ``name`` or without, and ``values`` has a
    number for each; or they are memory that holds the scalings of several layers, and all get the tensor ``values``.
    """
    if isinstance(values, torch.Tensor):
        change.copies += [(target, values.expand(target.shape)) for target in targets]
        return
    tables, numbers = [], []
    for target, value in zip(targets, values, strict=True):
        present = target.get(name)
        if isinstance(present, torch.Tensor):  # a prepared layer's
            change.copies.append((present, present.new_full((), value)))
        elif present is None:
            change.steps.append(partial(Journal.set_item, table=target, key=name, value=value))
        else:
            tables.append(target)
            numbers.append(value)
    if tables:
        change.steps.append(partial(Journal.set_items, tables=tables, key=name, values=numbers))


def write_settings(
    slot: Slot, layers: Sequence[SlotLayer], settings: OfLayers, journal: Journal, fields: Collection[str] | None = None
) -> None:
    """Write the settings of an adapter to these layers; None turns it off on a layer.

    ``fields`` names the settings that may differ from those that the layers have; by default, all may.
    """
    name = slot.adapter_name
    if fields is None:
        for layer, each in zip(layers, settings, strict=True):
            module: Any = layer.module
            marked: frozenset[str] = module.__dict__.get(OFF_ATTRIBUTE, frozenset())
            if (each is None) != (name in marked):
                journal.set_item(module.__dict__, OFF_ATTRIBUTE, marked ^ {name})
                if "merge" not in module.__dict__:
                    keep_off(slot.method, module, journal)
            if (each is None or name in marked) and not layer.is_plain:
                slot.method.turn(module, name, each is not None, journal)
            if each is not None:
                dropout = module._modules["lora_dropout"]._modules[name]
                if dropout.__dict__.get("p", 0.0) != each.dropout:
                    write_dropout(module, name, each.dropout, journal)
    elif not fields:
        return
    on = [(layer.module, each) for layer, each in zip(layers, settings, strict=True) if each]
    for table, field in SCALAR_TABLES.items():
        if fields is None or field in fields:
            tables = [module.__dict__[table] for module, _ in on]  # attribute access on a module is slow
            journal.set_items(tables, name, [getattr(each, field) for _, each in on])
