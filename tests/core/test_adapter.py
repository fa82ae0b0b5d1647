"""Reading adapters: from folders, good and bad. The Hub is in test_hub.py."""

from __future__ import annotations

import json
import os
import pickle

import pytest
import torch
from models import KINDS, load, save_random_adapter
from oracle import assert_equals_fresh_load, assert_untouched, snapshot
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from hotswap_lab import Adapter, HotswapError, hotswap_adapter

KIND = KINDS["linear"]


@pytest.fixture
def folder(tmp_path):
    return save_random_adapter(KIND, tmp_path / "adapter", seed=2, r=6)


@pytest.fixture
def model(tmp_path):
    return load(KIND, save_random_adapter(KIND, tmp_path / "old", seed=1, r=4))


def test_tensors_and_config_are_those_of_the_files(folder):
    adapter = Adapter.load(folder)
    expected = load_file(f"{folder}/adapter_model.safetensors")
    assert adapter.tensors.keys() == expected.keys()
    assert all(torch.equal(adapter.tensors[key], expected[key]) for key in expected)
    assert adapter.config.to_dict() == LoraConfig.from_pretrained(folder).to_dict()
    assert adapter.nbytes == os.path.getsize(f"{folder}/adapter_model.safetensors") - _header_size(folder)
    assert adapter.label == "adapter"


def _header_size(folder: str) -> int:
    with open(f"{folder}/adapter_model.safetensors", "rb") as stream:
        return 8 + int.from_bytes(stream.read(8), "little")


def test_subfolder(tmp_path, model):
    save_random_adapter(KIND, tmp_path / "repository" / "one", seed=3, r=2)
    hotswap_adapter(model, tmp_path / "repository", "default", subfolder="one")
    assert_equals_fresh_load(model, KIND, str(tmp_path / "repository" / "one"))


def test_key_mapping(tmp_path, folder, model):
    """An adapter for an older version of the model's code, whose layers had other names."""
    tensors = load_file(f"{folder}/adapter_model.safetensors")
    old_names = {key.replace("blocks.", "old_blocks.layer_"): tensor for key, tensor in tensors.items()}
    assert old_names.keys() != tensors.keys()
    save_file(old_names, f"{folder}/adapter_model.safetensors")
    mapping = {r"old_blocks\.layer_": "blocks."}
    before = snapshot(model)
    with pytest.raises(HotswapError, match="unexpected keys found"):
        hotswap_adapter(model, folder, "default")
    assert_untouched(model, before)
    hotswap_adapter(model, folder, "default", key_mapping=mapping)
    assert_equals_fresh_load(model, KIND, folder, key_mapping=mapping)


def test_the_models_own_key_mapping_is_the_default(folder, model):
    """transformers models that renamed their modules carry the mapping themselves; a fresh load applies it."""
    tensors = load_file(f"{folder}/adapter_model.safetensors")
    renamed = {key.replace("blocks.", "old_blocks.layer_"): tensor for key, tensor in tensors.items()}
    save_file(renamed, f"{folder}/adapter_model.safetensors")
    model.get_base_model()._checkpoint_conversion_mapping = {r"old_blocks\.layer_": "blocks."}
    hotswap_adapter(model, folder, "default")
    assert_equals_fresh_load(model, KIND, folder, key_mapping={r"old_blocks\.layer_": "blocks."})


def test_bin_files_are_read_without_executing_anything(tmp_path, folder, model):
    tensors = load_file(f"{folder}/adapter_model.safetensors")
    os.remove(f"{folder}/adapter_model.safetensors")
    torch.save(tensors, f"{folder}/adapter_model.bin")
    hotswap_adapter(model, folder, "default")
    assert_equals_fresh_load(model, KIND, folder)

    class Attack:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    with open(f"{folder}/adapter_model.bin", "wb") as stream:
        pickle.dump({"x": Attack()}, stream)
    before = snapshot(model)
    with pytest.raises(HotswapError, match="can't be read"):
        hotswap_adapter(model, folder, "default")
    torch.save({"x": Attack()}, f"{folder}/adapter_model.bin")
    with pytest.raises(HotswapError, match="can't be read"):
        hotswap_adapter(model, folder, "default")
    assert_untouched(model, before)
    assert not (tmp_path / "executed").exists()


def test_safetensors_come_first(folder, model):
    torch.save({"not": "read"}, f"{folder}/adapter_model.bin")
    hotswap_adapter(model, folder, "default")
    assert_equals_fresh_load(model, KIND, folder)


def truncate(file: str, size: int) -> None:
    with open(file, "r+b") as stream:
        stream.truncate(size)


@pytest.mark.parametrize("size", [0, 4, 8, 100, -1])
def test_truncated_weights(folder, model, size):
    file = f"{folder}/adapter_model.safetensors"
    truncate(file, size if size >= 0 else os.path.getsize(file) + size)
    before = snapshot(model)
    with pytest.raises(HotswapError, match="can't be read"):
        hotswap_adapter(model, folder, "default")
    assert_untouched(model, before)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        *[(text, "can't be read") for text in ("", "{", "[]", "null", '{"r": 4}')],
        ('{"peft_type": "NEW"}', "^The adapter from .* is of an unknown kind"),
        ('{"peft_type": 3}', "^The adapter from .* is of an unknown kind"),
        ('{"peft_type": "LORA", "r": "x"}', None),
    ],
)
def test_broken_configs(folder, model, text, match):
    with open(f"{folder}/adapter_config.json", "w") as stream:
        stream.write(text)
    before = snapshot(model)
    with pytest.raises(HotswapError, match=match):
        hotswap_adapter(model, folder, "default")
    assert_untouched(model, before)


@pytest.mark.parametrize(
    "change", [dict(r=-1), dict(r=0), dict(r=4.5), dict(r=None), dict(lora_alpha="8"), dict(rank_pattern=[1])]
)
def test_values_of_the_wrong_kind(folder, model, change):
    file = f"{folder}/adapter_config.json"
    with open(file) as stream:
        config = json.load(stream)
    with open(file, "w") as stream:
        json.dump({**config, **change}, stream)
    before = snapshot(model)
    with pytest.raises(HotswapError):
        hotswap_adapter(model, folder, "default")
    assert_untouched(model, before)


def test_missing_files(tmp_path, folder, model):
    before = snapshot(model)
    os.remove(f"{folder}/adapter_model.safetensors")
    with pytest.raises(ValueError, match="Can't find weights for"):
        hotswap_adapter(model, folder, "default")
    os.remove(f"{folder}/adapter_config.json")
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config\.json' at"):
        hotswap_adapter(model, folder, "default")
    with pytest.raises(HotswapError, match=r"Can't find 'adapter_config\.json' at"):
        hotswap_adapter(model, tmp_path / "nowhere", "default")
    assert_untouched(model, before)


def test_an_adapter_read_once_can_be_swapped_often(folder, model, tmp_path):
    first, second = Adapter.load(folder), Adapter.load(tmp_path / "old")
    for adapter, source in ((first, folder), (second, str(tmp_path / "old")), (first, folder)):
        hotswap_adapter(model, adapter, "default")
        assert_equals_fresh_load(model, KIND, source)
    with pytest.raises(TypeError, match="already read"):
        hotswap_adapter(model, first, "default", revision="main")


def test_unknown_arguments(folder, model):
    with pytest.raises(TypeError, match="revison"):
        hotswap_adapter(model, folder, "default", revison="main")


def test_a_config_is_needed(folder, model):
    with pytest.raises(HotswapError, match="config is missing"):
        Adapter.from_state_dict(Adapter.load(folder).tensors, None)


def test_a_state_dict_that_is_changed_later_changes_no_adapter(folder, model):
    read = Adapter.load(folder)
    tensors = dict(read.tensors)
    adapter = Adapter.from_state_dict(tensors, read.config)
    tensors.popitem()
    hotswap_adapter(model, adapter, "default")
    assert_equals_fresh_load(model, KIND, folder)


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ([1.0], "a? ?list under"),
        (torch.ones(1, 12, dtype=torch.int8), "a tensor of torch.int8"),
        (None, "NoneType under"),
    ],
    ids=["a list", "integers", "nothing"],
)
def test_what_is_no_tensor_is_named(value, found):
    with pytest.raises(HotswapError, match=f"{found}(.|\\n)*'first.lora_A.weight'"):
        Adapter.from_state_dict({"first.lora_A.weight": value}, LoraConfig(r=1))
