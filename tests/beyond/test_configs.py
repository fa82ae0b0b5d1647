"""What is refused for what a config says, whatever tensors come with it."""

from __future__ import annotations

import copy
import json
from fractions import Fraction
from pathlib import Path

import pytest
from lengths import long
from lora_kinds import LLAMA, MODELS
from models import load, save_random_adapter
from oracle import assert_equals_fresh_load
from peft import LoraConfig, XLoraConfig, inject_adapter_in_model
from refusals import refused

from hotswap_lab import Adapter, AdapterPool, hotswap_adapter, hotswap_adapter_from_state_dict
from hotswap_lab.beyond.configs import judge

#: what is changed in a config, and what the refusal names
MALFORMED = [
    ("LoRA", dict(r=True), "r=True"),
    ("LoRA", dict(r=0), "r=0"),
    *(("LoRA", dict(lora_alpha=each), "lora_alpha=") for each in (float("nan"), True, Fraction(8))),
    ("LoRA", dict(lora_dropout=1.5), "lora_dropout=1.5"),
    ("LoRA", dict(use_rslora="yes"), "use_rslora='yes'"),
    ("LoRA", dict(rank_pattern={"q_proj": 2.5}), "rank_pattern="),
    ("LoRA", dict(alpha_pattern={3: 2}), "alpha_pattern="),
    ("LoRA", dict(target_modules=[1, 2]), "target_modules="),
    ("LoRA", dict(target_modules="(unclosed"), "unclosed"),
    ("LoRA", dict(alpha_pattern={"(unclosed": 2}), "unclosed"),
    ("LoRA", dict(init_lora_weights="foo"), "init_lora_weights='foo'"),
    ("LoRA", dict(init_lora_weights="EVA"), "init_lora_weights='EVA'"),
    ("LoRA", dict(trainable_token_indices=[]), "trainable_token_indices="),
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


@pytest.mark.parametrize("kind", [long("llama"), "classifier"])
@pytest.mark.parametrize("task", ["SEQ_CLS", long("TOKEN_CLS"), "QUESTION_ANS"])
def test_the_heads_that_peft_adds_to_a_config_for_a_task(tmp_path, kind, task):
    """It does so in any model; where there is a head of that name, it looks for it in the file."""
    kind = MODELS[kind]
    old, new = (save_random_adapter(kind, tmp_path / str(seed), seed, r=2 * seed) for seed in (1, 2))
    file = Path(new, "adapter_config.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "task_type": task}))
    model = load(kind, old)
    if kind is not LLAMA and task != "QUESTION_ANS":
        with pytest.raises(KeyError, match="score"):
            load(kind, new)
        refused("PEFT can't load this adapter", hotswap_adapter, model, new, "default")
        return
    assert load(kind, new).peft_config["default"].modules_to_save
    for folder in (new, old, new):
        hotswap_adapter(model, folder, "default")
        assert_equals_fresh_load(model, kind, folder)
    injected = inject_adapter_in_model(LoraConfig(target_modules=list(kind.modules)), kind.base())
    hotswap_adapter(injected, new)  # where PEFT adds none
    assert injected.peft_config["default"].modules_to_save is None
    if kind is LLAMA:
        pool = AdapterPool(load(kind, old), adapters={"new": new}, progress=False)
        pool.swap("new")
        assert_equals_fresh_load(pool.model, kind, new, prepared=True)


@pytest.mark.parametrize("megatron_config", [None, {"a": 1}])
@pytest.mark.parametrize("megatron_core", ["megatron.core", "os"])
def test_only_megatron_is_imported(megatron_config, megatron_core):
    config = LoraConfig(megatron_config=megatron_config, megatron_core=megatron_core)
    assert len([*judge(config, "new")]) == (megatron_config is not None and megatron_core == "os")


@pytest.mark.parametrize("role", ["new", "loaded"])
def test_x_lora_can_never_be_swapped(role):
    (refusal,) = judge(XLoraConfig(hidden_size=2, adapters={}), role)
    assert role in refusal.summary
