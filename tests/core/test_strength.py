"""Strength on models that aren't compiled; test_compiled_swaps.py has the compiled ones."""

from __future__ import annotations

import pytest
import torch
from adapters import save_random_adapter_of
from models import ARCHITECTURES, KINDS, call, load, lora_layers, save_family, save_random_adapter
from oracle import assert_close, assert_equals_fresh_load, assert_same_outputs
from peft import LoraConfig, get_peft_model
from refusals import refused

from hotswap_lab import (
    AdapterPool,
    get_strength,
    hotswap_adapter,
    prepare_model_for_compiled_hotswap,
    save_adapter,
    set_strength,
)

LINEAR = KINDS["linear"]
CONFIG = dict(r=4, lora_alpha=6, rank_pattern={"last": 2}, alpha_pattern={"first": 3, "blocks.1": 0}, use_rslora=True)


@pytest.fixture(params=[False, True], ids=["floats", "tensors"])
def model(request, tmp_path):
    model = load(LINEAR, save_random_adapter(LINEAR, tmp_path / "a", seed=1, **CONFIG))
    if request.param:
        prepare_model_for_compiled_hotswap(model, target_rank=8)
    return model


def scaled(folder, strength):
    fresh = load(LINEAR, folder)
    for layer in lora_layers(fresh):
        layer.scaling["default"] *= strength
    return call(fresh, LINEAR.inputs())


@pytest.mark.parametrize("strength", [0, 0.25, 1, -0.5])
def test_every_strength(model, tmp_path, strength):
    set_strength(model, 7)
    set_strength(model, strength)
    assert get_strength(model) == strength
    assert_close(call(model, LINEAR.inputs()), scaled(tmp_path / "a", strength))
    if not strength:
        assert torch.equal(call(model, LINEAR.inputs()), call(LINEAR.base(), LINEAR.inputs()))


def test_it_is_as_exact_as_a_float(model):
    """Also in a prepared model whose parameters were moved out of their room."""
    scaling = model.base_model.model.first.scaling
    full = float(scaling["default"])
    for _ in range(2):
        set_strength(model, 0.3)
        assert float(scaling["default"]) == 0.3 * full
        model.double().float()


def test_a_swap_ends_it_and_saving_ignores_it(model, tmp_path):
    """Layers that are off have none."""
    set_strength(model, 0.5)
    save_adapter(model, tmp_path / "saved")
    hotswap_adapter(model, save_random_adapter(LINEAR, tmp_path / "b", 2, r=3, target_modules=["first"]), "default")
    assert get_strength(model) == 1
    hotswap_adapter(model, tmp_path / "saved", "default")
    prepared = isinstance(model.base_model.model.first.scaling["default"], torch.Tensor)
    assert_equals_fresh_load(model, LINEAR, str(tmp_path / "a"), prepared=prepared)


def test_an_off_mark_does_not_outlive_its_weights(tmp_path):
    """The adapter was turned off on some layers, then deleted, and another one loaded by the same name."""
    few = dict(r=4, target_modules=["first"])
    full, few, head = save_family(LINEAR, tmp_path, dict(r=4), few, {**few, "modules_to_save": ["last"]})
    for prepared in (True, False):
        model = load(LINEAR, full)
        hotswap_adapter(model, few, "default")
        model.load_adapter(few, "other")
        model.delete_adapter("default")
        model.load_adapter(full, "default")
        model.set_adapter("default")
        model.delete_adapter("other")
        if prepared:
            prepare_model_for_compiled_hotswap(model, target_rank=8)
        set_strength(model, 0.5)
        assert_close(call(model, LINEAR.inputs()), scaled(full, 0.5))
    hotswap_adapter(model, head, "default")
    assert_same_outputs(model, load(LINEAR, head), LINEAR)


def test_what_can_not_be_set_or_said(model):
    for strength in (float("nan"), float("inf"), "1", None, True):
        refused("not a number", set_strength, model, strength)
    refused("not found", set_strength, model, 0.5, "other")
    model.base_model.model.first.set_scale("default", 0.5)
    refused("different strengths", get_strength, model)
    model.merge_adapter()
    refused("merged into the base weights", set_strength, model, 0.5)


BESIDE = [
    dict(modules_to_save=["lm_head"]),
    dict(trainable_token_indices=[1, 2, 3]),
    dict(bias="all"),
    dict(layer_replication=[(0, 2), (0, 2)]),
    dict(use_dora=True),
]


@pytest.mark.parametrize("beside", BESIDE, ids=lambda beside: next(iter(beside)))
def test_what_no_scaling_reaches(tmp_path, beside):
    """A strength of 0 has to be the base model, and these would stay."""
    kind = ARCHITECTURES["qwen"]
    config = LoraConfig(r=4, target_modules=["q_proj"], **beside)
    model = load(kind, save_random_adapter_of(config, tmp_path / "a", 1, kind))
    for strength in (0, 0.5):
        refused(f"would stay at full strength|{next(iter(beside))}", set_strength, model, strength)
    if not beside.keys() & {"use_dora", "modules_to_save"}:  # which a pool can pack
        adapters = {"a": str(tmp_path / "a")}
        refused("A pool is for LoRA alone", AdapterPool, model, adapters=adapters, progress=False)


def test_base_weights_that_a_swap_brought_stay(tmp_path):
    """PEFT saves embeddings beside their LoRA, and a swap takes them over where they are others than the model's."""
    kind = ARCHITECTURES["llama"]
    plain = save_random_adapter_of(LoraConfig(r=4, target_modules=["q_proj"]), tmp_path / "plain", 1, kind)
    embedded = get_peft_model(kind.base(), LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"]))
    embedded.get_base_model().model.embed_tokens.base_layer.weight.data.mul_(1.5)
    embedded.save_pretrained(tmp_path / "embedded")
    model = load(kind, plain)
    hotswap_adapter(model, str(tmp_path / "embedded"), "default", add_layers=True)
    refused("base weights of its own", set_strength, model, 0)
    hotswap_adapter(model, plain, "default")
    set_strength(model, 0)
    assert_close(call(model, kind.inputs()), call(kind.base(), kind.inputs()))


def test_preparing_keeps_the_strength(tmp_path):
    folder = save_random_adapter(LINEAR, tmp_path / "a", seed=1, **CONFIG)
    model = load(LINEAR, folder)
    set_strength(model, 0.5)
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    assert get_strength(model) == 0.5
    assert_close(call(model, LINEAR.inputs()), scaled(folder, 0.5))
