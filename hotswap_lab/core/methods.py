"""What differs from one PEFT method to the next, and the door for all methods but LoRA.

``lora.py`` knows LoRA by heart: its tensors are written where they lie, and padded, packed and compiled. What PEFT has
to load itself comes in through :data:`rest`: the part of the package that knows the other methods puts its own there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from peft import PeftType

from . import lora
from .errors import Refusal, refusal
from .host import Config, Host, kind_of

if TYPE_CHECKING:
    from .adapter import Adapter
    from .change import Change
    from .journal import Journal
    from .parts import SlotTensor
    from .plan import Plan
    from .slot import Slot


class Rest:
    """What the engine asks of whoever knows the other methods. By itself: nothing is there but LoRA."""

    #: what :mod:`~hotswap_lab.core.lora` says of LoRA, of all other methods
    method: ModuleType = lora
    #: types other than LoRA that a model can be prepared for
    paddable: Collection[PeftType] = ()

    def knows(self, layer: torch.nn.Module) -> bool:
        """Whether a tuner layer is of another method, although it may look like LoRA."""
        return False

    def takes(self, draft: Plan) -> bool:
        """Whether this swap has to be decided here, since an adapter is more than LoRA's own tensors."""
        return False

    def plan(self, draft: Plan) -> Plan:
        """Decides it."""
        raise NotImplementedError

    def instead(self, draft: Plan) -> Plan | None:
        """The plan to go by, now that it is known what happens to each layer; None: that of the engine."""
        return None

    def take_leftovers(self, draft: Plan, tensors: dict[str, torch.Tensor]) -> None:
        """Takes those out that are base weights, saved with the adapter; may let the draft add layers for others."""

    def judge(self, config: Config, role: str, loaded: Config = None) -> Iterable[Refusal]:
        """What speaks against a config, ``role`` being "new" or "loaded"; also for a graph with the ``loaded`` one."""
        return ()

    def complete(self, config: Config, host: Host) -> Config:
        """Makes a config what loading leaves: PEFT may spell its target modules out for the model."""
        return config

    def no_room(self, slot: Slot, room: Mapping[str, int]) -> Iterable[Refusal]:
        """What speaks against making room for these ranks on the layers of these paths, which the slot may lack."""
        return ()

    def beside(self, config: Config) -> Sequence[str]:
        """The fields of a LoRA config that stand for state beyond its layers' tensors and scalars."""
        return ()

    def obstacle(self, layer: torch.nn.Module, adapter_name: str, tensors: Sequence[SlotTensor]) -> str | None:
        """Why a layer of LoRA can't be written to, or None."""
        return None

    def turn(self, layer: torch.nn.Module, adapter_name: str, on: bool, journal: Journal) -> None:
        """Does what there is to do, beside the mark, when an adapter is turned off on a layer, or on again."""

    def not_scaled(self, slot: Slot) -> str | None:
        """What of an adapter no scaling reaches, or None."""
        return None

    def prepare(self, slot: Slot, target_rank: int | None, family: Iterable[Adapter]) -> tuple[Change, list[Refusal]]:
        """Makes room in a slot that has no common layout, or says why it can't be had."""
        raise NotImplementedError


#: the one that is there
rest: Rest = Rest()


def misfits(slot: Slot, adapter: Adapter, in_graph: bool = False) -> Iterable[Refusal]:
    """What speaks against an adapter in this place; also in a graph that it shares with the loaded one."""
    loaded, new = slot.config, adapter.config
    if loaded.peft_type != new.peft_type:
        old, kind, label = kind_of(loaded), kind_of(new), adapter.label
        return [refusal("other_peft_type", old=old, kind=kind, label=label, adapter_name=slot.adapter_name)]
    return rest.judge(new, "new", loaded if in_graph else None)


def method_for(config: Config) -> ModuleType:
    """The method of adapters with this config."""
    return lora if config.peft_type == PeftType.LORA else rest.method


def method_of(layer: torch.nn.Module) -> ModuleType:
    """The method that a tuner layer belongs to."""
    return lora if isinstance(layer, lora.layer_class) and not rest.knows(layer) else rest.method
