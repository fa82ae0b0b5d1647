"""Slot: where an adapter lives in a model.

Every tensor and every scalar that belongs to one adapter name, found by walking the model's structure: the
adapter's name is looked up as a key of PEFT's own tables, never searched for inside a longer string, so
adapters called ``a``, ``lora`` or ``default_0`` can't be mistaken for one another.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple, Protocol, TypeVar

import torch

from . import lora
from .change import Change
from .engine import Engine, Method
from .host import Config, Host, TunerLayer, find_host, modules_in
from .journal import Journal
from .tensors import LayerSettings, SlotTensor

T = TypeVar("T")

#: on a base model: its slots as the last swaps left them, by adapter name
SLOTS = "hotswap_slots"
#: how much a slot remembers of configs
MOST_KNOWN = 128


@dataclass(eq=False)
class SlotLayer:
    """One layer that has the adapter.

    ``path`` is the layer's path in the base model. A module that is reachable by several paths (shared
    blocks) has the others in ``aliases``: files may name its tensors by any of them.
    """

    path: str
    module: TunerLayer
    tensors: tuple[SlotTensor, ...]
    aliases: tuple[str, ...] = ()

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.path, *self.aliases)

    @cached_property
    def keys(self) -> list[str]:
        """Of each tensor, its key in an adapter file."""
        return [f"{self.path}.{tensor.key}" for tensor in self.tensors]


class Memory(Protocol):
    """The :class:`~hotswap_lab.core.room.Room` of a slot, as far as a slot knows it."""

    def is_intact(self) -> bool: ...


@dataclass(eq=False)
class Slot:
    """One adapter name on one model, as ``engine`` has found it."""

    engine: Engine
    adapter_name: str
    host: Host
    method: Method
    layers: tuple[SlotLayer, ...]
    #: the memory that all tensors are views of, if the model was prepared
    room: Memory | None = None
    #: tables of modules and parameters, a name in each, and what was there: see :meth:`settle`
    _links: tuple[tuple[Any, ...], ...] = field(default=(), init=False, repr=False)
    #: what :meth:`once_for` has worked out
    _known: dict[object, Any] = field(default_factory=dict, init=False, repr=False)

    @property
    def config(self) -> Config:
        return self.host.configs[self.adapter_name]

    @cached_property
    def tensors(self) -> list[SlotTensor]:
        """All tensors of the adapter, in the order of the layers."""
        return [tensor for layer in self.layers for tensor in layer.tensors]

    @cached_property
    def parameters(self) -> list[torch.nn.Parameter]:
        """The parameters that the tensors were when the slot was found."""
        return [tensor.owner._parameters[tensor.name] for tensor in self.tensors]

    @cached_property
    def is_inference(self) -> bool:
        """Whether the adapter was loaded in inference mode.

        Its tensors demand that they are written in it; and tensors made in it would make any other model untrainable.
        """
        # prompts lie in no layer; then the model's own weights tell
        return True in map(torch.Tensor.is_inference, self.parameters or self.host.carrier.parameters())

    def write_mode(self) -> torch.inference_mode:
        """Inference mode exactly if the adapter was loaded in it, whatever the caller is in."""
        return torch.inference_mode(self.is_inference)

    @cached_property
    def own_keys(self) -> dict[str, str]:
        """:func:`own_keys_of` all layers."""
        return own_keys_of(self.layers)

    # ---- is everything where it was found?

    @cached_property
    def walk(self) -> list[tuple[str, torch.nn.Module]]:
        """The base model and all modules in it with their paths, but for those that are the adapters' own."""
        return modules_in(self.host.base)

    @cached_property
    def modules(self) -> list[torch.nn.Module]:
        return [module for _, module in self.walk]

    def settle(self) -> None:
        """Notes where everything is, which :meth:`is_in_place` compares with."""
        # what is an adapter's own, PEFT makes once for each layer; but for what is in it
        tables, known = [module._modules for module in self.modules], set(self.modules)
        links: list[tuple[Any, ...]] = [
            (table, name, child) for table in tables for name, child in table.items() if child in known
        ]
        for layer in self.layers:
            for tensor in layer.tensors:
                table: Any = layer.module._modules[tensor.named_key.partition(".")[0]]
                if table is not tensor.owner:
                    links.append((table._modules, self.adapter_name, tensor.owner))
                links.append((tensor.owner._parameters, tensor.name, tensor.parameter))
        self._links = tuple(zip(*links, strict=True))

    def is_in_place(self) -> bool:
        """Whether the parameters, and the modules on the way to them, are still those of the model."""
        tables, names, held = self._links
        if all(map(operator.is_, map(dict.get, tables, names), held)):
            return True
        # something else may have been put into the model, or a wrapper around a part that was compiled since
        now = slot_in(self.engine, self.host, self.adapter_name)
        if now._by_module() != self._by_module():
            return False
        self.walk, self.modules = now.walk, now.modules
        self.settle()
        return True

    def _by_module(self) -> dict[torch.nn.Module, list[int]]:
        """Which parameters each layer had; layers that were reserved come last, wherever they are in the model."""
        ids = map(id, self.parameters)
        return {layer.module: [next(ids) for _ in layer.tensors] for layer in self.layers}

    # ---- what is known of its layers, as long as everything is in place

    @cached_property
    def obstacles(self) -> list[tuple[SlotLayer, str]]:
        """The layers that can't be written to, and why not."""
        name, obstacle = self.adapter_name, self.method.obstacle
        found = [(layer, obstacle(layer.module, name, layer.tensors)) for layer in self.layers]
        return [(layer, reason) for layer, reason in found if reason]

    @property
    def is_merged(self) -> bool:
        """Whether the adapter is merged into the base weights, on any layer."""
        return any(self._merged) and True in [self.adapter_name in merged for merged in self._merged]

    @cached_property
    def _merged(self) -> list[list[str]]:
        # PEFT makes one list for each layer, and never another
        return [layer.module.merged_adapters for layer in self.layers]

    def once_for(self, config: Config, work_out: Callable[[Slot, Config], T]) -> T:
        """What is worked out once for each config, and remembered for some of them."""
        key = work_out, lora.fingerprint(config)
        if key not in self._known:
            if len(self._known) >= MOST_KNOWN:
                self._known.clear()
            self._known[key] = work_out(self, config)
        return self._known[key]

    def data_ptrs(self) -> list[int]:
        """The memory address of each tensor. A swap that keeps the ranks leaves them as they are.

        >>> from hotswap_lab import demo, hotswap_adapter, resolve_slot
        >>> model, _ = demo.load("reverse")
        >>> slot = resolve_slot(model, "default")
        >>> before = slot.data_ptrs()
        >>> hotswap_adapter(model, demo.adapter_path("reverse"), "default")
        >>> slot.data_ptrs() == before
        True
        """
        return [tensor.parameter.data_ptr() for tensor in self.tensors]


def own_keys_of(layers: Sequence[SlotLayer]) -> dict[str, str]:
    """The key of each tensor, by whatever else a file may call it: with the adapter's name, by an alias."""
    own_keys = {}
    for layer in layers:
        for tensor, key in zip(layer.tensors, layer.keys, strict=True):
            own_keys[f"{layer.path}.{tensor.named_key}"] = key
            for path in layer.aliases:
                own_keys[f"{path}.{tensor.key}"] = own_keys[f"{path}.{tensor.named_key}"] = key
    return own_keys


class Expected(NamedTuple):
    """What an adapter with a certain config has on a layer."""

    settings: LayerSettings
    #: whether the config targets it
    is_targeted: bool
    #: of its tensors; None where they can't have this rank
    shapes: list[tuple[int, ...]] | None


def expected_of(slot: Slot, config: Config, layers: Sequence[SlotLayer] | None = None) -> list[Expected]:
    """Of each layer, what an adapter with this config has there."""
    settings_for, targets, expected = lora.settings_for, lora.targets, []
    alike = None if config.rank_pattern or config.alpha_pattern else settings_for(config, "")
    for layer in slot.layers if layers is None else layers:
        targeted = targets(config, layer.path) or any(targets(config, path) for path in layer.aliases)
        settings, tensors = alike or settings_for(config, layer.path), layer.tensors
        shapes = [tensor.shape_for(settings.rank) for tensor in tensors]
        expected.append(Expected(settings, targeted, None if settings.rank % tensors[0].rank_step else shapes))
    return expected


class Uncopied(dict[str, Any]):
    """A table that every copy of the model, and every model that is read back from a file, starts without."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Uncopied:
        return type(self)()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()


def change_of(slot: Slot, config: Config = None, slot_after: Slot | None = None) -> Change:
    """A change of the adapter in a slot, with nothing to write yet.

    Parameters
    ----------
    config:
        The config that the model has afterwards; None leaves the present one.
    slot_after:
        The slot afterwards; None where it has to be looked for again.
    """
    change = Change(slot.is_inference)
    if config is not None:
        change.steps += [partial(note, slot, config) for note in slot.engine.on_config]
        change.last_steps.append(partial(_put_config, slot, config, slot_after))
    return change


def _put_config(slot: Slot, config: Config, slot_after: Slot | None, journal: Journal) -> None:
    journal.set_item(slot.host.configs, slot.adapter_name, config)
    keep_slot(slot, slot_after, journal)


def keep_slot(slot: Slot, after: Slot | None, journal: Journal) -> None:
    """Notes on the base model what the slot is after a swap; None where it has to be looked for again."""
    if after is not None and not after._links:
        after.settle()
    noted = slot.host.base.__dict__
    journal.set_item(noted, SLOTS, Uncopied({**noted.get(SLOTS, {}), slot.adapter_name: after}))


def kept_slot(base: torch.nn.Module, adapter_name: str) -> Slot | None:
    """The slot that the last swap left, if everything is still in place; with its room if it has one."""
    slot: Slot | None = base.__dict__.get(SLOTS, {}).get(adapter_name)
    is_there = slot is not None and (slot.is_in_place() if slot.room is None else slot.room.is_intact())
    return slot if is_there else None


def slot_for(engine: Engine, host: Host, adapter_name: str) -> Slot:
    """:func:`resolve_slot` without a walk, where the slot is as the last swap left it; with its room if it has one."""
    slot = kept_slot(host.base, adapter_name)
    if slot is None or slot.host.configs is not host.configs or slot.engine is not engine:
        return slot_in(engine, host, adapter_name)
    slot.host = host  # the user may call it by a wrapper around it now
    return slot


def room_of(base: torch.nn.Module, adapter_name: str) -> Any:
    """The room of an adapter, if it was prepared and everything is still in place."""
    slot = kept_slot(base, adapter_name)
    return slot and slot.room


def room_left_by(slot: Slot) -> Any:
    """The room that an adapter was prepared in, whether its parameters are still there or were moved away since."""
    kept = slot.host.base.__dict__.get(SLOTS, {}).get(slot.adapter_name)
    return kept and kept.room


def resolve_slot(engine: Engine, model: torch.nn.Module, adapter_name: str) -> Slot:
    """Finds everything in ``model`` that belongs to the adapter called ``adapter_name``.

    Parameters
    ----------
    model:
        A PEFT model, compiled or not, or a module that contains one.
    adapter_name:
        The name under which the adapter was loaded.

    Returns
    -------
    Slot

    Raises
    ------
    HotswapError
        If there is no such adapter, or its PEFT method is not known to the engine.

    Examples
    --------
    >>> from hotswap_lab import demo, resolve_slot
    >>> model, _ = demo.load("caesar")
    >>> slot = resolve_slot(model, "default")
    >>> len(slot.layers), slot.layers[0].path
    (12, 'model.layers.0.mlp.gate_proj')
    """
    return slot_in(engine, find_host(model, adapter_name), adapter_name)


def slot_in(engine: Engine, host: Host, adapter_name: str) -> Slot:
    """:func:`resolve_slot` for a host that is known already."""
    if adapter_name not in host.configs:
        find_host(host.root, adapter_name)  # says so
    method = engine.method_for(host.configs[adapter_name])
    found: dict[torch.nn.Module, tuple[list[SlotTensor], list[str]]] = {}
    for path, module in (walk := modules_in(host.base)):
        if module in found:
            found[module][1].append(path)
        elif (tensors := method.tensors_of(module, adapter_name)) is not None:
            found[module] = tensors, [path]
    layers = [
        SlotLayer(paths[0], module, tuple(tensors), tuple(paths[1:])) for module, (tensors, paths) in found.items()
    ]
    slot = Slot(engine, adapter_name, host, method, tuple(layers))
    slot.walk = walk
    return slot
