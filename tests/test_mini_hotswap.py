"""``notebooks/solutions/mini_hotswap.py``: right, as the package is, for what it says, and short.

What is refused, patterns and rows: its parts are checked as a reader's are, see ``lessons/test_exercises.py``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from lengths import long
from oracle import assert_close
from peft import PeftModel
from torch._dynamo.testing import CompileCounter

from hotswap_lab import demo

FOLDER = Path(__file__).parents[1] / "notebooks" / "solutions"
sys.path.append(str(FOLDER))
import mini_hotswap  # noqa: E402
from mini_hotswap import Pool, plan, prepare, read, scalings_as_tensors, write  # noqa: E402

FOLDERS = {name: demo.adapter_path(name) for name in demo.adapter_names()}
INPUTS = torch.arange(24).view(2, 12)


@pytest.fixture(scope="module")
def family():
    return {name: read(folder) for name, folder in FOLDERS.items()}


@pytest.fixture(scope="module")
def expected():
    """What a fresh load of each adapter computes."""
    return {
        name: PeftModel.from_pretrained(demo.load_base().double(), folder).eval()(INPUTS).logits.detach()
        for name, folder in FOLDERS.items()
    }


def assert_is(model, expected, name):
    others = [(expected[name] - each).abs().max() for other, each in expected.items() if other != name]
    assert min(others) > 1  # another adapter would be far away
    assert_close(model(INPUTS).logits.detach(), expected[name], 1e-6)


@pytest.mark.parametrize("by", [long("write"), "pool"])
def test_each_adapter_is_as_a_fresh_load_and_nothing_is_compiled_again(family, expected, by):
    model = scalings_as_tensors(prepare(demo.load_base().double(), family.values()))
    pool = Pool(model, family) if by == "pool" else None
    addresses = [each.data_ptr() for each in model.parameters()]
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for name in [*FOLDERS, *FOLDERS]:
        pool.swap(name) if pool else write(plan(model, family[name]))
        assert_is(compiled, expected, name)
    assert counter.frame_count == 1
    assert [each.data_ptr() for each in model.parameters()] == addresses


def test_it_is_the_idea_and_no_more():
    lines = [line for line in Path(mini_hotswap.__file__).read_text().splitlines() if line.strip()]
    assert len(lines) <= 120
