"""Targets: the live tensor that each key of an adapter's file is written to, as found by a fresh load.

The next adapter with the same config differs only in its tensors' values. They are copied to the known targets, and
PEFT doesn't load that adapter.

Tests: ``tests/beyond/test_in_place.py`` and ``tests/beyond/test_every_method.py``.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace

from peft import PeftConfig, PeftType

from ..core.adapter import Adapter
from ..core.journal import Journal
from ..core.plan import Action
from ..core.settings import PROVENANCE
from ..core.slot import Slot, Uncopied
from ..core.tensors import are_interchangeable
from .base_values import BaseChange
from .difference import Graft, Target
from .fresh_adapter import FreshAdapter

#: on a base model: the targets by adapter name
TARGETS = "hotswap_targets"
#: config fields that may differ between adapters with the same targets
MAY_DIFFER = (*PROVENANCE, "inference_mode")


@dataclass(frozen=True, eq=False)
class Targets:
    """The target of each key of a file. They are valid as long as the model has the config ``in_model``."""

    #: the config as it was read, and its version in the model
    given: Mapping[str, object]
    in_model: PeftConfig | None
    #: by the keys of the file
    tensors: Mapping[str, Target]
    #: the swap that found them, without the values that it wrote
    graft: Graft

    def fit(self, slot: Slot, adapter: Adapter) -> bool:
        """Whether these targets are right for an adapter, and still in the model."""
        if slot.config is not self.in_model or adapter.tensors.keys() != self.tensors.keys():
            return False
        for name, (table, key, tensor) in self.tensors.items():
            if table.get(key) is not tensor or adapter.tensors[name].shape != tensor.shape:
                return False
        # a fresh load would restore scalings that the user has changed
        is_kept = all(table.get(slot.adapter_name) == value for table, value in self.graft.scalars)
        return is_kept and _compared_fields(adapter.config) == self.given

    def graft_of(self, adapter: Adapter) -> Graft:
        """A graft that writes only the adapter's tensors."""
        layers = [replace(layer, action=Action.COPY, rank_before=layer.rank_after) for layer in self.graft.layers]
        graft = Graft(layers=layers, parameters=self.graft.parameters)
        graft.copies = [(target.tensor, adapter.tensors[name].detach()) for name, target in self.tensors.items()]
        return graft

    def completed(self, config: PeftConfig) -> PeftConfig:
        """Another adapter's config, completed as PEFT would complete it."""
        completed = copy.deepcopy(self.in_model)
        for name in MAY_DIFFER:
            setattr(completed, name, getattr(config, name, None))
        return completed


def keep_targets(slot: Slot, targets: Targets | None, config: PeftConfig, journal: Journal) -> None:
    """Store the targets of an adapter (None: unknown) on the base model; ``config`` is the one put into the model."""
    notes, own = slot.host.base.__dict__, targets and replace(targets, in_model=config)
    journal.set_item(notes, TARGETS, Uncopied({**notes.get(TARGETS, {}), slot.adapter_name: own}))


def find_targets(slot: Slot, adapter: Adapter, fresh: FreshAdapter, graft: Graft) -> Targets | None:
    """The targets of a freshly loaded adapter; None if the swap writes more than tensors, or PEFT converts some."""
    is_more = fresh.base_values or (slot.config.peft_type == PeftType.ADALORA and not slot.config.inference_mode)
    if is_more or not graft.writes_values_only:
        return None
    tensors = {}
    for name, source in adapter.tensors.items():
        loaded = fresh.origins.get(name)
        target = graft.target_of.get(id(loaded))
        if target is None or not are_interchangeable(loaded.detach(), source.detach().to(loaded.device, loaded.dtype)):
            return None
        tensors[name] = target
    if len({id(target.tensor) for target in tensors.values()}) < len(tensors):
        return None
    # without the references that would keep the fresh load alive
    summary = replace(graft, copies=[], steps=[], scalings=[], target_of={}, base=BaseChange())
    return Targets(_compared_fields(adapter.config), None, tensors, summary)


def _compared_fields(config: PeftConfig) -> dict[str, object]:
    return {key: value for key, value in config.to_dict().items() if key not in MAY_DIFFER}
