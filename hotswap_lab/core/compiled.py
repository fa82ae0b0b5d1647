"""What is compiled in a model, and whether its graphs would notice that an adapter was swapped.

A compiled graph reads the adapter's tensors anew at each call, so values written in place are seen. Everything
else (shapes, Python numbers, types of modules) is fixed in the graph and watched by guards. Two settings of the
compiler break that bargain: freezing copies weights into the graph, and dropped guards let it run on with old numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from .. import compat

#: the name under which ``torch.compile`` keeps the module it wraps
COMPILED = "_orig_mod"
#: where compiled functions may lie in a module: ``module.compile()``, a compiled ``forward``, transformers' generate
CALLABLES = ("_compiled_call_impl", "forward", "_compiled_call")


def unwrap_compiled(model: torch.nn.Module) -> torch.nn.Module:
    """The module behind ``torch.compile(model)``; any other module as it is.

    ``hasattr(model, "_orig_mod")`` would be wrong: a PeftModel passes unknown attributes on to its base model,
    so a PeftModel over a compiled base would be taken for a compiled PeftModel.
    """
    while (inner := model._modules.get(COMPILED)) is not None:
        model = inner
    return model


def compiled_in(model: torch.nn.Module, known: Sequence[torch.nn.Module] = ()) -> list[object]:
    """The compiled modules and functions in ``model``, itself included.

    Compiled by ``torch.compile(m)``, by ``m.compile()``, by ``m.forward = torch.compile(m.forward)``, or by the
    ``generate`` of transformers. The module behind ``torch.compile(m)`` doesn't know of it: ask the wrapper.

    >>> len(compiled_in(torch.nn.Linear(2, 2)))
    0
    >>> len(compiled_in(torch.compile(torch.nn.Linear(2, 2), backend="eager"))) > 0
    True

    Written as a plain loop: every swap does this, and models have thousands of modules. What has been walked already
    is ``known``: a module, and after it all that is below. Of a tuner layer, only the layer it is around is looked
    into: the adapters' own small modules are most of all modules.
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
        found = [table[name] for table in tables if name in table]
        # a bound method passes the attributes of its function on; not so what accelerate puts in place of forward
        compiled += [each for each in found if hasattr(each, "_torchdynamo_orig_callable")]
    return compiled


def blind_spot(compiled: list[object], prepared: bool) -> str | None:
    """Why compiled graphs might go on with the old adapter after a swap, or None.

    Freezing copies weights into the graph, and without its guards a graph runs on with old numbers.

    Parameters
    ----------
    compiled:
        The :func:`compiled_in` of what the user calls, wrapper included.
    prepared:
        Whether the swap changes nothing but the values of tensors, so that no guard has anything to notice.
    """
    if not compiled and not prepared:
        return None
    # imports the compiler, unless it is imported already
    if compat.inductor_config.freezing:
        return "torch._inductor.config.freezing is on, which copies the weights into the compiled graph"
    contexts = [_context_of(each) for each in compiled]
    if any((getattr(context, "compiler_config", None) or {}).get("freezing") for context in contexts):
        return "the model was compiled with freezing, which copies the weights into the compiled graph"
    if prepared:
        return None
    if getattr(compat.eval_frame._stance, "skip_guard_eval_unsafe", False):
        return "torch.compiler.set_stance(skip_guard_eval_unsafe=True) is on, so guards are not evaluated"
    if any(getattr(getattr(context, "_hooks", None), "guard_filter_fn", None) is not None for context in contexts):
        return "the model was compiled with a guard_filter_fn, so guards may be missing"
    return None


def _context_of(each: Any) -> object | None:
    """The compile context of a module or function. A function keeps it nowhere but in its closure."""
    if isinstance(each, torch.nn.Module):
        return each.__dict__.get("dynamo_ctx")
    function = getattr(each, "__func__", each)
    for cell in function.__closure__ or ():
        try:
            content = cell.cell_contents
        except ValueError:
            continue
        if compat.is_a(content, "DynamoContext"):
            return content
    return None
