"""Whether other programs were in the way."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from .rows import Extra, Row

#: the share of the time spent waiting for a core from which on the machine was too busy to trust the table
BUSY = 0.02


def waited_for_a_core() -> float | None:
    """Seconds that the threads of this process were ready but had no core to run on; None where nobody counts them."""
    try:
        return sum(int(file.read_text().split()[1]) for file in Path("/proc/self/task").glob("*/schedstat")) / 1e9
    except (OSError, IndexError):
        return None


def measure_waiting(rank: int, run: Callable[[], list[Row]]) -> tuple[list[Row], list[Extra]]:
    """Runs ``run``, and says whether other programs were in its way.

    A copy by two threads that finds one core taken waits for the scheduler: milliseconds, where it takes a fraction of
    one. A median can't show that if it happens at every call.
    """
    before, start = waited_for_a_core(), time.perf_counter()
    rows = run()
    seconds, after = time.perf_counter() - start, waited_for_a_core()
    if not before or not after:  # 0 where the kernel has the file but doesn't count
        return rows, []
    share = (after - before) / seconds
    text = f"waiting for a core that another program had: {share:.1%} of the time"
    if share > BUSY:
        text += ". TOO BUSY: measure again when the machine is idle, or with --threads 1"
    return rows, [Extra("waiting", rank, text, {"share": share, "seconds": seconds})]
