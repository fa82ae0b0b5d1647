"""Adapters that transformers loads itself (``model.load_adapter``), with no PeftModel around the model."""

from __future__ import annotations

import pytest
from models import KINDS, load, save_family
from oracle import assert_same_outputs, assert_same_tensors
from peft.utils import get_peft_model_state_dict

from hotswap_lab import AdapterPool, hotswap_adapter, save_adapter, verify_hotswap

LLAMA = KINDS["llama"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    fewer = dict(r=2, target_modules=["q_proj", "k_proj"], use_rslora=True)
    patterns = dict(r=4, lora_dropout=0.1, alpha_pattern={"q_proj": 32})
    return save_family(LLAMA, tmp_path_factory.mktemp("adapters"), dict(r=4), dict(r=8, lora_alpha=3), fewer, patterns)


def native(folder: str):
    model = LLAMA.base()
    model.load_adapter(folder, adapter_name="default")
    return model.eval()


def test_a_swap_equals_a_fresh_load_by_transformers_and_by_peft(folders, tmp_path):
    model = native(folders[0])
    for number in (1, 2, 3, 0):
        hotswap_adapter(model, folders[number], "default")
        fresh = native(folders[number])
        assert_same_outputs(model, fresh, LLAMA)
        assert_same_outputs(model, load(LLAMA, folders[number]), LLAMA)
        assert model.peft_config["default"].to_dict() == fresh.peft_config["default"].to_dict()
        assert_same_tensors(get_peft_model_state_dict(model), get_peft_model_state_dict(fresh))
        assert verify_hotswap(model, folders[number])
        save_adapter(model, tmp_path / str(number))
        assert_same_outputs(model, load(LLAMA, str(tmp_path / str(number))), LLAMA)


def test_a_pool(folders):
    model = native(folders[2])
    pool = AdapterPool(model, adapters={str(i): folder for i, folder in enumerate(folders)}, progress=False)
    for number in (0, 1, 3, 2, 1):
        pool.swap(str(number))
        assert_same_outputs(model, load(LLAMA, folders[number]), LLAMA)
