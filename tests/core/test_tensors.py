"""One tensor of an adapter: where its rank components are, and how another adapter's values are written to it."""

from __future__ import annotations

import pytest
import torch
from models import randn
from torch import nn

from hotswap_lab.core.change import Change, apply
from hotswap_lab.core.tensors import SlotTensor, are_interchangeable, have_same_values, is_finite

#: the axis of the rank components, the attribute that repeats the rank, the shape at rank 4, and the one at rank 2
A = 0, "out_features", (4, 6), (2, 6)
B = 1, "in_features", (3, 4), (3, 2)


def tensor_of(axis: int | None, attribute: str | None, shape: tuple[int, ...]) -> SlotTensor:
    owner = nn.Linear(shape[1], shape[0], bias=False, dtype=torch.float64)
    return SlotTensor("lora.weight", "lora.default.weight", owner, "weight", axis, attribute)


@pytest.mark.parametrize(("axis", "attribute", "shape", "smaller"), [A, B], ids="AB")
def test_the_rank_is_along_one_axis(axis, attribute, shape, smaller):
    tensor = tensor_of(axis, attribute, shape)
    assert (tensor.capacity, tensor.rank_of(smaller), tensor.shape_for(2)) == (4, 2, smaller)
    own, padding = tensor.own(tensor.parameter, 3), tensor.padding(tensor.parameter, 3)
    assert torch.equal(torch.cat([own, padding], axis), tensor.parameter)
    assert (own.shape[axis], padding.shape[axis]) == (3, 1)


@pytest.mark.parametrize(("axis", "attribute", "shape", "smaller"), [A, B], ids="AB")
@pytest.mark.parametrize("fixed_size", [False, True])
def test_another_rank_is_a_new_size_or_padding(axis, attribute, shape, smaller, fixed_size):
    tensor, source, change = tensor_of(axis, attribute, shape), randn(smaller), Change()
    parameter, address = tensor.parameter, tensor.parameter.data_ptr()
    tensor.write(source, change, fixed_size)
    apply([change])
    assert tensor.parameter is parameter
    if fixed_size:
        assert parameter.data_ptr() == address
        assert torch.equal(parameter, tensor.padded(source, 4))
        assert not tensor.padding(parameter, 2).any()
        assert getattr(tensor.owner, attribute) == 4
    else:
        assert torch.equal(parameter, source)
        assert parameter.data_ptr() != source.data_ptr()
        assert getattr(tensor.owner, attribute) == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_same_shape_is_a_copy_in_the_models_dtype(dtype):
    tensor, source, change = tensor_of(*A[:3]), randn(4, 6).to(dtype), Change()
    before = tensor.parameter.detach().clone()
    tensor.write(source, change, fixed_size=False)
    assert torch.equal(tensor.parameter, before)
    apply([change])
    assert torch.equal(tensor.parameter, source.double())


def test_no_source_is_zeros():
    tensor, change = tensor_of(*A[:3]), Change()
    tensor.write(None, change, fixed_size=True)
    apply([change])
    assert tensor.is_zero


FITS = {(4, 6): True, (1, 6): True, (4, 5): False, (6,): False, (4, 6, 1): False}


@pytest.mark.parametrize("shape", FITS, ids=str)
def test_only_the_rank_may_differ(shape):
    assert tensor_of(*A[:3]).fits(shape) == FITS[shape]


def test_a_tensor_without_a_rank_is_whole():
    tensor = tensor_of(None, None, (3, 5))
    assert (tensor.capacity, tensor.rank_of((3, 5)), tensor.shape_for(2)) == (None, None, (3, 5))
    assert tensor.own(tensor.parameter, 1) is tensor.parameter
    assert tensor.fits((3, 5))
    assert not tensor.fits((2, 5))


@pytest.mark.parametrize(
    ("other", "is_equal", "is_interchangeable"),
    [
        (torch.ones(2), True, True),
        (torch.ones(2, dtype=torch.float16), True, False),
        (torch.tensor([1.0, 2.0]), False, False),
        (torch.ones(2, 1), False, False),
        (torch.ones(2, device="meta"), False, False),
        (torch.tensor([1.0, torch.nan]), False, False),
    ],
)
def test_values_are_compared_in_the_dtype_of_the_model(other, is_equal, is_interchangeable):
    assert have_same_values(torch.ones(2), other) == is_equal
    assert are_interchangeable(torch.ones(2), other) == is_interchangeable


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_one_value_that_is_not_finite_is_found(value, dtype):
    tensor = torch.full((3, 5), torch.finfo(dtype).max, dtype=dtype)
    assert is_finite(tensor)
    tensor[1, 2] = value
    assert not is_finite(tensor)
