"""Chapter 03: swapping inside a compiled model, and what makes it compile again."""

from __future__ import annotations

import itertools
import math
import statistics
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict

from .. import demo
from ..core.compiled import compiled_in
from ..engine import hotswap_adapter, hotswap_adapter_from_state_dict
from ..figures import Canvas, Figure
from ..figures.palette import BASE, INK, MUTED, WHITE, WRONG
from ..verify import verify_hotswap
from ..watch import Call, RecompileWatch, readable
from .exercise import Exercise

#: what a call is drawn as: its name in the legend, its color, and a path around the point where it is
MARKS = {
    "call": ("a call", BASE, "m-4 0 a4 4 0 1 0 8 0 a4 4 0 1 0 -8 0 z"),
    "compile": ("first compile", WHITE, "m-5 -5 h10 v10 h-10 z"),
    "recompile": ("recompile", WRONG, "m0 -8 l8 14 h-16 z"),
}

# --- the timeline ----------------------------------------------------------------------------------------------------


def timeline(title: str, watches: Mapping[str, RecompileWatch]) -> Figure:
    """The latency of every call that some watches noted, on one logarithmic scale, one panel below the other.

    A new label among the calls of a watch is taken for a swap. First compiles and recompiles differ from other
    calls in color and in shape.

    >>> with RecompileWatch() as watch:
    ...     _ = watch.call("reverse", sum, [1, 2]), watch.call("sort", sum, [3, 4])
    >>> print(timeline("Latency", {"prepared": watch}))  # doctest: +ELLIPSIS
    Latency. prepared: 2 calls, 1 swap, 0 compiled, 0 recompiles, other calls ... ms in the median.
    """
    left, width, top, height, gap = 62, 578, 58, 130, 58
    canvas = Canvas(660, top + len(watches) * (height + gap) - gap + 44)
    canvas.text(330, 26, title, size=15)
    exponents = [math.log10(call.seconds) for watch in watches.values() for call in watch.calls]
    low, high = math.floor(min(exponents)), max(math.ceil(max(exponents)), math.floor(min(exponents)) + 1)
    decade = height / (high - low)
    for name, watch in watches.items():
        canvas.text(left, top - 22, name, anchor="start")
        for exponent in range(low, high + 1):
            y = top + (high - exponent) * decade
            canvas.line(left, y, left + width, y, BASE)
            canvas.text(left - 8, y + 4, readable(10.0**exponent), size=11, anchor="end", color=MUTED)
        x, step = left, width / len(watch.calls)
        for label, group in itertools.groupby(watch.calls, lambda call: call.label):
            if x > left:
                canvas.line(x, top - 14, x, top + height, MUTED, dashed=True)
            start = x
            for call in group:
                y, kind = top + (high - math.log10(call.seconds)) * decade, _kind(call)
                _mark(canvas, x + step / 2, y, kind)
                if kind != "call":
                    canvas.text(x + step / 2 + 11, y + 5, readable(call.seconds), size=11, anchor="start")
                x += step
            canvas.text((start + x) / 2, top - 5, label, size=11, color=MUTED)
        top += height + gap
    for number, (kind, (text, _, _)) in enumerate(MARKS.items()):
        _mark(canvas, left + 6 + number * 110, canvas.height - 22, kind)
        canvas.text(left + 18 + number * 110, canvas.height - 18, text, size=11, anchor="start", color=MUTED)
    canvas.text(left + 348, canvas.height - 18, "dashed line: a swap", size=11, anchor="start", color=MUTED)
    return canvas.figure(" ".join([f"{title}.", *(f"{name}: {_summary(watch)}." for name, watch in watches.items())]))


def _mark(canvas: Canvas, x: float, y: float, kind: str) -> None:
    _, color, path = MARKS[kind]
    canvas.shapes.append(f"<path class='{kind}' d='M{x:.1f} {y:.1f} {path}' fill='{color}' stroke='{INK}'/>")


def _kind(call: Call) -> str:
    if call.recompiles:
        return "recompile"
    return "compile" if call.compilations else "call"


def _summary(watch: RecompileWatch) -> str:
    swaps = sum(call.label != before.label for before, call in itertools.pairwise(watch.calls))
    parts = [f"{len(watch.calls)} calls", f"{swaps} swap{'' if swaps == 1 else 's'}", watch.summary]
    parts += [
        f"{call.label} {readable(call.seconds)} with a {_kind(call)}" for call in watch.calls if call.compilations
    ]
    others = [call.seconds for call in watch.calls if not call.compilations]
    if others:
        parts.append(f"other calls {statistics.median(others) * 1000:.2g} ms in the median")
    return ", ".join(parts)


# --- exercises -------------------------------------------------------------------------------------------------------

OLD_CONFIG = dict(r=4, lora_alpha=8)

#: what is swapped in where ``OLD_CONFIG`` was loaded
SCENARIOS: dict[str, dict[str, Any]] = {
    "r=4 alpha=8": dict(r=4, lora_alpha=8),
    "r=4 alpha=16": dict(r=4, lora_alpha=16),
    "r=8 alpha=16": dict(r=8, lora_alpha=16),
    "r=4 alpha=4 rsLoRA": dict(r=4, lora_alpha=4, use_rslora=True),
    "r=4 alpha=8 dropout=0.1": dict(r=4, lora_alpha=8, lora_dropout=0.1),
    "r=4 alpha=8 on fewer layers": dict(r=4, lora_alpha=8, target_modules=["0"]),
}


def _config(options: Mapping[str, object]) -> LoraConfig:
    return LoraConfig(**{"target_modules": ["0", "2"], **options})


def recompiles(old: LoraConfig, new: LoraConfig) -> int:
    """How often a small compiled model that isn't prepared is compiled again after a swap, by trying it.

    >>> recompiles(_config(dict(r=4, lora_alpha=8)), _config(dict(r=4, lora_alpha=16)))
    1
    """
    # a graph of an earlier try, of the same code, must not be found here
    torch.compiler.reset()
    model, other = (
        inject_adapter_in_model(
            config, torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8))
        )
        for config in (old, new)
    )
    compiled = torch.compile(model.eval(), backend="eager", dynamic=False)
    inputs = torch.ones(2, 8)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it may recompile is the question here
        compiled(inputs)
        hotswap_adapter_from_state_dict(compiled, get_peft_model_state_dict(other), "default", new)
        with RecompileWatch() as watch:
            compiled(inputs)
    return watch.recompiles


@Exercise
def will_recompile(solution):
    """`old` and `new` are LoraConfigs. A model with the adapter `old` is compiled, not prepared, and in eval mode.
    Return whether its next call after a swap to `new` compiles again: True or False. About 3 lines.
    There are no patterns, and `new` has no layer that `old` lacks. The check compiles a small model and swaps;
    `old` has r=4 and lora_alpha=8 each time.
    """
    for what, options in SCENARIOS.items():
        old, new = _config(OLD_CONFIG), _config(options)
        yield f"to {what}", solution(old, new), recompiles(old, new) > 0


FAMILY = ("double", "caesar", "pig_latin", "sort")
SEQUENCE = ("sort", "caesar", "double", "pig_latin", "caesar")


@Exercise
def make_ready(solution):
    """`model` is not compiled and has the adapter `double`; `family` is a list of folders. Return a compiled model
    into which any of them can be swapped without a recompile. 2 lines; backend="eager" is quick.
    """
    torch.compiler.reset()
    model, _ = demo.load("double")
    inputs = model.get_base_model().dummy_inputs
    compiled = solution(model, [demo.adapter_path(name) for name in FAMILY])
    if not isinstance(compiled, torch.nn.Module) or not compiled_in(compiled):
        yield "what you return", type(compiled).__name__, "a compiled model"
        return
    equal = 0
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the check says it if it recompiles
        compiled(**inputs)
        with RecompileWatch() as watch:
            for name in SEQUENCE:
                hotswap_adapter(compiled, demo.adapter_path(name), "default")
                compiled(**inputs)
                equal += bool(verify_hotswap(compiled, demo.adapter_path(name), base=demo.load_base))
    yield f"recompiles in {len(SEQUENCE)} swaps", watch.recompiles, 0
    yield "swaps that equal a fresh load", equal, len(SEQUENCE)
