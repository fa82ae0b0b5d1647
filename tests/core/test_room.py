"""Rooms: one memory for a slot, and the settings of what is in it."""

from __future__ import annotations

import pickle

import pytest
from models import KINDS, load, save_random_adapter

from hotswap_lab import prepare_model_for_compiled_hotswap, resolve_slot

LLAMA = KINDS["llama"]


@pytest.fixture
def model(tmp_path):
    config = dict(r=3, lora_alpha=5, rank_pattern={"q_proj": 6})
    model = load(LLAMA, save_random_adapter(LLAMA, tmp_path / "a", seed=1, **config))
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    return model


def test_row_j_of_one_memory_holds_rank_component_j_of_each_parameter(model):
    tensors = resolve_slot(model, "default").tensors
    (memory,) = {
        tensor.parameter.untyped_storage().data_ptr(): tensor.parameter.untyped_storage() for tensor in tensors
    }.values()
    (pitch,) = {tensor.parameter.stride(tensor.rank_axis) for tensor in tensors}
    assert pitch * 4 // 64 % 2 == 1, "an odd number of cache lines"
    assert memory.nbytes() >= 8 * pitch * 4
    columns = []
    for tensor in tensors:
        assert tensor.parameter.data_ptr() % 64 == 0
        start = (tensor.parameter.data_ptr() - memory.data_ptr()) // 4
        columns += range(start, start + tensor.parameter.numel() // 8)
    assert len(columns) == len(set(columns)), "no two tensors share an element"
    assert max(columns) < pitch


def test_a_pickle_does_not_hold_the_memory_once_per_tensor(model):
    parameters = sum(parameter.nbytes for parameter in model.parameters())
    assert len(pickle.dumps(model)) < 3 * parameters + 300_000
