"""What a swap costs besides what it writes: the modules, functions and calls of this package."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest

import hotswap_lab
from hotswap_lab import AdapterPool, demo, hotswap_adapter, verify_hotswap

PACKAGE = str(Path(hotswap_lab.__file__).parent)
#: the most modules, functions and calls of one swap between two of the demo's adapters, comprehensions not counted
MOST = {"disk": (20, 106, 548), "pool": (9, 34, 84)}


def calls_of(action) -> Counter:
    calls: Counter = Counter()

    def note(frame, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE) and frame.f_code.co_name[0] != "<":
            code = frame.f_code
            calls[code.co_filename, getattr(code, "co_qualname", code.co_name)] += 1

    sys.setprofile(note)
    try:
        action()
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.parametrize("way", MOST)
def test_a_swap_goes_a_short_way(way):
    """Once the layers and the verdicts on both configs are known."""
    model, _ = demo.load("reverse")
    folders = {name: demo.adapter_path(name) for name in ("caesar", "reverse")}
    if way == "pool":
        swap = AdapterPool(model, adapters=folders, progress=False).swap
    else:
        swap = lambda name: hotswap_adapter(model, folders[name], "default")  # noqa: E731
    for name in ("caesar", "reverse"):
        swap(name)
    calls = calls_of(lambda: swap("caesar"))
    found = len({module for module, _ in calls}), len(calls), calls.total()
    assert all(each <= most for each, most in zip(found, MOST[way], strict=True)), (found, calls.most_common(12))
    assert verify_hotswap(model, folders["caesar"])


@pytest.mark.parametrize("new", ["pig_latin", "shout"])
def test_the_first_swap_calls_few_functions(new):
    """It has to find the layers, and gives most of them another rank."""
    model, _ = demo.load("reverse")
    assert calls_of(lambda: hotswap_adapter(model, demo.adapter_path(new), "default")).total() <= 1500
