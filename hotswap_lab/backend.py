"""What has to be known of the compiler: which backend works here, and when a graph would not notice a swap."""

from __future__ import annotations

import functools
import os
import warnings
from typing import Any

import torch

from .core.compiled import BLIND_SPOTS


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
        from torch._inductor.utils import fresh_inductor_cache  # not public, so it may be gone one day
    except ImportError:
        return reason
    with fresh_inductor_cache():
        return reason if _try_inductor() else None


def _try_inductor() -> str | None:
    try:
        torch.compile(lambda x: x + 1, backend="inductor", dynamic=False)(torch.zeros(8))
    except Exception as error:
        cause = error.__cause__ or error
        return (str(cause).strip() or type(cause).__name__).splitlines()[0]
    return None


# ---- would a graph notice?


def blind_spot(parts: list[object], prepared: bool) -> str | None:
    """Freezing copies weights into the graph, and dropped guards let it run on with old numbers."""
    if not parts and not prepared:
        return None
    inductor: Any = torch._inductor
    if inductor.config.freezing:
        return "torch._inductor.config.freezing is on, which copies the weights into the compiled graph"
    contexts = [_context_of(part) for part in parts]
    if any((getattr(context, "compiler_config", None) or {}).get("freezing") for context in contexts):
        return "the model was compiled with freezing, which copies the weights into the compiled graph"
    if prepared:
        return None
    if getattr(torch._dynamo.eval_frame._stance, "skip_guard_eval_unsafe", False):
        return "torch.compiler.set_stance(skip_guard_eval_unsafe=True) is on, so guards are not evaluated"
    if any(getattr(getattr(context, "_hooks", None), "guard_filter_fn", None) is not None for context in contexts):
        return "the model was compiled with a guard_filter_fn, so guards may be missing"
    return None


def _context_of(part: Any) -> object | None:
    """The compile context of a module or function. A function keeps it nowhere but in its closure."""
    if isinstance(part, torch.nn.Module):
        return part.__dict__.get("dynamo_ctx")
    function = getattr(part, "__func__", part)
    for cell in function.__closure__ or ():
        try:
            content = cell.cell_contents
        except ValueError:
            continue
        if isinstance(content, torch._dynamo.eval_frame._TorchDynamoContext):
            return content
    return None


BLIND_SPOTS.append(blind_spot)
