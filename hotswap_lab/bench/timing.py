"""Measuring, the same way everywhere: many calls, median and minimum, and a line that says on what machine."""

from __future__ import annotations

import os
import platform
import re
import statistics
import timeit
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import peft
import torch

from ..watch import readable

#: calls of one function before it is another one's turn
PER_ROUND = 5


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median and the minimum of ``n`` calls."""

    median: float
    minimum: float
    n: int

    @classmethod
    def of(cls, seconds: Iterable[float]) -> Timing:
        seconds = list(seconds)
        return cls(statistics.median(seconds), min(seconds), len(seconds))

    def __str__(self) -> str:
        return readable(self.median)

    @property
    def full(self) -> str:
        """Median, minimum and how many calls, as text."""
        return f"{self} (min {readable(self.minimum)}, n {self.n})"


def measure(run: Callable[[], object], *, before: Callable[[], object] = lambda: None, n: int = 15) -> Timing:
    """Times ``run`` ``n`` times, after one call that doesn't count; ``before`` runs untimed ahead of each call.

    >>> timing = measure(lambda: sum(range(1000)), n=5)
    >>> timing.n, 0 < timing.minimum <= timing.median
    (5, True)
    """
    return Timing.of(timeit.repeat(run, setup=before, number=1, repeat=n + 1)[1:])


def in_rounds(runs: Mapping[str, Callable[[], object]], n: int) -> dict[str, Timing]:
    """Times several functions side by side: they take turns, a few calls each, until each was timed ``n`` times.

    So whatever else the machine does in between hits all of them alike. An uncounted call of the same function goes
    ahead of each timed one: the caches are in the state that the function itself leaves them in.

    >>> timings = in_rounds({"short": lambda: sum(range(10)), "long": lambda: sum(range(10000))}, n=7)
    >>> {name: timing.n for name, timing in timings.items()}
    {'short': 7, 'long': 7}
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for done in range(0, n, PER_ROUND):
        for name, run in runs.items():
            seconds[name] += timeit.repeat(run, setup=run, number=1, repeat=min(PER_ROUND, n - done))
    return {name: Timing.of(each) for name, each in seconds.items()}


def machine() -> str:
    """The machine and the versions that a figure was measured with, in one line."""
    threads, cpuinfo = torch.get_num_threads(), Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    processor = found[1] if found else platform.processor() or platform.machine()
    return (
        f"{processor}, {os.cpu_count()} cores, {threads} thread{'s' if threads > 1 else ''}, {platform.system()}, "
        f"Python {platform.python_version()}, torch {torch.__version__}, peft {peft.__version__}"
    )


def waited_for_a_core() -> float:
    """Seconds that the threads of this process were ready but had no core to run on; 0 where nobody counts them."""
    return sum(int(file.read_text().split()[1]) for file in Path("/proc/self/task").glob("*/schedstat")) / 1e9
