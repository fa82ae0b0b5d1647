"""Chapter 01: swapping by hand, and what that gets wrong."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .. import demo
from ..core.plan import Action
from ..files.reading import Adapter
from ..swap import plan_hotswap, resolve_slot
from .exercise import Exercise

WORD = "notebook"


@Exercise
def swap_by_hand(solution):
    """Copy each tensor of the dict into the parameter of the model that it belongs to, in place. About 3 lines."""
    model, tokenizer = demo.load("reverse")
    slot = resolve_slot(model, "default")
    addresses = slot.data_ptrs()
    solution(model, Adapter.load(demo.adapter_path("vowels_up")).tensors)
    yield f"the answer to {WORD}", demo.ask(model, tokenizer, WORD), demo.TASKS["vowels_up"](WORD)
    yield "the addresses stay the same", slot.data_ptrs() == addresses, True


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


@Exercise
def layers_to_turn_off(solution):
    """Return the set of layers that only the old adapter has. About 3 lines."""
    for old, new in (("reverse", "shout"), ("reverse", "caesar"), ("caesar", "pig_latin"), ("shout", "shout")):
        plan = plan_hotswap(demo.load(old)[0], demo.adapter_path(new))
        expected = {layer.path for layer in plan.layers if layer.action is Action.OFF}
        yours = solution(*(Adapter.load(demo.adapter_path(name)).tensors for name in (old, new)))
        yield f"{old} to {new}", f"{len(yours)} layers", f"{len(expected)} layers"
        if len(yours) == len(expected) and set(yours) != expected:
            yield f"{old} to {new}, one of them", min(yours), min(expected)
