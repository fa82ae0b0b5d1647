"""The models of the notebook beside PEFT. That its judge tells good from bad is what the notebook's table shows."""

from __future__ import annotations

import re

import torch

from hotswap_lab.lessons import beside
from hotswap_lab.lessons.beside import LLAMA, load, lora, outcome


def test_models_and_adapters_are_the_same_each_time_and_draw_no_random_numbers_of_others():
    before = torch.get_rng_state()
    tables = [beside.Beside(None, None) for _ in range(2)]
    folders = [table.save(lora(lora_alpha=8)) for table in tables]
    first, second = LLAMA(), LLAMA()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(map(torch.equal, first.parameters(), second.parameters()))
    assert not beside.changed(load(folders[0]), beside.values(load(folders[1])))


def test_a_verdict_is_wrong_unless_it_is_known_to_be_right():
    table = beside.Beside(None, None)
    table.rows = [("a case", "something new; refused, untouched", "equals a fresh load")]
    line = table._repr_markdown_().splitlines()[-1]
    shown = re.sub("</?span.*?>", "", line)
    assert shown == "| a case | ≠ something new<br>✗ refused, untouched | ✓ equals a fresh load |"
    assert [line.count(f"background-color:{beside.TINTS[sign]};") for sign in "≠✗"] == [1, 1]
    assert line.count("<span") == line.count("</span>") == 2


def test_an_error_that_is_no_refusal_is_named():
    def half(model, _):
        next(value for key, value in model.named_parameters() if "lora_A" in key).data.zero_()
        raise KeyError

    table = beside.Beside(None, None)
    assert outcome(half, *(table.save(lora(lora_alpha=alpha)) for alpha in (8, 3))) == "KeyError, half swapped"
