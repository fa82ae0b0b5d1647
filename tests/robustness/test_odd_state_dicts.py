"""State dicts as nobody should pass them: swapped in right, or refused, and never kept or changed."""

from __future__ import annotations

import pytest
import torch
from models import KINDS, load, save_random_adapter
from mutations import KEY, odd
from oracle import assert_equals_fresh_load, assert_untouched, snapshot, untouched
from peft import LoraConfig
from refusals import refused
from safetensors.torch import load_file

from hotswap_lab import hotswap_adapter_from_state_dict

KIND = KINDS["linear"]


@pytest.fixture
def folder(tmp_path):
    return save_random_adapter(KIND, tmp_path / "new", seed=2, r=4)


@pytest.fixture
def model(tmp_path):
    return load(KIND, save_random_adapter(KIND, tmp_path / "old", seed=1, r=4))


def swap(model, table, folder):
    hotswap_adapter_from_state_dict(model, table, "default", LoraConfig.from_pretrained(folder))


def strange_views(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same values in memory that is laid out in other ways."""
    wide = torch.empty(tensor.shape[0], 2 * tensor.shape[1])
    wide[:, ::2] = tensor
    with torch.inference_mode():
        inference = tensor.clone()
    return {
        "transposed": tensor.t().contiguous().t(),
        "every second": wide[:, ::2],
        "part of something": torch.cat([tensor, tensor])[: len(tensor)],
        "parameter": torch.nn.Parameter(tensor.clone()),
        "with gradient": tensor.clone().requires_grad_(),
        "not a leaf": tensor.clone().requires_grad_() * 1.0,
        "double": tensor.double(),
        "negative view": torch._neg_view(-tensor),
        "inference": inference,
    }


@pytest.mark.parametrize("form", strange_views(torch.ones(2, 2)))
def test_the_values_count_not_where_they_lie(folder, model, form):
    state_dict = {
        key: strange_views(each)[form] for key, each in load_file(f"{folder}/adapter_model.safetensors").items()
    }
    before = {key: (each.detach().clone(), each.stride(), each.requires_grad) for key, each in state_dict.items()}
    swap(model, state_dict, folder)
    assert_equals_fresh_load(model, KIND, folder)
    for key, (value, stride, requires_grad) in before.items():
        assert torch.equal(state_dict[key].detach(), value)
        assert (state_dict[key].stride(), state_dict[key].requires_grad) == (stride, requires_grad)
        assert all(each.data_ptr() != state_dict[key].data_ptr() for each in model.parameters())


def assert_has(model, expected: dict[str, torch.Tensor]) -> None:
    for key, value in expected.items():
        assert torch.equal(model.state_dict()[key.replace(".weight", ".default.weight")], value), key


def test_expanded_tensors(folder, model):
    """In memory a tensor may well be one row, repeated."""
    state_dict = load_file(f"{folder}/adapter_model.safetensors")
    tensors = {key: each[:1].expand(each.shape) for key, each in state_dict.items()}
    swap(model, tensors, folder)
    assert_has(model, tensors)


def test_the_models_own_parameters_in_another_order(folder, model):
    """A's of one layer for another: read while they are written."""
    live = {key: each for key, each in model.state_dict(keep_vars=True).items() if "lora_" in key}
    # what was blocks.0 is blocks.1, and the other way round
    order = str.maketrans({"0": "1", "1": "0"})
    own = {key.translate(order).replace(".default", ""): value for key, value in live.items()}
    expected = {key: value.detach().clone() for key, value in own.items()}
    swap(model, own, folder)
    assert_has(model, expected)


def raising(*_: object) -> None:
    raise ArithmeticError


@pytest.mark.parametrize("how", ["__iter__", "keys", "__getitem__", "items"])
def test_a_table_that_raises(folder, model, how):
    """Its own error comes through, or it was not asked in this way; nothing in between."""
    table = type("Broken", (dict,), {how: raising})(load_file(f"{folder}/adapter_model.safetensors"))
    before = snapshot(model)
    try:
        swap(model, table, folder)
    except ArithmeticError:
        assert_untouched(model, before)
    else:
        assert_equals_fresh_load(model, KIND, folder)


KEYS = (5, None, ("a", "b"), KEY.encode(), "", ".", ".lora_A.weight", "...")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "change",
    [*({KEY: each} for each in odd(torch.ones(4, 12)).values()), *({key: torch.ones(4, 12)} for key in KEYS)],
    ids=[*odd(torch.ones(4, 12)), *map(str, KEYS)],
)
def test_what_can_not_be_swapped_in(folder, model, change):
    error = refused(None, swap, model, load_file(f"{folder}/adapter_model.safetensors") | change, folder)
    assert "found:" in str(error)


@pytest.mark.parametrize("table", [None, 5, [], "weights", [("a", torch.ones(2))], torch.ones(2)])
def test_what_is_no_table(folder, model, table):
    with untouched(model), pytest.raises((TypeError, ValueError)):
        swap(model, table, folder)
