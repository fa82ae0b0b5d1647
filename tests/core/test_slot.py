"""Where an adapter lives: every tensor of it, nothing else, by exact name."""

from __future__ import annotations

from models import KINDS, load, save_random_adapter
from peft import IA3Config, get_peft_model

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
    paths = [layer.path for layer in slot.layers]
    assert paths == [name for name, _ in model.get_base_model().named_modules() if name in paths]


def test_a_shared_block_is_one_layer_with_two_paths(tmp_path):
    kind = KINDS["shared"]
    model = load(kind, save_random_adapter(kind, tmp_path / "adapter", seed=1, r=4))
    (layer,) = resolve_slot(model, "default").layers
    assert layer.paths == ("early.0", "late.0")


def test_every_method_has_a_slot():
    model = get_peft_model(KINDS["linear"].base(), IA3Config(target_modules=["first"], feedforward_modules=[]))
    slot = resolve_slot(model, "default")
    assert [(layer.path, [tensor.key for tensor in layer.tensors]) for layer in slot.layers] == [("first", ["ia3_l"])]
    assert slot.data_ptrs() == [model.get_base_model().first.ia3_l["default"].data_ptr()]
