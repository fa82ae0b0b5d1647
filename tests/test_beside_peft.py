"""The table of ``notebooks/beside_peft.ipynb``: nbval makes its rows anew; this is about all that stands on it."""

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
def table() -> dict[str, tuple[str, str]]:
    """What the notebook shows at its end: by case, what PEFT does and what is done here."""
    notebook = nbformat.read(ROOT / "notebooks" / "beside_peft.ipynb", as_version=4)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", []) if "data" in output]
    (text,) = (output.data["text/markdown"] for output in outputs if "text/markdown" in output.data)
    plain = re.sub("<.*?>", "", text.replace("<br>", "; "))
    return {case: (theirs, ours) for case, theirs, ours in ROW.findall(plain)[2:]}


def test_readme_has_seven_rows_of_the_table(table):
    rows = ROW.findall(section_of_readme("Beside PEFT's hotswap"))[2:]
    assert len(rows) == 7
    for case, theirs, ours in rows:
        assert table[case] == (theirs, ours)


def test_the_right_column_is_never_wrong_in_silence(table):
    assert len(table) > 50
    equal = [case for case, (_, ours) in table.items() if ours.startswith("✓ equals a fresh load")]
    refused = [case for case, (_, ours) in table.items() if ours == "✗ refused, untouched"]
    others = table.keys() - {*equal, *refused}
    assert len(others) == 6, others  # no swaps: what is saved, what a config says, what a neighbour or a caller keeps
    assert all(table[case][1].startswith("✓") for case in others)
