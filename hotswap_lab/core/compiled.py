"""Finds the compiled code in a model, and checks whether its graphs would notice that an adapter was swapped.

A compiled graph reads the adapter's tensors anew at each call, so it sees values that are written in place. Everything
else (shapes, Python numbers, types of modules) is fixed in the graph and checked by guards. Two compiler settings break
this: freezing copies weights into the graph, and without its guards a graph goes on with old numbers.

Tests: ``tests/core/test_compiled_swaps.py``.
"""

import contextlib
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from .. import compat

#: the name under which ``torch.compile`` stores the module that it wraps
COMPILED = "_orig_mod"
#: attributes of a module that may hold compiled code: ``module.compile()``, ``forward``, transformers' ``generate``
CALLABLES = ("_compiled_call_impl", "forward", "_compiled_call")


def unwrap_compiled(model: torch.nn.Module) -> torch.nn.Module:
    """The module inside ``torch.compile(model)``; any other module as it is.

    ``hasattr(model, "_orig_mod")`` would be wrong: a PeftModel passes unknown attributes on to its base model,
    so a PeftModel over a compiled base would be taken for a compiled PeftModel.
    """
    while (inner := model._modules.get(COMPILED)) is not None:
        model = inner
    return model


def compiled_in(model: torch.nn.Module, known: Sequence[torch.nn.Module] = ()) -> list[object]:
    """The compiled modules and functions in ``model``, itself included.

    They are compiled by ``torch.compile(m)``, ``m.compile()``, ``m.forward = torch.compile(m.forward)``, or the
    ``generate`` of transformers. The module inside ``torch.compile(m)`` shows no trace of it, so pass the wrapper.

    >>> len(compiled_in(torch.nn.Linear(2, 2)))
    0
    >>> len(compiled_in(torch.compile(torch.nn.Linear(2, 2), backend="eager"))) > 0
    True

    A plain loop, because every swap does this and models have thousands of modules. ``known`` is the result of an
    earlier walk: a module, then all modules below it. Of a tuner layer, only the base layer is searched: the adapters'
    own small modules are the majority of all modules.
    """
    modules: list[torch.nn.Module] = []
    stack, seen = [model], set()
    while stack:
        module = stack.pop()
        if module in seen:
            continue
        seen.add(module)
        children = module.__dict__["_modules"]
        if known and module is known[0]:
            modules += known
        else:
            modules.append(module)
            below = [children.get("base_layer")] if isinstance(module, BaseTunerLayer) else children.values()
            stack += [child for child in below if child is not None]
    compiled: list[object] = [module for module in modules if COMPILED in module._modules]
    tables = [module.__dict__ for module in modules]
    for name in CALLABLES:
        callables = [table[name] for table in tables if name in table]
        # hasattr finds the attribute on bound methods, too: they pass on the attributes of their functions
        compiled += [function for function in callables if hasattr(function, "_torchdynamo_orig_callable")]
    return compiled


#: the modules that were being called while something was compiled with freezing on; None for a function, which may use
#: any model
frozen: list[weakref.ref[torch.nn.Module] | None] = []
FREEZING = "which copies the weights into the compiled graph"


class Listeners(list[Callable[[Any], None]]):
    """What is called when a compilation begins. ``torch.compiler.reset()`` drops graphs and listeners; ours stay."""

    def clear(self) -> None:
        frozen.clear()
        self[:] = [
            function for function in self if (getattr(function, "__module__", None) or "").startswith("hotswap_lab.")
        ]


def listen(listener: Callable[[Any], None]) -> None:
    """Have ``listener`` called when a compilation begins, until it is removed from PyTorch's list."""
    handler = compat.dynamo_callbacks
    if not isinstance(handler.start_callbacks, Listeners):
        handler.start_callbacks = Listeners(handler.start_callbacks)
    if listener not in handler.start_callbacks:
        handler.register_start_callback(listener)


def _note_freezing(_: object) -> None:
    if not compat.inductor_config.freezing:
        return
    frame: Any = sys._getframe()
    modules: list[torch.nn.Module] = []
    while frame is not None:
        if isinstance(called := frame.f_locals.get("self"), torch.nn.Module):
            modules.append(called)
        frame = frame.f_back
    frozen.extend(map(weakref.ref, modules) if modules else [None])


def frozen_in(base: torch.nn.Module) -> str | None:
    """The reason why code that was compiled with freezing on may keep an old adapter of this base; None if none was."""
    with contextlib.suppress(ImportError):
        listen(_note_freezing)
    modules = [module for reference in frozen if reference and (module := reference()) is not None]
    if None in frozen or any(base in module.modules() or module in base.modules() for module in modules):
        setting = "torch._inductor.config.freezing was on"
        return f"it was compiled while {setting}, {FREEZING}; torch.compiler.reset() drops such graphs"
    return None


def blind_spot(base: torch.nn.Module, compiled: list[object], prepared: bool) -> str | None:
    """The reason why compiled graphs might keep using the old adapter after a swap; None if there is none.

    Freezing copies weights into the graph, and without its guards a graph runs on with old numbers.

    Parameters
    ----------
    base:
        The model, or its base.
    compiled:
        The :func:`compiled_in` of the object that the user calls, wrapper included.
    prepared:
        Whether the swap changes only the values of tensors, so that no guard is needed.
    """
    if reason := frozen_in(base):
        return reason
    if not compiled and not prepared and not guards_are_skipped():
        return None
    # this imports the compiler, if nothing else has
    if compat.inductor_config.freezing:
        return f"torch._inductor.config.freezing is on, {FREEZING}"
    contexts = list(map(_compile_context_of, compiled))
    if any((getattr(context, "compiler_config", None) or {}).get("freezing") for context in contexts):
        return f"the model was compiled with freezing, {FREEZING}"
    if prepared:
        return None
    if getattr(compat.eval_frame._stance, "skip_guard_eval_unsafe", False):
        return "torch.compiler.set_stance(skip_guard_eval_unsafe=True) is on, so guards are not evaluated"
    for context in contexts:
        # torch 2.8 stores the hooks on the callback of the context
        hooks = getattr(context, "_hooks", None) or getattr(getattr(context, "callback", None), "hooks", None)
        if getattr(hooks, "guard_filter_fn", None) is not None:
            return "the model was compiled with a guard_filter_fn, so guards may be missing"
    return None


def guards_are_skipped() -> bool:
    """Whether compiled code runs without a look at its guards: a setting of the process, not of a model."""
    try:  # turning it on imports the compiler, which takes seconds
        return "torch._dynamo" in sys.modules and getattr(compat.eval_frame._stance, "skip_guard_eval_unsafe", False)
    except ImportError:  # a swap of plain LoRA needs no private name
        return False


def _compile_context_of(compiled: Any) -> object | None:
    """Return the compile context of a compiled module or function; None if it has none."""
    if isinstance(compiled, torch.nn.Module):
        return compiled.__dict__.get("dynamo_ctx")
    function = compiled
    while function is not None:
        if (context := _context_in_closure(function)) is not None:
            return context
        # a hook of accelerate puts another function around a compiled forward
        function = getattr(function, "__wrapped__", None)
    return None


def _context_in_closure(function: Any) -> object | None:
    """Return the compile context that a compiled function stores in its closure; None if there is none."""
    plain_function = getattr(function, "__func__", function)
    for cell in getattr(plain_function, "__closure__", None) or ():
        with contextlib.suppress(ValueError):  # the cell is empty
            if compat.is_a(cell.cell_contents, "DynamoContext"):
                return cell.cell_contents
    return None


if "torch._dynamo" in sys.modules:  # PEFT has imported it; if not, importing it would take seconds
    listen(_note_freezing)
