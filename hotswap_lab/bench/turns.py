"""What threads that take turns pay: ``with in_use(model)`` around a forward pass, beside that pass."""

from __future__ import annotations

import torch

from ..threads import in_use
from .rounds import in_rounds
from .rows import Extra
from .scene import Scene
from .times import described, values_of

#: entering and leaving takes microseconds, which the clock alone would distort
REPEATS = 100


def measure_turns(scene: Scene) -> Extra:
    """The time of entering and leaving ``in_use``, and what part of a forward pass over one token that is."""
    model = scene.load()
    token = scene.make_inputs(1)

    def enter_and_leave() -> None:
        for _ in range(REPEATS):
            with in_use(model):
                pass

    def forward() -> torch.Tensor:
        return scene.outputs(model, token)

    timings = in_rounds({"in_use": enter_and_leave, "forward": forward}, scene.settings.n)
    entering = timings["in_use"].median / REPEATS
    share = entering / timings["forward"].median
    text = (
        f"turns: `with in_use(model)` takes {entering * 1e6:.1f} us, {share:.3%} of a forward over one token: "
        f"{described(timings['forward'])}"
    )
    values = {"in_use_s": entering, "share": share, "forward": values_of(timings["forward"])}
    return Extra("turns", scene.rank, text, values)
