"""Layers and modules that a swap adds take on the state of those that are there."""

from __future__ import annotations

import pytest
import torch
from adapters import CONFIGS, LLAMA, save_random_adapter_of
from models import call, load
from oracle import assert_same_outputs
from peft import LoraConfig

from hotswap_lab import hotswap_adapter

Q = ["q_proj"]
#: an adapter on few layers, and one that needs more of them, or a module of its own
GROWING = {
    "LoHa": (CONFIGS["LoHa"][2], CONFIGS["LoHa"][0]),
    "a head": (LoraConfig(target_modules=Q), LoraConfig(target_modules=Q, modules_to_save=["lm_head"])),
    "tokens": (LoraConfig(target_modules=Q), LoraConfig(target_modules=Q, trainable_token_indices=[1, 2])),
}


@pytest.fixture(params=GROWING)
def folders(request, tmp_path):
    return [
        save_random_adapter_of(each, tmp_path / f"{seed}", seed) for seed, each in enumerate(GROWING[request.param])
    ]


def test_what_is_added_while_adapters_are_disabled_is_disabled(folders):
    model = load(LLAMA, folders[0])
    model.base_model.disable_adapter_layers()
    hotswap_adapter(model, folders[1], "default", add_layers=True)
    assert torch.equal(call(model, LLAMA.inputs()), call(LLAMA.base(), LLAMA.inputs()))
    model.base_model.enable_adapter_layers()
    assert_same_outputs(model, load(LLAMA, folders[1]), LLAMA)


def test_what_is_added_to_an_inactive_adapter_is_frozen(folders):
    model = load(LLAMA, folders[0], is_trainable=True)
    model.load_adapter(folders[0], "other")
    model.set_adapter("other")
    before = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    hotswap_adapter(model, folders[1], "default", add_layers=True)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == before
