"""Core imports nothing else of the package but ``compat``, and is read in the order that it says."""

from __future__ import annotations

from pathlib import Path

import hotswap_lab.core

FOLDER = Path(hotswap_lab.core.__file__).parent


#: what core imports from outside of itself
OTHERS = {"from .. import compat"}


def test_core_imports_nothing_else_of_the_package():
    imports = [line.strip() for path in FOLDER.rglob("*.py") for line in path.read_text().splitlines()]
    imports = {line for line in imports if line.startswith(("from ..", "from hotswap_lab", "import hotswap_lab"))}
    assert imports == OTHERS


def test_the_order_to_read_it_in_names_every_module():
    modules = {path.stem for path in FOLDER.glob("*.py")} - {"__init__"}
    text = hotswap_lab.core.__doc__
    assert {name for name in modules if f"``{name}``" not in text} == set()


def test_the_top_of_the_package_is_a_house_with_few_doors():
    top = FOLDER.parent
    assert len([each for each in top.iterdir() if each.name not in ("__pycache__", "py.typed")]) <= 20
