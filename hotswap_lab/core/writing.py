"""Writing: the code that writes the scaling and the settings of a layer: rank, alpha, flags and dropout.

Whatever the slot is, and whichever code plans the swap, a wrong scaling after a swap comes from here, or from the
values that were passed. Settings have one more writer: a comparison with a fresh load
(:mod:`hotswap_lab.beyond.difference`) copies all tables of the fresh load.
"""

from collections.abc import Collection, Iterable, Sequence
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


def write_packed_scalings(change: Change, memories: Iterable[torch.Tensor], scalings: torch.Tensor) -> None:
    """Have ``change`` copy ``scalings`` of all layers to each of ``memories``, which a room holds on its devices."""
    change.copies += [(memory, scalings.expand(memory.shape)) for memory in memories]


def write_scalings(change: Change, tables: Sequence[Any], name: str, scalings: Sequence[float]) -> None:
    """Have ``change`` write one scaling to each layer's table, under the adapter's ``name``."""
    present_tables, numbers = [], []
    for table, scaling in zip(tables, scalings, strict=True):
        present = table.get(name)
        if isinstance(present, torch.Tensor):  # the layer is prepared
            change.copies.append((present, present.new_full((), scaling)))
        elif present is None:
            change.steps.append(partial(Journal.set_item, table=table, key=name, value=scaling))
        else:
            present_tables.append(table)
            numbers.append(scaling)
    if present_tables:
        change.steps.append(partial(Journal.set_items, tables=present_tables, key=name, values=numbers))


def write_settings(
    slot: Slot, layers: Sequence[SlotLayer], settings: OfLayers, journal: Journal, fields: Collection[str] | None = None
) -> None:
    """Write the settings of an adapter to these layers; None turns it off on a layer.

    ``fields`` names the settings that may differ from those that the layers have; by default, all may.
    """
    name = slot.adapter_name
    if fields is None:
        for layer, wanted in zip(layers, settings, strict=True):
            module: Any = layer.module
            marked: frozenset[str] = module.__dict__.get(OFF_ATTRIBUTE, frozenset())
            if (wanted is None) != (name in marked):
                journal.set_item(module.__dict__, OFF_ATTRIBUTE, marked ^ {name})
                if "merge" not in module.__dict__:
                    keep_off(slot.method, module, journal)
            if (wanted is None or name in marked) and not layer.is_plain:
                slot.method.turn(module, name, wanted is not None, journal)
            if wanted is not None:
                dropout = module._modules["lora_dropout"]._modules[name]
                if dropout.__dict__.get("p", 0.0) != wanted.dropout:
                    write_dropout(module, name, wanted.dropout, journal)
    elif not fields:
        return
    on = [(layer.module, wanted) for layer, wanted in zip(layers, settings, strict=True) if wanted]
    for table, field in SCALAR_TABLES.items():
        if fields is None or field in fields:
            tables = [module.__dict__[table] for module, _ in on]  # attribute access on a module is slow
            journal.set_items(tables, name, [getattr(wanted, field) for _, wanted in on])
