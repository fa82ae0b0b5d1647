"""Chapter 03: swapping inside a compiled model, and what makes it compile again."""

from __future__ import annotations

import html
import math
import statistics
import warnings
from collections.abc import Callable, Mapping

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict

from .. import demo
from ..core.compiled import is_compiled
from ..core.errors import HotswapError
from ..core.hotswap import hotswap_adapter, hotswap_adapter_from_state_dict
from ..verify import verify_hotswap
from ..watch import Call, RecompileWatch
from .exercise import Exercise, Result
from .figures import FROZEN, INK, MUTED, NEW, OLD, Canvas, Figure

RECOMPILED = "#c8374a"

#: what a call is drawn as: its name in the legend, its colour
MARKS = {"call": ("a call", NEW), "compile": ("first compile", OLD), "recompile": ("recompile", RECOMPILED)}

# --- the timeline ----------------------------------------------------------------------------------------------------


def timeline(title: str, watches: Mapping[str, RecompileWatch]) -> Figure:
    """The latency of every call that some watches noted, on one logarithmic scale, one panel below the other.

    A new label among the calls of a watch is taken for a swap. First compiles and recompiles differ from other
    calls in colour and in shape.

    >>> with RecompileWatch() as watch:
    ...     _ = watch.call("reverse", sum, [1, 2]), watch.call("sort", sum, [3, 4])
    >>> print(timeline("Latency", {"prepared": watch}))  # doctest: +ELLIPSIS
    Latency. prepared: 2 calls, 1 swap, 0 compiled, 0 recompiles, other calls ... ms in the median.
    """
    left, right, top, panel, gap, legend = 62, 20, 58, 130, 58, 44
    canvas = Canvas(660, top + len(watches) * (panel + gap) - gap + legend)
    canvas.text(330, 26, title, size=15)
    seconds = [call.seconds for watch in watches.values() for call in watch.calls]
    low, high = math.floor(math.log10(min(seconds))), math.ceil(math.log10(max(seconds)))
    high = max(high, low + 1)
    for number, (name, watch) in enumerate(watches.items()):
        y = top + number * (panel + gap)
        _panel(canvas, name, watch, (left, y, canvas.width - left - right, panel), (low, high))
    _legend(canvas, left, canvas.height - 18)
    return canvas.figure(" ".join([f"{title}.", *(f"{name}: {_summary(watch)}." for name, watch in watches.items())]))


def _panel(canvas: Canvas, name: str, watch: RecompileWatch, area: tuple, decades: tuple[int, int]) -> None:
    left, top, width, height = area
    low, high = decades
    canvas.shapes.append(
        f"<text x='{left}' y='{top - 22}' font-size='13' font-weight='bold' fill='{INK}' "
        f"font-family='Helvetica, Arial, sans-serif'>{html.escape(name)}</text>"
    )
    for decade in range(low, high + 1):
        y = top + height * (high - decade) / (high - low)
        _line(canvas, left, y, left + width, y, FROZEN)
        canvas.text(left - 8, y + 4, _readable(10.0**decade), size=11, anchor="end", color=MUTED)
    step = width / len(watch.calls)
    starts = [i for i, call in enumerate(watch.calls) if i == 0 or call.label != watch.calls[i - 1].label]
    for start, stop in zip(starts, [*starts[1:], len(watch.calls)], strict=True):
        x = left + start * step
        if start:
            _line(canvas, x, top - 14, x, top + height, MUTED, dashed=True)
        canvas.text(x + (stop - start) * step / 2, top - 5, watch.calls[start].label, size=11, color=MUTED)
    for number, call in enumerate(watch.calls):
        x = left + (number + 0.5) * step
        y = top + height * (high - math.log10(call.seconds)) / (high - low)
        kind = _kind(call)
        _mark(canvas, x, y, kind)
        if kind != "call":
            canvas.text(x + 11, y + 5, _readable(call.seconds), size=11, anchor="start")


def _legend(canvas: Canvas, x: float, y: float) -> None:
    for kind, (text, _) in MARKS.items():
        _mark(canvas, x + 6, y - 4, kind)
        canvas.text(x + 18, y, text, size=11, anchor="start", color=MUTED)
        x += 110
    _line(canvas, x + 6, y - 12, x + 6, y + 4, MUTED, dashed=True)
    canvas.text(x + 18, y, "swap", size=11, anchor="start", color=MUTED)


def _mark(canvas: Canvas, x: float, y: float, kind: str) -> None:
    style = f"class='{kind}' fill='{MARKS[kind][1]}' stroke='{INK}'"
    if kind == "call":
        shape = f"<circle cx='{x:.1f}' cy='{y:.1f}' r='4' {style}/>"
    elif kind == "compile":
        shape = f"<rect x='{x - 5:.1f}' y='{y - 5:.1f}' width='10' height='10' {style}/>"
    else:
        shape = f"<path d='M{x:.1f} {y - 8:.1f} l8 14 h-16 z' {style}/>"
    canvas.shapes.append(shape)


def _line(canvas: Canvas, x1: float, y1: float, x2: float, y2: float, color: str, *, dashed: bool = False) -> None:
    dash = " stroke-dasharray='3 3'" if dashed else ""
    canvas.shapes.append(f"<line x1='{x1:.1f}' y1='{y1:.1f}' x2='{x2:.1f}' y2='{y2:.1f}' stroke='{color}'{dash}/>")


def _kind(call: Call) -> str:
    if call.recompiles:
        return "recompile"
    return "compile" if call.compilations else "call"


def _readable(seconds: float) -> str:
    if seconds >= 0.9995:
        return f"{seconds:.3g} s"
    return f"{seconds * 1000:.3g} ms" if seconds >= 1e-4 else f"{seconds * 1e6:.3g} µs"


def _summary(watch: RecompileWatch) -> str:
    swaps = sum(call.label != before.label for before, call in zip(watch.calls, watch.calls[1:], strict=False))
    parts = [f"{len(watch.calls)} calls", f"{swaps} swap{'' if swaps == 1 else 's'}", watch.summary]
    parts += [
        f"{call.label} {_readable(call.seconds)} with a {_kind(call)}" for call in watch.calls if call.compilations
    ]
    others = [call.seconds for call in watch.calls if not call.compilations]
    if others:
        parts.append(f"other calls {statistics.median(others) * 1000:.2g} ms in the median")
    return ", ".join(parts)


# --- exercise: which swaps recompile? --------------------------------------------------------------------------------


class _Tiny(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu())


def _config(*, layers: tuple[str, ...] = ("first", "second"), **options: object) -> LoraConfig:
    return LoraConfig(target_modules=list(layers), **options)


OLD_CONFIG = dict(r=4, lora_alpha=8)

#: what is swapped in where ``OLD_CONFIG`` was loaded
SCENARIOS = {
    "r=4 alpha=8": dict(r=4, lora_alpha=8),
    "r=4 alpha=16": dict(r=4, lora_alpha=16),
    "r=8 alpha=16": dict(r=8, lora_alpha=16),
    "r=4 alpha=4 rsLoRA": dict(r=4, lora_alpha=4, use_rslora=True),
    "r=4 alpha=8 dropout=0.1": dict(r=4, lora_alpha=8, lora_dropout=0.1),
    "r=4 alpha=8 on fewer layers": dict(r=4, lora_alpha=8, layers=("first",)),
}


def recompiles(old: LoraConfig, new: LoraConfig) -> int:
    """How often a small compiled model that isn't prepared is compiled again after a swap, by trying it.

    >>> recompiles(_config(r=4, lora_alpha=8), _config(r=4, lora_alpha=16))
    1
    """
    # a graph of an earlier try, of the same code, must not be found here
    torch.compiler.reset()
    model = inject_adapter_in_model(old, _Tiny()).eval()
    tensors = get_peft_model_state_dict(inject_adapter_in_model(new, _Tiny()))
    compiled = torch.compile(model, backend="eager", dynamic=False)
    inputs = torch.ones(2, 8)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it may recompile is the question here
        compiled(inputs)
        hotswap_adapter_from_state_dict(compiled, tensors, "default", new)
        with RecompileWatch() as watch:
            compiled(inputs)
    return watch.recompiles


def _will_recompile(solution: Callable) -> list[Result]:
    results = []
    for what, options in SCENARIOS.items():
        old, new = _config(**OLD_CONFIG), _config(**options)
        results.append(Result(f"to {what}", solution(old, new), recompiles(old, new) > 0))
    return results


will_recompile = Exercise(
    "`old` and `new` are LoraConfigs. A model with the adapter `old` is compiled, not prepared, and in eval mode.\n"
    "Return whether its next call after a swap to `new` compiles again: True or False. About 3 lines.\n"
    "There are no patterns, and `new` has no layer that `old` lacks. The check compiles a small model and swaps;\n"
    "`old` has r=4 and lora_alpha=8 each time.",
    _will_recompile,
)


# --- exercise: make it ready -----------------------------------------------------------------------------------------

LOADED = "double"
FAMILY = ("double", "caesar", "pig_latin", "sort")
SEQUENCE = ("sort", "caesar", "double", "pig_latin", "caesar")


def _make_ready(solution: Callable) -> list[Result]:
    torch.compiler.reset()
    model, _ = demo.load(LOADED)
    inputs = model.get_base_model().dummy_inputs
    compiled = solution(model, [demo.adapter_path(name) for name in FAMILY])
    if not isinstance(compiled, torch.nn.Module) or not is_compiled(compiled):
        return [Result("what you return", type(compiled).__name__, "a compiled model")]
    equal = 0
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the check says it if it recompiles
        compiled(**inputs)
        with RecompileWatch() as watch:
            for name in SEQUENCE:
                try:
                    hotswap_adapter(compiled, demo.adapter_path(name), "default")
                except HotswapError as error:
                    return [Result(f"the swap to {name}", f"refused: {error.refusals[0].found}", "possible")]
                compiled(**inputs)
                equal += bool(verify_hotswap(compiled, demo.adapter_path(name)))
    return [
        Result(f"recompiles in {len(SEQUENCE)} swaps", watch.recompiles, 0),
        Result("swaps that equal a fresh load", equal, len(SEQUENCE)),
    ]


make_ready = Exercise(
    f"`model` is not compiled and has the adapter `{LOADED}`; `family` is a list of folders. Return a compiled model\n"
    'into which any of them can be swapped without a recompile. 2 lines; backend="aot_eager" is quick.',
    _make_ready,
)
