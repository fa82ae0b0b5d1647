"""The form of the notebooks. That they run, and print what is stored, is nbval's part of the same command."""

from __future__ import annotations

import base64
import hashlib
import itertools
import re
import runpy
from pathlib import Path

import nbformat
import pytest
from exercises import assert_is_svg

from hotswap_lab import figures
from hotswap_lab.figures.palette import OFF
from hotswap_lab.widgets.view import WIDGET_MIME

FOLDER = Path(__file__).parent.parent / "notebooks"
CHAPTERS = sorted(FOLDER.glob("[0-9]*.ipynb"))
#: these, their solutions, and those beside them
NOTEBOOKS = sorted(path for path in FOLDER.rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)
#: the sections of every chapter, in this order; others may stand between them
SECTIONS = ["Predict", "Run", "Read the result", "Check", "Exercise", "Take away", "Next"]
#: cells that show a widget, whose picture has another text
OTHER_PICTURES = ("meter",)
#: the share of cells whose output may differ from run to run
MAX_IGNORED = 0.15

#: pictures with a control, the gray bar, by cell: where the lines before say of each thing compared in what it differs
CONTROLS = {
    "6140ba45": r"not prepared +(A .*)\nrank 2, room for 128 +(A .*)\nrank 32, room for 128 +(A .*)",
    "82bd8712": r"\nnot prepared +(A .*)\nroom for rank 8 +(A .*)\nroom for rank 16 +(A .*)",
    "7941e7fc": r"(\d+ compiled, 2 recompiles)[^$]*(\d+ compiled, 0 recompiles)",
    "01beb23b": r"420 tensors, (.* bytes)[^$]*\n(.* bytes)\n",
    "calls-shown": r"contiguous (\[.*\])\nviews of an arena (\[.*\])",
}
#: pictures whose bars are other code, which the cells before show
OTHER_CODE = {"bed42cef", "4c90f6db", "buys-times", "e2df127d", "c037", "ce3a279e", "rl-times-shown"}


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: str(path.relative_to(FOLDER)))
def notebook(request):
    return read(request.param)


def test_there_are_solutions():
    with_solutions = {path.name for path in CHAPTERS} | {"engine.ipynb", "project.ipynb"}
    assert with_solutions == {path.name for path in NOTEBOOKS if path.parent != FOLDER}


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.name)
def test_the_skeleton_of_a_chapter(path):
    text = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")
    assert re.match(rf"# {path.name[:2]} · ", text)
    assert "**Goal.**" in text
    assert "**You will need.**" in text
    places = [re.search(rf"^## {section}", text, re.MULTILINE) for section in SECTIONS]
    assert all(places), [section for section, place in zip(SECTIONS, places, strict=True) if place is None]
    starts = [place.start() for place in places if place.re.pattern != "^## Exercise"]
    assert starts == sorted(starts)


def test_stored_form(notebook):
    assert "widgets" not in notebook.metadata
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    # nbval compares only cells that have a number; these do not depend on who ran what in which order
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    stored = [output.data for cell in code for output in cell.outputs if "data" in output]
    pictures = [data.get("image/png", "") for data in stored]
    pictures += [each for data in stored for each in re.findall(r'src="(data:image/[^"]*)', data.get("text/html", ""))]
    assert len(nbformat.writes(notebook)) - sum(map(len, pictures)) < 100_000
    assert any(cell.outputs for cell in code)
    assert len(nbformat.writes(notebook)) < 400_000
    ignored = [cell for cell in code if "nbval-ignore-output" in cell.metadata.get("tags", [])]
    assert len(ignored) <= MAX_IGNORED * len(code)
    # the first is for Colab, and does nothing elsewhere
    install = r'in (sys.modules|str\(get_ipython\(\)\)):\n    %pip install -q "git\+https://github.com/'
    assert re.search(f'if "google.colab" {install}', code[0].source)
    assert code[0].outputs == []


def test_texts_cite_no_measurements_and_tasks_stay_when_outputs_are_cleared(notebook):
    """Measurements are in outputs, next to the machine that they were measured on, and can't contradict a text."""
    texts = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    texts = texts.replace("about 3 GB of memory", "")  # what chapter 09 needs
    assert not re.findall(r"\d\s?(?:ms|µs|kB|MB|GB|tokens/s|%)(?!\w)", texts)
    for before, cell in itertools.pairwise(notebook.cells):
        stub = re.search(r"# about \d+ lines?|# your line goes here|# your code", cell.source)
        assert before.cell_type == "markdown" or cell.cell_type != "code" or not stub, cell.source


def test_outputs_are_stored_and_clean(notebook):
    for cell, output in [(each, output) for each in notebook.cells for output in each.get("outputs", [])]:
        assert output.output_type != "error", cell.source
        assert output.get("name") != "stderr", cell.source
        assert WIDGET_MIME not in output.get("data", {}), cell.source
        assert not re.search(r"/(home|root|tmp|usr|work)/", str(output)), cell.source
        if svg := output.get("data", {}).get("image/svg+xml"):  # JupyterLab shows only PNG in a fresh clone
            png, size = base64.b64decode(output.data["image/png"]), output.metadata["image/png"]
            assert png.startswith(b"\x89PNG")
            assert size["of"] == hashlib.sha256(svg.encode()).hexdigest()[:12], "notebooks/refresh.py --pictures"
            # twice as many pixels as it is shown with
            pixels = [int.from_bytes(png[at : at + 4], "big") for at in (16, 20)]
            assert pixels == [2 * size["width"], 2 * size["height"]]
            assert size["alt"] == output.data["text/plain"]
            # padding has not become the color of the card
            assert OFF not in svg or bytes.fromhex(OFF[1:]) in png
            if cell.source not in OTHER_PICTURES:
                assert_is_svg(svg, output.data["text/plain"])


def test_what_a_control_is_compared_with_differs_from_it():
    """Two models that are alike by mistake would take the same time, and prove what they should test."""
    found, machines = set(), set()
    for path in NOTEBOOKS:
        said = "\n"
        for cell in read(path).cells:
            text = "".join(each.get("text", "") for each in cell.get("outputs", []))
            machines |= {*re.findall(r"(?:^|on )([A-Z][^\n,]*), \d+ cores?, \d+ threads?, Linux", text, re.MULTILINE)}
            if path in CHAPTERS and re.search(
                r"^(figures\.bars\(.*base=|chart\(|timeline\()", cell.source, re.MULTILINE
            ):
                found.add(cell.id)
            if cell.id in CONTROLS:
                values = re.search(CONTROLS[cell.id], said).groups()
                assert len({*values}) == len(values), (path.name, values)
            said += text
    assert found == CONTROLS.keys() | OTHER_CODE
    assert len(machines) == 1  # or numbers of two chapters could not be compared


def test_ignored_cells_have_a_structure():
    """Numbers may differ, colors may not."""
    structure = runpy.run_path(str(FOLDER / "conftest.py"))["structure"]

    def of(base, *values):
        figure = figures.bars("Times", dict(zip("abc", values, strict=False)), "ms", base=base)
        return structure([{"data": {"image/svg+xml": figure.svg}}])

    assert of({"c"}, 1, 2) == of({"c"}, 3.5, 200) != of({"a"}, 1, 2)
    assert structure([{"data": {"text/html": "<b>1</b>"}}]) == ["b"]
