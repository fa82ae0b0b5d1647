"""Chapter 01: swapping by hand, and what that gets wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from .. import demo
from ..core.adapter import Adapter
from ..core.hotswap import plan_hotswap
from ..core.plan import Action
from ..core.slot import resolve_slot
from .exercise import Exercise, Result

WORD = "notebook"


def _swap_by_hand(solution: Callable) -> list[Result]:
    model, tokenizer = demo.load("reverse")
    slot = resolve_slot(model, "default")
    addresses = slot.data_ptrs()
    solution(model, Adapter.load(demo.adapter_path("vowels_up")).tensors)
    return [
        Result(f"the answer to {WORD}", demo.ask(model, tokenizer, WORD), demo.TASKS["vowels_up"](WORD)),
        Result("the addresses stay the same", slot.data_ptrs() == addresses, True),
    ]


swap_by_hand = Exercise(
    "Copy each tensor of the dict into the parameter of the model that it belongs to, in place. About 3 lines.\n"
    "The file calls it '....lora_A.weight', the model '....lora_A.default.weight'.",
    _swap_by_hand,
)


def reference_swap(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """One answer to :data:`swap_by_hand`. Right for adapters that differ in the values of their tensors only.

    >>> model, tokenizer = demo.load("reverse")
    >>> reference_swap(model, Adapter.load(demo.adapter_path("vowels_up")).tensors)
    >>> demo.ask(model, tokenizer, "notebook")
    'nOtEbOOk'
    """
    for key, tensor in tensors.items():
        parameter = model.get_parameter(key.replace(".weight", ".default.weight"))
        parameter.data.copy_(tensor)


def _layers_to_turn_off(solution: Callable) -> list[Result]:
    results = []
    for old, new in (("reverse", "shout"), ("reverse", "caesar"), ("caesar", "pig_latin"), ("shout", "shout")):
        model, _ = demo.load(old)
        plan = plan_hotswap(model, demo.adapter_path(new))
        expected = {layer.path for layer in plan.layers if layer.action is Action.OFF}
        tensors = [Adapter.load(demo.adapter_path(name)).tensors for name in (old, new)]
        yours = solution(*tensors)
        results.append(Result(f"{old} to {new}", _count(yours), _count(expected)))
        if len(yours) == len(expected) and set(yours) != expected:
            results.append(Result(f"{old} to {new}, one of them", min(yours), min(expected)))
    return results


def _count(layers: set[str]) -> str:
    return f"{len(layers)} layers"


layers_to_turn_off = Exercise(
    "From the tensors of the old and the new adapter, return the set of layers (such as\n"
    "'model.layers.0.mlp.up_proj') that only the old one has. About 3 lines.",
    _layers_to_turn_off,
)
