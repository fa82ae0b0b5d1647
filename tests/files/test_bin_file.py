"""Files of weights in PyTorch's own format. What is in a pickle is never run: see ``robustness/test_bad_files.py``."""

from __future__ import annotations

import os

import torch
from models import KINDS, load, save_family
from oracle import assert_equals_fresh_load
from refusals import refused
from safetensors.torch import load_file

from hotswap_lab import hotswap_adapter

KIND = KINDS["linear"]


def test_bin_files_are_read_where_there_are_no_safetensors(tmp_path):
    old, new = save_family(KIND, tmp_path, dict(r=4), dict(r=6))
    tensors = load_file(f"{new}/adapter_model.safetensors")
    torch.save({"not": "read"}, f"{new}/adapter_model.bin")
    model = load(KIND, old)
    hotswap_adapter(model, new, "default")
    assert_equals_fresh_load(model, KIND, new)
    os.remove(f"{new}/adapter_model.safetensors")
    refused("str under 'not'", hotswap_adapter, model, new, "default")
    torch.save(tensors, f"{new}/adapter_model.bin")
    hotswap_adapter(model, old, "default")
    hotswap_adapter(model, new, "default")
    assert_equals_fresh_load(model, KIND, new)
