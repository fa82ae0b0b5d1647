"""Base weights in an adapter's file: PEFT saves those of embeddings."""

from __future__ import annotations

import pytest
import torch
from models import KINDS, Kind, load, save_random_adapter
from oracle import assert_equals
from peft import PeftModel

from hotswap_lab import hotswap_adapter

LLAMA = KINDS["llama"]


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
