"""RecompileMeter: counts what RecompileWatch counts, and shows it."""

from __future__ import annotations

import pytest
import torch
from shown import folders, live

from hotswap_lab import AdapterPool, demo
from hotswap_lab.widgets import RecompileMeter


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore")  # that it may recompile is the question here
def test_reasons_are_listed_and_after_close_nothing_is_counted():
    function = torch.compile(lambda x, factor: x * factor, backend="eager", dynamic=False)
    with RecompileMeter(function) as meter:
        assert "0 calls" in live(meter).to_html()
        for factor in (2.0, *[3.0] * 49):
            meter(torch.ones(2), factor)
        assert "factor was 2.0" in meter._body.value
    meter(torch.ones(2), 4.0)  # a call, but nothing is looked for any more
    assert (meter.calls, meter.watch.compiles, meter.watch.recompiles) == (51, 1, 1)
    assert meter.figure().svg.count("class='call'") == 40 + 1  # and one in the legend
    assert "the last 40 of 51 calls" in meter.figure().svg


def test_stop():
    model, _ = demo.load("reverse")
    calls = []
    inputs = dict(input_ids=torch.zeros(1, 3, dtype=torch.long))
    with RecompileMeter(model, adapters=folders("reverse", "sort"), inputs=inputs) as meter:
        live(meter).model = lambda **inputs: (calls.append(1), meter.stop())
        meter.visit("reverse", calls=5)
        assert len(calls) == 1
        meter.stop()
        meter.swap("sort")  # what was stopped before does not matter
    assert meter.swaps == 2


def test_an_empty_pool_is_a_pool():
    model, _ = demo.load("reverse")
    with RecompileMeter(model, pool=AdapterPool(model)) as meter:
        meter(**model.get_base_model().dummy_inputs)
    assert [call.label for call in meter.watch.calls] == ["another adapter"]
