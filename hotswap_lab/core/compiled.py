"""What is compiled in a model, and whether its graphs would notice that an adapter was swapped.

A compiled graph reads the adapter's tensors anew at each call, so values written in place are seen. Everything
else (shapes, Python numbers, types of modules) is fixed in the graph and watched by guards. Two settings of the
compiler break that bargain: freezing copies weights into the graph, and dropped guards let it run on with old numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

#: the name under which ``torch.compile`` keeps the module it wraps
COMPILED = "_orig_mod"
#: where compiled functions may lie in a module: ``module.compile()``, a compiled ``forward``, transformers' generate
CALLABLES = ("_compiled_call_impl", "forward", "_compiled_call")
#: who knows settings of the compiler that keep graphs from noticing a swap: see :func:`blind_spot`
BLIND_SPOTS: list[Callable[[list[object], bool], str | None]] = []


def unwrap_compiled(model: torch.nn.Module) -> torch.nn.Module:
    """The module behind ``torch.compile(model)``; any other module as it is.

    ``hasattr(model, "_orig_mod")`` would be wrong: a PeftModel passes unknown attributes on to its base model,
    so a PeftModel over a compiled base would be taken for a compiled PeftModel.
    """
    while (inner := model._modules.get(COMPILED)) is not None:
        model = inner
    return model


def compiled_parts(model: torch.nn.Module, known: Sequence[torch.nn.Module] = ()) -> list[object]:
    """The compiled modules and functions in ``model``, itself included.

    Compiled by ``torch.compile(m)``, by ``m.compile()``, by ``m.forward = torch.compile(m.forward)``, or by the
    ``generate`` of transformers. The module behind ``torch.compile(m)`` doesn't know of it: ask the wrapper.

    >>> len(compiled_parts(torch.nn.Linear(2, 2)))
    0
    >>> len(compiled_parts(torch.compile(torch.nn.Linear(2, 2), backend="eager"))) > 0
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
    parts: list[object] = [module for module in modules if COMPILED in module._modules]
    tables = [module.__dict__ for module in modules]
    for name in CALLABLES:
        found = [table[name] for table in tables if name in table]
        # a bound method passes the attributes of its function on; not so what accelerate puts in place of forward
        parts += [each for each in found if hasattr(each, "_torchdynamo_orig_callable")]
    return parts


def blind_spot(parts: list[object], prepared: bool) -> str | None:
    """Why compiled graphs might go on with the old adapter after a swap, or None.

    Parameters
    ----------
    parts:
        The :func:`compiled_parts` of what the user calls, wrapper included.
    prepared:
        Whether the swap changes nothing but the values of tensors, so that no guard has anything to notice.
    """
    return next((reason for look in BLIND_SPOTS if (reason := look(parts, prepared))), None)
