"""Compares compiled code with the live model, on the inputs that it was compiled with.

The live model is called once, and the inputs and outputs of each compiled module are recorded. Then the module's code
is called with these inputs. That takes the time of two forward passes. It detects differences that a comparison of
settings can't: a forward that was rewritten, a different kind of adapter, layers that differ only in their code.

Tests: ``tests/ahead/test_ahead_checks.py``.
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
    """Refuse code whose outputs differ from those of the modules at its paths. Restores the model and its buffers.

    Outputs and written buffers are compared by their largest and their mean difference, relative to the output. Half of
    the digits of its dtype must agree, or of float32's in float64. A model that draws random numbers can't be compared.
    """
    inference = torch.is_inference_mode_enabled() or any(buffer.is_inference() for buffer in top.buffers())
    with torch.inference_mode(inference), torch.no_grad():  # inference_mode(False) turns gradients on
        calls = _calls(top, compiled, given)
        for path, (arguments, named), expected in calls:
            module = top.get_submodule(path)
            with kept(module):
                off = _difference((compiled[path](*arguments, **named), [*module.buffers()]), expected)
            if off and not _is_random(calls, _calls(top, compiled, given, seed=1)):
                raise refused("ahead_not_proven", path=path or type(top).__name__, off=off)


def _calls(top: torch.nn.Module, paths: Iterable[str], given: Mapping[str, Any], seed: int | None = None) -> list[Call]:
    """Record the calls of these modules in a forward of the live model: path, inputs, and outputs with buffers."""
    calls: list[Call] = []
    inputs: list[Any] = []

    def record(path: str, module: torch.nn.Module, _: object, output: Any) -> None:
        calls.append((path, inputs.pop(), copied((output, [*module.buffers()]))))

    with kept(top), torch.compiler.set_stance("force_eager"):  # `kept` removes the hooks afterwards
        if seed is not None:
            torch.manual_seed(seed)
        for path in paths:
            module = top.get_submodule(path)
            module.register_forward_pre_hook(lambda _, *given: inputs.append(copied(given)), with_kwargs=True)
            module.register_forward_hook(functools.partial(record, path))
        top(**given)
    return calls


def _difference(actual: Any, expected: Any) -> str | None:
    """Describe the first difference that is not rounding, or None."""
    actual, expected = (compat.tree_flatten(outputs)[0] for outputs in (actual, expected))
    if len(actual) != len(expected):
        return "a different number of outputs"
    for one, other in zip(actual, expected, strict=True):
        if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
            if type(one) is not type(other):
                return f"a {type(one).__name__} where the model has a {type(other).__name__}"
            continue
        if one.shape != other.shape or one.dtype != other.dtype:
            return f"{one.dtype} {list(one.shape)} where the model has {other.dtype} {list(other.shape)}"
        if torch.equal(one, other):
            continue
        exact = not (other.is_floating_point() or other.is_complex())
        # float64 models may compute parts in float32
        tolerance = 0.0 if exact else max(torch.finfo(dtype).eps for dtype in (other.dtype, torch.float32)) ** 0.5
        # equal infinities and NaNs count as equal
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
