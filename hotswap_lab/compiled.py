"""What is compiled in a model, and whether its graphs would notice that an adapter was swapped.

A compiled graph reads the adapter's tensors anew at each call, so values written in place are seen. Everything
else (shapes, Python numbers, types of modules) is fixed in the graph and watched by guards. Two settings of the
compiler break that bargain: freezing copies weights into the graph, and dropped guards let it run on with old numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch

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


def _compiled_functions(module: torch.nn.Module) -> Iterator[Callable]:
    for name in CALLABLES:
        function = module.__dict__.get(name)
        # a bound method passes the attributes of its function on; not so what accelerate puts in place of forward
        if function is not None and hasattr(function, "_torchdynamo_orig_callable"):
            yield function


def is_compiled(model: torch.nn.Module) -> bool:
    """Whether ``model`` or anything inside it was compiled.

    By ``torch.compile(m)``, by ``m.compile()``, by ``m.forward = torch.compile(m.forward)``, or by the
    ``generate`` of transformers. The module behind ``torch.compile(m)`` doesn't know of it: ask the wrapper.

    >>> is_compiled(torch.nn.Linear(2, 2)), is_compiled(torch.compile(torch.nn.Linear(2, 2), backend="eager"))
    (False, True)
    """
    return any(
        COMPILED in module._modules or any(True for _ in _compiled_functions(module)) for module in model.modules()
    )


def blind_spot(model: torch.nn.Module, prepared: bool) -> str | None:
    """Why graphs of ``model`` might go on with the old adapter after a swap, or None.

    Parameters
    ----------
    model:
        What the user calls, wrapper included.
    prepared:
        Whether the swap changes nothing but the values of tensors, so that no guard has anything to notice.
    """
    if not is_compiled(model) and not prepared:
        return None
    if torch._inductor.config.freezing:
        return "torch._inductor.config.freezing is on, which copies the weights into the compiled graph"
    if any(config.get("freezing") for config in _compiler_configs(model)):
        return "the model was compiled with freezing, which copies the weights into the compiled graph"
    if prepared:
        return None
    if getattr(torch._dynamo.eval_frame._stance, "skip_guard_eval_unsafe", False):
        return "torch.compiler.set_stance(skip_guard_eval_unsafe=True) is on, so guards are not evaluated"
    if any(getattr(hooks, "guard_filter_fn", None) is not None for hooks in _hooks(model)):
        return "the model was compiled with a guard_filter_fn, so guards may be missing"
    return None


def _compiler_configs(model: torch.nn.Module) -> Iterator[Mapping]:
    for module in model.modules():
        config = getattr(module.__dict__.get("dynamo_ctx"), "compiler_config", None)
        if config is not None:
            yield config
        for function in _compiled_functions(module):
            config = getattr(function, "get_compiler_config", lambda: None)()
            if config is not None:
                yield config


def _hooks(model: torch.nn.Module) -> Iterator[object]:
    for module in model.modules():
        contexts = [module.__dict__.get("dynamo_ctx")]
        contexts += [_context_of(function) for function in _compiled_functions(module)]
        for context in contexts:
            if context is not None:
                yield getattr(context, "_hooks", None)


def _context_of(function: Callable) -> object | None:
    """The compile context of a compiled function: it is kept nowhere but in the function's closure."""
    function = getattr(function, "__func__", function)
    for cell in function.__closure__ or ():
        try:
            content = cell.cell_contents
        except ValueError:
            continue
        if isinstance(content, torch._dynamo.eval_frame._TorchDynamoContext):
            return content
    return None
