"""Measurements of a batch in which each row has its own adapter."""

from __future__ import annotations

import itertools

import torch
from peft import PeftModel

from ..core.report import readable_bytes
from ..engine import AdapterPool
from ..watch import pick_backend
from .report import Extra
from .scene import Scene, waiting
from .timing import in_rounds

#: the number of rows and of adapters
ROWS = 8
#: tokens in each row: 1 as while generating, and a short prompt
TOKENS = (1, 32)
NAMES = [str(number) for number in range(ROWS)]


def measure_rows(scene: Scene) -> list[Extra]:
    """Time forward calls with eight adapters in a batch, and assigning another adapter to all eight rows."""
    pool, named = rows_pool(scene), _named(scene)
    pool.assign(NAMES)
    return [*(_forward(scene, pool, named, tokens) for tokens in TOKENS), _assigning(scene, pool)]


def rows_pool(scene: Scene) -> AdapterPool:
    """A pool of eight adapters for as many rows; they are copies of two, each in memory of its own."""
    adapters = {name: scene.folders[number % 2] for number, name in enumerate(NAMES)}
    return AdapterPool(scene.load(), adapters=adapters, target_rank=scene.target_rank, rows=ROWS, progress=False)


def _named(scene: Scene) -> PeftModel:
    """The same adapters in a ``PeftModel``."""
    model = scene.load()
    for number, name in enumerate(NAMES):
        model.load_adapter(scene.folders[number % 2], name, **scene.options)
    return model


def _forward(scene: Scene, pool: AdapterPool, named: PeftModel, tokens: int) -> Extra:
    backend, device = scene.settings.backend or pick_backend(), scene.settings.device
    inputs = scene.make_inputs(ROWS * tokens).view(ROWS, tokens)
    torch.compiler.reset()
    one, rows = (torch.compile(model, backend=backend) for model in (scene.load_prepared(), pool.model))

    @torch.no_grad()
    def call_named() -> torch.Tensor:
        return named(input_ids=inputs, use_cache=False, adapter_names=NAMES).logits

    fresh = [scene.outputs(scene.load(number), inputs) for number in (0, 1)]
    expected = torch.stack([fresh[number % 2][number] for number in range(ROWS)])
    is_right = torch.allclose(scene.outputs(rows, inputs), expected, rtol=0, atol=scene.tolerance)
    runs = {
        "one adapter": lambda: scene.outputs(one, inputs),
        "rows": lambda: scene.outputs(rows, inputs),
        "PEFT adapter_names": call_named,
    }
    timings = in_rounds({name: waiting(run, device) for name, run in runs.items()}, scene.settings.n)
    torch.compiler.reset()
    others = {name: timings["rows"].median / timings[name].median for name in timings if name != "rows"}
    text = (
        f"rows, {ROWS} with {ROWS} adapters, {tokens} tokens each, {backend}{'' if is_right else ', WRONG'}: "
        f"{others['one adapter']:.2f} times as long as one adapter for all, "
        f"{1 / others['PEFT adapter_names']:.2f} times as fast as PEFT's adapter_names (eager): "
        + "; ".join(f"{name} {timing.full}" for name, timing in timings.items())
    )
    state = "right" if is_right else "wrong"
    values = {"way": "rows", "state": state, "tokens": tokens, "ratios": others, "timings": timings}
    return Extra("rows", scene.rank, text, values)


def _assigning(scene: Scene, pool: AdapterPool) -> Extra:
    """Compare assigning the next adapter to every row to copying the same bytes."""
    turns = itertools.cycle([NAMES[number:] + NAMES[:number] for number in range(ROWS)])
    size = ROWS * pool.nbytes // len(pool)
    source = torch.ones(size, dtype=torch.uint8, pin_memory=torch.device(scene.settings.device).type == "cuda")
    target = torch.zeros(size, dtype=torch.uint8, device=scene.settings.device)
    runs = {
        "assign": lambda: pool.assign(next(turns)),
        "memcpy": lambda: target.copy_(source, non_blocking=True),
    }
    timings = in_rounds({name: waiting(run, scene.settings.device) for name, run in runs.items()}, scene.settings.n)
    ratio = timings["assign"].median / timings["memcpy"].median
    text = (
        f"rows, assigning {ROWS} adapters, {readable_bytes(size)}: "
        f"{ratio:.2f} times as long as copying the same bytes: "
        f"{timings['assign'].full}; {timings['memcpy'].full}"
    )
    return Extra("assigning", scene.rank, text, {"nbytes": size, "ratio": ratio, "timings": timings})
