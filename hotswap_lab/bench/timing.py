"""Measuring, the same way everywhere: many runs, median and minimum, and a line that says on what machine."""

from __future__ import annotations

import gc
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median and the minimum of ``n`` calls."""

    median: float
    minimum: float
    n: int

    def __str__(self) -> str:
        return f"{self.median * 1000:.2f} ms"


def measure(run: Callable[[], object], *, before: Callable[[], object] = lambda: None, n: int = 15) -> Timing:
    """Times ``run`` ``n`` times, after one call that doesn't count; ``before`` runs untimed ahead of each call.

    The garbage collector is off while the clock runs, as in :mod:`timeit`.

    >>> timing = measure(lambda: sum(range(1000)), n=5)
    >>> timing.n, 0 < timing.minimum <= timing.median
    (5, True)
    """
    seconds = []
    for number in range(n + 1):
        before()
        gc_was_on = gc.isenabled()
        gc.disable()
        try:
            start = time.perf_counter()
            run()
            elapsed = time.perf_counter() - start
        finally:
            if gc_was_on:
                gc.enable()
        if number:
            seconds.append(elapsed)
    return Timing(statistics.median(seconds), min(seconds), n)


def machine() -> str:
    """The machine and the versions that a figure was measured with, in one line."""
    import os

    import peft
    import torch

    threads = torch.get_num_threads()
    return (
        f"{_processor()}, {os.cpu_count()} cores, {threads} thread{'s' if threads > 1 else ''}, {platform.system()}, "
        f"Python {platform.python_version()}, torch {torch.__version__}, peft {peft.__version__}"
    )


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
