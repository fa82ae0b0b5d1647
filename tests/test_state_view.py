"""Layers that are turned off: absent from everything saved, and missed by nothing that is loaded."""

from __future__ import annotations

import pytest
import torch
from adapters import save_random_adapter_of
from models import COPIES, KINDS, call, copied, load, save_random_adapter
from oracle import assert_same_outputs, assert_same_tensors, assert_untouched, snapshot
from peft import LoHaConfig, LoraConfig

from hotswap_lab import hotswap_adapter, prepare_model_for_compiled_hotswap

LLAMA = KINDS["llama"]


@pytest.fixture
def folders(tmp_path):
    return (
        save_random_adapter(LLAMA, tmp_path / "all", seed=1, r=4),
        save_random_adapter(LLAMA, tmp_path / "few", seed=2, r=4, target_modules=["q_proj"]),
    )


@pytest.fixture
def model(folders):
    model = load(LLAMA, folders[0])
    hotswap_adapter(model, folders[1], "default")
    return model


def test_state_dict_has_the_keys_of_a_fresh_load(model, folders):
    def adapter_keys(each):
        return {key for key in each.state_dict() if ".lora_" in key}

    assert adapter_keys(model) == adapter_keys(load(LLAMA, folders[1]))
    hotswap_adapter(model, folders[0], "default")
    assert adapter_keys(model) == adapter_keys(load(LLAMA, folders[0]))


def test_a_state_dict_goes_back_in_strictly(model, folders):
    before = call(model, LLAMA.inputs())
    result = model.load_state_dict(model.state_dict(), strict=True)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert torch.equal(call(model, LLAMA.inputs()), before)


def test_a_full_state_dict_goes_in_as_well(model, folders):
    """One that was taken before the layers were turned off."""
    model.load_state_dict(load(LLAMA, folders[0]).state_dict(), strict=True)


@pytest.mark.parametrize("way", COPIES)
def test_copies_of_a_swapped_model(model, folders, way):
    twin = copied(model, way)
    assert_same_outputs(twin, load(LLAMA, folders[1]), LLAMA)
    assert twin.state_dict().keys() == model.state_dict().keys()
    before = snapshot(model)
    hotswap_adapter(twin, folders[0], "default")
    assert_same_outputs(twin, load(LLAMA, folders[0]), LLAMA)
    assert_untouched(model, before)


def test_an_off_mark_does_not_outlive_its_weights(model, folders, tmp_path):
    """PEFT deletes the adapter and loads one by the same name on all layers; then the head changes, too."""
    head = save_random_adapter(
        LLAMA, tmp_path / "head", seed=3, r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]
    )
    model.delete_adapter("default")
    model.load_adapter(folders[0], "default")
    model.set_adapter("default")
    hotswap_adapter(model, head, "default")
    assert_same_outputs(model, load(LLAMA, head), LLAMA)


def test_training_does_not_revive_a_layer_that_is_off(folders):
    """A fresh load has no such layer, so no optimizer step may give it weights."""
    model = load(LLAMA, folders[0], is_trainable=True)
    hotswap_adapter(model, folders[1], "default")
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=1.0)
    for _ in range(3):
        optimizer.zero_grad()
        call_with_gradient(model).backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            assert (parameter.abs().max() > 0) == ("q_proj" in name), name


def call_with_gradient(model) -> torch.Tensor:
    return model(**LLAMA.inputs()).logits.square().mean()


def test_other_adapters_on_the_same_layer_are_saved_as_ever(folders):
    model = load(LLAMA, folders[0])
    model.load_adapter(folders[0], "other")
    expected = {key for key in model.state_dict() if ".other." in key}
    hotswap_adapter(model, folders[1], "default")
    assert {key for key in model.state_dict() if ".other." in key} == expected


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("config", [LoraConfig, LoHaConfig])
def test_nothing_around_what_is_saved_goes_into_a_checkpoint(tmp_path, config, rank):
    config = config(r=rank, target_modules=list(LLAMA.modules))
    model = load(LLAMA, save_random_adapter_of(config, tmp_path / "made", seed=1))
    expected = {key: value.clone() for key, value in model.state_dict().items()}
    prepare_model_for_compiled_hotswap(model, target_rank=64)
    assert_same_tensors(model.state_dict(), expected)
    for key, value in model.state_dict().items():
        assert value.untyped_storage().nbytes() == value.nbytes, key
