"""LoRA layers for modules that have none yet, built beside the model and attached only at commit.

PEFT injects into a whole model and changes it while it goes. Here it gets a stand-in: a tree of empty
modules with nothing but the wanted layers at their paths. What comes out are finished LoRA layers around
the model's own base layers, while the model itself has not been touched.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from peft import inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer

from .guard import guard
from .host import Config
from .interrupts import interrupts_held
from .journal import Journal
from .slot import Slot, SlotLayer

#: what PEFT looks up on a base model to choose the class of a LoRA layer
CHOOSES_CLASS = {"is_loaded_in_8bit", "is_loaded_in_4bit", "hqq_quantized", "quantization_method", "hf_quantizer"}


def adaptable(base: torch.nn.Module, key: str) -> str | None:
    """The path of the module in ``base`` that a LoRA key belongs to, or None.

    >>> adaptable(torch.nn.ModuleDict({"lin": torch.nn.Linear(2, 2)}), "lin.lora_A.weight")
    'lin'
    """
    path, separator, _ = key.rpartition(".lora_")
    if not separator:
        return None
    try:
        base.get_submodule(path)
    except AttributeError:
        return None
    return path


def build_shadow_layers(slot: Slot, config: Config, paths: list[str]) -> list[SlotLayer]:
    """New LoRA layers for ``paths``, with the slot's adapter name and ``config``'s settings, not attached."""
    stand_in = torch.nn.Module()
    for attribute in CHOOSES_CLASS & slot.host.base.__dict__.keys():
        setattr(stand_in, attribute, slot.host.base.__dict__[attribute])
    requires_grad: list[tuple[torch.nn.Parameter, bool]] = []
    for path in paths:
        module = slot.host.base.get_submodule(path)
        if isinstance(module, BaseTunerLayer) and not isinstance(module, slot.method.layer_class):
            raise TypeError(f"{path} is already adapted by another PEFT method, {type(module).__name__}")
        base_layer = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if any(True for _ in base_layer.children()):
            # PEFT would put layers inside it, and thereby change the model itself
            raise TypeError(f"{path} is a {type(base_layer).__name__}, which has modules of its own")
        requires_grad += [(parameter, parameter.requires_grad) for parameter in base_layer.parameters()]
        _plant(stand_in, path, base_layer)
    config = copy.deepcopy(config)
    config.target_modules = list(paths)
    config.layers_to_transform = config.layers_pattern = config.exclude_modules = None
    # PEFT sets `requires_grad` of the base layers' own parameters on its way, which no other thread must compute with
    with guard(slot.host.base), interrupts_held():
        try:
            with slot.write_mode(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                # without memory, and so without random numbers that somebody else would have drawn
                inject_adapter_in_model(config, stand_in, slot.adapter_name, low_cpu_mem_usage=True)
        finally:
            for parameter, value in requires_grad:
                parameter.requires_grad_(value)
    return [_with_memory(slot, path, stand_in.get_submodule(path)) for path in paths]


def _with_memory(slot: Slot, path: str, module: Any) -> SlotLayer:
    like = slot.tensors[0].parameter
    device = next((each.device for each in module.get_base_layer().parameters()), like.device)
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None and parameter.is_meta and owner is not module.get_base_layer():
                with slot.write_mode():
                    fresh = torch.zeros(parameter.shape, dtype=like.dtype, device=device)
                    owner._parameters[name] = torch.nn.Parameter(fresh, requires_grad=like.requires_grad)
    return SlotLayer(path, module, tuple(slot.method.tensors_of(module, slot.adapter_name)))


def _plant(root: torch.nn.Module, path: str, module: torch.nn.Module) -> None:
    *parents, name = path.split(".")
    for parent in parents:
        if parent not in root._modules:
            root.add_module(parent, torch.nn.Module())
        root = root.get_submodule(parent)
    root.add_module(name, module)


def _join(present: Any, shadow: Any, name: str, journal: Journal) -> None:
    """Gives a layer all that the shadow has under the adapter's name."""
    # a variant of LoRA lists its tables on the layer that it is on; which of them there are, it keeps in no list
    for listed in ("adapter_layer_names", "other_param_names"):
        names = tuple(dict.fromkeys((*getattr(present, listed), *getattr(shadow, listed))))
        if names != tuple(getattr(present, listed)):
            journal.set_item(present.__dict__, listed, names)
    tables: list[tuple[str, Any]] = [*shadow.__dict__.items(), *shadow._modules.items()]
    for attribute, table in tables:
        if attribute.startswith("_") or not hasattr(table, "keys") or name not in table:
            continue
        if isinstance(table[name], torch.nn.Module):
            table[name].train(present.training)
        journal.set_item(getattr(present, attribute), name, table[name])


def attach(slot: Slot, layer: SlotLayer, journal: Journal) -> Any:
    """Puts a shadow layer into the model, in the state of the slot's other layers.

    Returns the layer that now has the adapter: one that other adapters are on already, or the shadow.
    """
    name, shadow, sibling = slot.adapter_name, layer.module, slot.layers[0].module
    parent_path, _, child_name = layer.path.rpartition(".")
    parent = slot.host.base.get_submodule(parent_path)
    present: Any = parent._modules[child_name]
    if isinstance(present, BaseTunerLayer):
        _join(present, shadow, name, journal)
    else:
        shadow._active_adapter = copy.copy(sibling._active_adapter)
        shadow._disable_adapters = sibling._disable_adapters
        in_base_layer = set(present.modules())
        for module in shadow.modules():
            if module not in in_base_layer:
                module.training = present.training
        journal.set_item(parent._modules, child_name, shadow)
    if slot.host.tuner is not None and hasattr(slot.host.tuner, "targeted_module_names"):
        names = slot.host.tuner.targeted_module_names
        if layer.path not in names:
            journal.set_attribute(slot.host.tuner, "targeted_module_names", [*names, layer.path])
    return present if isinstance(present, BaseTunerLayer) else shadow
