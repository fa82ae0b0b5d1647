"""Chapter 00: the first swap."""

from __future__ import annotations

from collections.abc import Callable

from .. import demo
from ..core.slot import resolve_slot
from ..verify import verify_hotswap
from .exercise import Exercise, Result

WORD = "hotswap"


def _make_it_shout(solution: Callable) -> list[Result]:
    model, tokenizer = demo.load("reverse")
    parameters = [each.parameter for each in resolve_slot(model, "default").tensors]
    solution(model)
    after = {id(each) for each in model.parameters()}
    return [
        Result(f"the answer to {WORD}", demo.ask(model, tokenizer, WORD), demo.TASKS["shout"](WORD)),
        Result("equals a fresh load", bool(verify_hotswap(model, demo.adapter_path("shout"))), True),
        Result("the parameters are the same objects", all(id(each) in after for each in parameters), True),
    ]


make_it_shout = Exercise("Swap the adapter `shout` into the model you are given. 1 line.", _make_it_shout)
