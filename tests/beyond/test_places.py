"""The second and later swaps to one config, which only write tensors."""

from __future__ import annotations

import pytest
from adapters import CONFIGS, LLAMA, save_random_adapter_of
from models import load
from oracle import assert_equals_fresh_load
from peft.tuners.tuners_utils import BaseTunerLayer

from hotswap_lab import hotswap_adapter


@pytest.mark.parametrize("name", ["LoHa", "LoKr"])
def test_a_scale_that_the_user_set_is_gone_after_the_swap(tmp_path, name):
    one, two = (save_random_adapter_of(CONFIGS[name][0], tmp_path / f"{seed}", seed) for seed in (1, 2))
    model = load(LLAMA, one)
    for folder in (two, one, two):
        hotswap_adapter(model, folder, "default")
        assert_equals_fresh_load(model, LLAMA, folder)
        for layer in model.modules():
            if isinstance(layer, BaseTunerLayer):
                layer.set_scale("default", 0.5)
