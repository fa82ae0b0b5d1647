"""A draft: what is known of a swap while it is being decided, and all that speaks against it so far."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from peft import PeftConfig

from ..beyond.decide import Grafting
from .adapter import Adapter
from .change import Change
from .errors import Refusal
from .plan import Action, LayerPlan, Plan
from .prepared import has_fixed_size
from .slot import Slot
from .writing import change_layer_by_layer


@dataclass
class Draft:
    """What is known while a plan is being made."""

    slot: Slot
    adapter: Adapter
    config: PeftConfig
    #: what is compiled in the model
    compiled: list[object]
    again: Callable[[], Plan]
    add_layers: bool = False
    #: whether the adapter's config has to say which layers it is for; else they are those of its tensors
    check_targets: bool = True
    base_weights: Mapping[str, torch.Tensor] | None = None
    grafting: Grafting | None = None
    layers: list[LayerPlan] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def refuse(self, summary: str, found: str, expected: str, next_step: str) -> None:
        self.refusals.append(Refusal(summary, found, expected, next_step))

    @cached_property
    def fixed(self) -> list[bool]:
        """Of each layer of the slot, whether it was prepared, and so keeps its shapes."""
        name = self.slot.adapter_name
        return [has_fixed_size(layer.module, name) for layer in self.slot.layers]

    @property
    def is_prepared(self) -> bool:
        """Whether all layers keep their shapes, so that a compiled graph can go on."""
        return False not in self.fixed

    def afresh(self) -> Draft:
        """The same swap, nothing of it decided."""
        return replace(self, config=self.adapter.config, grafting=None, layers=[], refusals=[], notes=[])

    def finish(self) -> Plan:
        make_change: Callable[[Plan], Change] = change_layer_by_layer
        if self.grafting is not None:
            make_change = self.grafting.change_for
        elif self.slot.room is not None and Action.ADD not in [plan.action for plan in self.layers]:
            make_change = self.slot.room.change_for
        return Plan(
            self.slot,
            self.adapter,
            tuple(self.layers),
            self.config,
            tuple(self.refusals),
            tuple(self.notes),
            is_compiled=bool(self.compiled),
            again=self.again,
            make_change=make_change,
            grafting=self.grafting,
        )
