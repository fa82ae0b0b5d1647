"""Timing of functions: median and minimum of many calls, and one line that describes the machine."""

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

from ..figures.latency import readable

#: calls of one function before the next function's turn
PER_ROUND = 5


@dataclass(frozen=True)
class Timing:
    """The median and minimum time of ``n`` calls, in seconds."""

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
        """Median, minimum and number of calls, as text."""
        return f"{self} (min {readable(self.minimum)}, n {self.n})"


def measure(run: Callable[[], object], *, before: Callable[[], object] = lambda: None, n: int = 15) -> Timing:
    """Time ``n`` calls of ``run``, after one call that doesn't count. ``before`` runs untimed ahead of each call.

    >>> timing = measure(lambda: sum(range(1000)), n=5)
    >>> timing.n, 0 < timing.minimum <= timing.median
    (5, True)
    """
    return Timing.of(timeit.repeat(run, setup=before, number=1, repeat=n + 1)[1:])


def in_rounds(runs: Mapping[str, Callable[[], object]], n: int) -> dict[str, Timing]:
    """Time several functions in turns of a few calls each, until each was timed ``n`` times.

    So other load on the machine affects all of them alike. An untimed call of the same function precedes each timed
    one, so the caches are in the state in which the function itself leaves them.

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
    """One line with the machine and the versions, to be printed with a measurement."""
    threads, cpuinfo = torch.get_num_threads(), Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text(encoding="utf-8")) if cpuinfo.exists() else None
    processor = found[1] if found else platform.processor() or platform.machine()
    return (
        f"{processor}, {os.cpu_count()} cores, {threads} thread{'s' if threads > 1 else ''}, {platform.system()}, "
        f"Python {platform.python_version()}, torch {torch.__version__}, peft {peft.__version__}"
    )


def waited_for_a_core() -> float:
    """Seconds that threads of this process were ready but had no core to run on; 0 if the system doesn't count them."""
    return sum(int(file.read_text().split()[1]) for file in Path("/proc/self/task").glob("*/schedstat")) / 1e9
