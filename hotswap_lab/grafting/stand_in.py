"""A stand-in for a base model: the same modules around the same memory, but objects of its own, without adapters.

PEFT loads an adapter by rebuilding the model that it is given. Given a stand-in, it builds a fresh load beside the
live model, at the price of the adapter alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from peft.tuners.adaption_prompt.layer import _BaseAdaptedAttention
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.other import TrainableTokensWrapper

from ..compiled import unwrap_compiled

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


def is_embedding(base: torch.nn.Module, module: torch.nn.Module) -> bool:
    """Whether ``module`` is where a transformers model gets its embeddings from, or puts its logits out."""
    getters = (getattr(base, name, None) for name in ("get_input_embeddings", "get_output_embeddings"))
    return any(getter is not None and _call(getter) is module for getter in getters)


def _call(getter) -> torch.nn.Module | None:
    try:
        return getter()
    except (NotImplementedError, AttributeError):
        return None


@dataclass
class StandIn:
    """``model`` is the stand-in; the tables lead from the ids of its parts back to those of the live model."""

    model: torch.nn.Module = None
    live_modules: dict[int, torch.nn.Module] = field(default_factory=dict)
    live_tensors: dict[int, torch.Tensor] = field(default_factory=dict)
    twins: list[torch.Tensor] = field(default_factory=list)
    #: tensors of special classes, which both models share
    shared: list[tuple[torch.nn.Parameter, bool]] = field(default_factory=list)

    def versions(self) -> dict[int, int]:
        """How often each tensor of the base model was written."""
        return {key: 0 if live.is_inference() else live._version for key, live in self.live_tensors.items()}

    def was_changed(self, versions: dict[int, int]) -> bool:
        """Whether PEFT gave a weight of the base model another value while it loaded an adapter."""
        same_memory = all(
            twin is self.live_tensors[id(twin)] or twin.data_ptr() == self.live_tensors[id(twin)].data_ptr()
            for twin in self.twins
        )
        return not same_memory or self.versions() != versions


def make_stand_in(base: torch.nn.Module) -> StandIn:
    """A stand-in for a base model.

    >>> linear = torch.nn.Linear(2, 3)
    >>> stand_in = make_stand_in(linear)
    >>> stand_in.model is linear, stand_in.model.weight is linear.weight
    (False, False)
    >>> stand_in.model.weight.data_ptr() == linear.weight.data_ptr()
    True
    """
    stand_in = StandIn()
    modules: dict[int, torch.nn.Module] = {}
    tensors: dict[int, torch.Tensor] = {}

    def twin_of(module: torch.nn.Module) -> torch.nn.Module:
        module = unwrap_compiled(module)
        while isinstance(module, WRAPPERS):
            module = unwrap_compiled(inside(module))
        if id(module) not in modules:
            twin = module.__class__.__new__(module.__class__)
            modules[id(module)] = twin
            stand_in.live_modules[id(twin)] = module
            # tables of its own, so that hooks and attributes that PEFT sets stay here
            twin.__dict__.update(
                {key: value.copy() if isinstance(value, dict) else value for key, value in module.__dict__.items()}
            )
            twin.__dict__.pop("peft_config", None)
            twin.__dict__["_modules"] = {
                name: None if child is None else twin_of(child) for name, child in module._modules.items()
            }
            twin.__dict__["_parameters"] = {
                name: None if parameter is None else tensor_twin(parameter)
                for name, parameter in module._parameters.items()
            }
            for buffer in module._buffers.values():
                if buffer is not None:
                    stand_in.live_tensors[id(buffer)] = buffer
        return modules[id(module)]

    def tensor_twin(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
        if id(parameter) not in tensors:
            if type(parameter) is torch.nn.Parameter and type(parameter.data) is torch.Tensor:
                twin = torch.nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
            else:
                twin = parameter
                stand_in.shared.append((parameter, parameter.requires_grad))
            tensors[id(parameter)] = twin
            stand_in.live_tensors[id(twin)] = parameter
            stand_in.twins.append(twin)
        return tensors[id(parameter)]

    stand_in.model = twin_of(base)
    return stand_in
