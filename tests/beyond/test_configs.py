"""What is said of a config before anything of its adapter is looked at."""

from __future__ import annotations

import pytest
from peft import IA3Config, LoraConfig, RandLoraConfig, XLoraConfig

from hotswap_lab.beyond.configs import extra_state, judge


@pytest.mark.parametrize(
    "changes",
    [
        dict(r=True),
        dict(r=0),
        dict(lora_alpha=float("nan")),
        dict(lora_dropout=1.5),
        dict(use_rslora="yes"),
        dict(rank_pattern={"q_proj": 2.5}),
        dict(alpha_pattern={3: 2}),
        dict(target_modules=[1, 2]),
        dict(target_modules="(unclosed"),
        dict(alpha_pattern={"(unclosed": 2}),
    ],
)
def test_malformed_configs(changes):
    config = LoraConfig(target_modules=["q_proj"])
    assert not list(judge(config, "new"))
    for name, value in changes.items():
        setattr(config, name, value)
    assert list(judge(config, "new"))


def test_the_loaded_adapter_is_not_asked_for_the_kind_of_its_values():
    """PEFT has taken them, and computes with them."""
    config = LoraConfig(target_modules=["q_proj"])
    config.r = 4.0
    assert list(judge(config, "new"))
    assert not list(judge(config, "loaded"))


def test_of_other_methods_only_numbers_are_judged():
    config = RandLoraConfig(target_modules=["q_proj"])
    assert not list(judge(config, "new"))
    config.randlora_alpha = float("inf")
    assert [refusal.found for refusal in judge(config, "new")] == ["randlora_alpha=inf"]


@pytest.mark.parametrize("role", ["new", "loaded"])
def test_what_can_never_be_swapped(role):
    for config in (XLoraConfig(hidden_size=2, adapters={}), LoraConfig(init_lora_weights="pissa")):
        (refusal,) = judge(config, role)
        assert role in refusal.summary


def test_what_has_no_common_graph():
    plain, dora = LoraConfig(), LoraConfig(use_dora=True)
    assert not list(judge(plain, "new", plain))
    (refusal,) = judge(dora, "new", plain)
    assert "no common graph" in refusal.summary


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, []),
        (dict(use_dora=True, use_rslora=True, init_lora_weights="gaussian"), []),
        (dict(modules_to_save=["lm_head"], bias="all"), ["modules_to_save", "bias"]),
        (dict(trainable_token_indices=[1]), ["trainable_token_indices"]),
    ],
)
def test_what_is_beside_lora(options, expected):
    assert extra_state(LoraConfig(**options)) == expected


def test_a_config_of_another_method_is_none_of_lora():
    assert not list(judge(IA3Config(), "new", IA3Config()))
