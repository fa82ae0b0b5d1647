"""The one door between what changes a model and whoever computes with it: what decides and writes does so behind it.

It stands open until :mod:`hotswap_lab.threads` puts its turns there. Nothing here knows of threads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import ModuleType

import torch

from .host import Host

#: the module behind the door
turns: ModuleType | None = None


def guard(*bases: torch.nn.Module, computing: bool = False) -> AbstractContextManager[None]:
    """Keeps everybody else out of base models for the length of a block. May be nested.

    Parameters
    ----------
    computing:
        Whether others may go on computing, and only swaps are kept out: what is decided stays true.

    Examples
    --------
    >>> with guard(torch.nn.Linear(2, 2)):
    ...     "decide, and write"
    'decide, and write'
    """
    return contextlib.nullcontext() if turns is None else turns.taken(bases, computing)


def is_shared(base: torch.nn.Module) -> bool:
    """Whether others have computed with a base model, and may be doing so now."""
    return turns is not None and turns.is_shared(base)


def undisturbed(host: Host) -> AbstractContextManager[None]:
    """:func:`guard` where a forward changes for a moment, or for good, what a decision goes by; else nothing."""
    return contextlib.nullcontext() if turns is None else turns.undisturbed(host)


def put_back(action: Callable[[], object], what: str) -> None:
    """What has to be put back waits for its turn however long that takes; ``what`` says what stays if it does not."""
    action() if turns is None else turns.put_back(action, what)
