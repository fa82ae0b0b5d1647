"""The recipes: each is short, can be pasted, shows its result, says what can go wrong, and is reached from the top."""

from __future__ import annotations

import ast
import builtins
import re
from pathlib import Path

import nbformat
import pytest

#: by task, by framework, ...
NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("recipes*.ipynb"))
#: of a cell; a callback or a rollout can't be cut
MAX_LINES, LONGER = 6, {"recipes_training.ipynb": 17}
#: the first line of each cell before the one that is to be pasted
GIVEN = re.compile(r"# (You have this already|Only for this demo: .+)\n")
#: headings that are not recipes
CONTENTS, NEXT = "Contents", "Next"


def sections(path: Path) -> dict[str, list[nbformat.NotebookNode]]:
    """The cells below each heading, the one with the heading first."""
    found: dict[str, list[nbformat.NotebookNode]] = {}
    for cell in nbformat.read(path, as_version=4).cells:
        if heading := re.match(r"## (.+)", cell.source):
            assert heading[1] not in found
            cells = found[heading[1]] = []
        if found:
            cells.append(cell)
    return found


SECTIONS = {path.name: sections(path) for path in NOTEBOOKS}
RECIPES = {(name, title): cells for name, found in SECTIONS.items() for title, cells in found.items()}
RECIPES = {each: cells for each, cells in RECIPES.items() if each[1] not in (CONTENTS, NEXT)}


def code_of(cells: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    return [cell for cell in cells if cell.cell_type == "code"]


def recipe_in(cells: list[nbformat.NotebookNode]) -> int:
    """The place of the one cell that is to be pasted."""
    (place,) = (number for number, cell in enumerate(cells) if "recipe" in cell.metadata.get("tags", []))
    return place


def names_in(code: str) -> tuple[set[str], set[str], set[str]]:
    """The names that are imported, made and used."""
    imported, made, used = set(), set(), set()
    if code.startswith("%%bash"):  # a shell's names are none of Python's
        return imported, made, used
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else made).add(node.id)
        elif isinstance(node, ast.alias):
            imported.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.ExceptHandler)):
            made.add(node.name)
        elif isinstance(node, ast.arg):
            made.add(node.arg)
    return imported, made, used


@pytest.mark.parametrize("name", SECTIONS)
def test_the_contents_name_every_recipe_in_its_order(name):
    links = re.findall(r"\[([^]]+)\]\(#([^)]+)\)", SECTIONS[name][CONTENTS][0].source)
    assert len(links) > 3
    assert links == [(title, title.replace(" ", "-")) for where, title in RECIPES if where == name]


@pytest.mark.parametrize("where", RECIPES, ids=" ".join)
def test_a_recipe(where):
    start, last = "**What can go wrong.** ", RECIPES[where][-1].source
    cells = code_of(RECIPES[where])
    for cell in cells:
        lines = [line for line in cell.source.splitlines() if line.strip() and not line.startswith("#")]
        assert len(lines) <= LONGER.get(where[0], MAX_LINES), cell.source
    assert any(cell.outputs for cell in cells)
    assert last.startswith(start)
    assert re.fullmatch(r"[^.]+(\.[^\s.][^.]*)*\.", last.removeprefix(start)), "one sentence"
    # it is told from what it is pasted into, and takes no name from another recipe
    place, found = recipe_in(cells), [names_in(cell.source) for cell in cells]
    assert [bool(GIVEN.match(cell.source)) for cell in cells[: place + 1]] == [True] * place + [False]
    imported_before = set().union(*(imported for imported, *_ in found[:place]))
    imported, _, used = found[place]
    assert (used - imported) & imported_before <= {"torch", "demo", "digits"}
    imported, made, used = (set().union(*each) for each in zip(*found, strict=True))
    assert used <= imported | made | set(dir(builtins))
