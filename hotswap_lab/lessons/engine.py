"""The notebook that reads the code: a method of the reader's own, and a search for a mistake.

Tests: ``tests/lessons/test_exercises.py`` and ``tests/lessons/test_lessons.py``.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch

from .. import demo
from ..beyond.passes import PASSES
from ..core import room
from ..core.adapter import Adapter
from ..core.change import Change
from ..core.plan import Plan
from ..core.planner import make_plan
from ..core.prepared import ScalingTable
from ..core.settings import LayerSettings
from ..core.slot import copy_of
from ..swap import carry_out, prepare_model_for_compiled_hotswap, resolve_slot
from .exercise import Exercise, refused

#: the key of a gain in a file: the layer's path, and this
GAIN = ".gain"


def gains_of(draft: Plan) -> dict[str, float]:
    """What an adapter of gains holds: by the path of a layer, how many times as strong LoRA is there.

    >>> model, _ = demo.load("reverse")
    >>> with_gains(model, {"model.layers.0.mlp.up_proj.gain": torch.tensor(0.5)}, lambda draft: print(gains_of(draft)))
    {'model.layers.0.mlp.up_proj': 0.5}
    """
    return {key.removesuffix(GAIN): float(gain) for key, gain in draft.adapter.tensors.items() if key.endswith(GAIN)}


@dataclass(eq=False)
class PlanOfChange(Plan):
    """A plan that builds the change that it was given."""

    own_change: Change = field(default_factory=Change)

    def build_change(self) -> Change:
        return self.own_change


def as_plan(draft: Plan, change: Change) -> Plan:
    """Return a plan that builds this change, with the config that is in the model."""
    config = copy_of(draft.slot.config)
    return PlanOfChange(
        draft.slot, draft.adapter, config, draft.compiled, refusals=draft.refusals, is_decided=True, own_change=change
    )


def with_gains(model: torch.nn.Module, tensors: dict[str, torch.Tensor], solution: Callable) -> None:
    """Swaps gains in, decided by ``solution`` as the first pass; None changes nothing."""

    def plan_gains(plan: Plan) -> Plan | None:
        if not gains_of(plan):
            return None
        plan.is_decided = True
        return solution(plan) or as_plan(plan, Change())

    slot = resolve_slot(model, "default")
    carry_out([make_plan(slot, Adapter.from_state_dict(tensors, slot.config), passes=[plan_gains, *PASSES])])


@Exercise
def gains(solution):
    """Return a plan whose change multiplies the scaling of each layer by its gain. About 8 lines."""
    model, _ = demo.load("reverse")
    layers = resolve_slot(model, "default").layers
    tensors = {f"{layer.path}{GAIN}": torch.tensor(0.0 if index < 14 else 2.0) for index, layer in enumerate(layers)}

    def scalings() -> list[float]:
        return [layer.module.scaling["default"] for layer in layers]

    before = scalings()
    with_gains(model, tensors, solution)
    after = scalings()
    yield "14 layers off", after[:14], [0.0] * 14
    yield "14 layers twice as strong", after[14:], [2 * scaling for scaling in before[14:]]
    more = {**tensors, f"model.layers.9.mlp.up_proj{GAIN}": torch.tensor(1.0)}
    yield "a layer that is not there is refused", refused(lambda: with_gains(model, more, solution)), "ValueError"
    yield "and nothing is written then", scalings(), after
    with_gains(model, {f"{layers[0].path}{GAIN}": torch.tensor(1.0)}, solution)
    yield "a gain of one changes nothing", scalings(), after

    def spoiled(draft: Plan) -> Plan:
        plan = solution(draft)
        plan.build_change().steps.append(lambda journal: 1 / 0)
        return plan

    with contextlib.suppress(ZeroDivisionError):
        with_gains(model, tensors, spoiled)
    yield "after an error in the last step, all is as before", scalings(), after


def mistakes(number: int) -> dict[str, Any]:
    """By the name of a file of core, a block in which that file doubles the scaling of a layer on its way."""

    def doubled(values: torch.Tensor) -> torch.Tensor:
        factors = torch.ones_like(values)
        factors[number] = 2
        return values * factors

    scaling, scalings_of = LayerSettings.scaling.fget, room.Room.scalings_of
    write, read = room.write_packed_scalings, ScalingTable.__getitem__
    return {
        "settings": patch.object(LayerSettings, "scaling", property(lambda self: 2 * scaling(self))),
        "room": patch.object(room.Room, "scalings_of", lambda *given: doubled(scalings_of(*given))),
        "writing": patch.object(room, "write_packed_scalings", lambda *given: write(*given[:2], doubled(given[2]))),
        "prepared": patch.object(ScalingTable, "__getitem__", lambda *given: 2 * read(*given)),
    }


@Exercise
def search(solution):
    """Swap an adapter in, and return a layer's scaling as each of four files has it. About 8 lines."""
    model, _ = demo.load("reverse")
    right, path = 4.0, "model.layers.2.self_attn.v_proj"  # alpha 8, rank 2
    folder = demo.adapter_path("double")  # neither is one that the notebook has used before
    prepare_model_for_compiled_hotswap(model, adapters=[folder])
    files = mistakes([layer.path for layer in resolve_slot(model, "default").layers].index(path))

    def found() -> dict[str, float]:
        return {file: float(value) for file, value in solution(model, folder, path).items()}

    yield "without a mistake, all four are right", found(), dict.fromkeys(files, right)
    for file, mistake in files.items():
        with mistake:
            wrong = [name for name, value in found().items() if value != right]
        yield f"a mistake in {file} is found there", [name for name in files if name in wrong][:1], [file]
