"""A benchmark of adapter swaps: each way of swapping, in one run on one machine.

On the command line::

    python -m hotswap_lab.bench
    python -m hotswap_lab.bench --model tiny --rank 4 --n 5
    python -m hotswap_lab.bench --rank 64 --compiled --rows --json bench.json --plot bench.svg
    python -m hotswap_lab.bench --cold

The weights are random, since their values don't affect the time of a swap. The ways take turns, a few calls each, so
other load on the machine affects all of them alike. Each way swaps back and forth between two adapters, and its outputs
are checked first against ``PeftModel.from_pretrained`` of both.

``--cold`` measures how long a new process takes to its first answer instead, with the embedded model. Its files are in
the system's cache by then, so this is a cold start of the process, not of the machine.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable

import torch

from .cold import measure_starts
from .compiled import measure_compiled
from .report import Extra, Report, Row
from .rows import measure_rows
from .scene import Scene, Way, make_base
from .settings import Settings
from .timing import in_rounds, machine, waited_for_a_core
from .ways import measure_ways

__all__ = ["Report", "Row", "Scene", "Settings", "Way", "in_rounds", "make_base", "run"]

#: measurements beyond the table, by the setting that requests them
FURTHER = {"compiled": measure_compiled, "rows": measure_rows}
#: above this share of time spent waiting for a core, the machine was too busy to trust the table
BUSY = 0.02


def run(
    settings: Settings,
    say: Callable[[str], object] = lambda text: None,
) -> Report:
    """Run the benchmark.

    Parameters
    ----------
    settings:
        Shape, ranks, dtype, device, repeats and the further measurements.
    say:
        Called with a line of text at each step.

    Returns
    -------
    Report
        It prints as a table; ``rows``, ``extras``, ``to_json()`` and ``figure()`` have the rest.

    Examples
    --------
    >>> report = run(Settings(model="tiny", ranks=(2,), n=1))
    >>> len(report.rows), {row.state for row in report.rows}
    (9, {'right'})
    >>> report.timing("hotswap_lab, pool", rank=2).n
    1
    """
    sizes, rows, extras = [], [], []
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT and transformers warn about random adapters
            if settings.cold:
                starts, n = measure_starts(settings.cold, say), settings.cold
                # the report names the shape that was measured, not the requested one
                settings = Settings(model="demo", ranks=(8,), threads=settings.threads, n=n, cold=n)
                return Report(machine(), settings, (), (), starts=tuple(starts))
            base = make_base(settings)
            for rank in settings.ranks:
                with tempfile.TemporaryDirectory() as folder:
                    say(f"rank {rank}: making two adapters, timing each way {settings.n} times")
                    scene = Scene(base, settings, rank, folder)
                    sizes.append(scene.size)
                    before, start = waited_for_a_core(), time.perf_counter()
                    rows += measure_ways(scene)
                    extras += say_of_waiting(rank, before, waited_for_a_core(), time.perf_counter() - start)
                    for name, measure in FURTHER.items():
                        if getattr(settings, name):
                            say(f"rank {rank}: {name}")
                            extras += measure(scene)
        return Report(machine(), settings, tuple(sizes), tuple(rows), tuple(extras))
    finally:
        torch.set_num_threads(threads)


def say_of_waiting(rank: int, before: float, after: float, seconds: float) -> list[Extra]:
    """A line on the share of time that was spent waiting for a core; empty where the system doesn't count it.

    A copy by two threads takes a fraction of a millisecond, but waits for milliseconds if another program has one of
    the cores. If that happens at every call, a median can't show it.
    """
    share = (after - before) / seconds
    text = f"waiting for a core that another program had: {share:.1%} of the time"
    if share > BUSY:
        fewer = ", or with --threads 1" if torch.get_num_threads() > 1 else ""
        text += f". TOO BUSY: measure again when the machine is idle{fewer}"
    return [Extra("waiting", rank, text, {"share": share})] if before else []
