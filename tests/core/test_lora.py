"""What LoRA's own module says of configs and layers."""

from __future__ import annotations

import pytest
import torch
from lora_kinds import Attention
from models import KINDS, randomize
from oracle import assert_same_tensors
from peft import LoHaConfig, LoraConfig, PeftMixedModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from refusals import refused
from torch import nn

from hotswap_lab import hotswap_adapter_from_state_dict

LLAMA = KINDS["llama"]


NAMES = [name for name, each in LLAMA.base().named_modules() if isinstance(each, nn.Linear) and "head" not in name]


@pytest.mark.parametrize("targets", ["all-linear", None, NAMES * 2], ids=["all-linear", "PEFT's default", "many names"])
def test_the_config_says_what_peft_makes_of_it(targets):
    """Above twenty full names, PEFT looks for shorter ones that mean the same. The caller's config stays as it is."""
    fresh = get_peft_model(LLAMA.base(), LoraConfig(target_modules=targets))
    model = get_peft_model(LLAMA.base(), LoraConfig(target_modules=list(LLAMA.modules)))
    config = LoraConfig(target_modules=targets)
    given = config.target_modules
    hotswap_adapter_from_state_dict(model, get_peft_model_state_dict(fresh), "default", config)
    assert model.peft_config["default"].target_modules == fresh.peft_config["default"].target_modules
    assert config.target_modules == given


def ones(**layers: tuple[int, int]) -> dict[str, torch.Tensor]:
    """An adapter of rank 2 for linear layers of these sizes."""
    a = {f"{name}.lora_A.weight": torch.ones(2, inputs) for name, (inputs, _) in layers.items()}
    return a | {f"{name}.lora_B.weight": torch.ones(outputs, 2) for name, (_, outputs) in layers.items()}


def test_multihead_attention_is_not_added_either():
    model, tensors = (
        get_peft_model(Attention(), LoraConfig(r=2, target_modules=["head"])),
        ones(head=(8, 4), attention=(8, 24)),
    )
    swap = hotswap_adapter_from_state_dict
    refused("a MultiheadAttention", swap, model, tensors, "default", LoraConfig(r=2), add_layers=True)


def test_layers_of_another_peft_method_are_not_added_to():
    model = PeftMixedModel(KINDS["linear"].base(), LoraConfig(r=2, target_modules=["first"]), "lora")
    model.add_adapter("loha", LoHaConfig(target_modules=["last"]))
    match, tensors = "already adapted by another PEFT method", ones(first=(12, 16), last=(16, 6))
    refused(match, hotswap_adapter_from_state_dict, model, tensors, "lora", LoraConfig(r=2), add_layers=True)


def test_multihead_attention_from_a_state_dict():
    """Its config may leave out which layers it is for: those of the loaded one."""
    other = get_peft_model(Attention(), LoraConfig(r=2, target_modules=["attention"]))
    randomize(other, "default", seed=1)
    tensors = get_peft_model_state_dict(other)
    model = get_peft_model(Attention(), LoraConfig(r=4, target_modules=["attention"]))
    hotswap_adapter_from_state_dict(model, tensors, "default", LoraConfig(r=2))
    assert_same_tensors(get_peft_model_state_dict(model), tensors)
    assert model.get_base_model().attention.scaling["default"] == 4


def test_tensors_whose_values_share_memory_are_refused():
    model = get_peft_model(KINDS["linear"].base(), LoraConfig(r=2, target_modules=["first"]))
    model.get_base_model().first.lora_A["default"].weight.data = torch.zeros(1, 1).expand(2, 12)
    swap, tensors = hotswap_adapter_from_state_dict, ones(first=(12, 16))
    refused("share memory", swap, model, tensors, "default", LoraConfig(r=2))
