"""Engine: what a swap is made of. :mod:`hotswap_lab.engine` composes the one that the package uses.

Every function that a person calls gets an engine, and each :class:`~hotswap_lab.core.slot.Slot` holds the one that
found it. Nothing is registered on import, so an engine has what its composition names and nothing else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from .errors import Refusal
from .host import Config, TunerLayer
from .journal import Journal
from .tensors import SlotTensor


class Method(Protocol):
    """What the engine has to know of a PEFT method, or of several that are alike."""

    def takes(self, config: Config) -> bool:
        """Whether adapters with this config are of this method."""
        ...

    def tensors_of(self, layer: torch.nn.Module, adapter_name: str) -> list[SlotTensor] | None:
        """The tensors of an adapter on a layer; None if the layer doesn't have it, or is of another method."""
        ...

    def obstacle(self, layer: TunerLayer, adapter_name: str, tensors: Sequence[SlotTensor]) -> str | None:
        """Why a layer can't be written to, or None."""
        ...

    def turn(self, layer: TunerLayer, adapter_name: str, on: bool, journal: Journal) -> None:
        """What else changes on a layer when an adapter is turned off there, or on again."""
        ...

    def judge(self, config: Config, role: str, loaded: Config = None) -> Iterable[Refusal]:
        """Why an adapter with this config can't be swapped; ``role`` is "new" or "loaded".

        With ``loaded``, also why it can't share a compiled graph with an adapter of that config.
        """
        ...

    def extra_state(self, config: Config) -> Sequence[str]:
        """The fields of a config that mean more than the tensors and scalars of its layers."""
        ...

    def not_scaled(self, slot: Any) -> str | None:
        """Which part of an adapter no scaling reaches, or None."""
        ...

    def no_room(self, slot: Any, room: Mapping[str, int]) -> Iterable[Refusal]:
        """Why layers can't be prepared for these ranks, which are by their paths; the slot may lack some of them."""
        ...


class Lock(Protocol):
    """Keeps threads apart that swap in a model, and that compute with it."""

    def held(self, *bases: torch.nn.Module, computing: bool = False) -> AbstractContextManager[None]:
        """Keeps all other threads out of base models for a block. With ``computing``, only those that swap."""
        ...

    def is_shared(self, base: torch.nn.Module) -> bool:
        """Whether other threads have computed with a base model, and may be doing so now."""
        ...


class NoLock:
    """For a model that a single thread uses."""

    def held(self, *bases: torch.nn.Module, computing: bool = False) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def is_shared(self, base: torch.nn.Module) -> bool:
        return False


#: gets a plan that is being made. Fills it in and returns None, or returns another plan to go on with. The types of
#: plans and slots are not named in this file, since a plan holds a slot, and a slot its engine
Pass = Callable[[Any], Any]
#: gets a slot and the config that its adapter will have, before that config is put into the model
OnConfig = Callable[[Any, Config, Journal], object]


@dataclass(frozen=True)
class Engine:
    """Everything that takes part in a swap, in the order in which it does.

    Parameters
    ----------
    methods:
        PEFT's methods. The first one that takes a config is used for it.
    passes:
        Steps from an adapter and a slot to a plan, in groups. A group is run to its end, so that a user sees all that
        it refuses; after a group that refused something, no other one is run.
    read:
        Reads an adapter from where a user says that it is: ``read(source, only_config=..., **arguments)``.
    lock:
        Keeps threads apart.
    on_config:
        Called before a config takes the place of another one in a model.
    prepare_in_place:
        Prepares a slot that has no common memory, tensor by tensor: ``(slot, target_rank, family)`` to a change and the
        reasons against it.
    """

    methods: tuple[Method, ...]
    passes: tuple[tuple[Pass, ...], ...]
    read: Callable[..., Any]
    lock: Lock = field(default_factory=NoLock)
    on_config: tuple[OnConfig, ...] = ()
    prepare_in_place: Callable[..., Any] | None = None

    def method_for(self, config: Config) -> Method:
        """The method of adapters with this config."""
        return next(method for method in self.methods if method.takes(config))
