"""The notebook that reads the code: a method of the reader's own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch

from .. import demo
from ..beyond.passes import PASSES
from ..core.adapter import Adapter
from ..core.change import Change
from ..core.plan import Plan
from ..core.planner import make_plan
from ..swap import carry_out, resolve_slot
from .exercise import Exercise, refused

#: the key of a gain in a file: the layer's path, and this
GAIN = ".gain"


def gains_of(draft: Plan) -> dict[str, float]:
    """What an adapter of gains holds: by the path of a layer, how many times as strong LoRA is there.

    >>> model, _ = demo.load("reverse")
    >>> with_gains(model, {"model.layers.0.mlp.up_proj.gain": torch.tensor(0.5)}, lambda draft: print(gains_of(draft)))
    {'model.layers.0.mlp.up_proj': 0.5}
    """
    tensors = draft.adapter.tensors
    return {key.removesuffix(GAIN): float(value) for key, value in tensors.items() if key.endswith(GAIN)}


def as_plan(draft: Plan, change: Change) -> Plan:
    """A plan that comes to this change, for the config that is in the model."""
    draft.config = draft.slot.config
    draft.change_maker = lambda plan: change
    return draft


def with_gains(model: torch.nn.Module, tensors: dict[str, torch.Tensor], solution: Callable) -> None:
    """Swaps gains in, decided by ``solution`` as the first pass; None changes nothing."""

    def plan_gains(plan: Plan) -> Plan | None:
        if not gains_of(plan):
            return None
        plan.is_decided = True
        return solution(plan) or as_plan(plan, Change())

    slot = resolve_slot(model, "default")
    adapter = Adapter.from_state_dict(tensors, slot.config)
    carry_out([make_plan(slot, adapter, passes=[plan_gains, *PASSES])])


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
    yield "14 layers twice as strong", after[14:], [2 * each for each in before[14:]]
    more = {**tensors, f"model.layers.9.mlp.up_proj{GAIN}": torch.tensor(1.0)}
    yield "a layer that is not there is refused", refused(lambda: with_gains(model, more, solution)), "ValueError"
    yield "and nothing is written then", scalings(), after
    with_gains(model, {f"{layers[0].path}{GAIN}": torch.tensor(1.0)}, solution)
    yield "a gain of one changes nothing", scalings(), after

    def spoiled(draft: Plan) -> Plan:
        plan = solution(draft)
        plan.change_maker(plan).steps.append(lambda journal: 1 / 0)
        return plan

    with contextlib.suppress(ZeroDivisionError):
        with_gains(model, tensors, spoiled)
    yield "after an error in the last step, all is as before", scalings(), after
