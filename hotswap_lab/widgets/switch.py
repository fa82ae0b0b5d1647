"""The widgets' interface for swaps by name: a pool, or a model with the folders of its adapters.

Tests: ``tests/widgets/test_swap_panel.py`` and ``tests/widgets/test_changes.py``.
"""

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

#: The attribute of a base model that its switches share. By adapter name: the source that a switch swapped in, its name
#: in that switch, and its config in the model, which another swap replaces.
SWITCHED = "hotswap_switched"


class ModelSwitch:
    """A model and the folders of its adapters, with the same interface as an :class:`AdapterPool`.

    >>> from hotswap_lab import demo
    >>> model, _ = demo.load("reverse")
    >>> switch = ModelSwitch(model, {"sort": demo.adapter_path("sort")})
    >>> switch.active                     # None, because reverse is not one of these
    >>> switch.swap("sort")
    >>> switch.active
    'sort'
    """

    def __init__(self, model: torch.nn.Module, adapters: Mapping[str, object], adapter_name: str | None = None):
        self.model = model
        self.adapters: dict[str, object] = dict(adapters)
        self.adapter_name: str = name_in(model, adapter_name)
        # raises if the model has no such adapter
        self._base: dict[str, Any] = find_host(model, self.adapter_name).base.__dict__

    @property
    def names(self) -> list[str]:
        return list(self.adapters)

    @property
    def active(self) -> str | None:
        source, last_name, config = self._base.get(SWITCHED, {}).get(self.adapter_name) or (None, None, None)
        names = [name for name, own in self.adapters.items() if own is source or (type(own) is str and own == source)]
        if not names or config is not config_of(self) or strength_of(self) == 0:
            return None
        return last_name if last_name in names else names[0]

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


#: an object that swaps by name
Switch = AdapterPool | ModelSwitch


def demo_pool(**options: Any) -> tuple[AdapterPool, Any]:
    """Return a pool of the embedded model with all of its adapters, and the tokenizer.

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
    """Return a widget's argument if it is a pool or a switch, or a switch for it if it is a model.

    >>> switch_for(42)
    Traceback (most recent call last):
    hotswap_lab.core.errors.HotswapError: A widget can't swap adapters in this object.
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
    """Return the states of the base models and of the adapters in ``owner``, to compare with later ones.

    States stay equal until a swap, a tensor's version counter, or PEFT's attributes of a layer show a change. A pool
    records its own writes, so a block that restores the previous adapter doesn't count as a change.

    >>> from hotswap_lab import demo, set_strength
    >>> model, _ = demo.load("reverse")
    >>> before = contents(model)
    >>> set_strength(model, 0.5)
    >>> [now == previous for now, previous in zip(contents(model), before)]
    [True, False]
    """
    bases, adapters = [], []
    for host in hosts_in(owner):
        writes = sum(parameter._version for parameter in host.base.parameters() if not parameter.is_inference())
        for name, config in host.configs.items():
            if (room := room_of(host.base, name)) and not room.is_touched:
                writes -= room._versions_now()
                adapters += room.state, room.assigned
            else:
                adapters.append(vars(config).get(WHEN))
        layers = [module for module in host.base.modules() if isinstance(module, BaseTunerLayer)]
        bases += writes, [(layer.disable_adapters, layer.active_adapters, [*layer.merged_adapters]) for layer in layers]
        adapters += [[*map(float, getattr(layer, "scaling", {}).values())] for layer in layers]
    return bases, adapters


def is_off(layer: torch.nn.Module, name: str) -> bool:
    """Whether PEFT has turned an adapter off on a layer, by disabling all adapters or by activating another one."""
    return getattr(layer, "disable_adapters", False) or name not in getattr(layer, "active_adapters", [name])


def whereabouts(switch: Switch) -> str:
    """Return the active adapter's name, ``"off"``, or ``"another adapter"``.

    >>> from hotswap_lab import demo
    >>> model, _ = demo.load("reverse")
    >>> switch = ModelSwitch(model, {"sort": demo.adapter_path("sort")})
    >>> whereabouts(switch)
    'another adapter'
    >>> switch.off()
    >>> whereabouts(switch)
    'off'
    """
    layers = [module for module in switch.model.modules() if isinstance(module, BaseTunerLayer)]
    if strength_of(switch) == 0 or (layers and all(is_off(layer, switch.adapter_name) for layer in layers)):
        return "off"
    return switch.active or "another adapter"


def strength_of(switch: Switch) -> float | None:
    """Return the strength, or None if it can't be set, as for DoRA, or if layers have different ones."""
    try:
        return None if not_scaled(config_of(switch)) else switch.strength
    except ValueError:
        return None
