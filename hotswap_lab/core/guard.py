"""The one door between what changes a model and whoever computes with it: what decides and writes does so behind it.

It stands open until :mod:`hotswap_lab.threads` puts its turns there. Nothing here knows of threads.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from types import ModuleType

import torch

from .host import Host

#: how many seconds to wait at the door at most
patience: ContextVar[float] = ContextVar("hotswap_lab_patience", default=math.inf)
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
    """:func:`guard` where a forward changes for a moment, or for good, what a decision goes by; else nothing.

    Layers around single parameters (``target_parameters``) give the module inside another class while it computes, and
    move its parameters about; OFT with ``coft`` writes to its weights.
    """
    changing = any(
        getattr(config, "target_parameters", None) or getattr(config, "coft", False) for config in host.configs.values()
    )
    return guard(host.base) if changing else contextlib.nullcontext()


def put_back(action: Callable[[], object], what: str) -> None:
    """What has to be put back waits for its turn however long that takes, and on Ctrl-C, unless it comes again.

    ``what`` says in a warning what stays as it is after the second time.
    """
    token = patience.set(math.inf)
    try:
        action()
    except KeyboardInterrupt:
        warnings.warn(
            f"Waiting for threads that compute with the model. Ctrl-C once more ends this, and {what}.", stacklevel=4
        )
        action()
        raise
    finally:
        patience.reset(token)
