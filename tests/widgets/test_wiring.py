"""The chapters show widgets, and what is stored of them needs no kernel."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = Path(__file__).parent.parent.parent / "notebooks"
SHOWN = {
    "00_start_here": ["SwapPanel"],
    "01_uncompiled_swap": ["PlanView"],
    "02_rank_padding": ["RankPaddingView"],
    "03_compiled_swap": ["RecompileMeter"],
    "04_many_adapters": ["SwapRace"],
    "05_real_llm": ["SwapPanel"],
    "07_beyond_lora": ["PlanView"],
    "08_many_at_once": ["RowPanel"],
    "09_beyond_one_machine": ["ReplicaPanel"],
}


@pytest.mark.parametrize("chapter", SHOWN)
def test_the_static_form_is_stored(chapter):
    cells = nbformat.read(NOTEBOOKS / f"{chapter}.ipynb", as_version=4).cells
    data = [output.data for cell in cells for output in cell.get("outputs", []) if "data" in output]
    assert not any("application/vnd.jupyter.widget-view+json" in each for each in data)
    static = [each["text/plain"] for each in data if "text/html" in each or "image/svg+xml" in each]
    for widget in SHOWN[chapter]:
        assert any(f"from hotswap_lab.widgets import {widget}" in cell.source for cell in cells)
        assert any(text.startswith((widget, "Swap ")) for text in static)
