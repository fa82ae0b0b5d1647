"""State dicts as nobody should pass them: swapped in right, or refused, and never kept or changed."""

from __future__ import annotations

import pytest
import torch
from models import KINDS, load, save_random_adapter
from mutations import odd
from oracle import assert_equals_fresh_load, assert_untouched, snapshot, untouched
from peft import LoraConfig
from safetensors.torch import load_file

from hotswap_lab import HotswapError, hotswap_adapter_from_state_dict

KIND = KINDS["linear"]


@pytest.fixture
def folder(tmp_path):
    return save_random_adapter(KIND, tmp_path / "new", seed=2, r=4)


@pytest.fixture
def model(tmp_path):
    return load(KIND, save_random_adapter(KIND, tmp_path / "old", seed=1, r=4))


def strange_views(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same values in memory that is laid out in other ways."""
    wide = torch.empty(tensor.shape[0], 2 * tensor.shape[1])
    wide[:, ::2] = tensor
    return {
        "transposed": tensor.t().contiguous().t(),
        "every second": wide[:, ::2],
        "part of something": torch.cat([tensor, tensor])[: len(tensor)],
        "parameter": torch.nn.Parameter(tensor.clone()),
        "with gradient": tensor.clone().requires_grad_(),
        "not a leaf": tensor.clone().requires_grad_() * 1.0,
        "double": tensor.double(),
        "negative view": torch._neg_view(-tensor),
    }


@pytest.mark.parametrize("form", strange_views(torch.ones(2, 2)))
def test_the_values_count_not_where_they_lie(folder, model, form):
    state_dict = {
        key: strange_views(each)[form] for key, each in load_file(f"{folder}/adapter_model.safetensors").items()
    }
    before = {key: (each.detach().clone(), each.stride(), each.requires_grad) for key, each in state_dict.items()}
    hotswap_adapter_from_state_dict(model, state_dict, "default", LoraConfig.from_pretrained(folder))
    assert_equals_fresh_load(model, KIND, folder)
    for key, (value, stride, requires_grad) in before.items():
        assert torch.equal(state_dict[key].detach(), value)
        assert (state_dict[key].stride(), state_dict[key].requires_grad) == (stride, requires_grad)
        assert all(each.data_ptr() != state_dict[key].data_ptr() for each in model.parameters())


def test_inference_tensors(folder, model):
    with torch.inference_mode():
        state_dict = {key: each.clone() for key, each in load_file(f"{folder}/adapter_model.safetensors").items()}
    hotswap_adapter_from_state_dict(model, state_dict, "default", LoraConfig.from_pretrained(folder))
    assert_equals_fresh_load(model, KIND, folder)


def test_expanded_tensors(folder, model):
    """In memory a tensor may well be one row, repeated."""
    tensors = {
        key: each[:1].expand(each.shape) for key, each in load_file(f"{folder}/adapter_model.safetensors").items()
    }
    hotswap_adapter_from_state_dict(model, tensors, "default", LoraConfig.from_pretrained(folder))
    live = dict(model.named_parameters())
    for key, value in tensors.items():
        assert torch.equal(live[key.replace(".weight", ".default.weight")], value)


def test_the_models_own_parameters_in_another_order(model):
    """A's of one layer for another: read while they are written."""
    live = {key: each for key, each in model.state_dict(keep_vars=True).items() if "lora_" in key}
    first, second = "base_model.model.blocks.0", "base_model.model.blocks.1"
    own = {key.replace(".default", ""): value for key, value in live.items()}
    for part in ("lora_A", "lora_B"):
        one, other = f"{first}.{part}.weight", f"{second}.{part}.weight"
        own[one], own[other] = own[other], own[one]
    expected = {key: value.detach().clone() for key, value in own.items()}
    hotswap_adapter_from_state_dict(model, own, "default", model.peft_config["default"])
    for key, value in expected.items():
        assert torch.equal(model.state_dict()[key.replace(".weight", ".default.weight")], value), key


class Raises(dict):
    """A table that breaks when it is read."""

    def __init__(self, *args, how: str):
        super().__init__(*args)
        self.how = how

    def _raise(self, how: str):
        if how == self.how:
            raise ArithmeticError(how)

    def __iter__(self):
        self._raise("iter")
        return super().__iter__()

    def keys(self):
        self._raise("keys")
        return super().keys()

    def __getitem__(self, key):
        self._raise("getitem")
        return super().__getitem__(key)

    def items(self):
        self._raise("items")
        return super().items()


@pytest.mark.parametrize("how", ["iter", "keys", "getitem", "items"])
def test_a_table_that_raises(folder, model, how):
    """Its own error comes through, or it was not asked in this way; nothing in between."""
    before = snapshot(model)
    table = Raises(load_file(f"{folder}/adapter_model.safetensors"), how=how)
    try:
        hotswap_adapter_from_state_dict(model, table, "default", LoraConfig.from_pretrained(folder))
    except ArithmeticError:
        assert_untouched(model, before)
    else:
        assert_equals_fresh_load(model, KIND, folder)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("form", odd(torch.ones(2, 2)))
def test_what_can_not_be_swapped_in(folder, model, form):
    state_dict = load_file(f"{folder}/adapter_model.safetensors")
    key = sorted(state_dict)[0]
    with untouched(model):
        with pytest.raises(HotswapError) as info:
            hotswap_adapter_from_state_dict(
                model, {**state_dict, key: odd(state_dict[key])[form]}, "default", LoraConfig.from_pretrained(folder)
            )
        assert "found:" in str(info.value)


@pytest.mark.parametrize("key", [5, None, ("a", "b"), b"first.lora_A.weight", "", ".", ".lora_A.weight", "..."])
def test_strange_keys(folder, model, key):
    state_dict = load_file(f"{folder}/adapter_model.safetensors")
    with untouched(model), pytest.raises(HotswapError):
        hotswap_adapter_from_state_dict(
            model, {**state_dict, key: torch.ones(4, 12)}, "default", LoraConfig.from_pretrained(folder)
        )


@pytest.mark.parametrize("table", [None, 5, [], "weights", [("a", torch.ones(2))], torch.ones(2)])
def test_what_is_no_table(folder, model, table):
    with untouched(model), pytest.raises((HotswapError, TypeError, ValueError)):
        hotswap_adapter_from_state_dict(model, table, "default", LoraConfig.from_pretrained(folder))
