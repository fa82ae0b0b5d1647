"""A room: a prepared slot, into which a packed adapter is put in one copy."""

from __future__ import annotations

import pytest
import torch
from models import KINDS, load, save_family
from oracle import assert_same_outputs
from torch import nn

from hotswap_lab import Adapter, prepare_model_for_compiled_hotswap
from hotswap_lab.core.change import apply
from hotswap_lab.core.room import Packed, Room, State, strengths_of
from hotswap_lab.core.settings import settings_for
from hotswap_lab.core.slot import room_of

KIND = KINDS["linear"]
CONFIGS = dict(r=4), dict(r=8, lora_alpha=4), dict(r=2, target_modules=["first", "last"], rank_pattern={"last": 3})


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save_family(KIND, tmp_path_factory.mktemp("family"), *CONFIGS)


@pytest.fixture
def model(folders):
    model = load(KIND, folders[0])
    prepare_model_for_compiled_hotswap(model, adapters=folders)
    return model


@pytest.fixture
def room(model) -> Room:
    return room_of(model.get_base_model(), "default")


def packed(room: Room, folder: str) -> Packed:
    """An adapter in the layout of a room, off where its file has nothing for a layer."""
    adapter = Adapter.load(folder)
    values = {room.slot.own_keys[key]: value for key, value in adapter.tensors.items()}
    settings = [
        settings_for(adapter.config, layer.path) if layer.keys[0] in values else None for layer in room.slot.layers
    ]
    sources = [
        (tensor, values[key])
        for layer in room.slot.layers
        for tensor, key in zip(layer.tensors, layer.keys, strict=True)
        if key in values
    ]
    return room.pack(State(tuple(settings), adapter.config), sources)


@pytest.mark.parametrize("number", range(len(CONFIGS)))
def test_a_packed_adapter_is_a_fresh_load_at_the_same_addresses(model, room, folders, number):
    addresses = room.slot.data_ptrs()
    apply([room.change_to_packed(packed(room, folders[number]))])
    assert_same_outputs(model, load(KIND, folders[number]), KIND)
    assert room.slot.data_ptrs() == addresses
    assert room.is_intact()


def test_a_packed_adapter_takes_the_memory_of_its_own_components(room, folders):
    small = packed(room, folders[2])
    assert [len(band) for band in small.bands] == [3]
    assert small.nbytes < packed(room, folders[0]).nbytes < packed(room, folders[1]).nbytes <= room.nbytes * 1.1
    assert small.state.ranks == [2, None, None, 3]
    assert small.state.on == [True, False, False, True]
    assert small.state.acts.flatten().tolist() == small.state.on
    assert room.components_for(small.state) == ([0], [3])


@pytest.mark.parametrize("strength", [0.0, 0.5, 2.0])
def test_a_strength_multiplies_the_scaling_of_each_layer(model, room, folders, strength):
    with_strength = packed(room, folders[1])
    apply([room.change_to_packed(with_strength, strength)])
    fresh = load(KIND, folders[1])
    for layer in fresh.modules():
        if hasattr(layer, "scale_layer"):
            layer.set_scale("default", strength)
    assert_same_outputs(model, fresh, KIND, margin=1000 * (strength != 0))
    apply([room.change_strength(1.0)])
    assert_same_outputs(model, load(KIND, folders[1]), KIND)


def test_the_strength_of_a_layer_that_is_off_is_the_median_of_the_others(room, folders):
    small = packed(room, folders[2])
    scaled = Packed(small.state, small.bands, room.scalings_of(small.state, 0.5))
    assert strengths_of(scaled).tolist() == [0.5] * 4


def replace_parameter(model, room) -> None:
    layer = model.get_base_model().first.lora_A.default
    layer.weight = nn.Parameter(layer.weight.detach().clone())


def move_out(model, room) -> None:
    for parameter in room.slot.parameters:
        parameter.data = parameter.data.clone()


def delete(model, room) -> None:
    model.delete_adapter("default")


@pytest.mark.parametrize("change", [replace_parameter, move_out, delete])
def test_parameters_elsewhere_are_noticed(model, room, change):
    base = model.get_base_model()
    assert room_of(base, "default") is room
    change(model, room)
    assert not room.is_intact()
    assert room_of(base, "default") is None


def test_memory_that_other_processes_share_is_still_the_rooms(model, room):
    before = room.slot.data_ptrs()
    model.share_memory()
    assert room.slot.data_ptrs() != before
    assert room.is_intact()


def test_a_write_by_other_code_shows_until_the_next_swap(room, folders):
    assert not room.is_touched
    with torch.no_grad():
        room.slot.parameters[0].mul_(2)
    assert room.is_touched
    apply([room.change_to_packed(packed(room, folders[1]))])
    assert not room.is_touched
