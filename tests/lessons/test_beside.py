"""The judge of the notebook beside PEFT tells good from bad, whoever swapped."""

from __future__ import annotations

import pytest
import torch

from hotswap_lab import hotswap_adapter
from hotswap_lab.lessons import beside
from hotswap_lab.lessons.beside import LLAMA, load, lora, outcome


@pytest.fixture(scope="module")
def table():
    return beside.Beside(None, None)


@pytest.fixture(scope="module")
def folders(table):
    return table.save(lora(lora_alpha=8)), table.save(lora(lora_alpha=3))


def right(model, new):
    hotswap_adapter(model, new, "default")


def half(model, new, error=ValueError):
    next(value for key, value in model.named_parameters() if "lora_A" in key).data.zero_()
    raise error


def half_with_a_typo(model, new):
    half(model, new, KeyError)


def refuse(model, new):
    raise RuntimeError


def forget_the_config(model, new):
    before = model.peft_config["default"]
    hotswap_adapter(model, new, "default")
    model.peft_config["default"] = before


def break_it(model, new):
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.data = parameter.data[:, :3]


WORDS = {
    right: "equals a fresh load",
    half: "refused, half swapped",
    half_with_a_typo: "KeyError, half swapped",
    refuse: "refused, untouched",
    forget_the_config: "equal outputs, old config",
    break_it: "broken model",
}


@pytest.mark.parametrize("swap", WORDS)
def test_outcomes(folders, swap):
    assert outcome(swap, *folders) == WORDS[swap]


def test_models_and_adapters_are_the_same_each_time_and_draw_no_random_numbers_of_others(table):
    before = torch.get_rng_state()
    first, second = LLAMA(), LLAMA()
    table.save(lora())
    assert torch.equal(torch.get_rng_state(), before)
    assert all(map(torch.equal, first.parameters(), second.parameters()))
    again = beside.Beside(None, None)
    folder = again.save(lora(lora_alpha=8))
    assert not beside.changed(load(folder), beside.values(load(f"{table._root.name}/1")))
