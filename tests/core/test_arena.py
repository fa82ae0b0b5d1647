"""The memory of a prepared slot: an adapter of rank r is the first r rows of a band."""

from __future__ import annotations

import pytest
import torch
from models import randn
from torch import nn

from hotswap_lab.core.arena import CACHE_LINE, Band, build_arena
from hotswap_lab.core.tensors import SlotTensor

#: the shapes of three tensors with room for rank 4, of one with room for rank 2, and of one that has no rank
ROOM = {
    "A": (0, (4, 10)),
    "B": (1, (3, 4)),
    "A of a convolution": (0, (4, 2, 3)),
    "small": (0, (2, 5)),
    "head": (None, (7, 3)),
}


def arena(dtype: torch.dtype = torch.float64) -> list[Band]:
    tensors = []
    for name, (axis, shape) in ROOM.items():
        owner = nn.Module()
        owner.weight = nn.Parameter(torch.zeros(shape, dtype=dtype))
        tensors.append((SlotTensor(name, name, owner, "weight", axis), shape))
    return build_arena(tensors, like=torch.zeros((), dtype=dtype))


def test_tensors_with_equal_room_share_a_band_and_those_without_a_rank_come_last():
    bands = arena()
    names = [[span.tensor.key for span in band.spans] for band in bands]
    assert names == [["A", "B", "A of a convolution"], ["small"], ["head"]]
    assert [len(band.memory) for band in bands[:2]] == [4, 2]
    assert bands[2].memory.dim() == 1


@pytest.mark.parametrize("rank", [1, 3, 4])
def test_an_adapter_is_the_first_rows_of_a_band(rank):
    band = arena()[0]
    sources = [randn(span.tensor.shape_for(rank)) for span in band.spans]
    for span, source in zip(band.spans, sources, strict=True):
        span.tensor.own(span.view(band.memory), rank).copy_(source)
    assert not band.memory[rank:].any()
    for span, source in zip(band.spans, sources, strict=True):
        assert torch.equal(span.view(band.memory[:rank]), source)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_no_two_tensors_overlap_and_each_starts_at_a_cache_line(dtype):
    for band in arena(dtype):
        for number, span in enumerate(band.spans, 1):
            view = span.view(band.memory)
            assert tuple(view.shape) == span.shape
            assert not view.any()
            assert (view.data_ptr() - band.memory.data_ptr()) % CACHE_LINE == 0
            view.fill_(number)
        for number, span in enumerate(band.spans, 1):
            assert (span.view(band.memory) == number).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_row_has_an_odd_number_of_cache_lines(dtype):
    for band in arena(dtype)[:2]:
        lines, rest = divmod(band.memory[0].nbytes, CACHE_LINE)
        assert (lines % 2, rest) == (1, 0)
