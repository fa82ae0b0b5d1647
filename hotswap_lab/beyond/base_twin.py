"""Twins of base models: new modules around the same memory, without adapters.

PEFT loads an adapter by changing the model that it is given. Given a twin, it builds a fresh load next to the live
model, which takes no more memory than the adapter.

Tests: ``tests/beyond/test_in_place.py`` and ``tests/beyond/test_lora_kinds.py``.
"""

import copy
import dis
import functools
import inspect
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch

from ..core.compiled import unwrap_compiled
from ..core.state_dict_hooks import forget_hooks
from ..core.wrappers import peel

#: the ``id()`` of a module, tensor or table, of the live model and of the fresh load (whose base model is a twin)
LiveId: TypeAlias = int
FreshId: TypeAlias = int


@dataclass
class BaseTwin:
    """The twin of a base model, and the live counterparts of its modules and tensors."""

    model: torch.nn.Module = None
    #: the live counterpart of each module, parameter and buffer of the twin
    live_of: dict[FreshId, Any] = field(default_factory=dict)
    #: the twin of each live module; with `parameters`, it keeps the objects alive whose ids are in `live_of`
    twin_of: dict[LiveId, torch.nn.Module] = field(default_factory=dict)
    parameters: list[torch.nn.Parameter] = field(default_factory=list)
    #: parameters of special classes, which both models share, and their ``requires_grad``
    shared: list[tuple[torch.nn.Parameter, bool]] = field(default_factory=list)
    #: whether the live model's forward may have changed the order of a module's parameters
    is_unordered: bool = False


def make_base_twin(base: torch.nn.Module) -> BaseTwin:
    """Make the twin of a base model.

    >>> linear = torch.nn.Linear(2, 3)
    >>> twin = make_base_twin(linear)
    >>> twin.model is linear, twin.model.weight is linear.weight
    (False, False)
    >>> twin.model.weight.data_ptr() == linear.weight.data_ptr()
    True
    """
    made = BaseTwin()
    twin_of_tensor: dict[LiveId, torch.nn.Parameter] = {}

    def module_twin(module: torch.nn.Module) -> torch.nn.Module:
        wrappers, module = peel(module)
        if id(module) not in made.twin_of:
            twin = module.__class__.__new__(module.__class__)
            made.twin_of[id(module)] = twin
            made.live_of[id(twin)] = module
            # with copies of the tables, hooks and attributes that PEFT sets stay in the twin
            twin.__dict__.update({key: _own(value) for key, value in module.__dict__.items()})
            twin.__dict__.pop("peft_config", None)
            forget_hooks(twin)
            twin.__dict__["_modules"] = {
                name: None if child is None else module_twin(child) for name, child in module._modules.items()
            }
            order = in_defined_order(module)
            if order is None and any("parameter_name" in wrapper.__dict__ for wrapper in wrappers):
                made.is_unordered = True
            twin.__dict__["_parameters"] = {
                name: None if module._parameters[name] is None else tensor_twin(module._parameters[name])
                for name in dict.fromkeys([*(order or ()), *module._parameters])
            }
            made.live_of |= {id(buffer): buffer for buffer in module._buffers.values()}
        return made.twin_of[id(module)]

    def tensor_twin(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
        if id(parameter) not in twin_of_tensor:
            if type(parameter) is torch.nn.Parameter:
                twin = torch.nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
                made.parameters.append(twin)
            else:
                twin = parameter
                made.shared.append((parameter, parameter.requires_grad))
            twin_of_tensor[id(parameter)] = twin
            made.live_of[id(twin)] = parameter
        return twin_of_tensor[id(parameter)]

    made.model = module_twin(unwrap_compiled(base))
    return made


def base_tensors(base: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All weights and buffers of a base model by their names, without those of PEFT's wrappers."""
    tensors, paths = {}, [("", peel(base)[1])]
    while paths:
        path, module = paths.pop()
        own = (*module._parameters.items(), *module._buffers.items())
        tensors |= {f"{path}{name}": tensor for name, tensor in own if tensor is not None}
        paths += [(f"{path}{name}.", peel(child)[1]) for name, child in module._modules.items() if child is not None]
    return tensors


def _own(value: object) -> object:
    """Copy a table, so that entries that PEFT adds stay in the twin."""
    if type(value) in (dict, OrderedDict):
        return value.copy()  # the same as copy.copy, and several times faster
    return copy.copy(value) if isinstance(value, dict) else value


def in_defined_order(module: torch.nn.Module) -> list[str] | None:
    """The names of a module's own parameters in a fresh module's order; None if the class doesn't show it.

    PEFT wraps the parameters of one module in this order, one layer inside the other, and a file's keys depend on the
    nesting. A forward through such a layer removes the parameter and puts it back as the last one.

    >>> linear = torch.nn.Linear(2, 2)
    >>> linear.weight = linear._parameters.pop("weight")
    >>> list(linear._parameters), in_defined_order(linear)
    (['bias', 'weight'], ['weight', 'bias'])
    """
    names = [name for name, parameter in module._parameters.items() if parameter is not None]
    if len(names) < 2:
        return names
    named = _names_in_constructors(type(module))
    if not set(names) <= set(named):
        return None
    # a name may occur several times: the order of first and of last occurrences must agree
    first, last = sorted(names, key=named.index), sorted(names, key=named[::-1].index)[::-1]
    return first if first == last else None


@functools.lru_cache(maxsize=1024)
def _names_in_constructors(cls: type) -> tuple[str, ...]:
    """Names of attributes that a class's constructors assign, and their string constants, in the order of the code."""
    named: list[str] = []
    for ancestor in reversed(cls.__mro__):
        code = getattr(inspect.unwrap(ancestor.__dict__.get("__init__", object)), "__code__", None)
        steps = () if code is None else dis.get_instructions(code)
        named += [step.argval for step in steps if step.opname in ("STORE_ATTR", "LOAD_CONST")]
    return tuple(name for name in named if isinstance(name, str))
