"""Each module has a test file of its name, or a line that says which tests are its own."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import hotswap_lab

ROOT, PACKAGE = Path(__file__).parents[1], Path(hotswap_lab.__file__).parent
#: the last line of a module's docstring, and the files that it names
LINE = re.compile(r"^Tests: ((?:``tests/[\w/]+\.py``(?:, | and )?)+)\.$", re.MULTILINE)


def has_names(path: Path) -> bool:
    """Whether a module defines a function or class that other code uses."""
    nodes = ast.parse(path.read_text("utf-8")).body
    return any(isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name[0] != "_" for node in nodes)


MODULES = [path.relative_to(PACKAGE) for path in sorted(PACKAGE.rglob("*.py")) if has_names(path)]


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_a_module_has_its_tests(module):
    name = module.parent.name if module.name == "__init__.py" else module.stem.strip("_")
    named = LINE.findall(ast.get_docstring(ast.parse((PACKAGE / module).read_text("utf-8"))) or "")
    files = [ROOT / file for line in named for file in re.findall(r"``(.*?)``", line)]
    own = ROOT / "tests" / module.parent / f"test_{name}.py"
    assert files or own.exists(), f"write {own.relative_to(ROOT)}, or name its tests in the docstring of {module}"
    assert [file for file in files if not file.exists()] == []
