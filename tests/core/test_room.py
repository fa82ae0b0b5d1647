"""Rooms: one memory for a slot, and the settings of what is in it."""

from __future__ import annotations

import copy
import pickle

import pytest
from models import KINDS, load, lora_layers, save_random_adapter

from hotswap_lab import hotswap_adapter, prepare_model_for_compiled_hotswap, resolve_slot

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


def test_layers_have_the_settings_of_what_is_in(model, tmp_path):
    layer = lora_layers(model)[0]
    assert (layer.r["default"], layer.lora_alpha["default"], layer.use_rslora["default"]) == (6, 5, False)
    assert dict(layer.r) == {"default": 6}
    assert "default" in layer.r
    assert layer.r.get("nobody") is None
    new = save_random_adapter(LLAMA, tmp_path / "b", seed=2, r=4, lora_alpha=9, use_rslora=True, lora_dropout=0.2)
    hotswap_adapter(model, new, "default")
    assert (layer.r["default"], layer.lora_alpha["default"], layer.use_rslora["default"]) == (4, 9, True)
    assert layer.lora_dropout["default"].p == 0.2
    assert "p=0.2" in repr(layer.lora_dropout["default"])


def test_a_swap_that_writes_saved_modules_too_is_noted(tmp_path):
    saved = dict(modules_to_save=["lm_head"], target_modules=["q_proj"])
    old, new = (save_random_adapter(LLAMA, tmp_path / str(r), seed=r, r=r, **saved) for r in (3, 5))
    prepare_model_for_compiled_hotswap(model := load(LLAMA, old), target_rank=8)
    hotswap_adapter(model, new, "default")
    room = resolve_slot(model, "default").host.base.hotswap_slots["default"].room
    assert room.state.ranks == [5] * len(lora_layers(model))


def test_a_pickle_does_not_hold_the_memory_once_per_tensor(model):
    parameters = sum(parameter.nbytes for parameter in model.parameters())
    assert len(pickle.dumps(model)) < 3 * parameters + 300_000


def test_copies_have_memory_of_their_own(model):
    twin = copy.deepcopy(model)
    one, other = ({each.untyped_storage().data_ptr() for each in every.parameters()} for every in (model, twin))
    assert not one & other
    assert type(lora_layers(twin)[0].r) is dict
    assert lora_layers(twin)[0].r == {"default": 6}


def test_a_scaling_is_printed_as_a_number(model):
    assert repr(lora_layers(model)[0].scaling) == "{'default': tensor(0.8333, dtype=torch.float64)}"
