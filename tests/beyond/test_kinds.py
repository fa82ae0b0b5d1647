"""Tensors of rare kinds: where the rank components of grouped convolutions are."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from hotswap_lab import resolve_slot
from hotswap_lab.beyond.lora import GroupedTensor
from hotswap_lab.beyond.shards import ShardedTensor, _sharded
from hotswap_lab.core.tensors import SlotTensor


def pair_of(groups: int, rank: int):
    model = get_peft_model(
        nn.Sequential(nn.Conv1d(8, 8, 3, padding=1, groups=groups)), LoraConfig(r=rank, target_modules=["0"])
    )
    (layer,) = resolve_slot(model, "default").layers
    return layer.tensors


def computed(a: torch.Tensor, b: torch.Tensor, groups: int, x: torch.Tensor) -> torch.Tensor:
    """What PEFT computes with the two."""
    return nn.functional.conv1d(nn.functional.conv1d(x, a, padding=1), b, groups=groups)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_padding_changes_no_output_and_comes_off_again(groups):
    torch.manual_seed(0)
    pair = pair_of(groups, rank=4)
    assert {type(each) for each in pair} == {GroupedTensor if groups > 1 else SlotTensor}
    assert [each.rank_step for each in pair] == [groups, groups]
    assert [each.rank_of(each.parameter.shape) for each in pair] == [each.capacity for each in pair] == [4, 4]
    own = [torch.randn(each.shape_for(4)) for each in pair]
    padded = [each.padded(tensor, 12) for each, tensor in zip(pair, own, strict=True)]
    assert [tuple(tensor.shape) for tensor in padded] == [each.shape_for(12) for each in pair]
    x = torch.randn(2, 8, 5)
    torch.testing.assert_close(computed(*padded, groups, x), computed(*own, groups, x))
    for each, tensor, whole in zip(pair, own, padded, strict=True):
        assert torch.equal(each.own(whole, 4).reshape(each.shape_for(4)), tensor)
        assert not each.padding(whole, 4).any()
        assert each.padding(whole, 4).numel() == whole.numel() - tensor.numel()


def test_a_grouped_convolution_may_be_spread_over_processes():
    kind = _sharded(GroupedTensor)
    tensor = kind(**vars(pair_of(2, rank=4)[1]))
    assert isinstance(tensor, ShardedTensor)
    assert (tensor.is_shard, tensor.shape_for(8)[1], tensor.capacity) == (True, 4, 4)
