"""The short form of threads.py: every output equals one adapter's, whoever swaps meanwhile, and however."""

from __future__ import annotations

import itertools

import pytest
from lengths import TIMES, long
from threads import make_family, storm, ways


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_family(tmp_path_factory.mktemp("family"))


@pytest.mark.parametrize(
    ("way", "swapping"),
    # not two that set strengths: what one asks for, the other would change before anybody has computed with it
    [
        *(("pool", 2), ("from_disk", 1)),
        *itertools.starmap(long, (("pool", 1), ("from_disk", 2), ("prepared", 1), ("prepared", 2), ("strength", 1))),
        *itertools.starmap(long, (("pool_mixed", 1), ("pool_mixed", 2), ("rows", 1), ("rows", 2))),
    ],
)
def test_no_output_is_torn(folders, way, swapping):
    result = storm(folders, way, swaps=TIMES * (60 if way == "from_disk" else 200), swapping=swapping)
    assert not result.errors
    assert result.torn == 0
    assert sum(count > 0 for count in result.whole.values()) > 1, "nobody computed between two swaps"


@pytest.mark.long
@pytest.mark.parametrize(
    ("way", "backend"),
    [
        ("pool", "aot_eager"),
        *itertools.starmap(
            long, [("prepared", "aot_eager"), ("rows", "aot_eager"), ("pool", "inductor"), ("prepared", "inductor")]
        ),
    ],
)
def test_no_output_of_a_compiled_model_is_torn(folders, way, backend):
    result = storm(folders, way, swaps=100 * TIMES, swapping=2, backend=backend)
    assert not result.errors
    assert (result.torn, result.recompiles) == (0, 0)


def test_without_taking_turns_outputs_are_torn(folders):
    """What all of this is for, and the proof that the storm would notice."""
    assert storm(folders, "pool", swaps=100_000, guarded=False, until_torn=True).torn


def test_every_way_is_tried(folders):
    assert set(ways(folders)) == {"pool", "pool_mixed", "rows", "from_disk", "prepared", "strength"}
