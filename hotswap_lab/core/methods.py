"""What differs from one PEFT method to the next, and the door for all methods but LoRA.

``lora.py`` knows LoRA by heart: its tensors are written where they lie, and padded, packed and compiled. What PEFT has
to load itself comes in through :data:`rest`: the part of the package that knows the other methods puts its own there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from peft import PeftType

from . import lora
from .errors import Refusal
from .host import Config

if TYPE_CHECKING:
    from .adapter import Adapter
    from .change import Change
    from .decide import Draft
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

    def takes(self, draft: Draft) -> bool:
        """Whether this swap has to be decided here, since an adapter is more than LoRA's own tensors."""
        return False

    def plan(self, draft: Draft) -> Plan:
        """Decides it."""
        raise NotImplementedError

    def instead(self, draft: Draft) -> Plan | None:
        """The plan to go by, now that it is known what happens to each layer; None: that of the engine."""
        return None

    def check(self, draft: Draft) -> None:
        """Adds what speaks against a swap that the engine decides."""

    def take_base_weights(self, draft: Draft, tensors: dict[str, torch.Tensor]) -> None:
        """Takes those tensors out that are base weights, saved with the adapter."""

    def former_layers(self, slot: Slot) -> Collection[str]:
        """Paths of layers that the adapter was on before, and may be again without being asked for."""
        return ()

    def not_scaled(self, slot: Slot) -> str | None:
        """What an adapter has brought beside its tensors, that no scaling reaches."""
        return None

    def prepare(self, slot: Slot, target_rank: int | None, family: Iterable[Adapter]) -> tuple[Change, list[Refusal]]:
        """Makes room in a slot that has no common layout, or says why it can't be had."""
        raise NotImplementedError


#: the one that is there
rest: Rest = Rest()


def method_for(config: Config) -> ModuleType:
    """The method of adapters with this config."""
    return lora if config.peft_type == PeftType.LORA else rest.method


def method_of(layer: torch.nn.Module) -> ModuleType:
    """The method that a tuner layer belongs to."""
    return lora if isinstance(layer, lora.layer_class) and not rest.knows(layer) else rest.method
