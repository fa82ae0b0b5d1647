"""What PEFT may not do while it loads an adapter: read what a config names, take memory that no tensor fills, or leave
another compiler behind."""

from __future__ import annotations

import os
import re
from types import SimpleNamespace

import pytest
import torch
from adapters import CONFIGS, kind_for, save_random_adapter_of
from lengths import few_of
from models import load

from hotswap_lab import Adapter, HotswapError, hotswap_adapter, verify_hotswap
from hotswap_lab.beyond.guards import MemoryGuard, TooLargeError, memory_guard, take_out

#: ways to make a large tensor
LARGE = {
    "empty": torch.empty,
    "arange": torch.arange,
    "Linear": lambda size: torch.nn.Linear(size, 1),
    "repeat": torch.ones(4).repeat,
    "eye": lambda _: torch.eye(10**6),
    "new_zeros": torch.ones(1).new_zeros,
    "full": lambda size: torch.full((size,), 1.0),
    "randn": torch.randn,
}


@pytest.mark.parametrize("way", LARGE)
def test_large_ones_are_refused(way):
    with MemoryGuard(1_000_000), pytest.raises(TooLargeError):
        LARGE[way](10**12)


def test_many_small_ones_add_up():
    with MemoryGuard(100_000), pytest.raises(TooLargeError):
        [torch.empty(100) for _ in range(100)]
    with MemoryGuard(10):
        assert torch.empty(10**12, device="meta").is_meta, "takes no memory"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_method_may_take_what_it_needs(dtype):
    """An order of all weights in int64, and 12 bytes more for each; and its own tensors once more."""
    base = torch.nn.Linear(2048, 8192, bias=False, dtype=dtype, device="meta")
    own = [torch.empty(10**8, device="meta")]
    assert memory_guard(base, own).limit > (8 + 12) * base.weight.numel() + own[0].nbytes


def test_what_a_prompt_starts_from_is_not_read():
    config = SimpleNamespace(prompt_tuning_init="TEXT")
    assert take_out(config) == {"prompt_tuning_init": "TEXT"}
    assert config.prompt_tuning_init == "RANDOM"
    with pytest.raises(ValueError, match="names a model"):
        take_out(SimpleNamespace(shadow_model="user/model"))


@pytest.mark.parametrize("compiler", [None, "g++"])
def test_the_compilers_stay_what_they_are(tmp_path, monkeypatch, compiler):
    """PEFT's BOFT names a C compiler where it can't build its extension, for whatever is compiled later."""
    kind = kind_for("BOFT")
    old, new = (save_random_adapter_of(CONFIGS["BOFT"][seed], tmp_path / str(seed), seed, kind) for seed in (0, 1))
    model = load(kind, old)
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False) if compiler is None else monkeypatch.setenv(name, compiler)
    before = dict(os.environ)
    hotswap_adapter(model, new, "default")
    assert dict(os.environ) == before
    assert verify_hotswap(model, new, inputs=kind.inputs())
    assert dict(os.environ) == before


@pytest.mark.parametrize("name", few_of(sorted(CONFIGS), ["LoHa", "OFT", "PromptTuning", "VeRA"]))
def test_no_method_takes_memory_for_a_number_in_its_config(tmp_path, name):
    """Every whole number of every method's config, one at a time, said to be a billion."""
    kind = kind_for(name)
    folder = save_random_adapter_of(CONFIGS[name][0], tmp_path, 1, kind)
    model, adapter = load(kind, folder), Adapter.load(folder)
    for key, value in list(vars(adapter.config).items()):
        if type(value) is int:
            setattr(adapter.config, key, 10**9)
            text = ""
            try:
                hotswap_adapter(model, adapter, "default")
            except HotswapError as error:
                text = str(error)
            assert not re.search("allocate|MemoryError", text), (key, text)
            setattr(adapter.config, key, value)
    hotswap_adapter(model, adapter, "default")
