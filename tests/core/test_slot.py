"""Where an adapter lives: every tensor of it, nothing else, by exact name."""

from __future__ import annotations

import torch
from models import KINDS, load, save_random_adapter
from peft import LoraConfig, PeftMixedModel, get_peft_model

from hotswap_lab import resolve_slot


def test_a_slot_has_exactly_the_parameters_that_carry_the_name(kind, tmp_path):
    folder = save_random_adapter(kind, tmp_path / "adapter", seed=1, r=4)
    model = load(kind, folder, "mine")
    model.load_adapter(folder, "mine_2")
    slot = resolve_slot(model, "mine")
    expected = {id(value): key for key, value in model.named_parameters() if "mine" in key.split(".")}
    assert {id(tensor.parameter) for tensor in slot.tensors} == set(expected)
    for layer in slot.layers:
        for tensor in layer.tensors:
            assert expected[id(tensor.parameter)] == f"base_model.model.{layer.path}.{tensor.named_key}"
    assert slot.config is model.peft_config["mine"]


def test_rank_axes(kind, tmp_path):
    model = load(kind, save_random_adapter(kind, tmp_path / "adapter", seed=1, r=8))
    for tensor in resolve_slot(model, "default").tensors:
        shape = tensor.parameter.shape
        assert tensor.rank_of(shape) == 8
        assert tensor.shape_for(8) == shape
        grown = list(shape)
        grown[tensor.rank_axis] *= 2
        assert tensor.fits(torch.Size(grown))
        grown[1 - tensor.rank_axis] += 1
        assert not tensor.fits(torch.Size(grown))
        assert not tensor.fits(torch.Size([*shape, 1]))


def test_a_shared_block_is_one_layer_with_two_paths(tmp_path):
    kind = KINDS["shared"]
    model = load(kind, save_random_adapter(kind, tmp_path / "adapter", seed=1, r=4))
    (layer,) = resolve_slot(model, "default").layers
    assert layer.paths == ("early.0", "late.0")


def test_nested_tuner_layers_are_known_by_the_path_of_the_layer_they_adapt():
    from peft import LoHaConfig

    model = PeftMixedModel(KINDS["linear"].base(), LoraConfig(target_modules=["first"]), "lora")
    model.add_adapter("loha", LoHaConfig(target_modules=["first"]))
    assert [layer.path for layer in resolve_slot(model, "lora").layers] == ["first"]


def test_layers_in_the_models_order(tmp_path):
    kind = KINDS["llama"]
    model = load(kind, save_random_adapter(kind, tmp_path / "adapter", seed=1, r=4))
    paths = [layer.path for layer in resolve_slot(model, "default").layers]
    assert paths == [name for name, _ in model.get_base_model().named_modules() if name in set(paths)]


def test_every_method_has_a_slot():
    from peft import IA3Config

    model = get_peft_model(KINDS["linear"].base(), IA3Config(target_modules=["first"], feedforward_modules=[]))
    slot = resolve_slot(model, "default")
    assert [(layer.path, [tensor.key for tensor in layer.tensors]) for layer in slot.layers] == [("first", ["ia3_l"])]
    assert slot.data_ptrs() == [model.get_base_model().first.ia3_l["default"].data_ptr()]
