"""RankPaddingView: the figures are those of a prepared model."""

from __future__ import annotations

import pytest
import torch
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
    assert "92,160 bytes" in view._body.value
    view.target_rank = 8
    assert view._slider.value == 8
    view._menu.value = view.layers[4]
    assert view.layer == view.layers[4]


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
    from peft import LoraConfig

    config = LoraConfig(r=4, rank_pattern={"b": 40}, target_modules=["a", "b"])
    tensors = {}
    for layer, rank in (("a", 4), ("b", 40)):
        tensors[f"base_model.model.{layer}.lora_A.weight"] = torch.zeros(rank, 8)
        tensors[f"base_model.model.{layer}.lora_B.weight"] = torch.zeros(8, rank)
    view = RankPaddingView(Adapter.from_state_dict(tensors, config), layer="b", target_rank=80)
    view.box  # noqa: B018
    view.layer = "a"
    assert (view.own_rank, view.target_rank, view._slider.value) == (4, 80, 80)


def test_what_is_out_of_range():
    view = RankPaddingView()
    for rank in (7, 65):
        with pytest.raises(ValueError, match="8 to 64"):
            view.target_rank = rank
    with pytest.raises(ValueError, match="no layer 'x'"):
        view.layer = "x"
    refused("nothing to pad", RankPaddingView, _conv_only())


def _conv_only():
    from peft import LoraConfig

    config = LoraConfig(r=2, target_modules=["conv"])
    tensors = {
        "base_model.model.conv.lora_A.weight": torch.zeros(2, 3, 3, 3),
        "base_model.model.conv.lora_B.weight": torch.zeros(4, 2, 1, 1),
    }
    return Adapter.from_state_dict(tensors, config)


def test_static_form():
    view = RankPaddingView(target_rank=32)
    stored = view._static()
    assert stored["image/svg+xml"].startswith("<svg")
    assert "output unchanged: True" in stored["image/svg+xml"]
    assert "output unchanged: True" in view.to_html()
    assert str(view) == stored["text/plain"]
    assert str(view) == str(RankPaddingView(target_rank=32))


def test_flops_are_counted_by_the_shapes():
    view = RankPaddingView(target_rank=32)
    a, b = view._pairs[view.layer]
    assert view.flops == (2 * 8 * (a.shape[1] + b.shape[0]), 2 * 32 * (a.shape[1] + b.shape[0]))
