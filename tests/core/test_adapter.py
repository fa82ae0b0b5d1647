"""Reading adapters: from folders, good and bad. The Hub is in test_hub.py."""

from __future__ import annotations

import pytest
import torch
from models import KINDS, load, save_random_adapter
from oracle import assert_equals_fresh_load
from refusals import refused
from safetensors.torch import load_file, save_file

from hotswap_lab import Adapter, AdapterPool, hotswap_adapter, set_strength

KIND = KINDS["linear"]


@pytest.fixture
def folder(tmp_path):
    return save_random_adapter(KIND, tmp_path / "adapter", seed=2, r=6)


@pytest.fixture
def model(tmp_path):
    return load(KIND, save_random_adapter(KIND, tmp_path / "old", seed=1, r=4))


def test_subfolder(tmp_path, model):
    save_random_adapter(KIND, tmp_path / "repository" / "one", seed=3, r=2)
    hotswap_adapter(model, tmp_path / "repository", "default", subfolder="one")
    assert_equals_fresh_load(model, KIND, str(tmp_path / "repository" / "one"))


@pytest.mark.parametrize("of_the_model", [False, True])
def test_key_mapping(folder, model, of_the_model):
    """An adapter for older code of the model, whose layers had other names; some transformers models know these."""
    tensors = load_file(f"{folder}/adapter_model.safetensors")
    old_names = {key.replace("blocks.", "old_blocks.layer_"): tensor for key, tensor in tensors.items()}
    save_file(old_names, f"{folder}/adapter_model.safetensors")
    mapping = {r"old_blocks\.layer_": "blocks."}
    refused("unexpected keys found", hotswap_adapter, model, folder, "default")
    if of_the_model:
        model.get_base_model()._checkpoint_conversion_mapping = mapping
    hotswap_adapter(model, folder, "default", **({} if of_the_model else {"key_mapping": mapping}))
    assert_equals_fresh_load(model, KIND, folder, key_mapping=mapping)


def test_an_adapter_read_once_can_be_swapped_often(folder, model, tmp_path):
    read, tensors = Adapter.load(folder), dict(Adapter.load(tmp_path / "old").tensors)
    second = Adapter.from_state_dict(tensors, Adapter.load(tmp_path / "old").config)
    tensors.popitem()  # which changes nothing of the adapter that was made of them
    for adapter, source in ((read, folder), (second, str(tmp_path / "old")), (read, folder)):
        hotswap_adapter(model, adapter, "default")
        assert_equals_fresh_load(model, KIND, source)
    with pytest.raises(TypeError, match="already read"):
        hotswap_adapter(model, read, "default", revision="main")


def test_unknown_arguments_and_a_missing_config(folder, model):
    with pytest.raises(TypeError, match="revison"):
        hotswap_adapter(model, folder, "default", revison="main")
    refused("config is missing", Adapter.from_state_dict, Adapter.load(folder).tensors, None)


def test_the_default_device_makes_no_difference(folder, model, tmp_path):
    """Tensors of ours are on the CPU, or where the model is."""
    dora = save_random_adapter(KIND, tmp_path / "dora", seed=3, r=3, use_dora=True)
    with torch.device("meta"):
        hotswap_adapter(model, dora, "default")
        hotswap_adapter(model, folder, "default")
        set_strength(model, 0.5, "default")
        set_strength(model, 1.0, "default")
        pool = AdapterPool(model, adapters={"new": folder}, progress=False)
        pool.swap("new")
    assert_equals_fresh_load(model, KIND, folder, prepared=True)
