"""What is refused for what a config says, whatever tensors come with it."""

from __future__ import annotations

import copy

import pytest
from lora_kinds import LLAMA
from models import load
from oracle import assert_equals_fresh_load
from peft import XLoraConfig
from refusals import refused

from hotswap_lab import Adapter, hotswap_adapter, hotswap_adapter_from_state_dict
from hotswap_lab.beyond.configs import judge

#: what is changed in a config, and what the refusal names
MALFORMED = [
    ("LoRA", dict(r=True), "r=True"),
    ("LoRA", dict(r=0), "r=0"),
    ("LoRA", dict(lora_alpha=float("nan")), "lora_alpha=nan"),
    ("LoRA", dict(lora_dropout=1.5), "lora_dropout=1.5"),
    ("LoRA", dict(use_rslora="yes"), "use_rslora='yes'"),
    ("LoRA", dict(rank_pattern={"q_proj": 2.5}), "rank_pattern="),
    ("LoRA", dict(alpha_pattern={3: 2}), "alpha_pattern="),
    ("LoRA", dict(target_modules=[1, 2]), "target_modules="),
    ("LoRA", dict(target_modules="(unclosed"), "unclosed"),
    ("LoRA", dict(alpha_pattern={"(unclosed": 2}), "unclosed"),
    ("LoRA", dict(init_lora_weights="pissa"), "changes the base model's own weights"),
    ("RandLora", dict(randlora_alpha=float("inf")), "randlora_alpha=inf"),
]


@pytest.fixture
def adapters(method_folders) -> dict[str, Adapter]:
    return {"LoRA": Adapter.load(method_folders("DoRA")[2]), "RandLora": Adapter.load(method_folders("RandLora")[0])}


@pytest.mark.parametrize(("method", "changes", "match"), MALFORMED)
def test_malformed_configs(adapters, method, changes, match):
    adapter = adapters[method]
    model, wrong = load(LLAMA, adapter.source), copy.deepcopy(adapter.config)
    for name, value in changes.items():
        setattr(wrong, name, value)
    refused(match, hotswap_adapter_from_state_dict, model, adapter.tensors, "default", wrong)


def test_the_loaded_adapter_is_not_asked_for_the_kind_of_its_values(adapters):
    """PEFT has taken them, and computes with them. But it may have changed the base model's own weights."""
    adapter = adapters["LoRA"]
    model = load(LLAMA, adapter.source)
    model.peft_config["default"].r = 4.0
    hotswap_adapter(model, adapter, "default")
    assert_equals_fresh_load(model, LLAMA, adapter.source)
    model.peft_config["default"].init_lora_weights = "pissa"
    refused("changes the base model's own weights", hotswap_adapter, model, adapter, "default")


@pytest.mark.parametrize("role", ["new", "loaded"])
def test_x_lora_can_never_be_swapped(role):
    (refusal,) = judge(XLoraConfig(hidden_size=2, adapters={}), role)
    assert role in refusal.summary
