"""Every exercise's check refuses the wrong answers of ``answers.py``, and accepts the right ones."""

from __future__ import annotations

import ast
import importlib.util
import pkgutil
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import torch
from answers import PROGRAMS, RIGHT, WRONG
from lengths import long

from hotswap_lab import lessons
from hotswap_lab.lessons import building, compiling, start
from hotswap_lab.lessons.exercise import Exercise

pytestmark = pytest.mark.usefixtures("fresh_compiler")

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


def edited(text: str, answer: str | tuple[str, ...]) -> str:
    """A solution's code with an answer in it."""
    if isinstance(answer, str):
        return f"{text}\n\n{answer}"
    for old, new in zip(answer[::2], answer[1::2], strict=True):
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def defined_in(notebooks: str, answer: str | tuple[str, ...] = ()) -> SimpleNamespace:
    """The functions that these notebooks define, with an answer in them; nothing else of them is run."""
    found: dict[str, object] = {}
    for path in sorted(NOTEBOOKS.glob(notebooks)):
        cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
        code = "\n".join(each for each in cells if "google.colab" not in each and not each.startswith("%%"))
        tree = ast.parse(re.sub(r"^%.*", "", edited(code, answer), flags=re.MULTILINE))
        tree.body = [each for each in tree.body if isinstance(each, (ast.FunctionDef, ast.Import, ast.ImportFrom))]
        exec(compile(tree, str(path), "exec"), found)
    return SimpleNamespace(**found)


MODULES = [import_module(f"hotswap_lab.lessons.{each.name}") for each in pkgutil.iter_modules(lessons.__path__)]


def test_a_part_is_kept_once_it_is_right_and_the_next_ones_are_built_on_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    right = str(building.solution("02"))
    building.part("02", right.replace("zeros_like", "ones_like"))
    building.part("02", "def padded(:")
    assert "SyntaxError" in capsys.readouterr().out
    assert not building.MINE.exists()
    for text in (right, right + "\nWHOSE = 'mine'"):
        building.part("02", text)
    assert "It is in my_hotswap.py now." in capsys.readouterr().out
    assert building.built("03").WHOSE == "mine"
    assert not hasattr(building.built("01"), "WHOSE")
    building.part("01", "\n\ndef read(folder):\n    raise KeyError('nope')")
    assert "KeyError: 'nope' (line 4 of part 01: raise KeyError('nope'))" in capsys.readouterr().out
    building.part("01", str(building.solution("01")))
    assert building.parts_of_yours().keys() == {"01", "02"}
    assert building.parts_of(building.MINE).keys() == {"", "01", "01b", "02"}  # 01b is lent: the file runs


@pytest.mark.long
def test_the_file_is_yours_in_a_new_process(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for chapter, text in (("02", f"{building.solution('02')}\nWHOSE = 'mine'"), ("01", str(building.solution("01")))):
        building.part(chapter, text)
    building.in_new_process("02", "import my_hotswap as mini; print(mini.WHOSE, mini.plan.__module__)")
    assert capsys.readouterr().out.endswith("now.\nof the solution, not of yours: 01b\nmine my_hotswap\n")
    code = "import my_hotswap; print(len(my_hotswap.read(__import__('hotswap_lab').demo.adapter_path('double'))))"
    alone = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert alone.stdout == "16\n", alone.stderr


#: the cells that run the reader's file in a new process, by chapter
FRESH = {
    path.name[:2]: cell
    for path in sorted(NOTEBOOKS.glob("0*.ipynb"))
    for cell in nbformat.read(path, as_version=4).cells
    if cell.source.startswith("%%fresh")
}


@pytest.mark.long
@pytest.mark.parametrize("chapter", FRESH)
def test_the_file_runs_in_a_new_process_after_each_chapter(chapter, capsys):
    """The notebooks' tests skip these cells, because each of them imports everything again."""
    first, _, code = FRESH[chapter].source.partition("\n")
    building.in_new_process(first.split()[1], code)
    (stored,) = FRESH[chapter].outputs
    found, known = (
        [line for line in text.splitlines() if "lines" not in line] for text in (capsys.readouterr().out, stored.text)
    )
    assert found == known


def test_without_the_solution_the_import_works_and_its_use_says_which_file_is_missing(monkeypatch):
    """As in a copy of the package without the notebooks."""
    monkeypatch.setattr(Path, "exists", lambda _: False)
    alone = importlib.util.module_from_spec(building.__spec__)
    building.__spec__.loader.exec_module(alone)
    monkeypatch.setattr(alone, "SOLUTION", Path("nowhere/mini_hotswap.py"))
    with pytest.raises(FileNotFoundError, match="mini_hotswap"):
        alone.built("01")


def test_each_exercise_has_wrong_and_right_answers():
    found = {name for each in MODULES for name, value in vars(each).items() if isinstance(value, Exercise)}
    assert found == {each.split()[1].removeprefix("my_") for each in WRONG}
    assert WRONG.keys() == RIGHT.keys()
    assert min(map(len, WRONG.values())) >= 6
    assert min(map(len, RIGHT.values())) >= 4


def tried(which, answer, capsys):
    """What the check says of an answer."""
    place, name = which.split()
    if name[:5] == "part_":
        task, answer = building.PARTS[place], edited(str(building.solution(place)), answer)
    else:
        (task,) = {
            getattr(each, name.removeprefix("my_")) for each in MODULES if hasattr(each, name.removeprefix("my_"))
        }
        made = vars(defined_in(f"solutions/{place}*.ipynb", answer))
        answer = [made[each] for each in PROGRAMS if each in made] if name == "debug" else made[name]
    # some of the answers set other ones, for the whole process
    with torch.compiler.set_stance("default"), torch._dynamo.config.patch(recompile_limit=8):
        task.check(answer)
    return capsys.readouterr().out


@pytest.mark.parametrize("count", [1, long(99)])
@pytest.mark.parametrize("which", WRONG)
def test_wrong_answers_are_refused_and_right_ones_are_not(which, count, capsys):
    for answer in RIGHT[which][:count]:
        out = tried(which, answer, capsys)
        assert out.startswith("Correct"), (answer, out)
    for answer in WRONG[which][:count]:
        out = tried(which, answer, capsys)
        assert out.startswith("Not yet.\n"), answer
        # a wrong answer raises no error, except with gradients, and for a tensor that can be written only without them
        assert "your code runs" not in out or re.search("a leaf Variable|are no longer o", out), (answer, out)


@pytest.mark.long
@pytest.mark.parametrize("name", PROGRAMS)
def test_the_watch_names_the_mistake_of_each_program(name, capsys):
    right, broken = defined_in("solutions/03*.ipynb"), defined_in("03*.ipynb")
    compiling.debug.check([getattr(broken if each == name else right, each) for each in PROGRAMS])
    said = capsys.readouterr().out
    assert said.startswith(f"Not yet.\n  {name}\n")
    assert PROGRAMS[name] in said
    assert "more that differ" not in said  # the answers are right


def test_an_error_in_the_readers_code_is_one_line(capsys):
    def broken(model):
        raise KeyError("nope")

    start.make_it_shout.check(broken)
    assert "yours:    KeyError: 'nope' (line 2 of broken: raise KeyError(\"nope\"))" in capsys.readouterr().out
