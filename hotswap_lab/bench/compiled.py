"""Compiled models: the first output after a swap, and a forward call in prepared memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from peft.utils.hotswap import hotswap_adapter as peft_hotswap

from ..backend import pick_backend
from ..core.hotswap import hotswap_adapter
from ..watch import RecompileWatch
from .rounds import Way, in_rounds
from .rows import Extra
from .scene import Scene
from .times import described, values_of
from .timing import measure
from .ways import peft_load

#: how often a recompile is timed: it takes seconds to minutes
RECOMPILES = 3


def measure_first_outputs(scene: Scene) -> list[Extra]:
    """From asking for another adapter to its first output, in a compiled model.

    One contender after the other, since each begins with nothing compiled. Inductor's cache on disk is left as it is
    set up: where it is on, a recompile finds code for an equal graph there and takes less time.
    """
    backend = scene.settings.backend or pick_backend()
    pool, prepared, by_peft = scene.pool(), scene.load_prepared(), scene.load_prepared_by_peft()
    loaded, device = scene.load(), scene.settings.device
    swaps: dict[str, tuple[torch.nn.Module, Callable[[int], object]]] = {
        "hotswap_lab, pool": (pool.model, lambda number: pool.swap(str(number))),
        "hotswap_lab, disk, prepared": (
            prepared,
            lambda number: hotswap_adapter(prepared, scene.folders[number], "default"),
        ),
        "PEFT hotswap, disk, prepared by PEFT": (
            by_peft,
            lambda number: peft_hotswap(by_peft, scene.folders[number], adapter_name="default", torch_device=device),
        ),
        "PEFT load + set + delete": (loaded, peft_load(scene, loaded)),
    }
    return [_first_output(scene, name, model, swap, backend) for name, (model, swap) in swaps.items()]


def _first_output(
    scene: Scene, name: str, model: torch.nn.Module, swap: Callable[[int], object], backend: str
) -> Extra:
    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend)
    outputs = scene.outputs(compiled)

    def swap_and_call(number: int) -> None:
        nonlocal outputs
        swap(number)
        outputs = scene.outputs(compiled)

    way = Way(name, swap_and_call, lambda number: scene.matches(outputs, number))
    # by default PyTorch gives up after 8 graphs and runs the model uncompiled from then on
    with torch._dynamo.config.patch(recompile_limit=64):
        with RecompileWatch() as watch:
            state, note = way.check()
        n = min(scene.settings.n, RECOMPILES) if watch.recompiles else scene.settings.n
        with RecompileWatch() as watch:
            timing = None if note else measure(way.alternating(scene.settings.device), n=n)
    torch.compiler.reset()
    values = {"way": name, "backend": backend, "state": state, "note": note, **values_of(timing)}
    text = f"compiled ({backend}), swap and first output: {name}: "
    if timing is None:
        return Extra("first output", scene.rank, f"{text}refused: {note}", values)
    values |= {"recompiles": watch.recompiles, "calls": n + 1}
    text += f"{described(timing)}, {watch.recompiles} recompiles in {n + 1} calls"
    return Extra("first output", scene.rank, text + (", wrong" if state == "wrong" else ""), values)


def measure_forward(scene: Scene, compiled: bool) -> Extra:
    """A forward call with the adapter in prepared memory, against one with ordinary parameters."""
    models = {"ordinary": scene.load(), "prepared": scene.load_prepared()}
    kind = "eager"
    if compiled:
        torch.compiler.reset()
        kind = scene.settings.backend or pick_backend()
        models = {name: torch.compile(model, backend=kind) for name, model in models.items()}
    inputs = scene.make_inputs(scene.settings.tokens)
    wait = torch.device(scene.settings.device).type != "cpu"

    def call(model: torch.nn.Module) -> None:
        scene.outputs(model, inputs)
        if wait:
            torch.accelerator.synchronize()

    for model in models.values():
        call(model)
    timings = in_rounds({name: lambda model=model: call(model) for name, model in models.items()}, scene.settings.n)
    if compiled:
        torch.compiler.reset()
    ratio = timings["prepared"].median / timings["ordinary"].median
    minima = timings["prepared"].minimum / timings["ordinary"].minimum
    values = {name: values_of(timing) for name, timing in timings.items()}
    return Extra(
        "forward",
        scene.rank,
        f"forward, {kind}, {scene.settings.tokens} tokens, prepared for rank {scene.target_rank} against ordinary "
        f"parameters: {ratio:.3f} times as long ({minima:.3f} by minima): {described(timings['prepared'])}; "
        f"{described(timings['ordinary'])}",
        {"kind": kind, "tokens": scene.settings.tokens, "ratio": ratio, "ratio_of_minima": minima, **values},
    )
