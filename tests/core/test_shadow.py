"""Layers that a swap adds."""

from __future__ import annotations

import pytest
from models import KINDS, load, save_random_adapter
from oracle import assert_equals_fresh_load

from hotswap_lab import hotswap_adapter

LINEAR = KINDS["linear"]


@pytest.mark.parametrize("neighbor", [None, ["first", "last"]], ids=["alone", "where another adapter is"])
@pytest.mark.parametrize("training", [False, True])
def test_an_added_layer_trains_when_the_model_does(tmp_path, training, neighbor):
    """Dropout that stays on in eval mode makes outputs random."""
    few = save_random_adapter(LINEAR, tmp_path / "few", seed=1, r=4, target_modules=["first"])
    new = save_random_adapter(LINEAR, tmp_path / "new", seed=2, r=4, lora_dropout=0.5)
    model = load(LINEAR, few)
    if neighbor:
        model.load_adapter(save_random_adapter(LINEAR, tmp_path / "n", seed=3, target_modules=neighbor), "neighbor")
    model.train(training)
    hotswap_adapter(model, new, "default", add_layers=True)
    assert {module.training for module in model.modules()} == {training}
    assert_equals_fresh_load(model.eval(), LINEAR, new)
