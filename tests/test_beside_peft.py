"""The table of ``notebooks/beside_peft.ipynb``: nbval makes its rows anew; this is about all that stands on it."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

import nbformat
import pytest
from adapters import CONFIGS, kind_for, save_random_adapter_of
from lengths import few_of
from models import load
from peft.utils.hotswap import hotswap_adapter as peft_hotswap

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
    return {case: (theirs, ours) for case, theirs, ours in ROW.findall(text)[2:]}


def test_readme_has_seven_rows_of_the_table(table):
    rows = ROW.findall(section_of_readme("Beside PEFT's hotswap"))[2:]
    assert len(rows) == 7
    for case, theirs, ours in rows:
        assert table[case] == (theirs, ours)


def test_the_right_column_is_never_wrong_in_silence(table):
    assert len(table) > 50
    equal = [case for case, (_, ours) in table.items() if ours.startswith("equals a fresh load")]
    refused = [case for case, (_, ours) in table.items() if ours == "refused, untouched"]
    others = table.keys() - {*equal, *refused}
    assert len(others) == 6, others  # no swaps: what is saved, what a config says, what a neighbour or a caller keeps
    assert not any("half" in table[case][1] or "error" in table[case][1] for case in others)


@pytest.mark.skipif(not version("peft").startswith("0.21."), reason="this is what PEFT 0.21 does; another is installed")
@pytest.mark.parametrize("name", few_of(CONFIGS, ("LoHa", "IA3", "PrefixTuning")))
def test_pefts_hotswap_refuses_all_other_methods(tmp_path, name):
    """The notebook tries seven of them. That ours equals a fresh load is what ``beyond/test_every_method.py`` shows."""
    (first, second, *_), kind = CONFIGS[name], kind_for(name)
    old = save_random_adapter_of(first, tmp_path / "old", 1, kind)
    new = save_random_adapter_of(second, tmp_path / "new", 2, kind)
    with pytest.raises((ValueError, RuntimeError)):
        peft_hotswap(load(kind, old), new, adapter_name="default", torch_device="cpu")
