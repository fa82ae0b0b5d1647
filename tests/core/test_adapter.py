"""Reading adapters: from folders, good and bad. The Hub is in test_hub.py."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from models import KINDS, load, save_random_adapter
from oracle import assert_equals_fresh_load, untouched
from peft import LoraConfig
from refusals import refused
from safetensors.torch import load_file, save_file

from hotswap_lab import Adapter, hotswap_adapter

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
    refused("unexpected keys found", hotswap_adapter, model, folder, "default")
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
    with untouched(model):
        refused("can't be read", hotswap_adapter, model, folder, "default")
        torch.save({"x": Attack()}, f"{folder}/adapter_model.bin")
        refused("can't be read", hotswap_adapter, model, folder, "default")
    assert not (tmp_path / "executed").exists()


def test_safetensors_come_first(folder, model):
    torch.save({"not": "read"}, f"{folder}/adapter_model.bin")
    hotswap_adapter(model, folder, "default")
    assert_equals_fresh_load(model, KIND, folder)


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
    refused("config is missing", Adapter.from_state_dict, Adapter.load(folder).tensors, None)


def truncated(size: int):
    def change(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        os.truncate(file, size if size >= 0 else file.stat().st_size + size)

    return change


def with_text(text: str):
    return lambda folder: (folder / "adapter_config.json").write_text(text)


def with_fields(**fields):
    def change(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))

    return change


BROKEN = {
    **{f"weights cut at {size}": (truncated(size), "can't be read") for size in (0, 4, 8, 100, -1)},
    **{f"the config is {text!r}": (with_text(text), "can't be read") for text in ("", "{", "[]", "null", '{"r": 4}')},
    **{
        f"the config is {text!r}": (with_text(text), "^The adapter from .* is of an unknown kind")
        for text in ('{"peft_type": "NEW"}', '{"peft_type": 3}')
    },
    **{
        f"the config says {fields}": (with_fields(**fields), None)
        for fields in (
            *(dict(r=rank) for rank in (-1, 0, 4.5, None, "x")),
            dict(lora_alpha="8"),
            dict(rank_pattern=[1]),
        )
    },
    "no weights": (lambda folder: os.remove(folder / "adapter_model.safetensors"), "Can't find weights for"),
    "no config": (lambda folder: os.remove(folder / "adapter_config.json"), r"Can't find 'adapter_config\.json' at"),
    "no folder": (shutil.rmtree, r"Can't find 'adapter_config\.json' at"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_broken_is_refused(folder, model, what):
    change, match = BROKEN[what]
    change(Path(folder))
    refused(match, hotswap_adapter, model, folder, "default")


def test_a_state_dict_that_is_changed_later_changes_no_adapter(folder, model):
    read = Adapter.load(folder)
    tensors = dict(read.tensors)
    adapter = Adapter.from_state_dict(tensors, read.config)
    tensors.popitem()
    hotswap_adapter(model, adapter, "default")
    assert_equals_fresh_load(model, KIND, folder)


NO_TENSORS = {
    "a list": ([1.0], "a? ?list under"),
    "integers": (torch.ones(1, 12, dtype=torch.int8), "a tensor of torch.int8"),
    "nothing": (None, "NoneType under"),
}


@pytest.mark.parametrize("what", NO_TENSORS)
def test_what_is_no_tensor_is_named(what):
    value, found = NO_TENSORS[what]
    match = f"{found}(.|\\n)*'first.lora_A.weight'"
    refused(match, Adapter.from_state_dict, {"first.lora_A.weight": value}, LoraConfig(r=1))
