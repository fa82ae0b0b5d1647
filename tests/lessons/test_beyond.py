"""Chapter 07, beyond what the chapter itself compares (its adapters, its pictures): the exercises."""

from __future__ import annotations

import pytest
import torch
from exercises import assert_tells_right_from_wrong

from hotswap_lab.lessons import beyond


def test_random_adapters_leave_the_random_numbers_of_others_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    beyond.load(beyond.PAIRS["LoHa"].old)
    beyond.adapter(beyond.PAIRS["VeRA"].new)
    beyond.pissa()
    assert torch.equal(torch.rand(3), expected)


# --- exercises -------------------------------------------------------------------------------------------------------


def turn_off(layer):
    if hasattr(layer, "ia3_l"):
        layer.ia3_l["default"].fill_(1)
    else:
        layer.lora_B["default"].weight.zero_()
        layer.lora_magnitude_vector["default"].weight.copy_(layer.get_base_layer().weight.norm(dim=1))


def all_zeros(layer):
    for parameters in (getattr(layer, "ia3_l", {}), getattr(layer, "lora_B", {})):
        for each in parameters.values():
            getattr(each, "weight", each).zero_()


def lengths_of_the_columns(layer):
    turn_off(layer)
    if hasattr(layer, "lora_B"):
        norms = layer.get_base_layer().weight.norm(dim=0)
        magnitude = layer.lora_magnitude_vector["default"].weight
        magnitude.copy_(norms[: len(magnitude)] if len(norms) >= len(magnitude) else norms.mean())


def new_memory(layer):
    turn_off(layer)
    for parameter in layer.parameters():
        if parameter is not layer.get_base_layer().weight:
            parameter.data = parameter.data.clone()


def make_equal(live, fresh):
    parameters_and_buffers(live, fresh)
    for module, other in zip(live.modules(), fresh.modules(), strict=True):
        if isinstance(getattr(other, "scaling", None), dict):
            module.scaling.update(other.scaling)


def parameters_only(live, fresh):
    for name, parameter in fresh.named_parameters():
        live.get_parameter(name).copy_(parameter)


def parameters_and_buffers(live, fresh):
    tensors = dict(live.named_parameters()) | dict(live.named_buffers())
    for name, tensor in [*fresh.named_parameters(), *fresh.named_buffers()]:
        tensors[name].copy_(tensor)


def modules_of_the_fresh_one(live, fresh):
    """Right outputs, new addresses."""
    live.base_model = fresh.base_model


SOLUTIONS = {
    "turn_off": (beyond.turn_off, turn_off, [lambda layer: None, all_zeros, lengths_of_the_columns, new_memory]),
    "make_equal": (
        beyond.make_equal,
        make_equal,
        [lambda live, fresh: None, parameters_only, parameters_and_buffers, modules_of_the_fresh_one],
    ),
}


@pytest.mark.parametrize("name", SOLUTIONS)
def test_right_and_wrong_solutions(name, capsys):
    assert_tells_right_from_wrong(*SOLUTIONS[name], capsys)
