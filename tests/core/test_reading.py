"""Core imports nothing else of the package but ``compat``, and is read in the order that it says."""

from __future__ import annotations

import ast
from pathlib import Path

import hotswap_lab.core

FOLDER = Path(hotswap_lab.core.__file__).parent


def imports_of(path: Path):
    """Modules that a file imports, relative to its folder: as many dots as there are, and a name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield from ((node.level, node.module or each.name) for each in node.names)
        elif isinstance(node, ast.Import):
            yield from ((0, each.name) for each in node.names)


def test_core_imports_nothing_else_of_the_package():
    paths = sorted(FOLDER.rglob("*.py"))
    assert len(paths) > 10
    for path in paths:
        for level, name in imports_of(path):
            assert level < 2 or (level, name) in ((2, "compat"), (2, "figures.palette")), (path.name, name)
            assert not name.startswith("hotswap_lab"), (path.name, name)


def test_the_order_to_read_it_in_names_every_module():
    modules = {path.stem for path in FOLDER.glob("*.py")} - {"__init__"}
    text = hotswap_lab.core.__doc__
    assert {name for name in modules if f"``{name}``" not in text} == set()


def test_the_top_of_the_package_is_a_house_with_few_doors():
    top = FOLDER.parent
    assert len([each for each in top.iterdir() if each.name not in ("__pycache__", "py.typed")]) <= 20
