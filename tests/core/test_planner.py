"""Plans: what the config says after a swap, and base weights in an adapter's file."""

from __future__ import annotations

import pytest
import torch
from models import KINDS, Kind, load, save_random_adapter
from oracle import assert_equals, assert_same_outputs
from peft import LoraConfig, PeftModel

from hotswap_lab import Adapter, hotswap_adapter, hotswap_adapter_from_state_dict, save_adapter

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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_base_weights_of_higher_precision_that_are_the_models_own(tmp_path, dtype):
    """They are what the model has, rounded: nothing speaks against a swap to an adapter without them, and back."""
    half = Kind(lambda: LLAMA.make_random().to(dtype), LLAMA.make_inputs, LLAMA.modules)
    embedded, plain = (
        save_random_adapter(LLAMA, tmp_path / str(seed), seed=seed, target_modules=targets)
        for seed, targets in enumerate((["embed_tokens", "q_proj"], ["q_proj"]))
    )
    model = PeftModel.from_pretrained(half.base(), plain).eval()
    model.load_adapter(plain, "neighbor")  # whose base weights must stay as they are
    for folder in (embedded, plain, embedded):
        hotswap_adapter(model, folder, "default", add_layers=True)
        fresh = load(half, folder).requires_grad_(False)  # PEFT leaves an embedding that it converts trainable
        assert_equals(model, fresh, half, margin=10)
