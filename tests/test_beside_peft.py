"""The table of ``notebooks/beside_peft.ipynb``: nbval makes its rows anew; this is about its judge, and README."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parent.parent
ROW = re.compile(r"^\| (.+?) \| (.+?) \| (.+?) \|$", re.MULTILINE)


def section_of_readme(title: str) -> str:
    return re.search(rf"^## {title}\n(.*?)^## ", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL).group(1)


@pytest.fixture(scope="module")
def notebook() -> nbformat.NotebookNode:
    return nbformat.read(ROOT / "notebooks" / "beside_peft.ipynb", as_version=4)


@pytest.fixture(scope="module")
def table(notebook) -> dict[str, tuple[str, str]]:
    """What the notebook shows at its end: by case, what PEFT does and what is done here."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", []) if "data" in output]
    (text,) = (output.data["text/markdown"] for output in outputs if "text/markdown" in output.data)
    plain = re.sub("<.*?>", "", text.replace("<br>", "; "))
    return {case: (theirs, ours) for case, theirs, ours in ROW.findall(plain)[2:]}


def test_readme_has_three_rows_of_the_table(table):
    rows = ROW.findall(section_of_readme("Comparison with PEFT"))[2:]
    assert len(rows) == 3
    for case, theirs, ours in rows:
        assert table[case] == (theirs, ours)


def test_the_right_column_is_never_wrong_in_silence(table):
    assert len(table) > 50
    equal = [case for case, (_, ours) in table.items() if ours.startswith("✓ equals a fresh load")]
    refused = [case for case, (_, ours) in table.items() if ours == "✗ refused, untouched"]
    others = table.keys() - {*equal, *refused}
    assert len(others) == 6, others  # no swaps: what is saved, what a config says, what a neighbour or a caller keeps
    assert all(table[case][1].startswith("✓") for case in others)


@pytest.fixture
def judge(notebook) -> dict:
    """What the notebook's own cells define: models, adapters, the table and its judge."""
    cells, found = {cell.id: cell.source for cell in notebook.cells}, {}
    exec(cells["beside-02"].partition("\ntorch.")[0], found)
    for name in ("models", "table", "verdicts", "signs"):
        exec(cells[f"beside-{name}"], found)
    return found


def test_a_verdict_is_wrong_unless_it_is_known_to_be_right(judge):
    table = judge["Table"](None, None)
    table.rows = [("a case", "something new; refused, untouched", "equals a fresh load")]
    line = table._repr_markdown_().splitlines()[-1]
    shown = re.sub("</?span.*?>", "", line)
    assert shown == "| a case | ≠ something new<br>✗ refused, untouched | ✓ equals a fresh load |"
    assert [line.count(f"background-color:{judge['TINTS'][sign]};") for sign in "≠✗"] == [1, 1]
    assert line.count("<span") == line.count("</span>") == 2


def test_an_error_that_is_no_refusal_is_named_and_nothing_done_is_wrong(judge):
    def half(model, _):
        next(value for key, value in model.named_parameters() if "lora_A" in key).data.zero_()
        raise KeyError

    table = judge["Table"](None, None)
    folders = [table.save(judge["lora"](lora_alpha=alpha)) for alpha in (8, 3)]
    assert judge["outcome"](half, *folders) == "KeyError, half swapped"
    assert judge["outcome"](lambda model, new: None, *folders) == "other outputs, no error"
