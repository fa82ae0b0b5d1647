"""Chapter 00: the first swap.

Tests: ``tests/lessons/test_exercises.py``.
"""

from .. import demo
from ..core.errors import HotswapError
from ..swap import resolve_slot
from ..verify import verify_hotswap
from .exercise import Exercise


@Exercise
def make_it_shout(solution):
    """Swap the adapter `shout` into the model you are given. 1 line."""
    model, tokenizer = demo.load("reverse")
    parameters = [tensor.parameter for tensor in resolve_slot(model, "default").tensors]
    solution(model)
    after = {id(parameter) for parameter in model.parameters()}
    yield "the answer to hotswap", demo.ask(model, tokenizer, "hotswap"), "HOTSWAP!"
    try:
        same: object = bool(verify_hotswap(model, demo.adapter_path("shout"), base=demo.load_base))
    except HotswapError as error:  # another adapter is active
        same = str(error).partition("\n")[0]
    yield "equals a fresh load", same, True
    yield "the parameters are the same objects", all(id(parameter) in after for parameter in parameters), True
