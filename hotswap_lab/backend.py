"""Which backend of ``torch.compile`` works on this machine."""

from __future__ import annotations

import functools
import os
import warnings

import torch

from . import compat


def pick_backend() -> str:
    """A backend for ``torch.compile`` that works on this machine: ``"inductor"``, or else ``"aot_eager"``.

    Inductor needs a C++ compiler on the CPU. Without one, ``aot_eager`` traces and guards the model in the same
    way, so that recompiles can be watched, but runs it as fast as without compiling; a warning says so, once.

    Examples
    --------
    >>> from hotswap_lab import pick_backend
    >>> pick_backend() in ("inductor", "aot_eager")
    True
    """
    reason = _why_not_inductor()
    if reason is None:
        return "inductor"
    # PEFT leaves a C compiler there when it has loaded a BOFT adapter
    named = f" (CXX names {os.environ['CXX']!r}: remove it, or set it to 'g++')" if "CXX" in os.environ else ""
    warnings.warn(
        f"torch.compile can't build code here ({reason}), so backend 'aot_eager' is used: recompiles are counted as "
        f"ever, but nothing gets faster. Install a C++ compiler such as g++ for inductor{named}, and start anew.",
        stacklevel=2,
    )
    return "aot_eager"


@functools.cache
def _why_not_inductor() -> str | None:
    """Compiles something small: only that shows whether the compiler that was found works."""
    if (reason := _try_inductor()) is None:
        return None
    # a build that was cut short stays in the compiler's cache, broken: that is no reason to do without the compiler
    try:
        fresh_cache = compat.fresh_inductor_cache
    except ImportError:
        return reason
    with fresh_cache():
        return reason if _try_inductor() else None


def _try_inductor() -> str | None:
    try:
        torch.compile(lambda x: x + 1, backend="inductor", dynamic=False)(torch.zeros(8))
    except Exception as error:
        cause = error.__cause__ or error
        return (str(cause).strip() or type(cause).__name__).splitlines()[0]
    return None
