"""Structure: what a change of tables and wrappers is decided against, beside the adapter's own values."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from peft import PeftConfig

from ..host import Host
from .difference import activity_of
from .wrappers import WRAPPERS


@dataclass(frozen=True, eq=False)
class Structure:
    """The adapters of a model, and what PEFT has put around its modules.

    Kept as the objects themselves, not as their ids: an object that is gone must not be taken for one that came later.
    """

    names: list[str]
    configs: list[PeftConfig]
    wrappers: list[torch.nn.Module]
    active: tuple[list[str], bool]

    @classmethod
    def of(cls, host: Host) -> Structure:
        return cls(list(host.configs), list(host.configs.values()), _wrappers_of(host.base), activity_of(host))

    def is_that_of(self, host: Host) -> bool:
        """Whether nobody has loaded, deleted, activated or unloaded an adapter since."""
        now = Structure.of(host)
        return (
            (self.names, self.active) == (now.names, now.active)
            and _are_same(self.configs, now.configs)
            and _are_same(self.wrappers, now.wrappers)
        )


def _wrappers_of(base: torch.nn.Module) -> list[torch.nn.Module]:
    """All wrappers in a base model, in an order that says where they are. Threads may be computing with it."""
    found: list[torch.nn.Module] = []
    stack, seen = [base], set()
    while stack:
        module = stack.pop()
        if module in seen:
            continue
        seen.add(module)
        if isinstance(module, WRAPPERS):
            found.append(module)
        stack += [child for child in list(module._modules.values()) if child is not None]
    return found


def _are_same(one: list, other: list) -> bool:
    return len(one) == len(other) and all(map(operator.is_, one, other))
