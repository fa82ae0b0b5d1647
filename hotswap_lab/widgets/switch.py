"""Swaps by name: in a pool, or in a model with the folders of its adapters. Of swapping, widgets know no more."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from ..core.errors import refuse
from ..core.host import find_host
from ..core.hotswap import hotswap_adapter
from ..core.pool import AdapterPool
from ..core.pool_sources import check_named
from ..core.slot import resolve_slot
from ..core.strength import get_strength, not_scaled, set_strength
from ..threads import ModelInUseError, waiting_at_most

#: how long a swap waits at a time before it looks whether it was stopped, in seconds
PATIENCE = 0.5


class PoolSwitch:
    """Swaps in an :class:`AdapterPool`.

    >>> from hotswap_lab import demo
    >>> model, _ = demo.load("reverse")
    >>> switch = PoolSwitch(AdapterPool(model, adapters={"sort": demo.adapter_path("sort")}, progress=False))
    >>> switch.swap("sort")
    >>> switch.active, switch.strength
    ('sort', 1.0)
    """

    def __init__(self, pool: AdapterPool):
        self.pool = pool
        self.model = pool.model

    @property
    def names(self) -> list[str]:
        return self.pool.names

    @property
    def config(self) -> object:
        return find_host(self.model, self.pool.adapter_name).configs[self.pool.adapter_name]

    @property
    def active(self) -> str | None:
        return self.pool.active

    @property
    def strength(self) -> float:
        return self.pool.strength

    @strength.setter
    def strength(self, value: float) -> None:
        self.pool.strength = value

    def swap(self, name: str) -> None:
        self.pool.swap(name)

    def off(self) -> None:
        self.pool.off()


class ModelSwitch:
    """Swaps in a model, with :func:`hotswap_adapter`.

    >>> from hotswap_lab import demo
    >>> model, _ = demo.load("reverse")
    >>> switch = ModelSwitch(model, {"sort": demo.adapter_path("sort")})
    >>> switch.active                     # reverse, which is not one of these
    >>> switch.swap("sort")
    >>> switch.active
    'sort'
    """

    def __init__(self, model: torch.nn.Module, adapters: Mapping[str, object], adapter_name: str = "default"):
        self.model = model
        self.adapters = dict(adapters)
        self.adapter_name = adapter_name
        #: the adapter that was swapped in here, and the model's config of it, by which a later swap shows
        self._last: tuple[str, object] | None = None
        resolve_slot(model, adapter_name)  # raises if there is no such adapter

    @property
    def names(self) -> list[str]:
        return list(self.adapters)

    @property
    def active(self) -> str | None:
        if self._last is None or self._last[1] is not self.config or strength_of(self) == 0:
            return None
        return self._last[0]

    @property
    def config(self) -> object:
        return find_host(self.model, self.adapter_name).configs[self.adapter_name]

    @property
    def strength(self) -> float:
        return get_strength(self.model, self.adapter_name)

    @strength.setter
    def strength(self, value: float) -> None:
        set_strength(self.model, value, self.adapter_name)

    def swap(self, name: str) -> None:
        if name not in self.adapters:
            raise refuse(
                f"There is no adapter called {name!r}.",
                found=f"the names {', '.join(map(repr, self.adapters)) or '(none)'}",
                expected="one of these",
                next_step="check the name",
            )
        hotswap_adapter(self.model, self.adapters[name], self.adapter_name)
        self._last = name, self.config

    def off(self) -> None:
        self.strength = 0


def switch_for(
    pool_or_model: AdapterPool | torch.nn.Module,
    adapters: Mapping[str, object] | None = None,
    adapter_name: str = "default",
) -> PoolSwitch | ModelSwitch:
    """The switch for what a widget was given.

    >>> switch_for(42)
    Traceback (most recent call last):
    hotswap_lab.errors.HotswapError: A widget can't swap in this.
      found:    a int
      expected: an AdapterPool, or a model and adapters={name: folder, ...}
      next:     pass one of these
    """
    if isinstance(pool_or_model, AdapterPool):
        if adapters:
            raise refuse(
                "A widget swaps in a pool, or among adapters, not both.",
                found="an AdapterPool, and adapters beside it",
                expected="one of them: a pool has its adapters",
                next_step="pool.add(name, folder) puts another one into the pool",
            )
        return PoolSwitch(pool_or_model)
    check_named(adapters)
    if isinstance(pool_or_model, torch.nn.Module) and adapters:
        return ModelSwitch(pool_or_model, adapters, adapter_name)
    found = f"a {type(pool_or_model).__name__}"
    raise refuse(
        "A widget can't swap in this.",
        found=f"{found} without adapters" if isinstance(pool_or_model, torch.nn.Module) else found,
        expected="an AdapterPool, or a model and adapters={name: folder, ...}",
        next_step="pass one of these",
    )


def whereabouts(switch: PoolSwitch | ModelSwitch) -> str:
    """In words, what the model computes with.

    >>> from hotswap_lab import demo
    >>> model, _ = demo.load("reverse")
    >>> switch = ModelSwitch(model, {"sort": demo.adapter_path("sort")})
    >>> whereabouts(switch)
    'another adapter'
    >>> switch.off()
    >>> whereabouts(switch)
    'off'
    """
    active = switch.active
    if active is not None:
        return active
    return "off" if strength_of(switch) == 0 else "another adapter"


def strength_of(switch: PoolSwitch | ModelSwitch) -> float | None:
    """The strength; None where it can't be set, as of DoRA, or where each layer has its own."""
    try:
        if not_scaled(switch.config):
            return None
        return switch.strength
    except ValueError:
        return None


def patiently(change: Callable[[], object], check: Callable[[], object]) -> None:
    """Makes a change as soon as no thread computes with the model. Meanwhile ``check`` is called now and then.

    A swap waits by itself; this is for one that somebody may call off. ``check`` does that by raising.

    >>> patiently(lambda: print("changed"), lambda: None)
    changed
    """
    while True:
        check()
        try:
            with waiting_at_most(PATIENCE):
                change()
            return
        except ModelInUseError:
            continue
