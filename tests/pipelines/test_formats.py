"""The file of a whole pipeline, given to a function for one model: who reads it is named."""

from __future__ import annotations

import pytest
import torch
from refusals import refused
from safetensors.torch import save_file

from hotswap_lab import demo, hotswap_adapter

KEYS = {
    "diffusers": "unet.down_blocks.0.attn.to_q.lora_A.weight",
    "kohya": "lora_unet_down_blocks_0_attn_to_q.lora_down.weight",
    "a single file": "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight",
}


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
@pytest.mark.parametrize("way", ["file", "folder"])
def test_by_its_keys(tmp_path, key, way):
    save_file({key: torch.ones(2, 2)}, tmp_path / "style.safetensors")
    assert "hotswap_pipeline(pipe, " in refusal(tmp_path / "style.safetensors" if way == "file" else tmp_path)


def test_by_its_name(tmp_path):
    torch.save({}, tmp_path / "pytorch_lora_weights.bin")
    assert "hotswap_pipeline(pipe, " in refusal(tmp_path)


def test_other_files_are_not_taken_for_one(tmp_path):
    save_file({"base_model.model.lin.lora_A.weight": torch.ones(2, 2)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"no safetensors")
    assert "hotswap_pipeline" not in refusal(tmp_path)


def refusal(source) -> str:
    model, _ = demo.load("reverse")
    error = refused(r"Can't find 'adapter_config\.json'", hotswap_adapter, model, source, "default")
    return error.refusals[0].next_step
