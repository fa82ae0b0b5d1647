"""Chapter 04: its exercises tell right from wrong, its measurement measures what it says."""

from __future__ import annotations

import pytest
import torch
from exercises import assert_tells_right_from_wrong

from hotswap_lab import Adapter, demo, resolve_slot, verify_hotswap
from hotswap_lab.core.slot import room_of
from hotswap_lab.lessons import pools


def pack(pairs):
    rank = max(len(a) for a, b in pairs)
    shares = []
    for share in (each for a, b in pairs for each in (a, b.T)):
        shares.append(torch.cat([share, share.new_zeros(rank - len(share), share.shape[1])]))
    return torch.cat(shares, dim=1)


def all_a_first(pairs):
    return pack([(a, b.new_zeros(0, b.shape[1])) for a, b in pairs] + [(b.T, a.new_zeros(0, len(a))) for a, b in pairs])


def b_not_turned(pairs):
    return pack([(a, b.T.reshape(b.shape[1], -1).flip(1).T) for a, b in pairs])


def nines_beyond_the_rank(pairs):
    rows = pack(pairs)
    rows[len(pairs[0][0]) :, 0] = 9
    return rows


def swap_bytes(row, new, old):
    return new * row, max(old - new, 0) * row


SOLUTIONS = {
    "pack": (pools.pack, pack, [lambda pairs: pairs[0][0], all_a_first, b_not_turned, nines_beyond_the_rank]),
    "swap_bytes": (
        pools.swap_bytes,
        swap_bytes,
        [
            lambda row, new, old: (0, 0),
            lambda row, new, old: swap_bytes(row, old, new),
            lambda row, new, old: (new * row, old * row),
            lambda row, new, old: (new * row, (old - new) * row),
        ],
    ),
}


@pytest.mark.parametrize("name", SOLUTIONS)
def test_right_and_wrong_solutions(name, capsys):
    assert_tells_right_from_wrong(*SOLUTIONS[name], capsys)


def test_packing_is_what_the_engine_does():
    """The rows of the exercise are those of the library, but for the gaps at the ends of cache lines."""
    pool = pools._demo_pool()
    pool.swap("double")
    slot = resolve_slot(pool.model, "default")
    room = room_of(slot.host.base, "default")
    rows = room.components_for(room.state)[1]
    part = next(band.memory[:taken] for band, taken in zip(room.bands, rows, strict=True) if taken)
    tensors = Adapter.load(demo.adapter_path("double")).tensors
    pairs = [
        tuple(tensors[f"base_model.model.{layer.path}.{each.key}"] for each in layer.tensors) for layer in slot.layers
    ]
    # all sizes of the demo model are whole cache lines, so a row has a gap at its end only
    rows = pack(pairs)
    assert torch.equal(part[:, : rows.shape[1]], rows)
    assert not part[:, rows.shape[1] :].any()


def test_the_bytes_that_are_measured_are_those_that_are_packed():
    pool = pools._demo_pool()
    copied = {
        name: pools.written(pool, old, name)[0] for old, name in (("double", "pig_latin"), ("pig_latin", "double"))
    }
    scalings = 4 * 8 * len(resolve_slot(pool.model, "default").layers)  # SCALING_STEP numbers in float64
    assert sum(copied.values()) + 2 * scalings == pool.nbytes


def test_layers_of_the_large_model_share_base_weights_and_random_adapters_differ(tmp_path):
    """Its sizes are compared in the chapter itself."""
    model = pools.smol(layers=2)
    one, two = (layer.mlp.up_proj for layer in model.get_base_model().model.layers)
    assert one.base_layer.weight is two.base_layer.weight
    assert one.lora_A["default"].weight is not two.lora_A["default"].weight
    folders = pools.random_adapters(model, ["a", "b"], str(tmp_path))
    assert verify_hotswap(model, folders["b"])
    assert not verify_hotswap(model, folders["a"])


def test_steps_are_called_with_each_argument_in_turn():
    calls = {"first": [], "second": []}
    steps = {"first": (calls["first"].append, ["a", "b"]), "second": (calls["second"].append, ["c"])}
    timings = pools.measure_steps(steps, n=6)
    assert list(timings) == ["first", "second"]
    assert all(0 < timing.minimum <= timing.median for timing in timings.values())
    assert calls["first"] == ["a", "b"] * 6  # each timed call after one that doesn't count
    assert set(calls["second"]) == {"c"}
    assert {timing.n for timing in timings.values()} == {6}
