"""What a swap of LoRA writes besides weights."""

from __future__ import annotations

import pytest
from models import KINDS, load, save_random_adapter

from hotswap_lab import hotswap_adapter

LINEAR = KINDS["linear"]


@pytest.mark.parametrize("new", [dict(r=4), dict(r=6), dict(r=4, target_modules=["first"])], ids=str)
def test_gradients_of_the_old_weights_are_gone(tmp_path, new):
    old, new = (
        save_random_adapter(LINEAR, tmp_path / str(n), seed=n, **each) for n, each in enumerate((dict(r=4), new))
    )
    model = load(LINEAR, old, is_trainable=True)
    model(LINEAR.inputs()).sum().backward()
    assert any(parameter.grad is not None for parameter in model.parameters())
    hotswap_adapter(model, new, "default")
    assert all(parameter.grad is None for parameter in model.parameters())
