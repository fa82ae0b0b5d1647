"""What a widget can't use is refused where it is given, in words, and not taken silently."""

from __future__ import annotations

import pytest
import torch
from refusals import refused

from hotswap_lab import AdapterPool, HotswapError, demo
from hotswap_lab.widgets import RecompileMeter, StrengthLattice, SwapPanel


@pytest.fixture(scope="module")
def loaded():
    return demo.load("reverse")


FOLDERS = {name: demo.adapter_path(name) for name in ("reverse", "sort")}


@pytest.fixture(scope="module")
def pool(loaded):
    return AdapterPool(demo.load("reverse")[0], adapters=FOLDERS, progress=False)


@pytest.mark.parametrize("widget", [SwapPanel, StrengthLattice])
def test_a_panel_needs_something_that_answers(widget, loaded):
    model, tokenizer = loaded
    refused("how to run a prompt", widget, model, adapters=FOLDERS)
    refused("can't swap in this", widget, model, str)
    refused("pass a tokenizer as tokenizer=", widget, model, tokenizer, adapters=FOLDERS)


@pytest.mark.parametrize("adapters", [list(FOLDERS.values()), FOLDERS["sort"]])
def test_adapters_need_names(loaded, adapters):
    model, tokenizer = loaded
    refused("have no names", SwapPanel, model, tokenizer=tokenizer, adapters=adapters)
    refused("have no names", AdapterPool, model, adapters=adapters)


def test_a_pool_has_its_adapters(pool, loaded):
    refused("not both", SwapPanel, pool, tokenizer=loaded[1], adapters=FOLDERS)
    refused("not both", RecompileMeter, pool.model, pool=pool, adapters=FOLDERS)


def test_a_template_has_a_place_for_the_prompt(pool, loaded):
    refused("no place for the prompt", SwapPanel, pool, tokenizer=loaded[1], template="x>")


def test_strength_and_prompt_of_a_panel(pool, loaded):
    panel = SwapPanel(pool, tokenizer=loaded[1], template="{}>", prompt="abc")
    with pytest.raises(HotswapError, match="The strength is not a number"):
        panel.strength = "high"
    assert panel.strength == 1
    panel.prompt, panel.generate = 5, repr
    assert panel.run() == "'5'"


def test_a_meter_needs_something_to_call():
    refused("nothing to count", RecompileMeter, "model")


def test_a_meter_needs_named_inputs(loaded):
    model, _ = loaded
    refused("have no names", RecompileMeter, model, inputs=torch.zeros(1, 3, dtype=torch.long))
    with RecompileMeter(model, adapters=FOLDERS) as meter, pytest.raises(HotswapError, match="pass inputs"):
        meter.visit("sort")
    with RecompileMeter(model) as meter, pytest.raises(HotswapError, match="nothing to swap in"):
        meter.swap("sort")


def test_a_meter_says_when_nothing_can_be_recompiled(loaded):
    model, _ = loaded
    with RecompileMeter(model) as meter:
        assert "the model is not compiled" in str(meter)
    with RecompileMeter(torch.compile(model, backend="eager")) as meter:
        assert "not compiled" not in str(meter)
