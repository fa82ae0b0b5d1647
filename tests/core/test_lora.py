"""What LoRA's own module says of configs and layers."""

from __future__ import annotations

import pytest
import torch
from models import KINDS, load, randomize, save_family
from oracle import assert_equals_fresh_load, assert_same_tensors
from peft import LoHaConfig, LoraConfig, PeftMixedModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from refusals import refused
from torch import nn

from hotswap_lab import hotswap_adapter, hotswap_adapter_from_state_dict
from hotswap_lab.core import lora

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


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin, self.mha = nn.Linear(8, 8), nn.MultiheadAttention(8, 2)

    def forward(self, x):
        return self.mha(x, x, x)[0]


def ones(**layers: tuple[int, int]) -> dict[str, torch.Tensor]:
    """An adapter of rank 2 for linear layers of these sizes."""
    a = {f"{name}.lora_A.weight": torch.ones(2, inputs) for name, (inputs, _) in layers.items()}
    return a | {f"{name}.lora_B.weight": torch.ones(outputs, 2) for name, (_, outputs) in layers.items()}


def test_multihead_attention_is_not_added_either():
    model, tensors = get_peft_model(Attention(), LoraConfig(r=2, target_modules=["lin"])), ones(lin=(8, 8), mha=(8, 24))
    swap = hotswap_adapter_from_state_dict
    refused("a MultiheadAttention", swap, model, tensors, "default", LoraConfig(r=2), add_layers=True)


def test_layers_of_another_peft_method_are_not_added_to():
    model = PeftMixedModel(KINDS["linear"].base(), LoraConfig(r=2, target_modules=["first"]), "lora")
    model.add_adapter("loha", LoHaConfig(target_modules=["last"]))
    match, tensors = "already adapted by another PEFT method", ones(first=(12, 16), last=(16, 6))
    refused(match, hotswap_adapter_from_state_dict, model, tensors, "lora", LoraConfig(r=2), add_layers=True)


def test_multihead_attention_from_a_state_dict():
    """Its config may leave out which layers it is for: those of the loaded one."""
    other = get_peft_model(Attention(), LoraConfig(r=2, target_modules=["mha"]))
    randomize(other, "default", seed=1)
    tensors = get_peft_model_state_dict(other)
    model = get_peft_model(Attention(), LoraConfig(r=4, target_modules=["mha"]))
    hotswap_adapter_from_state_dict(model, tensors, "default", LoraConfig(r=2))
    assert_same_tensors(get_peft_model_state_dict(model), tensors)
    assert model.get_base_model().mha.scaling["default"] == 4


def test_tensors_whose_values_share_memory_are_refused():
    model = get_peft_model(KINDS["linear"].base(), LoraConfig(r=2, target_modules=["first"]))
    model.get_base_model().first.lora_A["default"].weight.data = torch.zeros(1, 1).expand(2, 12)
    swap, tensors = hotswap_adapter_from_state_dict, ones(first=(12, 16))
    refused("share memory", swap, model, tensors, "default", LoraConfig(r=2))


#: two adapters that differ in one field of their config, and in their tensors
ONE_FIELD = {
    "r": 2,
    "lora_alpha": 3,
    "use_rslora": True,
    "lora_dropout": 0.3,
    "rank_pattern": {"q_proj": 2},
    "alpha_pattern": {"q_proj": 2},
    "target_modules": ["q_proj"],
    "exclude_modules": ["k_proj"],
    "layers_to_transform": [1],
}


@pytest.mark.parametrize("field", ONE_FIELD)
def test_a_change_of_one_field_is_noticed(tmp_path, field):
    """What is known of one config's layers is kept for the next adapter, as long as nothing of that depends on it."""
    config = dict(r=4, lora_alpha=6, target_modules=["q_proj", "k_proj"])
    every, one, other = save_family(LLAMA, tmp_path, dict(r=4), config, {**config, field: ONE_FIELD[field]})
    model = load(LLAMA, every)
    for folder in (other, one, other):
        hotswap_adapter(model, folder, "default")
        assert_equals_fresh_load(model, LLAMA, folder)


def test_configs_are_told_apart_by_every_field_and_its_type():
    """Verdicts on them are remembered."""

    def known(**fields) -> bytes | None:
        return lora.fingerprint(LoraConfig(**{"r": 1, "target_modules": ["q_proj", "v_proj"], **fields}))

    assert known() == known(target_modules=["v_proj", "q_proj"]) == known(inference_mode=True)
    others = [dict(r=True), dict(r=2), dict(bias="all"), dict(modules_to_save=["x"]), dict(rank_pattern={"q": 1})]
    assert len({known(), *(known(**each) for each in others)}) == 1 + len(others)
    deep: list = []
    for _ in range(5000):
        deep = [deep]
    assert known(layer_replication=deep) is None
