"""Measuring: what counts, what doesn't."""

from __future__ import annotations

import gc
import time

from hotswap_lab.bench.timing import machine, measure


def test_the_first_call_and_the_preparation_do_not_count():
    calls = []

    def run():
        calls.append("run")
        if calls.count("run") == 1:
            time.sleep(0.2)

    timing = measure(run, before=lambda: (calls.append("before"), time.sleep(0.02)), n=3)
    assert calls == ["before", "run"] * 4
    assert timing.n == 3
    assert timing.minimum <= timing.median < 0.02


def test_the_garbage_collector_is_put_back():
    states = []
    measure(lambda: states.append(gc.isenabled()), n=1)
    assert states == [False, False]
    assert gc.isenabled()


def test_a_figure_says_where_it_was_measured():
    text = machine()
    for word in ("cores", "thread", "Python", "torch", "peft"):
        assert word in text
