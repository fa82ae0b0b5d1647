"""The order in which a class gives its modules their parameters, whatever has become of it in a live model.

PEFT nests its layers around single parameters of one module by that order, and files name them by the nesting. A
forward through such a layer takes the parameter away and puts it back as the last one.
"""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Iterable

import torch


def in_defined_order(module: torch.nn.Module) -> list[str] | None:
    """The names of a module's own parameters as a fresh module has them; None if the class doesn't show it.

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
    # where a name is in several places, they must agree
    first, last = _sorted(names, named), _sorted(names, named[::-1])[::-1]
    return first if first == last else None


def _sorted(names: Iterable[str], order: tuple[str, ...]) -> list[str]:
    return sorted(names, key=order.index)


@functools.lru_cache(maxsize=1024)
def _names_in_constructors(cls: type) -> tuple[str, ...]:
    """What the constructors of a class assign to attributes, or may register by name, in the order of the code."""
    named: list[str] = []
    for each in reversed(cls.__mro__):
        code = getattr(inspect.unwrap(each.__dict__.get("__init__", object)), "__code__", None)
        if code is not None:
            steps = (step for step in dis.get_instructions(code) if step.opname in ("STORE_ATTR", "LOAD_CONST"))
            named += [step.argval for step in steps if isinstance(step.argval, str)]
    return tuple(named)
