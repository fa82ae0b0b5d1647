"""What a swap costs beside what it writes: the functions of this package that it calls."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest

import hotswap_lab
from hotswap_lab import demo, hotswap_adapter, verify_hotswap

PACKAGE = str(Path(hotswap_lab.__file__).parent)
#: of one swap of the demo's 28 layers in a model that is not prepared: the first has to find them, others know them
MOST_CALLS = {"first": 1500, "second": 1050}


def calls_of(action) -> Counter:
    calls: Counter = Counter()

    def note(frame, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            calls[f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}"] += 1

    sys.setprofile(note)
    try:
        action()
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.parametrize("new", ["pig_latin", "shout"])
def test_a_swap_calls_few_functions(new):
    """The first one has to find the layers, and gives most of them another rank; the second one knows them."""
    model, _ = demo.load("reverse")
    for attempt, most in MOST_CALLS.items():
        calls = calls_of(lambda: hotswap_adapter(model, demo.adapter_path(new), "default"))
        assert calls.total() <= most, (attempt, calls.total(), calls.most_common(12))
    assert verify_hotswap(model, demo.adapter_path(new))
