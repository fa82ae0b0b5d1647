"""The notebook that reads the engine: its code fits on a page, its exercise tells right from wrong."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from exercises import assert_tells_right_from_wrong

from hotswap_lab.core.change import Change
from hotswap_lab.core.room import build_room
from hotswap_lab.lessons import engine, source

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "engine.ipynb"


def swapped(draft, **faults):
    """A right solution, or one with a fault."""
    layers = {layer.path: layer.module for layer in draft.slot.layers}
    change = Change()
    for path, gain in engine.gains_of(draft).items():
        if path in layers:
            value = layers[path].scaling["default"] * gain if "sets" not in faults else gain
            change.steps.append(
                lambda journal, table=layers[path].scaling, value=value: journal.set_item(table, "default", value)
            )
        elif "takes all" not in faults:
            draft.refuse("not_in_pool", name=path, found="others")
    return engine.as_plan(draft, change)


def at_once(draft):
    """Writes while it decides."""
    for path, gain in engine.gains_of(draft).items():
        for layer in draft.slot.layers:
            if layer.path == path:
                layer.module.scaling["default"] *= gain
    plan = swapped(draft)
    return engine.as_plan(draft, Change()) if plan.ok else plan


def test_right_and_wrong_solutions(capsys):
    wrong = [
        lambda draft: None,
        lambda draft: swapped(draft, sets=True),
        lambda draft: swapped(draft, **{"takes all": True}),
        at_once,
    ]
    assert_tells_right_from_wrong(engine.gains, engine.reference_gains, wrong, capsys)
    assert_tells_right_from_wrong(engine.gains, swapped, [], capsys)


def test_what_is_longer_than_a_page_is_not_shown():
    with pytest.raises(ValueError, match="too many to read"):
        source(build_room)


def test_code_is_shown_in_a_fence_without_its_docstring():
    code = source(engine.has_gains)
    assert code._repr_markdown_() == f"```python\n{code}\n```"
    assert str(code) == "def has_gains(draft: Plan) -> bool:\n    return bool(gains_of(draft))"


def test_every_hop_has_one_sentence_and_its_code():
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    assert len(cells) <= 45
    shown = [index for index, cell in enumerate(cells) if cell.source.startswith("source(")]
    assert len(shown) >= 12
    sentences = [re.findall(r"\*\*(.+?)\*\*", cells[index - 1].source) for index in shown]
    # the second of two functions that belong together needs none of its own
    assert sum(map(len, sentences)) >= 10
    for each in sentences:
        assert all(sentence.count(".") == 1 for sentence in each), each
