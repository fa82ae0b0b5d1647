"""RankPaddingView: the figures are those of a prepared model."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from refusals import refused
from shown import live

from hotswap_lab import demo, prepare_model_for_compiled_hotswap, resolve_slot
from hotswap_lab.files.reading import Adapter
from hotswap_lab.widgets import RankPaddingView


def test_its_numbers_are_those_of_a_prepared_model_in_every_layer():
    model, _ = demo.load("sort")
    slot = resolve_slot(model, "default")
    own = sum(tensor.parameter.nbytes for tensor in slot.tensors)
    prepare_model_for_compiled_hotswap(model, target_rank=48)
    held = sum(tensor.parameter.nbytes for tensor in slot.tensors)
    view, ranks = live(RankPaddingView(demo.adapter_path("sort"), target_rank=48)), set()
    assert view._count(4, *view.layers) == (own, held)
    for layer in slot.layers:
        view._menu.value = layer.path
        held = sum(tensor.parameter.nbytes for tensor in layer.tensors)
        assert (view.layer, view.nbytes[1], view.flops[1]) == (layer.path, held, held // 2)
        assert view.unchanged
        assert (view._slider.min, view._slider.value) == (view.own_rank, 48)
        ranks.add(view.own_rank)
    assert ranks == {6, 16, 24}
    view._slider.value = 60
    assert view.target_rank == 60
    view.target_rank = 50
    assert view._slider.value == 50
    assert "in room for rank 50" in view._body.value
    assert "output unchanged: True" in view._static()["image/svg+xml"]


def test_unchanged_can_be_false(monkeypatch):
    """A preparation that leaves something in the padding is found out."""

    def bad(model, target_rank):
        prepare_model_for_compiled_hotswap(model, target_rank=target_rank)
        for weight in (model[0].lora_A["default"].weight, model[0].lora_B["default"].weight):
            weight.data.fill_(1)

    monkeypatch.setattr("hotswap_lab.widgets.rank_padding_view.prepare_model_for_compiled_hotswap", bad)
    view = RankPaddingView()
    assert "output unchanged: False" in str(view)
    assert "CHANGED" in view.figure().svg


def test_what_cannot_be_shown_is_refused():
    view = RankPaddingView()
    for rank in (7, 65, 8.5):
        with pytest.raises(ValueError, match="must be 8 to 64"):
            view.target_rank = rank
    with pytest.raises(ValueError, match="no layer 'x'"):
        view.layer = "x"
    tensors = {
        "base_model.model.conv.lora_A.weight": torch.zeros(2, 3, 3, 3),
        "base_model.model.conv.lora_B.weight": torch.zeros(8, 2, 1, 1),
    }
    conv = Adapter.from_state_dict(tensors, LoraConfig(r=2, target_modules=["conv"]))
    refused("nothing to pad", RankPaddingView, conv)
