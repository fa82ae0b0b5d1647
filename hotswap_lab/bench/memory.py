"""Whether the process grows from swap to swap."""

from __future__ import annotations

import gc
import os
from pathlib import Path

from ..core.pool import HISTORY
from .rows import Extra
from .scene import Scene


def resident_mb() -> float | None:
    """The memory that this process has in RAM, in MB (10^6 bytes); None where the system doesn't say."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return None
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def measure_memory(scene: Scene, swaps: int) -> Extra:
    """How much the process grows over many swaps of a pool."""
    pool = scene.pool()

    def swap(times: int) -> float | None:
        for number in range(times):
            pool.swap(str(number % 2))
        gc.collect()
        return resident_mb()

    before = swap(2 * HISTORY)  # what undo() needs is full by then
    after = swap(swaps)
    growth = None if before is None or after is None else after - before
    text = f"memory, {swaps} pool swaps: "
    text += (
        "not available on this system"
        if growth is None
        else f"{before:.1f} MB resident before, {after:.1f} MB after, {growth:+.2f} MB"
    )
    values = {"swaps": swaps, "before_mb": before, "after_mb": after, "growth_mb": growth}
    return Extra("memory", scene.rank, text, values)
