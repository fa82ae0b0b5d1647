"""What is saved after a swap is what would be saved after a fresh load."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from models import KINDS, load, randomize, save_random_adapter
from oracle import assert_equals_fresh_load, assert_same_outputs, assert_same_tensors
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from safetensors.torch import load_file

from hotswap_lab import HotswapError, hotswap_adapter, resolve_slot, save_adapter
from hotswap_lab import saving as saving_module

LLAMA = KINDS["llama"]


def read(folder) -> tuple[dict, dict]:
    config = json.loads((Path(folder) / "adapter_config.json").read_text())
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()
    return config, load_file(Path(folder) / "adapter_model.safetensors")


def test_same_files_as_pefts_own_save_after_a_fresh_load(kind, tmp_path):
    old = save_random_adapter(kind, tmp_path / "old", seed=1, r=4)
    new = save_random_adapter(kind, tmp_path / "new", seed=2, r=8, target_modules=list(kind.modules)[:2])
    model = load(kind, old)
    hotswap_adapter(model, new, "default")
    save_adapter(model, tmp_path / "ours")
    load(kind, new).save_pretrained(tmp_path / "fresh", save_embedding_layers=False)
    (our_config, our_tensors), (config, tensors) = read(tmp_path / "ours"), read(tmp_path / "fresh")
    assert our_config == config
    # PEFT 0.20 saves a shared block once per path, PEFT 0.21 once
    tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith("base_model.model.late.")}
    assert_same_tensors(our_tensors, tensors)
    assert_equals_fresh_load(load(kind, str(tmp_path / "ours")), kind, new)


@pytest.mark.parametrize("compiled", [False, True])
def test_from_any_wrapping_and_any_name(tmp_path, compiled):
    old = save_random_adapter(LLAMA, tmp_path / "old", seed=1, r=4)
    other = save_random_adapter(LLAMA, tmp_path / "other", seed=3, r=2)
    new = save_random_adapter(LLAMA, tmp_path / "new", seed=2, r=6, target_modules=["q_proj"])
    model = load(LLAMA, old, "mine")
    model.load_adapter(other, "mine_too")
    hotswap_adapter(model, new, "mine")
    save_adapter(torch.compile(model, backend="eager") if compiled else model, tmp_path / "saved", "mine")
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert_equals_fresh_load(load(LLAMA, str(tmp_path / "saved")), LLAMA, new)


def test_from_a_model_that_is_no_peft_model(tmp_path):
    config = LoraConfig(r=4, target_modules=["q_proj"])
    model = inject_adapter_in_model(config, LLAMA.base())
    randomize(model, "default", seed=5)
    save_adapter(model, tmp_path / "saved")
    assert_same_outputs(PeftModel.from_pretrained(LLAMA.base(), tmp_path / "saved"), model, LLAMA)


def test_the_saved_tensors_share_no_memory_with_the_model(tmp_path):
    old = save_random_adapter(LLAMA, tmp_path / "old", seed=1, r=4)
    slot = resolve_slot(load(LLAMA, old), "default")
    addresses = set(slot.data_ptrs())
    assert not addresses & {tensor.data_ptr() for tensor in saving_module.saved_tensors(slot).values()}


def test_an_error_while_saving_leaves_the_older_file_whole(tmp_path, monkeypatch):
    old = save_random_adapter(LLAMA, tmp_path / "old", seed=1, r=4)
    model = load(LLAMA, old)
    target = tmp_path / "target"
    save_adapter(model, target)
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    randomize(model, "default", seed=9)

    def disk_full(tensors, file, metadata):
        Path(file).write_bytes(b"half")
        raise OSError("No space left on device (pretended)")

    monkeypatch.setattr(saving_module, "save_file", disk_full)
    with pytest.raises(OSError, match="No space left"):
        save_adapter(model, target)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old", "target"]


def test_links_of_others_in_the_folder_are_left_alone(tmp_path):
    folders = [save_random_adapter(LLAMA, tmp_path / str(seed), seed=seed, r=4) for seed in (1, 2)]
    target = tmp_path / "target"
    (target / "below").mkdir(parents=True)
    links = {"latest": ".", "up": "..", "inner": "below", "nowhere": "not/there", "itself": "itself"}
    for name, leads_to in links.items():
        (target / name).symlink_to(leads_to)
    for folder in folders:
        save_adapter(load(LLAMA, folder), target)
        assert {name: os.readlink(target / name) for name in links} == links
        assert {path.name for path in target.iterdir()} == {
            *("adapter_config.json", "adapter_model.safetensors", "below", *links)
        }
        assert_equals_fresh_load(load(LLAMA, str(target / "latest")), LLAMA, folder)


def test_an_unknown_name_is_refused(tmp_path):
    model = load(LLAMA, save_random_adapter(LLAMA, tmp_path / "old", seed=1, r=4))
    with pytest.raises(HotswapError, match="Adapter nobody not found"):
        save_adapter(model, tmp_path / "target", "nobody")
    assert not (tmp_path / "target").exists()
