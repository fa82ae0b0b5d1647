"""Wrappers: what PEFT puts around modules of a base model, and where it keeps what belongs to an adapter there.

A tuner layer, an auxiliary wrapper (a saved module, trained tokens) or an adapted attention. Whatever is an adapter's
own lies in tables under the adapter's name: ``ModuleDict``, ``ParameterDict``, ``BufferDict`` or plain ``dict``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping

import torch
from peft.tuners.adaption_prompt.layer import _BaseAdaptedAttention
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.other import TrainableTokensWrapper

from ..core.compiled import unwrap_compiled
from ..core.prepared import OFF_ATTRIBUTE, PADDED_ATTRIBUTE

#: what PEFT puts around a module of the base model
WRAPPERS = (BaseTunerLayer, AuxiliaryTrainingWrapper, _BaseAdaptedAttention)


def holder_of_inside(wrapper: torch.nn.Module) -> tuple[torch.nn.Module, str]:
    """The module that holds what a wrapper is around, and under which name."""
    if isinstance(wrapper, TrainableTokensWrapper):
        return wrapper.token_adapter, "base_layer"
    if isinstance(wrapper, AuxiliaryTrainingWrapper):
        return wrapper, "original_module"
    if isinstance(wrapper, BaseTunerLayer):
        return wrapper, "base_layer"
    return wrapper, "model"


def inside(wrapper: torch.nn.Module) -> torch.nn.Module:
    """The module that a wrapper is around."""
    holder, name = holder_of_inside(wrapper)
    return holder._modules[name]


def wrappers_in(base: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """All wrappers in a base model, with their paths."""
    for path, module in base.named_modules():
        if isinstance(module, WRAPPERS):
            yield path, module


def peel(module: torch.nn.Module) -> tuple[list[torch.nn.Module], torch.nn.Module]:
    """The wrappers around a module of the base model, outermost first, and that module."""
    wrappers = []
    module = unwrap_compiled(module)
    while isinstance(module, WRAPPERS):
        wrappers.append(module)
        module = unwrap_compiled(inside(module))
    return wrappers, module


def core_of(wrapper: torch.nn.Module) -> torch.nn.Module:
    return peel(wrapper)[1]


def own_modules(wrapper: torch.nn.Module):
    """The modules of a wrapper without what it is around."""
    stack = [wrapper]
    while stack:
        module = stack.pop()
        yield module
        skip = holder_of_inside(module)[1] if isinstance(module, WRAPPERS) else None
        stack += [child for name, child in module._modules.items() if child is not None and name != skip]


def direct_tensors(module: torch.nn.Module) -> list[torch.Tensor]:
    return [tensor for tensor in (*module._parameters.values(), *module._buffers.values()) if tensor is not None]


def are_alike(live: torch.nn.Module, donor: torch.nn.Module) -> bool:
    live_class = getattr(type(live), "hotswap_original", type(live))
    parameter_name = "parameter_name"  # several ParamWrappers may be around one module, each for another parameter
    return live_class is type(donor) and live.__dict__.get(parameter_name) == donor.__dict__.get(parameter_name)


# ---- tables

#: what a wrapper has whether or not the adapter in question is on it
NOT_COMPARED = {
    # of every module
    *torch.nn.Module().__dict__,
    *("forward", "_hf_hook", "_old_forward"),
    # the state that a model is in: which adapters are there, active, enabled, merged
    *("_adapters", "_active_adapter", "active_adapter", "_disable_adapters", "_adapters_disabled", "_enabled"),
    *("merged_adapters", "_cached_adapters", "modules_to_save"),
    # configs, which are written as a whole, and what depends on the base model alone
    *("peft_config", "_peft_config", "peft_type", "config", "device", "special_peft_forward_args"),
    *("base_model_prepare_inputs_for_generation", "kwargs"),
    # relations to other modules
    *("_tied_adapter", "hook_handles", "_boundary_hook_handles", "_boundary_layers"),
    *("targeted_module_names", "targeted_parameter_names"),
    # what lives for one forward
    "_caches",
    # marks of this package
    *("hotswap_original", OFF_ATTRIBUTE, PADDED_ATTRIBUTE),
}


def is_table(module: object) -> bool:
    return isinstance(module, (torch.nn.ModuleDict, torch.nn.ParameterDict)) or type(module).__name__ == "BufferDict"


def entries_of(table: torch.nn.Module) -> MutableMapping:
    """Where a table of PyTorch or PEFT keeps its entries."""
    if isinstance(table, torch.nn.ModuleDict):
        return table._modules
    return table._parameters if isinstance(table, torch.nn.ParameterDict) else table._buffers


def keys_of(table: torch.nn.Module) -> dict | None:
    return table._keys if isinstance(table, torch.nn.ParameterDict) else None


def tables_of(wrapper: torch.nn.Module):
    holder = holder_of_inside(wrapper)[0]
    for module in dict.fromkeys((wrapper, holder)):
        yield from module.__dict__.items()
        yield from module._modules.items()


def entries_under(wrapper: torch.nn.Module, adapter_name: str) -> Iterator[tuple[str, Mapping | torch.nn.Module]]:
    """The tables of a wrapper that have an entry under the adapter's name, with their attributes."""
    skipped = NOT_COMPARED - {"modules_to_save"}
    for attribute, table in tables_of(wrapper):
        is_one = isinstance(table, MutableMapping) or (isinstance(table, torch.nn.Module) and is_table(table))
        if is_one and attribute not in skipped and adapter_name in table:
            yield attribute, table


def has_adapter(wrapper: torch.nn.Module, adapter_name: str) -> bool:
    """Whether a wrapper has anything under the adapter's name."""
    if not isinstance(wrapper, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
        return True
    return any(True for _ in entries_under(wrapper, adapter_name))


def rank_of(wrapper: torch.nn.Module, adapter_name: str) -> int | None:
    for attribute, table in tables_of(wrapper):
        if attribute == "r" or attribute.endswith("_r"):
            rank = table.get(adapter_name) if isinstance(table, MutableMapping) else None
            if isinstance(rank, int) and not isinstance(rank, bool):
                return rank
    return None


def scaling_of(wrapper: torch.nn.Module, adapter_name: str) -> float | None:
    table = getattr(wrapper, "scaling", None)
    value = table.get(adapter_name) if isinstance(table, MutableMapping) else None
    return value if isinstance(value, (int, float)) else None
