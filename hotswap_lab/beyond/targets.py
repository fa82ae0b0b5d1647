"""Targets: the tensor of a live model that each key of an adapter's file goes to, as a fresh load has shown once.

With the same config, all else of an adapter is the same, too: then its tensors are the only thing to write, and PEFT
need not load the next one again.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import PeftConfig, PeftType

from ..core.adapter import Adapter
from ..core.journal import Journal
from ..core.plan import Action
from ..core.slot import Slot, Uncopied
from ..core.tensors import are_interchangeable
from .base_values import BaseChange
from .difference import Graft
from .fresh_adapter import FreshAdapter

#: on a base model: the targets by adapter name
TARGETS = "hotswap_targets"
#: what says where an adapter comes from, and nothing of what it is
PROVENANCE = ("base_model_name_or_path", "revision", "auto_mapping", "peft_version", "inference_mode")


@dataclass(frozen=True, eq=False)
class Targets:
    """Where everything is, as long as the config in the model is the one that came with it."""

    #: the config as it was read, and as it is in the model
    given: Mapping[str, object]
    in_model: PeftConfig | None
    #: for each key of the file a table, a key and what is there
    tensors: Mapping[str, tuple[MutableMapping[str, Any], str, torch.Tensor]]
    #: what the swap was that has shown them, but for what it has written
    graft: Graft

    def fit(self, slot: Slot, adapter: Adapter) -> bool:
        """Whether this adapter can be written to these targets, and they are still in the model."""
        return (
            slot.config is self.in_model
            and adapter.tensors.keys() == self.tensors.keys()
            and _what_it_is(adapter.config) == self.given
            # the user may have changed scalings and the like since, which a fresh load has not
            and all(table.get(slot.adapter_name) == value for table, value in self.graft.scalars)
            and all(
                table.get(key) is tensor and adapter.tensors[name].shape == tensor.shape
                for name, (table, key, tensor) in self.tensors.items()
            )
        )

    def graft_of(self, adapter: Adapter) -> Graft:
        """What to write: the adapter's tensors, and nothing else."""
        layers = [replace(each, action=Action.COPY, rank_before=each.rank_after) for each in self.graft.layers]
        graft = Graft(layers=layers, parameters=self.graft.parameters)
        graft.copies = [(live, adapter.tensors[name].detach()) for name, (_, _, live) in self.tensors.items()]
        return graft

    def completed(self, config: PeftConfig) -> PeftConfig:
        """The config of another adapter as PEFT would complete it."""
        completed = copy.deepcopy(self.in_model)
        for name in PROVENANCE:
            setattr(completed, name, getattr(config, name, None))
        return completed


def targets_of(slot: Slot) -> Targets | None:
    """The targets of the slot's adapter, if a fresh load has shown them."""
    return slot.host.base.__dict__.get(TARGETS, {}).get(slot.adapter_name)


def keep_targets(slot: Slot, targets: Targets | None, config: PeftConfig, journal: Journal) -> None:
    """Notes the targets on the base model, or that they are not known; ``config`` is put into the model with them."""
    known = {
        **slot.host.base.__dict__.get(TARGETS, {}),
        slot.adapter_name: targets and replace(targets, in_model=config),
    }
    journal.set_item(slot.host.base.__dict__, TARGETS, Uncopied(known))


def find_targets(slot: Slot, adapter: Adapter, fresh: FreshAdapter, graft: Graft) -> Targets | None:
    """The targets of an adapter that was loaded afresh; None if more than tensors is written, or PEFT converts some."""
    is_more = fresh.base_values or (slot.config.peft_type == PeftType.ADALORA and not slot.config.inference_mode)
    if is_more or not graft.writes_values_only:
        return None
    tensors = {}
    for name, source in adapter.tensors.items():
        loaded = fresh.origins.get(name)
        place = graft.in_place.get(id(loaded))
        if place is None or not are_interchangeable(loaded.detach(), source.detach().to(loaded.device, loaded.dtype)):
            return None
        tensors[name] = place
    if len({id(live) for _, _, live in tensors.values()}) < len(tensors):
        return None
    shown = replace(graft, copies=[], steps=[], in_place={}, base=BaseChange())  # nothing of the fresh load
    return Targets(_what_it_is(adapter.config), None, tensors, shown)


def _what_it_is(config: PeftConfig) -> dict[str, object]:
    return {key: value for key, value in config.to_dict().items() if key not in PROVENANCE}
