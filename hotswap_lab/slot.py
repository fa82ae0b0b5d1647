"""Slot: where an adapter lives in a model.

Every tensor and every scalar that belongs to one adapter name, found by walking the model's structure: the
adapter's name is looked up as a key of PEFT's own tables, never searched for inside a longer string, so
adapters called ``a``, ``lora`` or ``default_0`` can't be mistaken for one another.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer

from .compiled import COMPILED
from .host import Host, find_host
from .methods import method_for
from .parts import SlotTensor


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


@dataclass(frozen=True, eq=False)
class Slot:
    """One adapter name on one model."""

    adapter_name: str
    host: Host
    method: ModuleType
    layers: tuple[SlotLayer, ...]

    @property
    def config(self) -> PeftConfig:
        return self.host.configs[self.adapter_name]

    @property
    def tensors(self) -> list[SlotTensor]:
        """All tensors of the adapter, in the order of the layers."""
        return [tensor for layer in self.layers for tensor in layer.tensors]

    def write_mode(self) -> torch.inference_mode:
        """Inference mode exactly if the adapter was loaded in it, whatever the caller is in.

        Its tensors demand that; and tensors made in inference mode would make any other model untrainable.
        """
        parameters = [tensor.parameter for tensor in self.tensors]
        # prompts lie in no layer; then the model's own weights tell
        return torch.inference_mode(any(each.is_inference() for each in parameters or self.host.carrier.parameters()))

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
    peft_type = host.configs[adapter_name].peft_type
    method = method_for(peft_type)
    found: dict[int, tuple[BaseTunerLayer, list[str]]] = {}
    for path, module in _walk(host.base):
        if isinstance(module, method.layer_class) and method.has_adapter(module, adapter_name):
            found.setdefault(id(module), (module, []))[1].append(path)
    layers = tuple(
        SlotLayer(paths[0], module, tuple(method.tensors_of(module, adapter_name)), tuple(paths[1:]))
        for module, paths in found.values()
    )
    return Slot(adapter_name, host, method, layers)
