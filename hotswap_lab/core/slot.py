"""Slot: where an adapter lives in a model.

Every tensor and every scalar that belongs to one adapter name, found by walking the model's structure: the
adapter's name is looked up as a key of PEFT's own tables, never searched for inside a longer string, so
adapters called ``a``, ``lora`` or ``default_0`` can't be mistaken for one another.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from peft import PeftConfig

from .compiled import COMPILED, unwrap_compiled
from .host import Config, Host, TunerLayer, find_host, modules_in
from .journal import Journal
from .methods import method_for
from .parts import LayerSettings, SlotTensor

if TYPE_CHECKING:
    from .room import Room

T = TypeVar("T")

#: on a base model: its slots as the last swaps left them, by adapter name, each with the config that it has since
SLOTS = "hotswap_slots"
#: how much a slot remembers of configs: two things of each
MAX_EXPECTED = 128


@dataclass(frozen=True, eq=False)
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
    def keys(self) -> list[list[str]]:
        """Of each tensor, the names that files may have for it."""
        paths, keys = (self.path, *self.aliases), []
        for tensor in self.tensors:
            names = []
            for path in paths:
                names += f"{path}.{tensor.key}", f"{path}.{tensor.named_key}"
            keys.append(names)
        return keys


@dataclass(eq=False)
class Slot:
    """One adapter name on one model."""

    adapter_name: str
    host: Host
    method: ModuleType
    layers: tuple[SlotLayer, ...]
    #: the memory that all tensors are views of, if the model was prepared
    room: Room | None = None
    _links: tuple[list[dict], list[str], list[object]] | None = field(default=None, init=False, repr=False)

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

    # ---- is everything where it was found?

    def is_in_place(self) -> bool:
        """Whether the parameters, and the modules on the way to them, are still those of the model."""
        if self._links is None:
            return False
        holders, names, held = self._links
        if all(map(operator.is_, map(dict.get, holders, names), held)):
            return True
        for holder, name, known in zip(holders, names, held, strict=True):
            present = holder.get(name)
            # a part may have been compiled since, and have a wrapper around it
            if isinstance(present, torch.nn.Module):
                present = unwrap_compiled(present)
            if present is not known:
                return False
        return True

    def settle(self) -> None:
        """Notes where everything is, which :meth:`is_in_place` compares with."""
        try:
            self._links = self._links_of_all()
        except KeyError:  # wrapped by more than the path says
            self._links = None

    def _links_of_all(self) -> tuple[list[dict], list[str], list[object]]:
        """Every step from the base model to the tensors: a table of modules or parameters, a name, what is there."""
        links: dict[tuple[int, str], tuple[dict, str]] = {}
        for layer in self.layers:
            module: Any = self.host.base
            names = layer.path.split(".")
            while module is not layer.module:
                name = COMPILED if COMPILED in module._modules else names.pop(0) if names else "base_layer"
                links[id(module), name] = module._modules, name
                module = module._modules[name]
            for tensor in layer.tensors:
                name = tensor.named_key.partition(".")[0]
                links[id(module), name] = module._modules, name
                if tensor.owner is not (table := module._modules[name]):
                    links[id(table), self.adapter_name] = table._modules, self.adapter_name
                links[id(tensor.owner), tensor.name] = tensor.owner._parameters, tensor.name
        holders, names = [holder for holder, _ in links.values()], [name for _, name in links.values()]
        return holders, names, [holder[name] for holder, name in links.values()]

    # ---- what is known of its layers, as long as everything is in place

    @cached_property
    def is_special(self) -> bool:
        """Whether a layer has state beyond its tensors."""
        return True in [self.method.is_special(layer.module, self.adapter_name) for layer in self.layers]

    @cached_property
    def obstacles(self) -> list[tuple[SlotLayer, str]]:
        """The layers that can't be written to, and why not."""
        found = [(layer, self.method.unsupported_tensors(layer.tensors)) for layer in self.layers]
        return [(layer, reason) for layer, reason in found if reason]

    @property
    def is_merged(self) -> bool:
        """Whether the adapter is merged into the base weights, on any layer."""
        return True in [self.adapter_name in layer.module.merged_adapters for layer in self.layers]

    @cached_property
    def reads_base(self) -> bool:
        """Whether turning a layer off takes a look at its base weight, as with DoRA."""
        return len([tensor for tensor in self.tensors if tensor.off is not None]) > 0

    @cached_property
    def is_sharded(self) -> bool:
        """Whether this process holds only parts of some of the tensors."""
        return True in [tensor.is_shard for tensor in self.tensors]

    def expect(self, config: Config) -> list[Expected]:
        """What an adapter with this config has for each layer; worked out once for each config."""
        return self.once_for(config, "layers", lambda: self.expected_of(self.layers, config))

    def expected_of(self, layers: Iterable[SlotLayer], config: Config) -> list[Expected]:
        """What an adapter with this config has for each of these layers."""
        settings_for, targets = self.method.settings_for, self.method.targets
        settings = None if config.rank_pattern or config.alpha_pattern else settings_for(config, "")
        expected = []
        for layer in layers:
            targeted = targets(config, layer.path) or any(targets(config, path) for path in layer.aliases)
            expected.append(Expected(settings or settings_for(config, layer.path), targeted))
        return expected

    def once_for(self, config: Config, what: str, work_out: Callable[[], T]) -> T:
        """What is worked out once for each config, and remembered for some of them."""
        key = what, self.method.fingerprint(config)
        if key not in self._expected:
            if len(self._expected) >= MAX_EXPECTED:
                self._expected.clear()
            self._expected[key] = work_out()
        return self._expected[key]

    @cached_property
    def _expected(self) -> dict[object, Any]:
        return {}

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


@dataclass(frozen=True, eq=False)
class Expected:
    """What an adapter's config says of one layer."""

    settings: LayerSettings
    targeted: bool


class Uncopied(dict[str, Any]):
    """A table that every copy of the model, and every model that is read back from a file, starts without."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Uncopied:
        return type(self)()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()


def keep_slot(slot: Slot, after: Slot | None, journal: Journal) -> None:
    """Notes on the base model what the slot is after a swap; None where it has to be looked for again."""
    base, name = slot.host.base, slot.adapter_name
    if SLOTS not in base.__dict__:
        journal.set_item(base.__dict__, SLOTS, Uncopied())
    if after is None:
        journal.delete_item(base.__dict__[SLOTS], name)
    else:
        if after._links is None:
            after.settle()
        journal.set_item(base.__dict__[SLOTS], name, (after, slot.host.configs[name]))


def slot_for(host: Host, adapter_name: str) -> Slot:
    """:func:`resolve_slot` without a walk, where the slot is as the last swap left it; with its room if it has one."""
    slot, config = _kept_slot(host.base, adapter_name)
    if slot is None or slot.host.configs is not host.configs:
        return slot_in(host, adapter_name)
    if slot.room is not None:
        is_there = slot.room.is_intact()
    else:
        is_there = host.configs.get(adapter_name) is config and slot.is_in_place()
    if not is_there:
        return slot_in(host, adapter_name)
    slot.host = host  # the user may call it by a wrapper around it now
    return slot


def room_of(base: torch.nn.Module, adapter_name: str) -> Room | None:
    """The room of an adapter, if it was prepared and everything is still in place."""
    slot, _ = _kept_slot(base, adapter_name)
    return slot.room if slot is not None and slot.room is not None and slot.room.is_intact() else None


def _kept_slot(base: torch.nn.Module, adapter_name: str) -> tuple[Slot | None, PeftConfig | None]:
    return base.__dict__.get(SLOTS, {}).get(adapter_name, (None, None))


def resolve_slot(model: torch.nn.Module, adapter_name: str) -> Slot:
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
    return slot_in(find_host(model, adapter_name), adapter_name)


def slot_in(host: Host, adapter_name: str) -> Slot:
    """:func:`resolve_slot` for a host that is known already."""
    if adapter_name not in host.configs:
        find_host(host.root, adapter_name)  # says so
    method = method_for(host.configs[adapter_name])
    found: dict[int, tuple[Any, list[str]]] = {}
    for path, module in modules_in(host.base):
        if isinstance(module, method.layer_class) and method.has_adapter(module, adapter_name):
            found.setdefault(id(module), (module, []))[1].append(path)
    layers = [
        SlotLayer(paths[0], module, tuple(method.tensors_of(module, adapter_name)), tuple(paths[1:]))
        for module, paths in found.values()
    ]
    return Slot(adapter_name, host, method, tuple(layers))
