"""RankPaddingView: the figures are those of a prepared model."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest
import torch
from peft import LoraConfig
from refusals import refused

from hotswap_lab import demo, prepare_model_for_compiled_hotswap, resolve_slot
from hotswap_lab.files.reading import Adapter
from hotswap_lab.widgets import RankPaddingView


@pytest.mark.parametrize("name", demo.adapter_names())
def test_memory_is_that_of_a_prepared_model(name):
    model, _ = demo.load(name)
    slot = resolve_slot(model, "default")
    own = sum(tensor.parameter.nbytes for tensor in slot.tensors)
    prepare_model_for_compiled_hotswap(model, target_rank=48)
    held = sum(tensor.parameter.nbytes for tensor in slot.tensors)
    view = RankPaddingView(demo.adapter_path(name), target_rank=48)
    assert view._count(4, *view.layers) == (own, held)
    layer = next(layer for layer in slot.layers if layer.path == view.layer)
    assert view.nbytes[1] == sum(tensor.parameter.nbytes for tensor in layer.tensors)


@pytest.mark.parametrize("name", demo.adapter_names())
def test_the_output_is_unchanged_in_every_layer(name):
    view = RankPaddingView(demo.adapter_path(name))
    for layer in view.layers[:7]:
        view.layer = layer
        assert view.unchanged
        assert view.own_rank <= view.target_rank


def test_unchanged_can_be_false(monkeypatch):
    """A preparation that leaves something in the padding is found out."""

    def bad(model, target_rank):
        prepare_model_for_compiled_hotswap(model, target_rank=target_rank)
        for weight in (model[0].lora_A["default"].weight, model[0].lora_B["default"].weight):
            weight.data.fill_(1)

    monkeypatch.setattr("hotswap_lab.widgets.rank_padding_view.prepare_model_for_compiled_hotswap", bad)
    view = RankPaddingView()
    assert not view.unchanged
    assert "output unchanged: False" in str(view)
    assert "CHANGED" in view.figure().svg


def test_the_controls_follow_and_lead():
    view = RankPaddingView(target_rank=16)
    view.box  # noqa: B018
    view._refresh()
    view._slider.value = 40
    assert view.target_rank == 40
    assert "92.2 kB" in view._body.value
    view.target_rank = 8
    assert view._slider.value == 8
    view._menu.value = view.layers[4]
    assert view.layer == view.layers[4]


@pytest.mark.parametrize(
    ("ranks", "inputs", "is_true"), [({"a": 8}, 128, True), ({"a": 8}, 448, True), ({"a": 8}, 4096, False)]
)
def test_the_picture_is_to_scale_or_says_that_it_is_not(ranks, inputs, is_true):
    figure = RankPaddingView(adapter_of(ranks, inputs=(inputs,)), target_rank=32).figure()
    boxes = [each for each in ElementTree.fromstring(figure.svg).iter() if each.get("rx") == "4"]
    found = [(float(each.get("width")), float(each.get("height"))) for each in boxes]
    shapes = [(32, 8), (8, 8), (inputs, 32), (inputs, 8), (inputs, 8), (inputs, 8)]
    scale = 150 / inputs
    expected = [(scale * width, scale * height) for width, height in shapes]
    assert (found == [pytest.approx(each, rel=1e-4) for each in expected]) == is_true
    assert ("Drawn to scale." in figure.svg, "Ranks are not to scale." in figure.svg) == (is_true, not is_true)
    assert all(0 < length <= 150 for each in found for length in each)


def test_layers_of_other_ranks_move_the_slider():
    view = RankPaddingView(demo.adapter_path("sort"))
    view.box  # noqa: B018
    ranks = {}
    for layer in [*view.layers, *reversed(view.layers)]:
        view.layer = layer
        assert view._slider.min == view.own_rank
        assert view._slider.value == view.target_rank
        ranks[view.own_rank] = layer
    assert sorted(ranks) == [6, 16, 24]


def test_room_for_one_layer_is_room_for_another_one():
    view = RankPaddingView(adapter_of({"a": 4, "b": 40}), layer="b", target_rank=80)
    view.box  # noqa: B018
    view.layer = "a"
    assert (view.own_rank, view.target_rank, view._slider.value) == (4, 80, 80)


@pytest.mark.parametrize("rank", [7, 65, "a", 8.5, None])
def test_a_rank_is_a_whole_number_within_the_range(rank):
    view = RankPaddingView()
    with pytest.raises(ValueError, match="must be 8 to 64"):
        view.target_rank = rank


def test_layers_that_are_not_there():
    with pytest.raises(ValueError, match="no layer 'x'"):
        RankPaddingView().layer = "x"
    refused("nothing to pad", RankPaddingView, adapter_of({"conv": 2}, inputs=(3, 3, 3), outputs=(1, 1)))


def adapter_of(ranks: dict[str, int], inputs: tuple = (8,), outputs: tuple = ()) -> Adapter:
    config = LoraConfig(r=2, rank_pattern=ranks, target_modules=list(ranks))
    tensors = {}
    for layer, rank in ranks.items():
        tensors[f"base_model.model.{layer}.lora_A.weight"] = torch.zeros(rank, *inputs)
        tensors[f"base_model.model.{layer}.lora_B.weight"] = torch.zeros(8, rank, *outputs)
    return Adapter.from_state_dict(tensors, config)


def test_static_form():
    view = RankPaddingView(target_rank=32)
    stored = view._static()
    assert stored["image/svg+xml"].startswith("<svg")
    for form in (*stored.values(), view.to_html()):
        assert "output unchanged: True" in form
    assert str(view) == stored["text/plain"] == str(RankPaddingView(target_rank=32))
    a, b = view._pairs[view.layer]
    assert view.flops == tuple(2 * rank * (a.shape[1] + b.shape[0]) for rank in (8, 32))
