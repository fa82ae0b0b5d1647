"""Slot: where an adapter lives in a model.

Every tensor and every scalar that belongs to one adapter name, found by walking the model's structure: the
adapter's name is looked up as a key of PEFT's own tables, never searched for inside a longer string, so
adapters called ``a``, ``lora`` or ``default_0`` can't be mistaken for one another.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from types import ModuleType
from typing import TYPE_CHECKING, TypeVar

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer

from .compiled import COMPILED, unwrap_compiled
from .host import Host, embeddings_of, find_host
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
    module: BaseTunerLayer
    tensors: tuple[SlotTensor, ...]
    aliases: tuple[str, ...] = ()

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.path, *self.aliases)


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
    def config(self) -> PeftConfig:
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
            module, names = self.host.base, layer.path.split(".")
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
    def keys(self) -> list[list[list[str]]]:
        """Of each tensor of each layer, the names that files may have for it."""
        keys = []
        for layer in self.layers:
            of_layer = []
            for tensor in layer.tensors:
                names = [f"{layer.path}.{tensor.key}", f"{layer.path}.{tensor.named_key}"]
                for path in layer.aliases:
                    names += [f"{path}.{tensor.key}", f"{path}.{tensor.named_key}"]
                of_layer.append(names)
            keys.append(of_layer)
        return keys

    @cached_property
    def forms(self) -> list[tuple[bool, bool]]:
        """Which tensors each layer has beside A and B."""
        return [self.method.form_of(layer.module, self.adapter_name) for layer in self.layers]

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

    @cached_property
    def has_more(self) -> bool:
        """Whether a layer has tensors without rank components: a magnitude (DoRA), a bias."""
        return None in [tensor.rank_axis for tensor in self.tensors]

    @cached_property
    def embeddings(self) -> list[SlotLayer]:
        """The layers on embeddings, whose weights PEFT saves, too."""
        ids = list(map(id, embeddings_of(self.host.base)))
        return [layer for layer in self.layers if id(layer.module) in ids]

    def expect(self, config: PeftConfig) -> list[Expected]:
        """What an adapter with this config has for each layer; worked out once for each config."""
        return self.once_for(config, "layers", lambda: list(self._expect(config)))

    def _expect(self, config: PeftConfig) -> Iterator[Expected]:
        settings_for, targets = self.method.settings_for, self.method.targets
        settings = None if config.rank_pattern or config.alpha_pattern else settings_for(config, "")
        for layer in self.layers:
            targeted = targets(config, layer.path)
            for path in layer.aliases:
                targeted = targeted or targets(config, path)
            yield Expected(settings or settings_for(config, layer.path), targeted)

    def once_for(self, config: PeftConfig, what: str, work_out: Callable[[], T]) -> T:
        """What is worked out once for each config, and remembered for some of them."""
        key = what, self.method.fingerprint(config)
        if key not in self._expected:
            if len(self._expected) >= MAX_EXPECTED:
                self._expected.clear()
            self._expected[key] = work_out()
        return self._expected[key]

    @cached_property
    def _expected(self) -> dict[object, object]:
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


class Uncopied(dict):
    """A table that every copy of the model, and every model that is read back from a file, starts without."""

    def __deepcopy__(self, memo: dict) -> Uncopied:
        return type(self)()

    def __reduce__(self) -> tuple:
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


def _walk(root: torch.nn.Module) -> Iterator[tuple[str, BaseTunerLayer]]:
    """All tuner layers with their canonical paths, in the model's order, shared modules once per path.

    ``named_modules`` would do the same several times slower: it nests one generator per level and goes into
    the adapters' own small modules. A tuner layer around another one (``PeftMixedModel``) is no level of its
    own: adapter files know the inner one by the path of the layer that both adapt.
    """
    stack: list[tuple[str, torch.nn.Module]] = [("", root)]
    while stack:
        path, module = stack.pop()
        if isinstance(module, BaseTunerLayer):
            yield path, module
            while isinstance(module := module._modules.get("base_layer"), BaseTunerLayer):
                yield path, module
            if module is None:
                continue
            path = f"{path}.base_layer"
        for name, child in reversed(module._modules.items()):
            if child is not None:
                stack.append((path if name == COMPILED else f"{path}.{name}" if path else name, child))


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
    peft_type = host.configs[adapter_name].peft_type
    method = method_for(peft_type)
    found: dict[int, tuple[BaseTunerLayer, list[str]]] = {}
    for path, module in _walk(host.base):
        if isinstance(module, method.layer_class) and method.has_adapter(module, adapter_name):
            found.setdefault(id(module), (module, []))[1].append(path)
    layers = [
        SlotLayer(paths[0], module, tuple(method.tensors_of(module, adapter_name)), tuple(paths[1:]))
        for module, paths in found.values()
    ]
    return Slot(adapter_name, host, method, tuple(layers))
