"""A slot has every tensor of one adapter, by the tables that PEFT keeps, and notices when one is replaced."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from models import KINDS, load, save_random_adapter
from torch import nn

from hotswap_lab import resolve_slot
from hotswap_lab.core.change import apply
from hotswap_lab.core.slot import SLOTS, Uncopied, begin_change, copy_of, kept_slot, room_of

LINEAR, SHARED = KINDS["linear"], KINDS["shared"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_random_adapter(LINEAR, tmp_path_factory.mktemp("adapter"), 1, r=4)


@pytest.fixture
def model(folder):
    return load(LINEAR, folder)


@pytest.mark.parametrize("name", ["default", "lora", "a", "default_0", "lora_A"])
def test_the_name_of_an_adapter_is_never_taken_for_a_part_of_another(folder, name):
    model = load(LINEAR, folder)
    for other in {"default", "lora", "a", "default_0", "lora_A"} - {"default"}:
        model.load_adapter(folder, other)
    slot = resolve_slot(model, name)
    assert [layer.path for layer in slot.layers] == [*LINEAR.modules]
    own = {parameter for key, parameter in model.named_parameters() if key.split(".")[-2] == name}
    assert {*slot.parameters} == own
    assert [tensor.named_key for tensor in slot.tensors[:2]] == [f"lora_A.{name}.weight", f"lora_B.{name}.weight"]


def test_a_key_is_known_by_all_of_its_names_in_files(model):
    keys = resolve_slot(model, "default").own_keys
    names = [key for key, own in keys.items() if own == "blocks.0.lora_A.weight"]
    end = "blocks.0.lora_A.weight", "blocks.0.lora_A.default.weight"
    assert {*names} == {*end, *(f"base_model.model.{each}" for each in end)}


def test_a_module_with_two_paths_is_one_layer(tmp_path):
    model = load(SHARED, save_random_adapter(SHARED, tmp_path, 1, r=4))
    (layer,) = resolve_slot(model, "default").layers
    assert layer.paths == ("early.0", "late.0")
    assert resolve_slot(model, "default").own_keys["late.0.lora_B.weight"] == "early.0.lora_B.weight"


def replace_parameter(model) -> None:
    layer = model.get_base_model().first.lora_A.default
    layer.weight = nn.Parameter(layer.weight.detach().clone())


def replace_layer(model) -> None:
    model.get_base_model().last = nn.Linear(16, 6)


def replace_lora_layer(model) -> None:
    base = model.get_base_model()
    base.first = copy.deepcopy(base.first)


@pytest.mark.parametrize("replace", [replace_parameter, replace_layer, replace_lora_layer])
def test_what_is_replaced_is_not_in_place(model, replace):
    slot = resolve_slot(model, "default")
    slot.record_links()
    assert slot.is_in_place()
    replace(model)
    assert not slot.is_in_place()


def test_values_may_change(model):
    slot = resolve_slot(model, "default")
    slot.record_links()
    with torch.no_grad():
        slot.parameters[0].mul_(2)
    assert slot.is_in_place()


def test_after_a_change_the_model_has_its_slot_and_its_config(model):
    slot = resolve_slot(model, "default")
    config = copy_of(slot.config)
    apply([begin_change(slot, config, slot)])
    assert slot.config is config
    assert kept_slot(model.get_base_model(), "default") is slot
    assert room_of(model.get_base_model(), "default") is None
    replace_parameter(model)
    assert kept_slot(model.get_base_model(), "default") is None


def test_a_copied_model_starts_without_the_slots_of_the_first(model):
    slot = resolve_slot(model, "default")
    apply([begin_change(slot, copy_of(slot.config), slot)])
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.get_base_model().__dict__[SLOTS] == {"default": None}
        assert kept_slot(twin.get_base_model(), "default") is None
    assert copy.copy(Uncopied(a=1)) == {"a": None}


def test_a_copied_config_shares_nothing_that_can_be_changed(model):
    config = resolve_slot(model, "default").config
    config.rank_pattern, config.loftq_config = {"first": 2}, {"bits": [4]}
    twin = copy_of(config)
    assert vars(twin) == vars(config)
    twin.target_modules.clear()
    twin.rank_pattern["first"] = 3
    twin.loftq_config["bits"].append(8)
    assert {*config.target_modules} == {*LINEAR.modules}
    assert (config.rank_pattern, config.loftq_config) == ({"first": 2}, {"bits": [4]})
