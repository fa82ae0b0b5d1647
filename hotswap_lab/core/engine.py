"""Engine: the parts that a swap is made of. :mod:`hotswap_lab.engine` builds the one that the package uses.

Every public function takes an engine, and each :class:`~hotswap_lab.core.slot.Slot` holds the one that found it.
Nothing is registered on import: an engine has exactly the parts that it was built from.
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
    """The interface between the engine and a PEFT method, or several that are alike."""

    def takes(self, config: Config) -> bool:
        """Whether adapters with this config use this method."""
        ...

    def tensors_of(self, layer: torch.nn.Module, adapter_name: str) -> list[SlotTensor] | None:
        """The tensors of an adapter on a layer; None if the layer doesn't have it, or is of another method."""
        ...

    def obstacle(self, layer: TunerLayer, adapter_name: str, tensors: Sequence[SlotTensor]) -> str | None:
        """The reason why a layer can't be written to, or None."""
        ...

    def turn(self, layer: TunerLayer, adapter_name: str, on: bool, journal: Journal) -> None:
        """Make the method's own changes to a layer when an adapter is turned off there, or on again."""
        ...

    def judge(self, config: Config, role: str, loaded: Config = None) -> Iterable[Refusal]:
        """The reasons why an adapter with this config can't be swapped; ``role`` is "new" or "loaded".

        With ``loaded``, these include why it can't share a compiled graph with an adapter of that config.
        """
        ...

    def extra_state(self, config: Config) -> Sequence[str]:
        """The fields of a config that add state beyond the tensors and scalars of its layers."""
        ...

    def not_scaled(self, slot: Any) -> str | None:
        """Describe the part of an adapter that no scaling reaches, or None."""
        ...

    def no_room(self, slot: Any, room: Mapping[str, int]) -> Iterable[Refusal]:
        """The reasons why layers can't have room for these ranks, given by path; the slot may lack some of them."""
        ...


class Lock(Protocol):
    """A lock around every swap. Code that plans or writes a swap holds it, and can keep out threads that compute."""

    def held(self, *bases: torch.nn.Module, computing: bool = False) -> AbstractContextManager[None]:
        """Keep all other threads out of base models for a block; with ``computing``, only those that swap."""
        ...

    def is_shared(self, base: torch.nn.Module) -> bool:
        """Whether other threads have computed with a base model, and may still be doing so."""
        ...


class NoLock:
    """A lock that does nothing, for a model that a single thread uses."""

    def held(self, *bases: torch.nn.Module, computing: bool = False) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def is_shared(self, base: torch.nn.Module) -> bool:
        return False


#: gets an unfinished plan. Adds to it and returns None, or returns another plan to go on with. Plans and slots have no
#: types in this file, since a plan holds a slot, and a slot its engine
Pass = Callable[[Any], Any]
#: gets a slot and the config that its adapter will have, before that config is put into the model
OnConfig = Callable[[Any, Config, Journal], object]


@dataclass(frozen=True)
class Engine:
    """All parts of a swap, in the order in which it uses them.

    Parameters
    ----------
    methods:
        PEFT's methods. The first one that takes a config is used for it.
    passes:
        Steps that make a plan from an adapter and a slot, in groups. A group runs to its end, so that the user sees all
        of its refusals. After a group that refused something, no further group runs.
    read:
        Reads an adapter from the source that the user names: ``read(source, only_config=..., **arguments)``.
    lock:
        Keeps threads apart.
    on_config:
        Functions that are called before a config replaces another one in a model.
    prepare_in_place:
        Prepares a slot without common memory, tensor by tensor: ``(slot, target_rank, family)`` to a change and the
        refusals.
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
