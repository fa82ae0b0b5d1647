"""The table of crossings: each feature with each other one, on a small model, against fresh loads.

A cell is one short program: do, disturb, do again with other sizes. What can't go together is refused in words that
are known here, by the whole program or by the part of it that asks for it.
"""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from crossings import FEATURES, METHODS, Cell, World, closed
from lengths import few_of

from hotswap_lab import HotswapError

CELLS = {
    " x ".join(dict.fromkeys(pair)): pair
    for pair in itertools.combinations_with_replacement(FEATURES, 2)
    if pair not in (METHODS, ("trained", "inference"))  # an adapter is of one method; inference mode trains nothing
}
CELLS["plain"] = ()
#: what the whole program is refused with
REFUSED = {
    ("trained", "rows"): "is being trained",
    ("DoRA", "rows"): "nothing but a lora_A and a lora_B",
    ("DoRA", "mixes"): "whose magnitude would stay at full strength",
    ("DoRA", "strength"): "whose magnitude would stay at full strength",
    ("LoHa", "strength"): "an adapter of type LOHA",
    ("LoHa", "pool"): "A pool is for adapters of type LORA",
    ("LoHa", "ahead"): "Only a prepared model can be compiled ahead",
}
#: what takes ten seconds (``ahead/test_ahead.py`` reads rows from compiled code in the short form), or half of one,
#: with a neighbor that does the same without a compiler
LATER = {
    *(f"{name} x compiled" for name in ("DoRA", "LoHa", "half", "copies", "trained", "prepared", "several", "rows")),
    *(name for name in CELLS if "ahead" in name),
}
LATER |= {f"compiled x {name}" for name in ("merged", "saved", "copied", "disabled", "inference", "strength")}


@pytest.fixture(scope="module")
def world_of(tmp_path_factory):
    return functools.cache(lambda *features: World(tmp_path_factory.mktemp("world"), features))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("cell", few_of(CELLS, CELLS.keys() - LATER))
def test_a_crossing(cell, world_of, tmp_path):
    features = closed(*CELLS[cell])
    world = world_of(*[each for each in features if each in ("half", *METHODS)])
    match = next((text for pair, text in REFUSED.items() if {*pair} <= {*features}), None)
    with torch.inference_mode("inference" in features):
        if match is None:
            Cell(features, world, tmp_path).run()
        else:
            with pytest.raises(HotswapError, match=match):
                Cell(features, world, tmp_path).run()
