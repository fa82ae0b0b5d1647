"""What the config says after a swap from tensors whose config names other layers."""

from __future__ import annotations

import pytest
from models import KINDS, load, save_random_adapter
from oracle import assert_same_outputs
from peft import LoraConfig

from hotswap_lab import Adapter, hotswap_adapter_from_state_dict, save_adapter

LLAMA = KINDS["llama"]
Q = {"target_modules": ["q_proj", "k_proj"]}
#: each leaves out a layer that the tensors are for
SELECTIONS = {
    "targets": dict(target_modules=["q_proj"]),
    "no targets": dict(target_modules=None),
    "excluded": dict(Q, exclude_modules=["k_proj"]),
    "one layer": dict(Q, layers_to_transform=[0]),
    "one layer by its pattern": dict(Q, layers_to_transform=[0], layers_pattern="layers"),
}


@pytest.mark.parametrize("selection", SELECTIONS)
def test_what_is_saved_is_loaded_as_what_it_is(tmp_path, selection):
    old = save_random_adapter(LLAMA, tmp_path / "old", seed=1, r=4)
    new = save_random_adapter(LLAMA, tmp_path / "new", seed=2, r=4, **Q)
    model, tensors = load(LLAMA, old), Adapter.load(new).tensors
    hotswap_adapter_from_state_dict(model, tensors, "default", LoraConfig(r=4, **SELECTIONS[selection]))
    save_adapter(model, tmp_path / "saved")
    assert_same_outputs(load(LLAMA, str(tmp_path / "saved")), load(LLAMA, new), LLAMA)
