"""A stand-in for a base model: the same modules around the same memory, but objects of its own, without adapters.

PEFT loads an adapter by rebuilding the model that it is given. Given a stand-in, it builds a fresh load beside the
live model, at the price of the adapter alone.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass, field

import torch

from ..core.compiled import unwrap_compiled
from ..core.state_view import forget_hooks
from .base_values import ORIGINALS
from .parameter_order import in_defined_order
from .wrappers import WRAPPERS, inside


@dataclass
class StandIn:
    """``model`` is the stand-in; the tables lead from the ids of its parts back to those of the live model."""

    model: torch.nn.Module = None
    live_modules: dict[int, torch.nn.Module] = field(default_factory=dict)
    live_tensors: dict[int, torch.Tensor] = field(default_factory=dict)
    twins: list[torch.Tensor] = field(default_factory=list)
    #: tensors of special classes, which both models share
    shared: list[tuple[torch.nn.Parameter, bool]] = field(default_factory=list)
    #: ids of modules that may have had their parameters in another order before the live model computed
    unordered: set[int] = field(default_factory=set)

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
        module, moves_parameters = unwrap_compiled(module), False
        while isinstance(module, WRAPPERS):
            moves_parameters |= "parameter_name" in module.__dict__
            module = unwrap_compiled(inside(module))
        if id(module) not in modules:
            twin = module.__class__.__new__(module.__class__)
            modules[id(module)] = twin
            stand_in.live_modules[id(twin)] = module
            # tables of its own, so that hooks and attributes that PEFT sets stay here
            twin.__dict__.update({key: _own(value) for key, value in module.__dict__.items() if not _is_ours(key)})
            twin.__dict__.pop("peft_config", None)
            forget_hooks(twin)
            twin.__dict__["_modules"] = {
                name: None if child is None else twin_of(child) for name, child in module._modules.items()
            }
            order = in_defined_order(module)
            if order is None and moves_parameters:
                stand_in.unordered.add(id(twin))
            twin.__dict__["_parameters"] = {
                name: None if module._parameters[name] is None else tensor_twin(module._parameters[name])
                for name in dict.fromkeys([*(order or ()), *module._parameters])
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


def _is_ours(attribute: str) -> bool:
    """Whether this package notes something there about adapters of the live model."""
    return attribute.startswith("hotswap_") and attribute != ORIGINALS


def _own(value: object) -> object:
    """A table of its own, so that what PEFT puts into it stays with the stand-in."""
    if type(value) in (dict, OrderedDict):
        return value.copy()  # as copy.copy would, several times faster
    return copy.copy(value) if isinstance(value, dict) else value
