"""Measurements of compiled models: the first output after a swap, and a forward call in prepared memory."""

from __future__ import annotations

import torch

from .. import compat
from ..watch import RecompileWatch, pick_backend
from .report import Extra
from .scene import Scene, Way, waiting
from .timing import in_rounds, measure
from .ways import PEFT, disk_way, peft_hotswap_way, peft_load_way, pool_way

#: how often a recompile is timed: it takes seconds to minutes
RECOMPILES = 3


def measure_compiled(scene: Scene) -> list[Extra]:
    """Time a swap and the first output after it in a compiled model, and a forward call by itself.

    The ways are measured one after the other, since each begins with nothing compiled. The setting of Inductor's cache
    on disk isn't changed. If it is on, a recompile may find the code of an equal graph there and take less time.
    """
    by_peft = scene.load_prepared(PEFT.prepare_model_for_compiled_hotswap)
    ways = (
        pool_way(scene),
        disk_way(scene, "hotswap_lab, disk, prepared", scene.load_prepared()),
        peft_hotswap_way(scene, "PEFT hotswap, disk, prepared by PEFT", by_peft),
        peft_load_way(scene),
    )
    first_outputs = [_first_output(scene, way) for way in ways]
    return [*first_outputs, _forward(scene, compiled=False), _forward(scene, compiled=True)]


def _first_output(scene: Scene, swapping: Way) -> Extra:
    backend = scene.settings.backend or pick_backend()
    torch.compiler.reset()
    compiled = torch.compile(swapping.model, backend=backend)
    scene.outputs(compiled)

    def swap_and_call(number: int) -> None:
        swapping.swap(number)
        scene.outputs(compiled)

    way = scene.way(swapping.name, compiled, swap_and_call)
    # by default, PyTorch stops compiling after 8 graphs and runs the model eagerly
    with compat.dynamo_config.patch(recompile_limit=64):
        with RecompileWatch() as watch:
            state, note = way.check()
        n = min(scene.settings.n, RECOMPILES) if watch.recompiles else scene.settings.n
        with RecompileWatch() as watch:
            timing = None if note else measure(way.alternating(scene.settings.device), n=n)
    torch.compiler.reset()
    said = f"refused: {note}" if note else f"{timing.full}, {watch.recompiles} recompiles in {n + 1} calls"
    text = f"compiled ({backend}), swap and first output: {way.name}: {said}{', wrong' if state == 'wrong' else ''}"
    values = {"way": way.name, "state": state, "timing": timing, "recompiles": watch.recompiles, "calls": n + 1}
    return Extra("first output", scene.rank, text, values)


def _forward(scene: Scene, compiled: bool) -> Extra:
    """Compare a forward call with the adapter in prepared memory to one with ordinary parameters."""
    kind = (scene.settings.backend or pick_backend()) if compiled else "eager"
    tokens, device = scene.settings.tokens, scene.settings.device
    inputs = scene.make_inputs(tokens)
    torch.compiler.reset()
    runs = {}
    for name, model in {"ordinary": scene.load(), "prepared": scene.load_prepared()}.items():
        called = torch.compile(model, backend=kind) if compiled else model
        runs[name] = waiting(lambda called=called: scene.outputs(called, inputs), device)
    timings = in_rounds(runs, scene.settings.n)
    torch.compiler.reset()
    ratio = timings["prepared"].median / timings["ordinary"].median
    text = (
        f"forward, {kind}, {tokens} tokens, prepared for rank {scene.target_rank} against ordinary parameters: "
        f"{ratio:.3f} times as long: {timings['prepared'].full}; {timings['ordinary'].full}"
    )
    return Extra("forward", scene.rank, text, {"kind": kind, "tokens": tokens, "ratio": ratio, **timings})
