"""The recipes: each is short, can be pasted, shows its result, says what can go wrong, and is reached from the top."""

from __future__ import annotations

import ast
import builtins
import re
from pathlib import Path

import nbformat
import pytest

NOTEBOOK = nbformat.read(Path(__file__).parent.parent / "notebooks" / "recipes.ipynb", as_version=4)
MAX_LINES = 6
#: the first line of each cell before the one that is to be pasted
GIVEN = "# You have this already\n"
#: headings that are no recipes
CONTENTS, NEXT = "Contents", "Next"


def sections() -> dict[str, list[nbformat.NotebookNode]]:
    """The cells below each heading, the one with the heading first."""
    found: dict[str, list[nbformat.NotebookNode]] = {}
    for cell in NOTEBOOK.cells:
        if heading := re.match(r"## (.+)", cell.source):
            assert heading[1] not in found
            cells = found[heading[1]] = []
        if found:
            cells.append(cell)
    return found


SECTIONS = sections()
RECIPES = [title for title in SECTIONS if title not in (CONTENTS, NEXT)]


def code_of(title: str) -> list[nbformat.NotebookNode]:
    return [cell for cell in SECTIONS[title] if cell.cell_type == "code"]


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


def anchor(title: str) -> str:
    """What Jupyter makes of a heading. Anything but letters and spaces it treats differently from place to place."""
    assert re.fullmatch(r"[A-Za-z ]+", title)
    return title.replace(" ", "-")


def test_the_contents_name_every_recipe_in_its_order():
    links = re.findall(r"\[([^]]+)\]\(#([^)]+)\)", SECTIONS[CONTENTS][0].source)
    assert len(RECIPES) > 20
    assert links == [(title, anchor(title)) for title in RECIPES]


@pytest.mark.parametrize("title", RECIPES)
def test_a_recipe(title):
    cells, start, last = code_of(title), "**What can go wrong.** ", SECTIONS[title][-1].source
    for cell in cells:
        lines = [line for line in cell.source.splitlines() if line.strip() and not line.startswith("#")]
        assert len(lines) <= MAX_LINES, cell.source
    assert any(cell.outputs for cell in cells)
    assert last.startswith(start)
    assert re.fullmatch(r"[^.]+(\.[^\s.][^.]*)*\.", last.removeprefix(start)), "one sentence"


@pytest.mark.parametrize("title", RECIPES)
def test_the_names_of_a_recipe(title):
    """It is told from what it is pasted into, and takes no name from another recipe."""
    cells = code_of(title)
    place, found = recipe_in(cells), [names_in(cell.source) for cell in cells]
    assert [cell.source.startswith(GIVEN) for cell in cells[: place + 1]] == [True] * place + [False]
    imported_before = set().union(*(imported for imported, *_ in found[:place]))
    imported, _, used = found[place]
    assert (used - imported) & imported_before <= {"torch", "demo", "digits"}
    imported, made, used = (set().union(*each) for each in zip(*found, strict=True))
    assert used <= imported | made | set(dir(builtins))
