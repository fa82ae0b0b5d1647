"""Wrappers: the modules that PEFT puts around those of a base model, and their tables of adapters.

A wrapper is a tuner layer, an auxiliary wrapper (a saved module, trained tokens) or an adapted attention. It stores
an adapter in tables under its name: ``ModuleDict``, ``ParameterDict``, ``BufferDict`` or plain ``dict``.

Tests: ``tests/beyond/test_difference.py``.
"""

import contextlib
from collections.abc import Iterator, MutableMapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.other import TrainableTokensWrapper

from .. import compat
from .compiled import unwrap_compiled
from .tensors import are_interchangeable

#: the methods by which PEFT asks a model for its embeddings
EMBEDDINGS = ("get_input_embeddings", "get_output_embeddings")


def embeddings_of(base: torch.nn.Module) -> list[torch.nn.Module]:
    """The input and output embeddings of a transformers model."""
    embeddings = []
    for name in EMBEDDINGS:
        # not every model has these
        with contextlib.suppress(NotImplementedError, AttributeError, TypeError):
            embeddings.append(getattr(base, name)())
    return embeddings


def is_wrapper(module: object) -> bool:
    """Whether PEFT has put this module around one of the base model."""
    return isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) or compat.is_a(module, "AdaptedAttention")


def holder_of_inside(wrapper: torch.nn.Module) -> tuple[torch.nn.Module, str]:
    """The module that holds the wrapped module, and the name under which it does."""
    if isinstance(wrapper, TrainableTokensWrapper):
        return wrapper.token_adapter, "base_layer"
    if isinstance(wrapper, AuxiliaryTrainingWrapper):
        return wrapper, "original_module"
    return wrapper, "base_layer" if isinstance(wrapper, BaseTunerLayer) else "model"


def inside(wrapper: torch.nn.Module) -> torch.nn.Module:
    """The wrapped module."""
    holder, name = holder_of_inside(wrapper)
    return holder.get_submodule(name)


def peel(module: torch.nn.Module) -> tuple[list[torch.nn.Module], torch.nn.Module]:
    """The wrappers around a module of the base model, outermost first, and that module."""
    wrappers, module = [], unwrap_compiled(module)
    while is_wrapper(module):
        wrappers.append(module)
        module = unwrap_compiled(inside(module))
    return wrappers, module


def own_modules(wrapper: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The modules of a wrapper without the wrapped module."""
    stack = [wrapper]
    while stack:
        module = stack.pop()
        yield module
        skip = holder_of_inside(module)[1] if is_wrapper(module) else None
        stack += [child for name, child in module._modules.items() if child is not None and name != skip]


# ---- tables

#: attributes with plain values or tables that belong to no adapter, so a swap leaves them as they are
NOT_COMPARED = {
    # mode and tables of every module; the entries of these tables are compared one by one
    *torch.nn.Module().__dict__,
    # which adapters compute, as the user has set it
    *("active_adapter", "_active_adapter", "_adapters_disabled", "_disable_adapters"),
    # configs, which a plan puts into the model itself
    *("peft_config", "_peft_config"),
    # the arguments of a layer's constructor by name, which may be the name of an adapter, too
    "kwargs",
    # state that the last forward of a Shadow adapter has left; the next one begins by resetting it
    *("_deferred_shadow_seed", "_seed_shadow_state", "_shadow_past_out", "_should_pack_shadow_cache"),
}


def is_table(value: object) -> bool:
    """Whether a module is a table with an entry for each adapter."""
    return isinstance(value, (torch.nn.ModuleDict, torch.nn.ParameterDict)) or compat.is_a(value, "BufferDict")


#: a dict, or one of PyTorch's and PEFT's modules that are used like one
Table = Any


def stores_of(table: Table) -> tuple[MutableMapping[str, Any], ...]:
    """The dicts in which a table of Python, PyTorch or PEFT stores its entries; ParameterDict has two."""
    if isinstance(table, torch.nn.ModuleDict):
        return (table._modules,)
    if isinstance(table, torch.nn.ParameterDict):
        return table._parameters, table._keys
    return (table._buffers,) if compat.is_a(table, "BufferDict") else (table,)


def tables_of(wrapper: torch.nn.Module) -> Iterator[tuple[str, Table]]:
    """All tables of a wrapper, with the names of their attributes."""
    for module in dict.fromkeys((wrapper, holder_of_inside(wrapper)[0])):
        for attribute, value in (*module.__dict__.items(), *module._modules.items()):
            if (isinstance(value, MutableMapping) or is_table(value)) and attribute not in NOT_COMPARED:
                yield attribute, value


def entries_under(wrapper: torch.nn.Module, adapter_name: str) -> Iterator[tuple[str, Table]]:
    """The tables of a wrapper that have an entry under the adapter's name, with the names of their attributes."""
    return ((attribute, table) for attribute, table in tables_of(wrapper) if adapter_name in table)


def has_adapter(wrapper: torch.nn.Module, adapter_name: str) -> bool:
    """Whether a wrapper has anything under the adapter's name."""
    if not isinstance(wrapper, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
        return True
    return any(True for _ in entries_under(wrapper, adapter_name))


def rank_of(wrapper: torch.nn.Module, adapter_name: str) -> int | None:
    """The rank of an adapter on a wrapper of any method; None if it has none.

    >>> from hotswap_lab import demo, resolve_slot
    >>> rank_of(resolve_slot(demo.load("reverse")[0], "default").layers[0].module, "default")
    8
    """
    entries = entries_under(wrapper, adapter_name)
    ranks = (table[adapter_name] for attribute, table in entries if attribute == "r" or attribute.endswith("_r"))
    return next((rank for rank in ranks if type(rank) is int), None)


def scaling_of(wrapper: torch.nn.Module, adapter_name: str) -> float | None:
    value = dict(entries_under(wrapper, adapter_name)).get("scaling", {}).get(adapter_name)
    return value if isinstance(value, (int, float)) else None


# ---- whether a live wrapper can stay


def are_alike(live: torch.nn.Module, fresh: torch.nn.Module) -> bool:
    """Whether two wrappers are of one kind, around the same parameter if around a single one, and both tied or not."""
    # several ParamWrappers may be around one module, each for another parameter
    is_around_same = live.__dict__.get("parameter_name") == fresh.__dict__.get("parameter_name")
    return _class_of(live) is type(fresh) and is_around_same and is_tied(live) == is_tied(fresh)


def _class_of(entry: object) -> type:
    """The class of an object, which PEFT gave it, before it was prepared."""
    return getattr(type(entry), "hotswap_original", type(entry))


def is_tied(wrapper: torch.nn.Module) -> bool:
    """Whether trained tokens have no tables of their own: they read, and don't save, those of another module."""
    return getattr(holder_of_inside(wrapper)[0], "tied_adapter", None) is not None


def are_equal(first: Any, second: Any) -> bool:
    """Whether two plain values are the same. Objects are if they are of one class and have the same attributes.

    >>> are_equal([1, {"a": 2.0}], [1, {"a": 2}]), are_equal((1,), (1, 2)), are_equal(1, 2.0)
    (True, False, False)
    >>> one = torch.ones(())
    >>> are_equal({"a": 1}, {"a": 2}), are_equal({}, {"a": 1}), are_equal(one, 1), are_equal(1, one)
    (False, False, False, False)
    """
    if first is second:
        return True
    if _class_of(first) is not _class_of(second):
        return isinstance(first, (int, float)) and isinstance(second, (int, float)) and first == second
    if isinstance(first, torch.Tensor):
        return are_interchangeable(first, second)
    if isinstance(first, torch.nn.Module):
        return False
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(are_equal(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(are_equal, first, second))
    return are_equal(vars(first), vars(second)) if hasattr(first, "__dict__") else bool(first == second)


def have_same_form(first: Any, second: Any) -> bool:
    """Whether two modules differ at most in the values and shapes of their tensors and in plain attributes."""
    if _class_of(first) is not _class_of(second):
        return False
    for table in ("_parameters", "_buffers", "_modules"):
        one, other = first.__dict__[table], second.__dict__[table]
        if one.keys() != other.keys() or any((one[key] is None) != (other[key] is None) for key in one):
            return False
    children = [name for name, child in first._modules.items() if child is not None]
    return all(have_same_form(first._modules[name], second._modules[name]) for name in children)
