"""Rooms: one memory for a slot, and the settings of what is in it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from models import KINDS, load, save_random_adapter
from peft.tuners.lora import LoraLayer
from refusals import refused

from hotswap_lab import (
    commit,
    hotswap_adapter,
    plan_hotswap,
    prepare_model_for_compiled_hotswap,
    resolve_slot,
)
from hotswap_lab.core.slot import SLOTS, room_of

LLAMA, CONV = KINDS["llama"], KINDS["conv"]


@pytest.fixture
def model(tmp_path):
    model = load(
        LLAMA, save_random_adapter(LLAMA, tmp_path / "a", seed=1, r=3, lora_alpha=5, rank_pattern={"q_proj": 6})
    )
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    return model


def the_room(model):
    return room_of(model.get_base_model(), "default")


def first_layer(model) -> LoraLayer:
    return model.get_base_model().model.layers[0].self_attn.q_proj


def test_parameters_are_views_of_one_memory(model):
    room = the_room(model)
    (band,) = room.bands
    memory = band.memory
    assert memory.shape[0] == 8
    assert memory.stride(0) * 4 // 64 % 2 == 1, "an odd number of cache lines"
    seen = torch.zeros_like(memory, dtype=torch.bool)
    for tensor in room.slot.tensors:
        parameter = tensor.parameter
        assert parameter.untyped_storage().data_ptr() == memory.untyped_storage().data_ptr()
        assert parameter.data_ptr() % 64 == 0
        assert parameter.stride(tensor.rank_axis) == memory.stride(0)
        place = room.places[tensor][1]
        mine = place.view(seen)
        assert not mine.any(), "no two tensors share an element"
        mine.fill_(True)


def test_row_j_holds_rank_component_j(model):
    room = the_room(model)
    memory = room.bands[0].memory
    with torch.no_grad():
        memory.zero_()
        memory[2].fill_(1)
    for tensor in resolve_slot(model, "default").tensors:
        components = tensor.parameter.movedim(tensor.rank_axis, 0)
        assert components[2].all()
        assert not components[:2].any()
        assert not components[3:].any()


def test_grouped_convolutions_lie_in_the_tail(tmp_path):
    model = load(CONV, save_random_adapter(CONV, tmp_path / "a", seed=1, r=4))
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    *_, tail = the_room(model).bands
    assert tail.is_tail
    assert {place.tensor.owner for place in tail.places} == {
        getattr(layer, table)["default"]
        for layer in model.modules()
        if isinstance(layer, LoraLayer) and layer.get_base_layer().groups > 1
        for table in ("lora_A", "lora_B")
    }


def test_layers_have_the_settings_of_what_is_in(model, tmp_path):
    layer = first_layer(model)
    assert (layer.r["default"], layer.lora_alpha["default"], layer.use_rslora["default"]) == (6, 5, False)
    assert dict(layer.r) == {"default": 6}
    assert "default" in layer.r
    assert layer.r.get("nobody") is None
    new = save_random_adapter(LLAMA, tmp_path / "b", seed=2, r=4, lora_alpha=9, use_rslora=True, lora_dropout=0.2)
    hotswap_adapter(model, new, "default")
    assert (layer.r["default"], layer.lora_alpha["default"], layer.use_rslora["default"]) == (4, 9, True)
    assert layer.lora_dropout["default"].p == 0.2
    assert "p=0.2" in repr(layer.lora_dropout["default"])


def test_a_pickle_does_not_hold_the_memory_once_per_tensor(model):
    parameters = sum(parameter.nbytes for parameter in model.parameters())
    assert len(pickle.dumps(model)) < 3 * parameters + 300_000


def test_copies_have_memory_of_their_own(model):
    twin = copy.deepcopy(model)
    assert twin.get_base_model().__dict__[SLOTS] == {}
    mine = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    assert not mine & {parameter.untyped_storage().data_ptr() for parameter in twin.parameters()}
    assert type(first_layer(twin).r) is dict
    assert first_layer(twin).r == {"default": 6}


def test_a_plan_that_the_model_has_outlived_is_refused(model, tmp_path):
    plan = plan_hotswap(model, save_random_adapter(LLAMA, tmp_path / "b", seed=2, r=4))
    model.to(torch.bfloat16)
    before = [parameter.clone() for parameter in model.parameters()]
    refused("has changed since this swap was planned", commit, plan)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), before, strict=True))


def test_layers_that_are_off_are_frozen_again_by_the_next_swap(tmp_path):
    """PEFT's ``set_adapter`` unfreezes their magnitudes, and an optimizer would then change what must stay as it is."""
    every, *few = (
        save_random_adapter(LLAMA, tmp_path / str(seed), seed=seed, use_dora=True, target_modules=targets)
        for seed, targets in enumerate((list(LLAMA.modules), ["q_proj"], ["q_proj"]))
    )
    model = load(LLAMA, every, is_trainable=True)
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    trained = []
    for folder in few:
        hotswap_adapter(model, folder, "default")
        magnitudes = {name: each for name, each in model.named_parameters() if "magnitude" in name}
        trained.append({name.split(".")[-4] for name, each in magnitudes.items() if each.requires_grad})
        model.set_adapter("default")
    assert trained == [{"q_proj"}, {"q_proj"}]
