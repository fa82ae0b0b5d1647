"""Slot: the place of an adapter in a model.

A slot has every tensor and every scalar that belongs to one adapter name. They are found by walking the model's
structure: the name is looked up as a key of PEFT's own tables, never searched for inside a longer string, so
adapters called ``a``, ``lora`` or ``default_0`` can't be mistaken for one another.
"""

from __future__ import annotations

import copy
import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import torch

from . import lora
from .adapter import BASE, LOST_ORIGINALS, ORIGIN
from .change import Change
from .host import PEFT_PREFIX, Config, Host, TunerLayer, find_host, modules_in
from .journal import Journal
from .method import Method
from .settings import PATTERNS, LayerSettings, settings_for
from .tensors import SlotTensor

T = TypeVar("T")

#: the attribute of a base model with its slots as the last swaps left them, by adapter name
SLOTS = "hotswap_slots"
#: how many results a slot remembers that end with its modules, many of which are for one config each
MOST_RESULTS = 512


class Ends(enum.Enum):
    """When a result that a slot remembers is no longer valid."""

    MODULES = "when a module or a parameter of the model is replaced"
    MEMORY = "then, and when a parameter gets other memory"


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
    def is_plain(self) -> bool:
        """Whether its tensors are an A and a B, which are not trained while both are zero."""
        return all(tensor.rank_axis is not None for tensor in self.tensors)

    @cached_property
    def keys(self) -> list[str]:
        """The key of each tensor in an adapter file."""
        return [f"{self.path}.{tensor.key}" for tensor in self.tensors]


@dataclass(eq=False)
class Slot:
    """One adapter name on one model, as one of ``methods`` has found it."""

    methods: Sequence[Method]
    adapter_name: str
    host: Host
    method: Method
    layers: tuple[SlotLayer, ...]
    #: the :class:`~hotswap_lab.core.room.Room` that all tensors are views of, if the model was prepared
    room: Any = None
    #: tables of modules and parameters, each with a name in it and the entry there: see :meth:`record_links`
    _links: list[tuple[dict[str, Any], str, Any]] = field(default_factory=list, init=False, repr=False)
    #: the addresses of the parameters when they were last looked at
    _addresses: list[int] = field(default_factory=list, init=False, repr=False)
    #: the results that are remembered, by the time at which they end
    _results: dict[Ends, dict[object, Any]] = field(
        default_factory=lambda: {ends: {} for ends in Ends}, init=False, repr=False
    )

    @property
    def config(self) -> Config:
        return self.host.configs[self.adapter_name]

    @cached_property
    def tensors(self) -> list[SlotTensor]:
        """All tensors of the adapter, in the order of the layers."""
        return [tensor for layer in self.layers for tensor in layer.tensors]

    @cached_property
    def parameters(self) -> list[torch.nn.Parameter]:
        """The parameters of the tensors at the time the slot was found."""
        return [tensor.owner._parameters[tensor.name] for tensor in self.tensors]

    @cached_property
    def is_plain(self) -> bool:
        """Whether all of its layers are plain."""
        return all(layer.is_plain for layer in self.layers)

    @cached_property
    def is_inference(self) -> bool:
        """Whether the adapter was loaded in inference mode.

        Its tensors must then be written in inference mode. Tensors made in it would make any other model untrainable.
        """
        # prompts are in no layer; then the model's own weights decide
        return True in [parameter.is_inference() for parameter in self.parameters or self.host.carrier.parameters()]

    def write_mode(self) -> torch.inference_mode:
        """Inference mode if the adapter was loaded in it, and normal mode if not, regardless of the caller's mode."""
        return torch.inference_mode(self.is_inference)

    @cached_property
    def own_keys(self) -> dict[str, str]:
        """:func:`own_keys_of` all layers."""
        return own_keys_of(self.layers)

    # ---- whether everything is where it was found

    @property
    def walk(self) -> list[tuple[str, torch.nn.Module]]:
        """The base model and all of its modules with their paths, except for the adapters' own modules."""
        results = self._results[Ends.MODULES]
        if "walk" not in results:
            results["walk"] = modules_in(self.host.base)
        return results["walk"]

    @property
    def modules(self) -> list[torch.nn.Module]:
        return [module for _, module in self.walk]

    def forget(self, *ends: Ends) -> None:
        """Forget the results that end now. Their tables are replaced, because another thread may be reading them."""
        self._results = self._results | {end: {} for end in ends}

    def record_links(self) -> None:
        """Note where everything is, for :meth:`is_in_place` to compare with."""
        # PEFT makes an adapter's own tables once for each layer; only their entries may change
        tables: list[dict[str, Any]] = [module._modules for module in self.modules]
        known = set(self.modules)
        links = [(table, name, child) for table in tables for name, child in table.items() if child in known]
        parameters = iter(self.parameters)  # worked out now, because code such as pruning may take one out of its table
        for layer in self.layers:
            for tensor in layer.tensors:
                table: Any = layer.module._modules[tensor.named_key.partition(".")[0]]
                if table is not tensor.owner:
                    links.append((table._modules, self.adapter_name, tensor.owner))
                links.append((tensor.owner._parameters, tensor.name, next(parameters)))
        self._links = links

    def is_in_place(self) -> bool:
        """Whether the parameters, and the modules on the way to them, are still those of the model."""
        for table, name, entry in self._links:
            if table.get(name) is not entry:
                return self._is_elsewhere_in_place()
        if self.room is None and (addresses := list(map(torch.Tensor.data_ptr, self.parameters))) != self._addresses:
            self.forget(Ends.MEMORY)
            self._addresses = addresses
        return True

    def _is_elsewhere_in_place(self) -> bool:
        # another module may have been put into the model, or a wrapper around a part that was compiled since
        now = slot_in(self.methods, self.host, self.adapter_name)
        if now._by_module() != self._by_module():
            return False
        self._results = now._results
        self.record_links()
        return True

    def _by_module(self) -> dict[torch.nn.Module, list[tuple[str, int]]]:
        """Each layer's parameters: names and ids. A dict, because reserved layers are last, wherever they are."""
        ids = iter([id(parameter) for parameter in self.parameters])
        return {layer.module: [(tensor.named_key, next(ids)) for tensor in layer.tensors] for layer in self.layers}

    # ---- facts about its layers, valid as long as everything is in place

    @cached_property
    def obstacles(self) -> list[tuple[SlotLayer, str]]:
        """The layers that can't be written to, with the reasons."""
        name, obstacle = self.adapter_name, self.method.obstacle
        found = [(layer, obstacle(layer.module, name, layer.tensors)) for layer in self.layers]
        return [(layer, reason) for layer, reason in found if reason]

    @property
    def is_merged(self) -> bool:
        """Whether the adapter is merged into the base weights, on any layer."""
        return self.adapter_name in chain.from_iterable(self.merged)

    @cached_property
    def merged(self) -> list[list[str]]:
        """For each layer, the names of the adapters that are merged into it."""
        # PEFT makes one list for each layer, and never replaces it
        return [layer.module.merged_adapters for layer in self.layers]

    def once_for(self, config: Config, work_out: Callable[[Slot, Config], T]) -> T:
        """Return ``work_out(self, config)``, remembered for equal configs until modules are replaced."""
        if (fingerprint := lora.fingerprint(config)) is None:
            return work_out(self, config)
        if len(self._results[Ends.MODULES]) >= MOST_RESULTS:
            self.forget(Ends.MODULES)
        key, results = (work_out, fingerprint), self._results[Ends.MODULES]
        if key not in results:
            results[key] = work_out(self, config)
        return results[key]

    def once(self, work_out: Callable[..., T], *arguments: object) -> T:
        """Return ``work_out(self, *arguments)``, remembered until modules are replaced or memory is moved."""
        key, results = (work_out, arguments), self._results[Ends.MEMORY]
        if key not in results:
            results[key] = work_out(self, *arguments)
        return results[key]

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
    """The key of each tensor, by all names in files: as PEFT saves it, with the adapter's name, by an alias."""
    own_keys = {}
    for layer in layers:
        for tensor, key in zip(layer.tensors, layer.keys, strict=True):
            for path in layer.paths:
                own_keys[f"{path}.{tensor.named_key}"] = own_keys[f"{path}.{tensor.key}"] = key
    return own_keys | {f"{PEFT_PREFIX}{name}": key for name, key in own_keys.items()}


class Expected(NamedTuple):
    """The settings and tensor shapes that an adapter with a certain config has on a layer."""

    settings: LayerSettings
    #: whether the config targets it
    is_targeted: bool
    #: the shapes of its tensors; None if they can't have this rank
    shapes: list[tuple[int, ...]] | None


def expected_of(slot: Slot, config: Config, layers: Sequence[SlotLayer] | None = None) -> list[Expected]:
    """The :class:`Expected` of each layer for an adapter with this config."""
    is_targeted, expected = lora.is_targeted, []
    alike = None if any(getattr(config, pattern) for pattern in PATTERNS) else settings_for(config, "")
    for layer in slot.layers if layers is None else layers:
        settings, tensors = alike or settings_for(config, layer.path), layer.tensors
        shapes = (
            None if settings.rank % tensors[0].rank_step else [tensor.shape_for(settings.rank) for tensor in tensors]
        )
        expected.append(Expected(settings, is_targeted(config, layer.path), shapes))
    return expected


class Uncopied(dict[str, Any]):
    """A dict whose copies and pickles have its keys alone: a copied or saved model starts without the values."""

    def __reduce__(self) -> tuple[type, tuple[dict[str, None]]]:
        return type(self), (dict.fromkeys(self),)


def copy_of(config: Config) -> Config:
    """A copy of a config, which shares no value that can be changed with it. ``deepcopy`` takes ten times as long."""
    config = copy.copy(config)
    for name, value in vars(config).items():
        if isinstance(value, set) or (isinstance(value, (list, dict)) and not value):
            setattr(config, name, value.copy())
        elif name != ORIGIN and not isinstance(value, (str, int, float, type(None))):
            setattr(config, name, copy.deepcopy(value))
    return config


def begin_change(slot: Slot, config: Config = None, slot_after: Slot | None = None) -> Change:
    """A change of the adapter in a slot, with no tensor to write yet.

    Parameters
    ----------
    config:
        The config of the model after the change; None keeps the present one.
    slot_after:
        The slot after the change; None if it has to be looked for again.
    """
    change, name = Change(slot.is_inference), slot.adapter_name
    if config is not None:
        follow(change, slot, config, bool(slot.host.base.__dict__.get(SLOTS, {}).get(name)))
        change.last_steps.append(partial(Journal.set_item, table=slot.host.configs, key=name, value=config))
        change.last_steps.append(partial(keep_slot, slot, slot_after))
    return change


def follow(change: Change, slot: Slot, config: Config, is_kept: bool) -> None:
    """Let the method note a config that comes in. ``is_kept``: whether the model has the slot of an earlier swap."""
    live = vars(slot.host.configs[slot.adapter_name])
    if live is not vars(config):  # later adapters are compared with the first one's base model, not with this one's
        vars(config)[BASE] = live.get(BASE, live["base_model_name_or_path"])
    # the method has seen this model before, and what it noted then still holds
    if is_kept and LOST_ORIGINALS in live and slot.is_plain:
        vars(config)[LOST_ORIGINALS] = live[LOST_ORIGINALS]
    else:
        change.steps.append(partial(slot.method.follow, slot, config))


def keep_slot(slot: Slot, after: Slot | None, journal: Journal) -> None:
    """Note on the base model the slot after a swap; None if it has to be looked for again."""
    if after is not None:
        if not after._links:
            after.record_links()
        # memory that a swap gives to a parameter is its own, so what was known of it still holds
        if after.room is None:
            after._addresses = list(map(torch.Tensor.data_ptr, after.parameters))
    noted = slot.host.base.__dict__
    journal.set_item(noted, SLOTS, Uncopied({**noted.get(SLOTS, {}), slot.adapter_name: after}))


def has_been_swapped(base: torch.nn.Module, adapter_name: str) -> bool:
    """Whether this model, not another one, wrote the notes on the adapter's config."""
    return adapter_name in base.__dict__.get(SLOTS, {})


def kept_slot(base: torch.nn.Module, adapter_name: str) -> Slot | None:
    """The slot that the last swap left, if everything is still in place; with its room if it has one."""
    slot: Slot | None = base.__dict__.get(SLOTS, {}).get(adapter_name)
    is_there = slot is not None and (slot.is_in_place() if slot.room is None else slot.room.is_intact())
    return slot if is_there else None


def slot_for(methods: Sequence[Method], host: Host, adapter_name: str) -> Slot:
    """Like :func:`slot_in`, without a walk if the last swap's slot is still valid; with its room if it has one."""
    slot = kept_slot(host.base, adapter_name)
    if slot is None or slot.host.configs is not host.configs or slot.methods is not methods:
        return slot_in(methods, host, adapter_name)
    slot.host = host  # the user may pass a wrapper around the model now
    return slot


def room_of(base: torch.nn.Module, adapter_name: str) -> Any:
    """The room of an adapter, if it was prepared and everything is still in place."""
    slot = kept_slot(base, adapter_name)
    return slot and slot.room


def room_left_by(slot: Slot) -> Any:
    """The room that an adapter was prepared in, even if its parameters were moved out of it since."""
    kept = slot.host.base.__dict__.get(SLOTS, {}).get(slot.adapter_name)
    return kept and kept.room


def slot_in(methods: Sequence[Method], host: Host, adapter_name: str) -> Slot:
    """Find everything in a model that belongs to an adapter. The first method that takes its config is used."""
    if adapter_name not in host.configs:
        find_host(host.root, adapter_name)  # raises
    method = next(method for method in methods if method.takes(host.configs[adapter_name]))
    found: dict[torch.nn.Module, tuple[tuple[SlotTensor, ...], list[str]]] = {}
    for path, module in (walk := modules_in(host.base)):
        if module in found:
            found[module][1].append(path)
        elif (tensors := method.tensors_of(module, adapter_name)) is not None:
            found[module] = tuple(tensors), [path]
    layers = [SlotLayer(first, module, own, tuple(others)) for module, (own, (first, *others)) in found.items()]
    slot = Slot(methods, adapter_name, host, method, tuple(layers))
    slot._results[Ends.MODULES]["walk"] = walk
    return slot
