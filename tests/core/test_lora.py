"""What LoRA's own module says of configs and layers."""

from __future__ import annotations

import copy

import pytest
import torch
from models import KINDS, load, randomize, save_random_adapter
from oracle import assert_equals_fresh_load, assert_same_tensors, untouched
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from torch import nn

from hotswap_lab import HotswapError, hotswap_adapter, hotswap_adapter_from_state_dict, resolve_slot
from hotswap_lab.core import lora

LLAMA = KINDS["llama"]


def complete(config, host):
    return lora.complete(copy.deepcopy(config), host)


CONFIGS = {
    "plain": {},
    "rsLoRA": dict(use_rslora=True),
    "patterns": dict(rank_pattern={"q_proj": 3, "layers.1.mlp.up_proj": 5}, alpha_pattern={"up_proj": 7}),
    "first pattern wins": dict(rank_pattern={"q_proj": 3, r".*layers\.0\..*": 5}),
    "all-linear": dict(target_modules="all-linear"),
    "default targets": dict(target_modules=None),
    "regular expression": dict(target_modules=r".*layers\.1\..*(q|up)_proj"),
    "some layers": dict(layers_to_transform=[0]),
    "excluding": dict(exclude_modules=r".*down_proj"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_targets_and_settings_are_those_that_peft_makes(name):
    """PEFT's own injection is the truth: which layers it puts LoRA on, with which rank, alpha and scaling."""
    options = {"r": 4, "lora_alpha": 6, "target_modules": list(LLAMA.modules), **CONFIGS[name]}
    model = get_peft_model(LLAMA.base(), LoraConfig(**options))
    host = resolve_slot(model, "default").host
    config = complete(LoraConfig(**options), host)
    assert config.target_modules == model.peft_config["default"].target_modules
    for path, module in host.base.named_modules():
        if ".lora_" in path or path.endswith("base_layer") or not path:
            continue
        assert lora.targets(config, path) == isinstance(module, LoraLayer), path
        if isinstance(module, LoraLayer):
            settings = lora.settings_for(config, path)
            for table, field in lora.SCALAR_TABLES.items():
                assert getattr(module, table)["default"] == getattr(settings, field), (path, table)


def test_many_target_modules_are_shortened_as_peft_does():
    """Above twenty full names PEFT looks for shorter ones that mean the same."""
    names = [
        name for name, module in LLAMA.base().named_modules() if isinstance(module, nn.Linear) and "head" not in name
    ]
    wide = [name.replace("layers.0", f"layers.{index}") for index in range(2) for name in names] * 2
    model = get_peft_model(LLAMA.base(), LoraConfig(target_modules=wide))
    config = complete(LoraConfig(target_modules=wide), resolve_slot(model, "default").host)
    assert config.target_modules == model.peft_config["default"].target_modules


def test_the_callers_config_is_not_changed():
    config = LoraConfig(target_modules="all-linear")
    model = get_peft_model(LLAMA.base(), LoraConfig(target_modules=["q_proj"]))
    hotswap_adapter_from_state_dict(model, get_peft_model_state_dict(model), "default", config)
    assert config.target_modules == "all-linear"
    assert model.peft_config["default"].target_modules != "all-linear"


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2)

    def forward(self, x):
        return self.mha(x, x, x)[0]


def test_multihead_attention_is_not_added_either():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.mha = nn.Linear(8, 8), nn.MultiheadAttention(8, 2)

    model = get_peft_model(Both(), LoraConfig(r=2, target_modules=["lin"]))
    with untouched(model):
        tensors = {
            f"{name}.lora_{side}.weight": torch.ones(shape)
            for name, rows in (("lin", 8), ("mha", 24))
            for side, shape in (("A", (2, 8)), ("B", (rows, 2)))
        }
        with pytest.raises(HotswapError, match="a MultiheadAttention"):
            hotswap_adapter_from_state_dict(model, tensors, "default", LoraConfig(r=2), add_layers=True)


def test_layers_of_another_peft_method_are_not_added_to():
    from peft import LoHaConfig, PeftMixedModel

    model = PeftMixedModel(KINDS["linear"].base(), LoraConfig(r=2, target_modules=["first"]), "lora")
    model.add_adapter("loha", LoHaConfig(target_modules=["last"]))
    with untouched(model):
        tensors = {
            "first.lora_A.weight": torch.ones(2, 12),
            "first.lora_B.weight": torch.ones(16, 2),
            "last.lora_A.weight": torch.ones(2, 16),
            "last.lora_B.weight": torch.ones(6, 2),
        }
        with pytest.raises(HotswapError, match="already adapted by another PEFT method"):
            hotswap_adapter_from_state_dict(model, tensors, "lora", LoraConfig(r=2), add_layers=True)


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
    parameter = model.get_base_model().first.lora_A["default"].weight
    parameter.data = torch.zeros(1, 1).expand(2, 12)
    with pytest.raises(HotswapError, match="share memory"):
        hotswap_adapter_from_state_dict(
            model,
            {"first.lora_A.weight": torch.ones(2, 12), "first.lora_B.weight": torch.ones(16, 2)},
            "default",
            LoraConfig(r=2),
        )


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
    every, one, other = (
        save_random_adapter(LLAMA, tmp_path / str(seed), seed=seed, **each)
        for seed, each in enumerate((dict(r=4), config, {**config, field: ONE_FIELD[field]}))
    )
    model = load(LLAMA, every)
    for folder in (other, one, other):
        hotswap_adapter(model, folder, "default")
        assert_equals_fresh_load(model, LLAMA, folder)
