"""The config of a mix."""

from __future__ import annotations

import pytest
from models import KINDS, load, save_random_adapter
from oracle import assert_same_outputs

from hotswap_lab import AdapterPool, demo, save_adapter, verify_hotswap

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


def test_a_saved_mix_of_many_layers_is_what_the_model_has(tmp_path):
    """A fresh load shortens twenty names of layers or more."""
    model, _ = demo.load("reverse")
    adapters = {name: demo.adapter_path(name) for name in ("shout", "sort")}
    AdapterPool(model, adapters=adapters, target_rank=64, progress=False).swap({"shout": 0.7, "sort": 0.3})
    save_adapter(model, tmp_path / "saved")
    assert verify_hotswap(model, tmp_path / "saved", base=demo.load_base)
