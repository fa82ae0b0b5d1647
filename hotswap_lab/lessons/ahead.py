"""Chapter 10: which swaps reach compiled code.

Tests: ``tests/lessons/test_exercises.py``.
"""

import torch

from .exercise import Exercise


@Exercise
def unreached(solution):
    """Return the names in `swapped` that code bound to `bound` will not follow, sorted. About 3 lines."""
    a, b, scaling, moved = torch.zeros(4, 2, 2)  # in one storage
    names = {"scaling": scaling, "lora_B": b, "lora_A": a}  # not in the order of the answer
    same = {name: tensor.view(4).view(2, 2) for name, tensor in names.items()}  # other objects, the same memory
    most = {"lora_A": a, "lora_B": b}
    for case, constants, bound, swapped, expected in (
        ("all in memory, bound", ["scaling", "weight", "lora_B", "lora_A"], {**names, "weight": moved}, same, []),
        ("a scaling in the code", ["a.scaling", *most], {"a.scaling": moved, **most}, same, ["scaling"]),
        ("a tensor that was moved", list(names), names, {**same, "lora_A": moved}, ["lora_A"]),
        ("two exchanged", list(names), names, {**same, "lora_A": b, "lora_B": a}, ["lora_A", "lora_B"]),
        ("both", [*most], most, {**same, "lora_B": moved}, ["lora_B", "scaling"]),
    ):
        yield case, solution(constants, dict(reversed(bound.items())), dict(swapped)), expected
