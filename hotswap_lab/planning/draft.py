"""A draft: what is known of a swap while it is being decided, and all that speaks against it so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from peft import PeftConfig

from ..adapter import Adapter
from ..errors import Refusal
from ..grafting import Grafting, Structure
from ..plan import Action, LayerPlan, Plan, Preparation
from ..prepared_layer import has_fixed_size
from ..room import Room
from ..slot import Slot


@dataclass
class Draft:
    """What is known while a plan is being made."""

    slot: Slot
    adapter: Adapter
    config: PeftConfig
    #: what is compiled in the model
    compiled: list[object]
    room: Room | None
    preparation: Preparation
    add_layers: bool = False
    #: whether the adapter's config has to say which layers it is for; else they are those of its tensors
    check_targets: bool = True
    base_weights: Mapping[str, torch.Tensor] | None = None
    grafting: Grafting | None = None
    layers: list[LayerPlan] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    #: what the model was like when layers were built to be added to it
    structure: Structure | None = None

    def refuse(self, summary: str, found: str, expected: str, next_step: str) -> None:
        self.refusals.append(Refusal(summary, found, expected, next_step))

    @property
    def is_prepared(self) -> bool:
        """Whether all layers keep their shapes, so that a compiled graph can go on."""
        name = self.slot.adapter_name
        return self.room is not None or all(has_fixed_size(layer.module, name) for layer in self.slot.layers)

    def afresh(self) -> Draft:
        """The same swap, nothing of it decided."""
        return replace(self, config=self.adapter.config, grafting=None, layers=[], refusals=[], notes=[])

    def finish(self) -> Plan:
        adds = self.grafting is not None or any(plan.action is Action.ADD for plan in self.layers)
        room = None if adds else self.room
        return Plan(
            self.slot,
            self.adapter,
            tuple(self.layers),
            self.config,
            tuple(self.refusals),
            tuple(self.notes),
            is_compiled=bool(self.compiled),
            room=room,
            grafting=self.grafting,
            replaces=self.slot.config,
            preparation=self.preparation,
            structure=self.grafting.structure if self.grafting is not None else self.structure,
        )
