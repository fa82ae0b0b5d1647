"""Chapter 02: its exercises tell right from wrong, its measurement measures what it says."""

from __future__ import annotations

import pytest
import torch
from exercises import assert_tells_right_from_wrong

from hotswap_lab import Adapter, demo, prepare_model_for_compiled_hotswap, resolve_slot
from hotswap_lab.lessons import padding


def pad(a, b, rank):
    big_a, big_b = a.new_zeros(rank, a.shape[1]), b.new_zeros(b.shape[0], rank)
    big_a[: len(a)], big_b[:, : b.shape[1]] = a, b
    return big_a, big_b


def only_a_is_zero(a, b, rank):
    big_a, big_b = pad(a, b, rank)
    big_b[:, b.shape[1] :] = 9
    return big_a, big_b


def only_b_is_zero(a, b, rank):
    big_a, big_b = pad(a, b, rank)
    big_a[len(a) :] = 9
    return big_a, big_b


def in_float32(a, b, rank):
    return pad(a.float(), b.float(), rank)


def only_a_is_padded(a, b, rank):
    return pad(a, b, rank)[0], b


def own_and_held(tensors, rank):
    axis = {key: int(".lora_B." in key) for key in tensors}
    held = sum(tensor.nbytes // tensor.shape[axis[key]] * rank for key, tensor in tensors.items())
    return sum(tensor.nbytes for tensor in tensors.values()), held


def one_factor_for_all(tensors, rank):
    own = sum(tensor.nbytes for tensor in tensors.values())
    return own, own * rank // next(iter(tensors.values())).shape[0]


SOLUTIONS = {
    "pad": (
        padding.pad,
        pad,
        [lambda a, b, rank: (a, b), only_a_is_zero, only_b_is_zero, in_float32, only_a_is_padded],
    ),
    "bytes_held": (padding.bytes_held, own_and_held, [lambda tensors, rank: (0, 0), one_factor_for_all]),
}


@pytest.mark.parametrize("name", SOLUTIONS)
def test_right_and_wrong_solutions(name, capsys):
    assert_tells_right_from_wrong(*SOLUTIONS[name], capsys)


def test_the_exercise_asks_for_what_the_engine_does():
    tensors = Adapter.load(demo.adapter_path("sort")).tensors
    model, _ = demo.load("sort")
    slot = resolve_slot(model, "default")
    prepare_model_for_compiled_hotswap(model, target_rank=24)
    for layer in slot.layers:
        a, b = (tensors[f"base_model.model.{layer.path}.{tensor.key}"] for tensor in layer.tensors)
        for expected, tensor in zip(pad(a, b, 24), layer.tensors, strict=True):
            assert torch.equal(tensor.parameter, expected)


def test_times_are_of_calls_of_each_model():
    calls = []
    models = {name: demo.load(name)[0] for name in ("double", "reverse")}
    for name, model in models.items():
        model.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    times = padding.forward_times(models, words=1, n=5)
    assert calls == 10 * ["double"] + 10 * ["reverse"]  # each timed call after an uncounted one
    assert {name: timing.n for name, timing in times.items()} == {"double": 5, "reverse": 5}
    assert all(0 < timing.minimum <= timing.median for timing in times.values())
