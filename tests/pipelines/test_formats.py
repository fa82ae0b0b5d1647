"""The LoRA file of a whole pipeline, passed to a function for one model: the refusal names the function to call."""

from __future__ import annotations

import pytest
import torch
from refusals import refused
from safetensors.torch import save_file

from hotswap_lab import demo, hotswap_adapter

KEY = "unet.down_blocks.0.attn.to_q.lora_A.weight"


@pytest.mark.parametrize("way", ["file", "folder"])
def test_the_refusal_names_hotswap_pipeline(tmp_path, way):
    file = tmp_path / "pytorch_lora_weights.safetensors"
    save_file({KEY: torch.ones(2, 2)}, file)
    model, _ = demo.load("reverse")
    found = r"Can't find 'adapter_config\.json'"
    error = refused(found, hotswap_adapter, model, file if way == "file" else tmp_path, "default")
    assert "hotswap_lab.hotswap_pipeline" in error.refusals[0].next_step
