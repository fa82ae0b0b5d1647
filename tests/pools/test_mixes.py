"""The config of a mix."""

from __future__ import annotations

import pytest
from models import KINDS, load, save_random_adapter
from oracle import assert_same_outputs

from hotswap_lab import AdapterPool, save_adapter

LLAMA = KINDS["llama"]
Q = dict(r=4, target_modules=["q_proj", "k_proj"])
#: each keeps the first adapter of the mix from layers that the second one is on
FIRST = {
    "plain": {},
    "excluded": dict(exclude_modules=["k_proj"]),
    "one layer": dict(layers_to_transform=[0], layers_pattern="layers"),
    "rsLoRA": dict(use_rslora=True, lora_dropout=0.3),
}


@pytest.mark.parametrize("first", FIRST)
def test_a_mix_is_saved_with_all_of_its_layers(tmp_path, first):
    sources = {
        "first": save_random_adapter(LLAMA, tmp_path / "first", seed=1, **Q, **FIRST[first]),
        "second": save_random_adapter(LLAMA, tmp_path / "second", seed=2, **Q),
    }
    model = load(LLAMA, sources["second"])
    pool = AdapterPool(model, adapters=sources, target_rank=8, progress=False)
    pool.swap({"first": 0.7, "second": 0.4})
    save_adapter(model, tmp_path / "saved")
    assert_same_outputs(load(LLAMA, str(tmp_path / "saved")), model, LLAMA)
