"""Any arrangement of adapters, mixes and strengths: each row equals a fresh load, from one graph for all of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lengths import long
from models import KINDS, Kind, call, load
from row_truth import Truth, family

from hotswap_lab import AdapterPool, RecompileWatch

ROWS = 8
LINEAR = Kind(KINDS["linear"].make_random, lambda: torch.randn(ROWS, 12), KINDS["linear"].modules)
#: few enough that a fresh load of each combination is made once
WEIGHTS, STRENGTHS = (0.7, 0.3, -1.0), (1.0, 1.0, 0.5, 0.0, -2.0)

names = st.sampled_from("abcde")
mixes = st.dictionaries(names, st.sampled_from(WEIGHTS), min_size=1, max_size=2)
row = st.tuples(names | names | st.none() | mixes, st.sampled_from(STRENGTHS))
arrangements = st.lists(row, min_size=1, max_size=ROWS)


class Scene:
    """A pool with rows, its model, compiled or not, and what each row must be.

    In float64: what mixes cancel, float32 rounds by more than is allowed here on some processors.
    """

    def __init__(self, folder, backend: str | None, dtype: torch.dtype = torch.float64):
        torch.compiler.reset()
        self.dtype = dtype
        folders = family(LINEAR, folder)
        self.truth = Truth(
            LINEAR, folders, LINEAR.inputs(), lambda model, inputs: call(model.to(dtype), inputs.to(dtype))
        )
        model = load(LINEAR, folders["a"]).to(dtype)
        self.pool = AdapterPool(model, adapters=folders, rows=ROWS, target_rank=15, progress=False)
        self.model = torch.compile(model, backend=backend, fullgraph=True, dynamic=True) if backend else model
        for size in (1, 2, ROWS):  # PyTorch takes a 1 for a constant
            self.assign([("a", 1.0)] * size)

    def assign(self, arrangement) -> torch.Tensor:
        self.pool.assign([wanted for wanted, _ in arrangement], [strength for _, strength in arrangement])
        return call(self.model, self.truth.inputs[: len(arrangement)].to(self.dtype))


@pytest.fixture(
    scope="module", params=[[None], long(["aot_eager"]), long(["inductor"])], ids=["eager", "aot_eager", "inductor"]
)
def scene(request, tmp_path_factory):
    yield Scene(tmp_path_factory.mktemp("family"), *request.param)
    torch.compiler.reset()


many = st.lists(arrangements, min_size=50, max_size=50)
options = dict(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)


@pytest.mark.long
@settings(max_examples=20, **options)
@given(several=many)
def test_a_thousand_arrangements(scene, several):
    with RecompileWatch(allow=0) as watch:
        for arrangement in several:
            scene.truth.check(scene.assign(arrangement), *map(list, zip(*arrangement, strict=True)))
    assert watch.compiles == 0


@pytest.mark.parametrize(
    "scene", [[None, torch.float32], long(["inductor", torch.float32])], ids=["eager", "inductor"], indirect=True
)
@pytest.mark.parametrize("seed", [0, *map(long, range(1, 4))])
def test_a_neighbour_never_matters(scene, seed):
    """Row by row the others are exchanged: not a bit of the first changes."""
    output = scene.assign([("a", 1.0), *[("b", 1.0)] * 3])
    for number in range(1, 4):
        neighbours = [[("c", 0.5), (None, 1.0), ({"a": 0.7, "d": 0.3}, 1.0)][(seed + each) % 3] for each in range(3)]
        now = scene.assign([("a", 1.0), *neighbours[:number], *[("b", 1.0)] * (3 - number)])
        assert torch.equal(now[0], output[0])
        assert not torch.equal(now[number], output[number])
