"""A proof by experiment that compiled code computes what a live model does, on the inputs that it was compiled with.

The live model is called once, and each of its compiled modules notes what it is called with and returns. Then the
code of each gets the same. So it takes the time of two forwards. What a comparison of settings can't see, it sees: a
forward that was written anew, an adapter of another kind, layers that are alike in all but what they do.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from .. import compat
from ..core.errors import refused
from .live import copied, kept

Call = tuple[str, Any, Any]


def prove(top: torch.nn.Module, compiled: Mapping[str, Callable[..., Any]], given: Mapping[str, Any]) -> None:
    """Refuse code that computes otherwise than the modules at its paths. The model is as before, its buffers too.

    Outputs, and buffers that are written, are compared by their largest and their mean difference, relative to the
    output: half of the digits of its dtype must agree, of float32 at most. A model that draws random numbers can't be
    compared.
    """
    inference = torch.is_inference_mode_enabled() or any(each.is_inference() for each in top.buffers())
    with torch.inference_mode(inference), torch.no_grad():  # the previous turns gradients on where it is off
        calls = _calls(top, compiled, given)
        for path, (arguments, named), expected in calls:
            module = top.get_submodule(path)
            with kept(module):
                off = _difference((compiled[path](*arguments, **named), [*module.buffers()]), expected)
            if off and not _is_random(calls, _calls(top, compiled, given, seed=1)):
                raise refused("ahead_not_proven", path=path or type(top).__name__, off=off)


def _calls(top: torch.nn.Module, paths: Iterable[str], given: Mapping[str, Any], seed: int | None = None) -> list[Call]:
    """Each call of one of the modules in a forward of the live model: its path, its inputs, and what came of it."""
    calls: list[Call] = []
    begun: list[Any] = []

    def end(path: str, module: torch.nn.Module, _: object, output: Any) -> None:
        calls.append((path, begun.pop(), copied((output, [*module.buffers()]))))

    with kept(top), torch.compiler.set_stance("force_eager"):  # the first removes the hooks
        if seed is not None:
            torch.manual_seed(seed)
        for path in paths:
            module = top.get_submodule(path)
            module.register_forward_pre_hook(lambda _, *given: begun.append(copied(given)), with_kwargs=True)
            module.register_forward_hook(functools.partial(end, path))
        top(**given)
    return calls


def _difference(actual: Any, expected: Any) -> str | None:
    """Describe the first difference that is not rounding, or None."""
    pairs = [compat.tree_flatten(each)[0] for each in (actual, expected)]
    if len(pairs[0]) != len(pairs[1]):
        return "another number of outputs"
    for one, other in zip(*pairs, strict=True):
        if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
            if type(one) is not type(other):
                return f"a {type(one).__name__} where the model has a {type(other).__name__}"
            continue
        if one.shape != other.shape or one.dtype != other.dtype:
            return f"{one.dtype} {list(one.shape)} where the model has {other.dtype} {list(other.shape)}"
        if torch.equal(one, other):
            continue
        exact = not (other.is_floating_point() or other.is_complex())
        # models in float64 compute parts of it in float32
        tolerance = 0.0 if exact else max(torch.finfo(each).eps for each in (other.dtype, torch.float32)) ** 0.5
        # where both are infinite or no number, they agree
        size = other.abs().double()
        off = (one.to(torch.promote_types(one.dtype, torch.float32)) - other).abs().double()
        off[(one == other) | (one.isnan() & other.isnan())] = 0
        size = size[size.isfinite()]
        for measure in (torch.amax, torch.mean) if size.numel() else ():
            if not measure(off) <= tolerance * measure(size):
                return f"off by {measure(off):.3g}, of {measure(size):.3g}"
    return None


def _is_random(calls: list[Call], again: list[Call]) -> bool:
    return any(_difference(one[2], other[2]) for one, other in zip(calls, again, strict=True))
