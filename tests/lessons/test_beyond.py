"""Chapter 07: its adapters are what they claim, its exercises tell right from wrong, its pictures are true."""

from __future__ import annotations

import math
import re

import pytest
import torch
from exercises import assert_is_svg_with_a_text_form, assert_tells_right_from_wrong
from lengths import few_of

from hotswap_lab import demo, hotswap_adapter, plan_hotswap, verify_hotswap
from hotswap_lab.lessons import beyond

SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize("kind", few_of(beyond.PAIRS, ("LoRA to DoRA", "LoHa", "IA3")))
def test_each_pair_can_be_swapped_there_and_back(kind):
    pair = beyond.PAIRS[kind]
    model, old, new = beyond.load(pair.old), beyond.adapter(pair.old, seed=1), beyond.adapter(pair.new)
    assert verify_hotswap(model, old)
    assert not verify_hotswap(model, new)
    for adapter in (new, old):
        hotswap_adapter(model, adapter, "default", add_layers=True)
        assert verify_hotswap(model, adapter)


def test_random_adapters_leave_the_random_numbers_of_others_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    beyond.load(beyond.PAIRS["LoHa"].old)
    beyond.adapter(beyond.PAIRS["VeRA"].new)
    beyond.pissa()
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.long
def test_no_tensor_of_a_random_adapter_is_off():
    for pair in beyond.PAIRS.values():
        for key, tensor in beyond.adapter(pair.new).tensors.items():
            if tensor.is_floating_point():
                assert tensor.any(), key


def test_pissa_is_refused_and_its_conversion_is_not():
    adapter, folder = beyond.pissa()
    model, _ = demo.load("reverse")
    plan = plan_hotswap(model, adapter)
    assert not plan.ok
    assert "pissa" in plan.refusals[0].found
    hotswap_adapter(model, f"{folder.name}/start", "default")
    assert verify_hotswap(model, f"{folder.name}/start")


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


def values_only(old, new):
    return all(getattr(old, field) == getattr(new, field) for field in vars(old).keys() - {"d_initial"})


SOLUTIONS = {
    "turn_off": (beyond.turn_off, turn_off, [lambda layer: None, all_zeros, lengths_of_the_columns, new_memory]),
    "values_only": (
        beyond.values_only,
        values_only,
        [
            lambda old, new: None,
            lambda old, new: True,
            lambda old, new: vars(old) == vars(new),
            lambda old, new: old.peft_type == "VERA" or old == new,
            lambda old, new: all(
                getattr(old, field) == getattr(new, field)
                for field in vars(old).keys() - {"d_initial", "target_modules"}
            ),
        ],
    ),
}


@pytest.mark.parametrize("name", few_of(SOLUTIONS, SOLUTIONS.keys() - {"values_only"}))
def test_right_and_wrong_solutions(name, capsys):
    assert_tells_right_from_wrong(*SOLUTIONS[name], capsys)


# --- pictures --------------------------------------------------------------------------------------------------------

ROW, CHANGE = torch.tensor([3.0, 0.0, 4.0]), torch.tensor([0.0, 12.0, 0.0])
VECTORS = {
    "k_proj": torch.tensor([[0.5], [1.0], [2.0]]).repeat(6, 1),
    "v_proj": torch.ones(18, 1),
    "down_proj": torch.ones(1, 20),
}
FIGURES = {
    "dora": beyond.dora(ROW, CHANGE),
    "dora, straight back": beyond.dora(ROW, -2 * ROW),
    "dora, no change": beyond.dora(ROW, torch.zeros(3)),
    "ia3": beyond.ia3(VECTORS),
}


@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_valid_svg_with_a_text_form(name):
    assert_is_svg_with_a_text_form(FIGURES[name])


def test_the_picture_of_dora_has_true_lengths_and_a_true_angle():
    root = assert_is_svg_with_a_text_form(FIGURES["dora"])
    arrows = []
    for line in root.iter(f"{SVG}line"):
        x1, y1, x2, y2 = (float(line.get(key)) for key in ("x1", "y1", "x2", "y2"))
        if (x1, y1) == (70, 286):
            arrows.append((math.hypot(x2 - x1, y2 - y1), math.atan2(y1 - y2, x2 - x1)))
    (frozen, low), (lora, high), (dora, same) = arrows
    assert lora / frozen == pytest.approx(13 / 5, abs=0.02)
    assert dora / frozen == pytest.approx(1, abs=0.02)
    assert high - low == pytest.approx(math.acos(5 / 13), abs=0.01)
    assert same == pytest.approx(high, abs=0.02)
    assert "length 5.00" in repr(FIGURES["dora"])
    assert "turned by 67 degrees" in repr(FIGURES["dora"])


def test_the_picture_of_ia3_is_white_where_nothing_changes():
    root = assert_is_svg_with_a_text_form(FIGURES["ia3"])
    fills = [each.get("fill") for each in root.iter(f"{SVG}rect") if each.get("height") == "30"]
    assert len(fills) == 3 * beyond.SHOWN
    assert fills[1] == "#ffffff"
    assert fills[2] == beyond.NEW
    assert set(fills[beyond.SHOWN :]) == {"#ffffff"}
    assert re.search(r"56 factors in all", repr(FIGURES["ia3"]))
