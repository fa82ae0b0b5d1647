"""Skips the chapter that needs SmolLM2 where the model is nowhere, and says why, instead of failing in every cell."""

from __future__ import annotations

import pytest

#: the notebooks that need the model; the solutions do without it
NEED_SMOLLM2 = {"05_real_llm.ipynb"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items = [item for item in items if item.path.name in NEED_SMOLLM2 and item.path.parent.name == "notebooks"]
    if not items:
        return
    from hotswap_lab import HotswapError
    from hotswap_lab.demo import smollm2

    try:
        smollm2.find()
    except HotswapError as error:
        for item in items:
            item.add_marker(pytest.mark.skip(reason=str(error).replace("\n", " ")))
