"""The chapters show widgets, and what is stored of them needs no kernel."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest

from hotswap_lab import widgets

NOTEBOOKS = Path(__file__).parent.parent.parent / "notebooks"
SHOWN = {
    path.name: re.findall(r"from hotswap_lab.widgets import (\w+)", path.read_text())
    for path in sorted(NOTEBOOKS.glob("0*.ipynb"))
}


def test_every_widget_is_shown():
    assert {name for names in SHOWN.values() for name in names} == {*widgets.__all__} - {"View"}


@pytest.mark.parametrize("chapter", SHOWN)
def test_the_static_form_is_stored(chapter):
    cells = nbformat.read(NOTEBOOKS / chapter, as_version=4).cells
    data = [output.data for cell in cells for output in cell.get("outputs", []) if "data" in output]
    assert not any("application/vnd.jupyter.widget-view+json" in each for each in data)
    static = [each["text/plain"] for each in data if "text/html" in each or "image/svg+xml" in each]
    for widget in SHOWN[chapter]:
        assert any(text.startswith((widget, "Swap ")) for text in static)
