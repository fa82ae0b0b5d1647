"""Places: where each tensor of an adapter's file lies in a live model, as a donor has shown it once.

With the same config, all else of an adapter is the same, too: then its tensors are the only thing to write, and PEFT
need not load the next one again.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, replace

import torch
from peft import PeftConfig, PeftType

from ..core.adapter import Adapter
from ..core.journal import Journal
from ..core.sameness import have_same_bits
from ..core.slot import Slot, Uncopied
from .donor import Donor
from .graft import Extent, Graft, WrapperChange
from .wrappers import tables_of

#: on a base model: the places by adapter name
PLACES = "hotswap_places"

#: what says where an adapter comes from, and nothing of what it is
PROVENANCE = ("base_model_name_or_path", "revision", "auto_mapping", "peft_version")


@dataclass(frozen=True, eq=False)
class Places:
    """Valid as long as the config in the model is the one that was put there with it.

    ``tensors`` has a table, a key and what is there for each key of the file.
    """

    given: Mapping[str, object]
    config: PeftConfig
    tensors: Mapping[str, tuple[MutableMapping, str, torch.Tensor]]
    caches: tuple[dict, ...]
    changes: tuple[WrapperChange, ...]
    in_model: PeftConfig | None = None
    #: scalings and the like as they were put there: somebody may have changed them since, and a fresh load hasn't
    scalars: tuple[tuple[MutableMapping, object], ...] = ()

    def fit(self, slot: Slot, adapter: Adapter) -> bool:
        """Whether this adapter can go to these places, and they are still where they were."""
        return (
            slot.host.configs[slot.adapter_name] is self.in_model
            and adapter.tensors.keys() == self.tensors.keys()
            and _what_it_is(adapter.config) == self.given
            and all(_scalar(table.get(slot.adapter_name)) == value for table, value in self.scalars)
            and all(
                table.get(key) is tensor and adapter.tensors[name].shape == tensor.shape
                for name, (table, key, tensor) in self.tensors.items()
            )
        )

    def graft(self, adapter: Adapter) -> Graft:
        """What to write: the adapter's tensors, and nothing else."""
        graft = Graft(changes=list(self.changes))
        for name, (_, _, live) in self.tensors.items():
            graft.copies.append((live, adapter.tensors[name].detach()))
            if isinstance(live, torch.nn.Parameter):
                graft.parameters.append(live)
        graft.silent_steps += [lambda journal, cache=cache: journal.clear(cache) for cache in self.caches]
        return graft

    def completed(self, config: PeftConfig, inference_mode: bool) -> PeftConfig:
        """The config of another adapter as PEFT would complete it."""
        completed = copy.deepcopy(self.config)
        for name in PROVENANCE:
            if hasattr(config, name):
                setattr(completed, name, getattr(config, name))
        completed.inference_mode = inference_mode
        return completed

    def keep(self, slot: Slot, config: PeftConfig, journal: Journal) -> None:
        """Notes the places on the base model; ``config`` is what is put into the model with it."""
        base, name = slot.host.base, slot.adapter_name
        scalars = self.scalars or tuple(
            (table, value)
            for change in self.changes
            for _, table in tables_of(change.module)
            if isinstance(table, MutableMapping) and (value := _scalar(table.get(name))) is not None
        )
        known = replace(self, in_model=config, scalars=scalars)
        journal.set_item(base.__dict__, PLACES, Uncopied({**base.__dict__.get(PLACES, {}), name: known}))


def places_of(slot: Slot) -> Places | None:
    """The places of the slot's adapter, if a donor has shown them."""
    return slot.host.base.__dict__.get(PLACES, {}).get(slot.adapter_name)


def forget_places(slot: Slot, journal: Journal) -> None:
    """To be called when an adapter goes in whose places are not known."""
    if places_of(slot) is not None:
        places = Uncopied(slot.host.base.__dict__[PLACES])
        del places[slot.adapter_name]
        journal.set_item(slot.host.base.__dict__, PLACES, places)


def find_places(slot: Slot, adapter: Adapter, donor: Donor, graft: Graft) -> Places | None:
    """The places of an adapter that a donor has loaded; None if PEFT did more with its tensors than to copy them."""
    if donor.base_values or (slot.config.peft_type == PeftType.ADALORA and not slot.config.inference_mode):
        return None
    tensors = {}
    for name, source in adapter.tensors.items():
        loaded = donor.origins.get(name)
        place = graft.in_place.get(id(loaded))
        if place is None or not have_same_bits(loaded.detach(), source.detach().to(loaded.device, loaded.dtype)):
            return None
        tensors[name] = place
    if len({id(live) for _, _, live in tensors.values()}) != len(tensors):
        return None
    changes = tuple(replace(each, change=Extent.VALUES, rank_before=each.rank_after) for each in graft.changes)
    if any(each.change is Extent.REMOVED for each in graft.changes):
        changes = tuple(
            new for new, old in zip(changes, graft.changes, strict=True) if old.change is not Extent.REMOVED
        )
    return Places(_what_it_is(adapter.config), donor.config, tensors, tuple(graft.caches), changes)


def _scalar(value: object) -> bool | int | float | str | None:
    """A plain value, or that of a tensor without axes; None for anything else."""
    if isinstance(value, torch.Tensor) and value.ndim == 0:
        return float(value)
    return value if isinstance(value, (bool, int, float, str)) else None


def _what_it_is(config: PeftConfig) -> dict[str, object]:
    values = config.to_dict()
    for name in (*PROVENANCE, "inference_mode"):
        values.pop(name, None)
    return values
