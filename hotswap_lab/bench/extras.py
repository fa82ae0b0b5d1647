"""What can be measured beside the table: memory, the number of tensors, taking turns, and who else was in the way."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict

from ..pools import HISTORY, AdapterPool
from ..threads import in_use
from .report import Extra
from .scene import Scene, Way
from .settings import Settings
from .timing import in_rounds

#: entering and leaving ``in_use`` takes microseconds, which the clock alone would distort
REPEATS = 100
#: the share of the time spent waiting for a core from which on the machine was too busy to trust the table
BUSY = 0.02


def resident_mb() -> float | None:
    """The memory that this process has in RAM, in MB (10^6 bytes); None where the system doesn't say."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6 if statm.exists() else None


def measure_memory(scene: Scene) -> list[Extra]:
    """How much the process grows over many swaps of a pool."""
    pool = scene.pool()

    def swap(times: int) -> float | None:
        for number in range(times):
            pool.swap(str(number % 2))
        gc.collect()
        return resident_mb()

    swaps = scene.settings.memory
    before, after = swap(2 * HISTORY), swap(swaps)  # what undo() needs is full by then
    said = f"{before:.1f} MB resident before, {after:.1f} MB after" if before else "not available on this system"
    values = {"swaps": swaps, "before_mb": before, "after_mb": after}
    return [Extra("memory", scene.rank, f"memory, {swaps} pool swaps: {said}", values)]


def chain_pool(settings: Settings, rank: int, count: int, width: int) -> AdapterPool:
    """A pool of two adapters for square layers in a row. They share one weight: a swap has nothing to do with it."""
    chain = torch.nn.Sequential(*(torch.nn.Linear(width, width, bias=False, device="meta") for _ in range(count)))
    weight = torch.nn.Parameter(torch.zeros(width, width, dtype=getattr(torch, settings.dtype), device=settings.device))
    for layer in chain:
        layer.weight = weight
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=r"\d+", init_lora_weights=False)
    model = get_peft_model(chain.eval(), config, autocast_adapter_dtype=False)
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    adapters = {str(number): ({key: tensor + number for key, tensor in tensors.items()}, config) for number in (0, 1)}
    return AdapterPool(model, adapters=adapters, progress=False)


def measure_spread(scene: Scene) -> list[Extra]:
    """A pool's swap of the same bytes in a few wide layers, and in ten times as many of a tenth of the width."""
    count = scene.size.tensors // 2
    per_row = scene.size.nbytes / getattr(torch, scene.settings.dtype).itemsize / scene.rank
    # widths of whole cache lines, so that the packed bytes are the same, too
    width = max(round(per_row / (2 * count) / 10 / 32), 1) * 32
    pools = {
        f"{2 * layers} tensors": chain_pool(scene.settings, scene.rank, layers, side)
        for layers, side in ((count, width * 10), (count * 10, width))
    }
    runs = {
        name: Way(name, lambda number, pool=pool: pool.swap(str(number)), bool).alternating(scene.settings.device)
        for name, pool in pools.items()
    }
    timings = in_rounds(runs, scene.settings.n)
    few, many = timings
    ratio = timings[many].median / timings[few].median
    nbytes = {name: pool.nbytes // 2 for name, pool in pools.items()}
    text = (
        f"spread, {nbytes[many] / 1e6:.3g} MB packed: pool swap over {many} takes {ratio:.2f} times as long as over "
        f"{few}: {timings[many].full}; {timings[few].full}"
    )
    return [Extra("spread", scene.rank, text, {"ratio": ratio, "packed_nbytes": nbytes, "timings": timings})]


def measure_turns(scene: Scene) -> list[Extra]:
    """What threads that take turns pay: entering and leaving ``in_use``, as a part of a forward pass over one token."""
    model, token = scene.load(), scene.make_inputs(1)

    def enter_and_leave() -> None:
        for _ in range(REPEATS):
            with in_use(model):
                pass

    timings = in_rounds({"in_use": enter_and_leave, "forward": lambda: scene.outputs(model, token)}, scene.settings.n)
    entering, forward = timings["in_use"].median / REPEATS, timings["forward"]
    share = entering / forward.median
    text = (
        f"turns: `with in_use(model)` takes {entering * 1e6:.1f} us, {share:.3%} of a forward over one token: "
        f"{forward.full}"
    )
    return [Extra("turns", scene.rank, text, {"in_use_s": entering, "share": share, "forward": forward})]


def waited_for_a_core() -> float:
    """Seconds that the threads of this process were ready but had no core to run on; 0 where nobody counts them."""
    return sum(int(file.read_text().split()[1]) for file in Path("/proc/self/task").glob("*/schedstat")) / 1e9


def measure_waiting(rank: int, run: Callable[[], object]) -> list[Extra]:
    """Runs ``run``, and says whether other programs were in its way, if the system counts that.

    A copy by two threads that finds one core taken waits for the scheduler: milliseconds, where it takes a fraction of
    one. A median can't show that if it happens at every call.
    """
    before, start = waited_for_a_core(), time.perf_counter()
    run()
    share = (waited_for_a_core() - before) / (time.perf_counter() - start)
    text = f"waiting for a core that another program had: {share:.1%} of the time"
    if share > BUSY:
        fewer = ", or with --threads 1" if torch.get_num_threads() > 1 else ""
        text += f". TOO BUSY: measure again when the machine is idle{fewer}"
    return [Extra("waiting", rank, text, {"share": share})] if before else []
