"""Swaps by name in a pool, or in a model with the folders of its adapters: all that widgets need for swapping."""

from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer

from .. import demo
from ..beyond.configs import not_scaled
from ..core.adapter import WHEN
from ..core.errors import refused
from ..core.host import find_host, hosts_in, name_in
from ..core.slot import Uncopied, room_of
from ..pools.adapter_pool import AdapterPool
from ..pools.members import check_named
from ..swap import get_strength, hotswap_adapter, set_strength
from ..threads import bases_of, locked

#: the attribute of a base model, for all of its switches, by adapter name: what one of them swapped in, its name there,
#: and its config in the model, which another swap replaces
SWITCHED = "hotswap_switched"


class ModelSwitch:
    """A model and the folders of its adapters, with the same interface as an :class:`AdapterPool`.

    >>> from hotswap_lab import demo
    >>> model, _ = demo.load("reverse")
    >>> switch = ModelSwitch(model, {"sort": demo.adapter_path("sort")})
    >>> switch.active                     # reverse, which is not one of these
    >>> switch.swap("sort")
    >>> switch.active
    'sort'
    """

    def __init__(self, model: torch.nn.Module, adapters: Mapping[str, object], adapter_name: str | None = None):
        self.model = model
        self.adapters: dict[str, object] = dict(adapters)
        self.adapter_name: str = name_in(model, adapter_name)
        # raises if there is no such adapter
        self._base: dict[str, Any] = find_host(model, self.adapter_name).base.__dict__

    @property
    def names(self) -> list[str]:
        return list(self.adapters)

    @property
    def active(self) -> str | None:
        source, last, config = self._base.get(SWITCHED, {}).get(self.adapter_name) or (None, None, None)
        names = [name for name, own in self.adapters.items() if own is source or (type(own) is str and own == source)]
        is_in = names and config is config_of(self) and strength_of(self) != 0
        return None if not is_in else last if last in names else names[0]

    @property
    def strength(self) -> float:
        return get_strength(self.model, self.adapter_name)

    @strength.setter
    def strength(self, value: float) -> None:
        set_strength(self.model, value, self.adapter_name)

    def swap(self, name: str) -> None:
        if name not in self.adapters:
            raise refused("no_adapter_of_this_name", name=name, adapters=", ".join(map(repr, self.adapters)))
        with locked(*bases_of(self.model), computing=True):  # no swap by another thread before the config is read
            hotswap_adapter(self.model, self.adapters[name], self.adapter_name, add_layers=True)
            self._base.setdefault(SWITCHED, Uncopied())[self.adapter_name] = self.adapters[name], name, config_of(self)

    def off(self) -> None:
        self.strength = 0


#: what swaps by name
Switch = AdapterPool | ModelSwitch


def demo_pool(**options: Any) -> tuple[AdapterPool, Any]:
    """A pool of the embedded model with all of its adapters, and the tokenizer.

    >>> pool, _ = demo_pool(rows=2)
    >>> len(pool), pool.active
    (8, 'reverse')
    """
    model, tokenizer = demo.load("reverse")
    folders = {name: demo.adapter_path(name) for name in demo.adapter_names()}
    return AdapterPool(model, adapters=folders, progress=False, **options), tokenizer


def switch_for(
    pool_or_model: Switch | torch.nn.Module,
    adapters: Mapping[str, object] | None = None,
    adapter_name: str | None = None,
) -> Switch:
    """The pool or switch that a widget was given, or a switch for the model that it was given.

    >>> switch_for(42)
    Traceback (most recent call last):
    hotswap_lab.core.errors.HotswapError: A widget can't swap in this.
      found:    int without adapters
      expected: an AdapterPool, or a model and adapters={name: folder, ...}, not both
      next:     pass one of these
    """
    check_named(adapters)
    if isinstance(pool_or_model, Switch) and not adapters:
        return pool_or_model
    if isinstance(pool_or_model, torch.nn.Module) and adapters:
        return ModelSwitch(pool_or_model, adapters, adapter_name)
    raise refused("no_place_to_swap", kind=type(pool_or_model).__name__, how="and" if adapters else "without")


def config_of(switch: Switch) -> PeftConfig:
    """The config of the adapter that is in the model."""
    return find_host(switch.model, switch.adapter_name).configs[switch.adapter_name]


def contents(owner: object) -> tuple[list[object], list[object]]:
    """What is in the models of ``owner``, to compare with later: of the base models, and of their adapters.

    They stay equal until a swap, a version counter, or what PEFT notes on a layer shows a change. A pool knows what it
    wrote, so it is no change if a block puts the previous adapter back.

    >>> from hotswap_lab import demo, set_strength
    >>> model, _ = demo.load("reverse")
    >>> before = contents(model)
    >>> set_strength(model, 0.5)
    >>> [now == previous for now, previous in zip(contents(model), before)]
    [True, False]
    """
    own, adapters = [], []
    for host in hosts_in(owner):
        writes = sum(each._version for each in host.base.parameters() if not each.is_inference())
        for name, config in host.configs.items():
            if (room := room_of(host.base, name)) and not room.is_touched:
                writes -= room._versions_now()
                adapters += room.state, room.assigned
            else:
                adapters.append(vars(config).get(WHEN))
        layers = [each for each in host.base.modules() if isinstance(each, BaseTunerLayer)]
        own += writes, [(each.disable_adapters, each.active_adapters, [*each.merged_adapters]) for each in layers]
        adapters += [[*map(float, getattr(each, "scaling", {}).values())] for each in layers]
    return own, adapters


def is_off(layer: torch.nn.Module, name: str) -> bool:
    """Whether PEFT has turned an adapter off on a layer, by disabling all or by activating another one."""
    return getattr(layer, "disable_adapters", False) or name not in getattr(layer, "active_adapters", [name])


def whereabouts(switch: Switch) -> str:
    """The active adapter, ``"off"``, or ``"another adapter"``.

    >>> from hotswap_lab import demo
    >>> model, _ = demo.load("reverse")
    >>> switch = ModelSwitch(model, {"sort": demo.adapter_path("sort")})
    >>> whereabouts(switch)
    'another adapter'
    >>> switch.off()
    >>> whereabouts(switch)
    'off'
    """
    off = [is_off(each, switch.adapter_name) for each in switch.model.modules() if isinstance(each, BaseTunerLayer)]
    return "off" if strength_of(switch) == 0 or (off and all(off)) else switch.active or "another adapter"


def strength_of(switch: Switch) -> float | None:
    """The strength; None if it can't be set, as for DoRA, or if layers have different ones."""
    try:
        return None if not_scaled(config_of(switch)) else switch.strength
    except ValueError:
        return None
