"""Layers and modules that a swap adds take on the state of those that are there."""

from __future__ import annotations

import pytest
import torch
from adapters import LLAMA
from models import call, load
from oracle import assert_same_outputs

from hotswap_lab import hotswap_adapter

#: of these, an adapter on few layers, and one that needs more of them, or a module of its own
GROWING = {"LoHa": (2, 0), "modules_to_save": (2, 0), "trainable tokens": (3, 0)}


@pytest.fixture(params=GROWING)
def growing(request, method_folders):
    return [method_folders(request.param)[number] for number in GROWING[request.param]]


def test_what_is_added_while_adapters_are_disabled_is_disabled(growing):
    few, more = growing
    model = load(LLAMA, few)
    model.base_model.disable_adapter_layers()
    hotswap_adapter(model, more, "default", add_layers=True)
    assert torch.equal(call(model, LLAMA.inputs()), call(LLAMA.base(), LLAMA.inputs()))
    model.base_model.enable_adapter_layers()
    assert_same_outputs(model, load(LLAMA, more), LLAMA)


def test_what_is_added_to_an_inactive_adapter_is_frozen(growing):
    few, more = growing
    model = load(LLAMA, few, is_trainable=True)
    model.load_adapter(few, "other")
    model.set_adapter("other")
    before = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    hotswap_adapter(model, more, "default", add_layers=True)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == before
