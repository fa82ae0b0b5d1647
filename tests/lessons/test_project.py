"""The last project's rubric: it says yes to the solution (which nbval runs) and no to what isn't right."""

from __future__ import annotations

import pytest
import torch

from hotswap_lab import AdapterPool, demo
from hotswap_lab.lessons import project


def lines(capsys, **made):
    done = project.rubric(**made)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(project.STEPS)
    return done, {line[2:].partition(":")[0]: (line[0], line.partition(": ")[2]) for line in printed}


def test_nothing_yet(capsys):
    done, found = lines(capsys)
    assert not done
    assert {mark for mark, _ in found.values()} == {"-"}
    assert found["packaged"][1] == "needs adapter, pool, package"


@pytest.mark.long
def test_each_step_can_say_yes_and_no(capsys):
    """With an adapter that ships with the package, which does all but be new."""
    path, words = demo.adapter_path("sort"), ["hotswap", "hotsaw", "ahopstw"]
    live, _ = demo.load("reverse")
    pool = AdapterPool(live, adapters={"reverse": demo.adapter_path("reverse"), "mine": path}, rows=4, progress=False)
    pool.swap("mine")
    made = dict(trick=demo.TASKS["sort"], adapter=path, live=live, seen=words, pool=pool)
    compiled = torch.compile(live, backend="eager", dynamic=False)
    done, found = lines(capsys, **made, compiled=compiled)
    assert not done
    assert {name: mark for name, (mark, _) in found.items()} == {
        "a new trick": "✗",
        "trained": "✓",
        "swapped in while it trained": "✓",
        "in a pool with rows": "✓",
        "compiled once": "✓",
        "packaged": "-",
    }
    assert found["a new trick"][1] == "hotswap -> ahopstw, as sort does"
    wrong = made | dict(adapter=demo.adapter_path("shout"), seen=words[:2])
    pool.swap("mine")
    _, found = lines(capsys, **wrong, compiled=lambda **inputs: demo.load_base()(**inputs), package="nowhere.pt2")
    assert {mark for mark, _ in found.values()} == {"✗"}
    assert found["trained"][1].startswith("0 of 40")
    assert "Error" in found["packaged"][1]


@pytest.mark.parametrize("trick", [lambda word: word[:1], lambda word: word + "?"])
def test_a_trick_that_is_new(capsys, trick):
    assert lines(capsys, trick=trick)[1]["a new trick"][0] == "✓"
