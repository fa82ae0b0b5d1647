"""LoRA layers for modules that have none yet, built next to the model and attached only at commit.

PEFT injects adapters into a whole model and changes it on the way. Here it gets a stand-in that has only the wanted
modules. The result is finished LoRA layers around the model's own base layers, while the model itself stays
untouched.

Tests: ``tests/core/test_swap.py`` and ``tests/beyond/test_neighbours.py``.
"""

import contextlib
import copy
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from peft import inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer

from .errors import listing, refused
from .host import Config
from .journal import Journal
from .slot import Slot, SlotLayer

#: the attributes of a base model by which PEFT chooses the class of a LoRA layer
CHOOSES_CLASS = {"is_loaded_in_8bit", "is_loaded_in_4bit", "hqq_quantized", "quantization_method", "hf_quantizer"}
#: the fields of a config that are about other modules than those that get layers here
ELSEWHERE = ("layers_to_transform", "layers_pattern", "exclude_modules", "modules_to_save", "trainable_token_indices")


def adaptable(base: torch.nn.Module, key: str) -> str | None:
    """The path of the module in ``base`` that a LoRA key belongs to, or None.

    >>> adaptable(torch.nn.ModuleDict({"lin": torch.nn.Linear(2, 2)}), "lin.lora_A.weight")
    'lin'
    """
    path, separator, _ = key.rpartition(".lora_")
    with contextlib.suppress(AttributeError):  # there is no such module
        base.get_submodule(path)
        return path if separator else None
    return None


def build_added_layers(slot: Slot, config: Config, ranks: Mapping[str, int]) -> list[SlotLayer]:
    """Build LoRA layers for the slot's adapter name and ``config``, without attaching them; ``ranks`` are by path.

    Raises
    ------
    HotswapError
        If PEFT can't put LoRA there, or no plain LoRA.
    """
    try:
        layers = _build(slot, config, ranks)
    except Exception as error:
        raise refused("layers_not_addable", error=error, paths=listing(ranks, 3)) from error
    for layer in layers:
        if reason := slot.method.obstacle(layer.module, slot.adapter_name, layer.tensors):
            raise refused("layer_not_plain", path=layer.path, reason=reason)
    return layers


def _build(slot: Slot, config: Config, ranks: Mapping[str, int]) -> list[SlotLayer]:
    base, config, base_layers = slot.host.base, copy.deepcopy(config), [_base_layer(slot, path) for path in ranks]
    twins = torch.nn.Sequential(*map(_frozen_twin, base_layers))
    twins.__dict__.update({name: base.__dict__[name] for name in CHOOSES_CLASS & base.__dict__.keys()})
    config.target_modules, config.init_lora_weights = r"\d+", True
    config.rank_pattern = {str(number): rank for number, rank in enumerate(ranks.values())}
    for field in ELSEWHERE:
        setattr(config, field, None)
    with slot.write_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # on the meta device, so that none of the user's random numbers are drawn
        inject_adapter_in_model(config, twins, slot.adapter_name, low_cpu_mem_usage=True)
        return [_finished(slot, *parts) for parts in zip(ranks, twins, base_layers, strict=True)]


def _base_layer(slot: Slot, path: str) -> torch.nn.Module:
    module = slot.host.base.get_submodule(path)
    if isinstance(module, BaseTunerLayer) and not isinstance(module, LoraLayer):
        raise TypeError(f"{path} is already adapted by another PEFT method, {type(module).__name__}")
    base_layer = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    if any(True for _ in base_layer.children()):
        # PEFT would put layers inside it, and so change the model itself
        raise TypeError(f"{path} is a {type(base_layer).__name__}, which has modules of its own")
    return base_layer


def _frozen_twin(module: torch.nn.Module) -> torch.nn.Module:
    """Return a second module around the same memory, because PEFT freezes the parameters of the module that it gets."""
    twin = module.__class__.__new__(module.__class__)
    twin.__dict__.update(module.__dict__)
    twin._parameters = dict(module._parameters)
    for name, parameter in module._parameters.items():
        # parameters quantized to integers can't be trained anyway
        if parameter is not None and parameter.is_floating_point():
            twin._parameters[name] = torch.nn.Parameter(parameter.detach(), requires_grad=False)
    return twin


def _finished(slot: Slot, path: str, module: Any, base_layer: torch.nn.Module) -> SlotLayer:
    """The layer around its base layer, with zeros for tensors, and the dtype and ``requires_grad`` of the slot's."""
    module._modules["base_layer"] = base_layer
    like, tensors = slot.tensors[0].parameter, tuple(slot.method.tensors_of(module, slot.adapter_name) or ())
    device = next((parameter.device for parameter in base_layer.parameters()), like.device)
    for tensor in tensors:
        fresh = torch.zeros(tensor.parameter.shape, dtype=like.dtype, device=device)
        tensor.owner._parameters[tensor.name] = torch.nn.Parameter(fresh, requires_grad=like.requires_grad)
    return SlotLayer(path, module, tensors)


def _join(present: Any, added: Any, name: str, journal: Journal) -> None:
    """Add the new layer's entries under the adapter's name to the tables of a layer."""
    # a variant of LoRA adds its tables to the lists of the layer that it is on, so both layers' lists are joined
    for listed in ("adapter_layer_names", "other_param_names"):
        names = dict.fromkeys((*getattr(present, listed), *getattr(added, listed)))
        journal.set_item(present.__dict__, listed, tuple(names))
    tables: list[tuple[str, Any]] = [*added.__dict__.items(), *added._modules.items()]
    for attribute, table in tables:
        if attribute.startswith("_") or not hasattr(table, "keys") or name not in table:
            continue
        if isinstance(table[name], torch.nn.Module):
            table[name].train(present.training)
        journal.set_item(getattr(present, attribute), name, table[name])


def attach(slot: Slot, layer: SlotLayer, journal: Journal) -> Any:
    """Put a new layer into the model, in the state of the slot's other layers.

    Returns the layer that now has the adapter: an existing layer of other adapters, or the new one.
    """
    name, added, sibling = slot.adapter_name, layer.module, slot.layers[0].module
    parent_path, _, child_name = layer.path.rpartition(".")
    parent = slot.host.base.get_submodule(parent_path)
    present: Any = parent._modules[child_name]
    if isinstance(present, BaseTunerLayer):
        _join(present, added, name, journal)
    else:
        added._active_adapter = copy.copy(sibling._active_adapter)
        added._disable_adapters = sibling._disable_adapters
        added.train(present.training)
        journal.set_item(parent._modules, child_name, added)
    names = getattr(slot.host.tuner, "targeted_module_names", None)
    if names is not None and layer.path not in names:
        journal.set_attribute(slot.host.tuner, "targeted_module_names", [*names, layer.path])
    return present if isinstance(present, BaseTunerLayer) else added
