"""Regular expressions of configs: slow ones are found in a moment, and all that people write are let through."""

from __future__ import annotations

import time

import pytest
import torch
from lengths import few_of
from models import KINDS
from peft import IA3Config, LoraConfig

from hotswap_lab.core import expressions
from hotswap_lab.core.expressions import slow_expressions, slow_to_match

NAMES = [f"model.language_model.layers.{number}.self_attn.{part}_proj" for number in range(48) for part in "qkvo"]

#: as they are in adapters that people share
COMMON = [
    r".*\.(q|v)_proj",
    r"model\.layers\.(\d+)\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj",
    r"^(?!.*vision).*(?:q_proj|k_proj|v_proj|o_proj)",
    r"(.*\.)*q_proj",
    r"(?:.*?(?:language|text).*?(?:self_attn|attn|mlp).*?(?:k_proj|v_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:mlp))",
    r".*(transformer_blocks|layers)\.[0-9]+\.attn\.to_(q|k|v)$",
]
SLOW = [r"([\w.]+)+!", r"(.*)*!", ".*" * 25 + "!", r"(?=(.+)+!)x"]


@pytest.mark.parametrize("expression", COMMON)
def test_what_people_write_is_let_through(expression):
    assert slow_expressions(LoraConfig(target_modules=expression), NAMES) == []


@pytest.mark.parametrize("expression", few_of(SLOW, SLOW[:1]))
def test_slow_ones_are_found(expression):
    start = time.process_time()
    assert slow_expressions(LoraConfig(target_modules=expression), NAMES) == [expression]
    assert time.process_time() - start < 1, "the trial is another process's time"


@pytest.mark.long
@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=["x"], exclude_modules=SLOW[0]),
        LoraConfig(target_modules=["x"], rank_pattern={"x": 1, SLOW[0]: 2}),
        LoraConfig(target_modules=["x"], alpha_pattern={SLOW[0]: 2}),
        LoraConfig(target_modules=["x"], modules_to_save=["x", SLOW[0]]),
        LoraConfig(target_modules=["x"], layers_pattern=[SLOW[0]], layers_to_transform=[0]),
        IA3Config(target_modules=["x", SLOW[0]], feedforward_modules=["x"]),
    ],
)
def test_wherever_they_are(config):
    assert slow_expressions(config, NAMES) == [SLOW[0]]


def test_a_list_of_names_costs_nothing(monkeypatch):
    monkeypatch.setattr(expressions.subprocess, "run", None)

    def names():
        raise AssertionError("nobody has to walk the model")
        yield

    config = LoraConfig(target_modules=["q_proj"], rank_pattern={f"layers.{each}.q_proj": 2 for each in range(500)})
    assert slow_expressions(config, names()) == []
    assert slow_expressions(LoraConfig(target_modules=COMMON[0]), NAMES) == []


def test_where_no_process_can_be_started(monkeypatch):
    def fail(*_, **__):
        raise OSError("no")

    monkeypatch.setattr(expressions.subprocess, "run", fail)
    assert slow_expressions(LoraConfig(target_modules="(a|b)+" * 9), ["a" * 90]) == ["(a|b)+" * 9]
    # it takes many steps, but not for ever
    assert slow_expressions(LoraConfig(target_modules=r".*\.layers\.\d+\.(q|v)_proj.*"), NAMES) == []


@pytest.mark.parametrize("executable", ["", None, "/nowhere/python"])
def test_in_an_interpreter_that_is_no_program(monkeypatch, executable):
    monkeypatch.setattr(expressions.sys, "executable", executable)
    assert slow_expressions(LoraConfig(target_modules="(a|b)+" * 9), ["a" * 90]) == ["(a|b)+" * 9]
    assert slow_expressions(LoraConfig(target_modules=r".*\.layers\.\d+\.(q|v)_proj.*"), NAMES) == []


@pytest.mark.long
def test_many_expressions_have_a_second_each():
    pattern = {rf".*\.layers\.{each}\..*\.q_proj": 2 for each in range(48)}
    config = LoraConfig(target_modules=["q_proj"], rank_pattern={**pattern, SLOW[0]: 3})
    assert slow_expressions(config, NAMES) == [SLOW[0]]


def test_a_model_looks_at_an_expression_once(monkeypatch):
    base = KINDS["llama"].base()
    for _ in range(2):
        assert len(slow_to_match(LoraConfig(target_modules=SLOW[1]), base)) == 1
        assert slow_to_match(LoraConfig(target_modules=COMMON[1]), base) == []
        monkeypatch.setattr(expressions, "_try", None)


def test_the_refusal():
    (refusal,) = slow_to_match(LoraConfig(target_modules=SLOW[1]), KINDS["llama"].base())
    assert repr(SLOW[1]) in refusal.found
    assert slow_to_match(LoraConfig(target_modules=COMMON[0]), torch.nn.Linear(1, 1)) == []
