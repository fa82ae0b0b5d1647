"""Method: the interface to one of PEFT's methods. A slot holds the method of its adapter.

Tests: ``tests/core/test_lora_alone.py`` and ``tests/beyond/test_every_method.py``.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch

from .change import Change
from .errors import Refusal
from .host import Config, TunerLayer
from .journal import Journal
from .tensors import SlotTensor


class Method:
    """A PEFT method, or several that are alike. Slots have no type here, because a slot holds its method."""

    #: prepares a slot without common memory, tensor by tensor; None: the slot gets a room. Takes the slot, the rank to
    #: make room for (or None), and the family of adapters
    prepare_in_place: ClassVar[Callable[..., tuple[Change, list[Refusal]]] | None] = None

    #: whether its update of a weight is B @ A, so that a layer is off if A and B are zero
    is_lora: ClassVar[bool] = False

    def takes(self, config: Config) -> bool:
        """Whether adapters with this config use this method."""
        return True

    def tensors_of(self, layer: torch.nn.Module, adapter_name: str) -> list[SlotTensor] | None:
        """The tensors of an adapter on a layer; None if the layer doesn't have it, or is of another method."""
        raise NotImplementedError

    def obstacle(self, layer: TunerLayer, adapter_name: str, tensors: Sequence[SlotTensor]) -> str | None:
        """The reason why a layer can't be written to, or None."""

    def turn(self, layer: TunerLayer, adapter_name: str, on: bool, journal: Journal) -> None:
        """Make the method's own changes to a layer when an adapter is turned off there, or on again."""

    def make_offable(self, layer: TunerLayer, adapter_name: str, journal: Journal) -> None:
        """Make the changes to a layer after which zeros turn an adapter off there."""

    def follow(self, slot: Any, config: Config, journal: Journal) -> None:
        """Make the method's own changes to a model before its adapter's config is replaced with another one."""

    def judge(self, config: Config, role: str, loaded: Config = None) -> Iterable[Refusal]:
        """The reasons why an adapter with this config can't be swapped; ``role`` is "new" or "loaded".

        With ``loaded``, these include why it can't share a compiled graph with an adapter of that config.
        """
        return ()

    def unknown(self, config: Config) -> Sequence[str]:
        """The fields of a config that this method doesn't know, as those that a later PEFT brings."""
        return ()

    def extra_state(self, config: Config) -> Sequence[str]:
        """The fields of a config that add state beyond the tensors and scalars of its layers."""
        return ()

    def not_scaled(self, slot: Any) -> str | None:
        """Describe the part of an adapter that no scaling reaches, or None."""

    def no_room(self, slot: Any, ranks: Mapping[str, int]) -> Iterable[Refusal]:
        """The reasons why layers can't have room for these ranks, given by path; the slot may lack some of them."""
        return ()
