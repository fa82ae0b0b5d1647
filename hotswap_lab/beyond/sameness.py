"""Sameness: whether two values, tensors or modules are alike, so that a live one can stay."""

from __future__ import annotations

import torch


def are_equal(first: object, second: object) -> bool:
    """Whether two plain values are the same. Objects are if they are of one class and have the same attributes."""
    if first is second:
        return True
    if type(first) is not type(second):
        return isinstance(first, (int, float)) and isinstance(second, (int, float)) and first == second
    if isinstance(first, torch.Tensor):
        return have_same_bits(first, second)
    if isinstance(first, torch.nn.Module):
        return False
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(are_equal(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(are_equal, first, second))
    if hasattr(first, "__dict__") and type(first).__eq__ is object.__eq__:
        return are_equal(vars(first), vars(second))
    return bool(first == second)


def have_same_form(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    """Whether two modules differ at most in the values and shapes of their tensors and in plain attributes."""
    classes = [getattr(type(each), "hotswap_original", type(each)) for each in (first, second)]
    if classes[0] is not classes[1]:
        return False
    for table in ("_parameters", "_buffers", "_modules"):
        one, other = first.__dict__[table], second.__dict__[table]
        if one.keys() != other.keys() or any((one[key] is None) != (other[key] is None) for key in one):
            return False
    return all(
        have_same_form(first._modules[name], child) for name, child in second._modules.items() if child is not None
    )


def have_same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    return torch.equal(first.detach().to(second.device), second.detach())
