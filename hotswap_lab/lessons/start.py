"""Chapter 00: the first swap."""

import contextlib

from .. import demo
from ..core.errors import HotswapError
from ..swap import resolve_slot
from ..verify import verify_hotswap
from .exercise import Exercise


@Exercise
def make_it_shout(solution):
    """Swap the adapter `shout` into the model you are given. 1 line."""
    model, tokenizer = demo.load("reverse")
    parameters = [each.parameter for each in resolve_slot(model, "default").tensors]
    solution(model)
    after = {id(each) for each in model.parameters()}
    yield "the answer to hotswap", demo.ask(model, tokenizer, "hotswap"), "HOTSWAP!"
    same = False
    with contextlib.suppress(HotswapError):  # another adapter is active
        same = bool(verify_hotswap(model, demo.adapter_path("shout"), base=demo.load_base))
    yield "equals a fresh load", same, True
    yield "the parameters are the same objects", all(id(each) in after for each in parameters), True
