"""The config of a mix."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from models import KINDS, Kind, load, save_random_adapter
from oracle import assert_equals_fresh_load, assert_same_outputs, call
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from hotswap_lab import (
    Adapter,
    AdapterPool,
    HotswapError,
    demo,
    hotswap_adapter_from_state_dict,
    loaded,
    save_adapter,
    verify_hotswap,
)

LLAMA = KINDS["llama"]
Q = dict(r=4, target_modules=["q_proj", "k_proj"])
#: each keeps the first adapter of the mix from layers that the second one is on
FIRST = {
    "plain": {},
    "excluded": dict(exclude_modules=["k_proj"]),
    "one layer": dict(layers_to_transform=[0], layers_pattern="layers"),
    "rsLoRA": dict(use_rslora=True, lora_dropout=0.3),
}


@pytest.mark.parametrize("first", FIRST)
def test_a_mix_is_saved_with_all_of_its_layers(tmp_path, first):
    sources = {
        "first": save_random_adapter(LLAMA, tmp_path / "first", seed=1, **Q, **FIRST[first]),
        "second": save_random_adapter(LLAMA, tmp_path / "second", seed=2, **Q),
    }
    model = load(LLAMA, sources["second"])
    pool = AdapterPool(model, adapters=sources, target_rank=8, progress=False)
    pool.swap({"first": 0.7, "second": 0.4})
    save_adapter(model, tmp_path / "saved")
    assert_same_outputs(load(LLAMA, str(tmp_path / "saved")), model, LLAMA)


@pytest.mark.parametrize("first", FIRST)
def test_a_mix_is_the_exact_sum_also_where_that_of_peft_is_not(tmp_path, first):
    """As docs/facts.md says: the first adapter's config is that of PEFT's mix."""
    shares = {"first": 0.7, "second": 0.4}
    for seed, name in enumerate(shares):
        options = FIRST[first] if name == "first" else {}
        save_random_adapter(LLAMA, tmp_path / name, seed=seed + 1, **Q, **options)
    fresh = [load(LLAMA, tmp_path / name).double() for name in shares]
    expected, peft = LLAMA.base().double(), PeftModel.from_pretrained(LLAMA.base(), tmp_path / "first", "first")
    for model, weight in zip(fresh, shares.values(), strict=True):
        for path, layer in model.get_base_model().named_modules():
            if isinstance(layer, LoraLayer):
                with torch.no_grad():
                    expected.get_submodule(path).weight += weight * layer.get_delta_weight("default")
    mixed = load(LLAMA, tmp_path / "second").double()
    sources = {name: str(tmp_path / name) for name in shares}
    AdapterPool(mixed, adapters=sources, target_rank=8, progress=False).swap(shares)
    peft.load_adapter(sources["second"], "second")
    peft = peft.double()
    peft.add_weighted_adapter([*shares], [*shares.values()], "mix", combination_type="cat")
    peft.set_adapter("mix")
    wanted, ours, theirs = (call(model, LLAMA.inputs()) for model in (expected, mixed, peft.eval()))
    assert (ours - wanted).abs().max() < 1e-9
    assert ((theirs - wanted).abs().max() < 1e-9) == (first == "plain")


def test_a_write_that_no_counter_shows(tmp_path):
    """The pool compares the weights: it doesn't name them any more, and a block puts back those that were written."""
    sources = {str(n): save_random_adapter(LLAMA, tmp_path / str(n), seed=n, **Q) for n in (1, 2)}
    model = load(LLAMA, sources["1"])
    pool = AdapterPool(model, adapters=sources, target_rank=8, progress=False)
    written = next(module for module in model.modules() if hasattr(module, "lora_B")).lora_B["default"].weight
    for owner, name in (({"1": 0.5, "2": 0.25}, None), ("2", "2")):
        pool.swap(owner)
        assert (pool.mix, pool.active) == (None if name else owner, name)
        with pool.using("1"):
            pass
        assert (pool.mix, pool.active) == (None if name else owner, name)
        written.data.mul_(1.5)
        assert (pool.mix, pool.active) == (None, None)
        assert "active" not in str(pool)
        assert "mix" not in str(pool)
        assert loaded(model)[0].source == "unknown"
        expected = call(model, LLAMA.inputs())
        for other in ("1", {"1": 1, "2": 1}):
            with pool.using(other):
                assert (pool.active or pool.mix) == other
            assert torch.equal(call(model, LLAMA.inputs()), expected)
        written.data.div_(1.5)  # the same values, but for their rounding
        pool.swap(owner)
        written.data.mul_(2).div_(2)
        assert (pool.mix, pool.active) == (None if name else owner, name)


def test_a_write_to_a_member_that_was_dropped(tmp_path):
    sources = {str(n): save_random_adapter(LLAMA, tmp_path / str(n), seed=n, **Q) for n in (1, 2)}
    model = load(LLAMA, sources["1"])
    pool = AdapterPool(model, adapters=sources, target_rank=8, progress=False)
    pool._members.max_bytes = pool._members["1"].nbytes
    pool.swap("1")
    pool._members["1"].packed = None
    next(module for module in model.modules() if hasattr(module, "lora_B")).lora_B["default"].weight.data.mul_(1.5)
    expected = call(model, LLAMA.inputs())
    with pool.using("2"):
        pool._members.max_bytes = None
        pool._members.packed(pool._members["1"])  # it is read again meanwhile
    assert torch.equal(call(model, LLAMA.inputs()), expected)


def test_paths_that_are_ends_of_other_paths(tmp_path):
    """``1`` is in the mix at another rank than ``0.1``; and alone in a state dict."""
    nested = lambda: nn.Sequential(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), nn.Linear(6, 6))  # noqa: E731
    kind = Kind(nested, lambda: torch.randn(3, 6), ("0.1", "1"))
    sources = {
        "all": save_random_adapter(kind, tmp_path / "all", seed=1, r=4),
        "inner": save_random_adapter(kind, tmp_path / "inner", seed=2, r=2, target_modules=["0.1"]),
    }
    model = load(kind, sources["all"])
    AdapterPool(model, adapters=sources, target_rank=8, progress=False).swap({"all": 0.7, "inner": 0.4})
    save_adapter(model, tmp_path / "mix")
    assert_equals_fresh_load(model, kind, tmp_path / "mix", prepared=True)
    new = Adapter.load(sources["all"])
    tensors = {key: tensor for key, tensor in new.tensors.items() if ".0.1." not in key}
    hotswap_adapter_from_state_dict(model, tensors, "default", new.config)
    save_adapter(model, tmp_path / "outer")
    assert_equals_fresh_load(model, kind, tmp_path / "outer", prepared=True)


class Alike(nn.Module):
    """Two paths, one of which matches the other as a regular expression: in ``a.b``, the dot is any letter."""

    def __init__(self):
        super().__init__()
        self.a, self.a_b = nn.ModuleDict({"b": nn.Linear(8, 8)}), nn.Linear(8, 8)

    def forward(self, x):
        return self.a_b(self.a["b"](x))


def test_the_ranks_of_a_saved_mix_are_for_its_own_layers(tmp_path):
    kind = Kind(Alike, lambda: torch.randn(3, 8), ("a.b", "a_b"))
    ranks = dict(r=4, target_modules=["a.b", "a_b"], rank_pattern={r"^a\.b": 1})
    sources = {str(n): save_random_adapter(kind, tmp_path / str(n), seed=n, **ranks) for n in (1, 2)}
    model = load(kind, sources["1"])
    AdapterPool(model, adapters=sources, target_rank=8, progress=False).swap({"1": 0.5, "2": 0.5})
    save_adapter(model, tmp_path / "mix")
    assert_equals_fresh_load(model, kind, tmp_path / "mix", prepared=True)


def test_a_saved_mix_of_many_layers_is_what_the_model_has(tmp_path):
    """A fresh load shortens twenty names of layers or more."""
    model, _ = demo.load("reverse")
    adapters = {name: demo.adapter_path(name) for name in ("shout", "sort")}
    AdapterPool(model, adapters=adapters, target_rank=64, progress=False).swap({"shout": 0.7, "sort": 0.3})
    save_adapter(model, tmp_path / "saved")
    assert verify_hotswap(model, tmp_path / "saved", base=demo.load_base)


def test_a_mix_that_is_put_back_follows_its_members_although_one_was_removed(tmp_path):
    """A block had left the mix out when the pool lost one of its members."""
    first, second, new = (save_random_adapter(LLAMA, tmp_path / str(n), seed=n, **Q) for n in range(3))
    model, twin = load(LLAMA, first), load(LLAMA, first)
    pool, other = (
        AdapterPool(each, adapters={"first": first, "second": by}, target_rank=8, progress=False)
        for each, by in ((model, second), (twin, new))
    )
    mix = {"first": 0.7, "second": 0.4}
    pool.swap(mix)
    with pool.using("second"):
        pool.remove("first")
    pool.update("second", Adapter.load(new).tensors)
    other.swap(mix)
    assert_same_outputs(model, twin, LLAMA)
    assert pool.mix == mix


@pytest.mark.parametrize("names", [("vowels_up", "shout"), ("sort", "pig_latin")])
def test_a_refused_mix_names_a_rank_that_is_enough(names):
    """For each of its layers, and for the pool's other adapters."""
    adapters, mix = {name: demo.adapter_path(name) for name in demo.adapter_names()}, dict.fromkeys(names, 0.5)
    with pytest.raises(HotswapError) as refusal:
        AdapterPool(demo.load("reverse")[0], adapters=adapters, progress=False).swap(mix)
    rank = int(re.search(r"target_rank=(\d+)", str(refusal.value))[1])
    AdapterPool(demo.load("reverse")[0], adapters=adapters, target_rank=rank, progress=False).swap(mix)


def test_a_mix_whose_values_overflow_is_refused(tmp_path):
    kind = dataclasses.replace(KINDS["linear"], dtype=torch.float16)
    folders = {name: save_random_adapter(kind, tmp_path / name, seed, r=2) for seed, name in enumerate("ab")}
    model = PeftModel.from_pretrained(kind.base(), folders["a"], autocast_adapter_dtype=False).eval()
    pool = AdapterPool(model, adapters=folders, target_rank=4, progress=False)
    pool.swap({"a": 100, "b": -100})
    before = pool.active, {key: each.clone() for key, each in model.named_parameters()}
    with pytest.raises(HotswapError, match=r"values that torch\.float16 lacks"):
        pool.swap({"a": 1e6, "b": -1e6})
    assert pool.active == before[0]
    assert all(each.equal(before[1][key]) and each.isfinite().all() for key, each in model.named_parameters())
