"""Every exercise's check refuses plausible wrong answers.

That it accepts a right one, the solutions' notebooks show, from which the right answers here are taken.
"""

from __future__ import annotations

import ast
import importlib.util
import pkgutil
import re
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from lengths import few_of

from hotswap_lab import lessons
from hotswap_lab.lessons import building, compiling, start
from hotswap_lab.lessons.exercise import Exercise

pytestmark = pytest.mark.usefixtures("fresh_compiler")

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


def defined_in(notebooks: str, *edits: str) -> SimpleNamespace:
    """The functions that these notebooks define; nothing else of them is run. Edits: what is replaced, and by what."""
    found: dict[str, object] = {}
    for path in sorted(NOTEBOOKS.glob(notebooks)):
        cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
        code = "\n".join(each for each in cells if "google.colab" not in each and not each.startswith("%%"))
        for old, new in zip(edits[::2], edits[1::2], strict=True):
            assert code.count(old) == 1, old
            code = code.replace(old, new)
        tree = ast.parse(re.sub(r"^%.*", "", code, flags=re.MULTILINE))
        tree.body = [each for each in tree.body if isinstance(each, (ast.FunctionDef, ast.Import, ast.ImportFrom))]
        exec(compile(tree, str(path), "exec"), found)
    return SimpleNamespace(**found)


#: the programs of chapter 03, and what the watch says of each that isn't mended
PROGRAMS = {
    "ranks": "a tensor has another shape: base_model.model.0.lora_A.default.weight",
    "warm_up": "a tensor has another shape: args[0]",
    "temperatures": "a Python number in the graph has changed: by",
    "names": "active_adapter",
    "gradients": "grad_mode",
}
SHOUT = 'hotswap_adapter(model, demo.adapter_path("shout"), adapter_name="default")'
LOAD = 'model.load_adapter(demo.adapter_path("shout"), "{0}")\n    model.set_adapter("{0}")'
ANSWERS = "    compiled = prepared(model, folders)\n    yield from (compiled(x) for _ in folders)\n"
OFF = 'layer.lora_B["default"].weight'

#: for each exercise and the notebook of its solution, what is replaced in that, and by what; no two for the same reason
WRONG = {
    "00 make_it_shout": [
        (SHOUT, SHOUT.replace("shout", "sort")),
        (SHOUT, 'model.delete_adapter("default")\n    ' + LOAD.format("default")),
        (SHOUT, LOAD.format("shout")),
    ],
    "03 debug": [
        ("def ranks(model, folders, x):\n", "def ranks(model, folders, x):\n    prepared = lambda model, _: model\n"),
        ("def names(model, folders, x):\n", f"def names(model, folders, x):\n{ANSWERS}    return\n"),
        ("torch.tensor(by)", "by"),
        ("def names(model, folders, x):\n", "def names(model, folders, x):\n    folders = folders[:2]\n"),
        ("def gradients(", "def no_gradients("),  # one too few
    ],
    "05 take_turns": [
        ("torch.equal(ids[: len(read)], read)", "False"),
        ("torch.equal(ids[: len(read)], read)", "True"),
        ("    pool.swap(name)\n", "", "    return logits", "    pool.swap(name)\n    return logits"),
        ("    return logits", "    return None"),
    ],
    "06 one_filter": [
        ('scaling * torch.einsum("or,rihw->oihw", b[:, :, 0, 0], a)', "a"),
        ("scaling * torch.einsum", "torch.einsum"),
        ("->oihw", "->oiwh"),
    ],
    "06 halfway": [
        ("step < at", "step <= at"),
        ("first if step < at else second", "second if step < at else first"),
        ("enumerate(scheduler.timesteps)", "enumerate([*scheduler.timesteps] * 2)"),
    ],
    "07 turn_off": [
        ('["default"].fill_(1)', '["default"].zero_()'),
        (f"{OFF}.zero_()", f"{OFF}.data = 0 * {OFF}"),
        ('layer.ia3_l["default"].fill_(1)', "pass"),
    ],
    "07 make_equal": [
        ("module.scaling.update(other.scaling)", "pass"),
        ("    tensors = dict(", "    return live.load_state_dict(fresh.state_dict())\n    tensors = dict("),
        # right outputs, new addresses
        ("    tensors = dict(", "    live.base_model = fresh.base_model\n    tensors = dict("),
    ],
    "09 choose_replica": [
        ("having or numbers", "numbers"),
        ('["held"] and replicas[n]["waiting"] < most', '["held"] and replicas[n]["waiting"] <= most'),
        ("    numbers = range(len(replicas))", "    numbers = range(len(replicas))[::-1]"),
        (' and replicas[n]["waiting"] < most', ""),
    ],
    "10 unreached": [
        ("sorted([*in_code, *elsewhere])", "sorted(in_code)"),
        ("swapped[name].data_ptr() != bound[name].data_ptr()", "swapped[name] is not bound[name]"),
        ("sorted([*in_code, *elsewhere])", "sorted([*in_code, *elsewhere])[::-1]"),
        ("sorted([*in_code, *elsewhere])", "[each for each in swapped if each in {*in_code, *elsewhere}]"),
    ],
    "11 two_tricks": [
        ("groups.setdefault((row.adapter, prompt)", "groups.setdefault(prompt"),
        ("rewards[row.adapter](text)", 'rewards["shout"](text)'),
        ("row.version == now[row.adapter]", "True"),
        (
            *("row.version == now[row.adapter]", "True", "            found[number] = each - mean"),
            "            found[number] = (each - mean) * (rows[number].version == now[rows[number].adapter])",
        ),
    ],
    "engine my_gains": [
        ('table["default"] * gain', "gain"),
        ('draft.refuse("not_in_pool", name=path, found=f"{len(layers)} layers of the model")', "pass"),
        ('journal.set_item(table, "default", value)', "table.update(default=value)"),
        ("        change.steps.append(", '        table["default"] = value\n        change.steps.append('),
    ],
    "engine my_search": [
        ("    change.apply([plan.change()])\n", ""),
        ("room=of_room", "room=settings[number].scaling"),
        ("telling=of_memory", "telling=of_room"),
        ('prepared=table["default"]', "prepared=of_memory"),
        ("the_room.scalings[0][number, 0]", "the_room.scalings[0][0, 0]"),
    ],
}  # fmt: skip
MODULES = [import_module(f"hotswap_lab.lessons.{each.name}") for each in pkgutil.iter_modules(lessons.__path__)]
#: these compile, or take long
SLOW = {"debug", "take_turns", "halfway", "make_equal"}

#: for each part of the reader's file what is replaced in a right one, and by what
WRONG_PARTS = {
    "01": [
        ("if config.use_rslora", "if False"),
        ("(alphas or [config.lora_alpha])[0]", "config.lora_alpha"),
        ("for path, layer in layers.items():", "for path, layer in ((p, layers[p]) for p in adapter):"),
        ("in layers.items():", "in (each for each in layers.items() if 'layers.1.mlp' not in each[0]):"),
        ("if missing := adapter.keys() - layers.keys():", "if missing := '':"),
        ("writes.append((layer", "write(writes[-2:])\n        writes.append((layer"),
        ("table[key].copy_(torch.as_tensor(value))", "table[key] = torch.nn.Parameter(torch.as_tensor(value))"),
    ],
    "02": [
        ("whole = torch.zeros_like(room)", "whole = torch.zeros(room.shape)"),
        ("whole = torch.zeros_like(room)", "whole = room.clone()"),
        ("max(ranks.get(path, 0), len(a))", "len(a)"),
        ("max(ranks.get(path, 0), len(a))", "32"),
    ],
    "03": [
        ("    return model", ""),
        ("torch.tensor(float(layer.scaling[NAME]), ", "torch.ones((), "),
        ("for layer in layers_of(model).values():", "for layer in [*layers_of(model).values()][1:]:"),
    ],
    "04": [
        ("self.memory.copy_(self.packed[name])", "self.memory = self.packed[name]"),
        ("target.data = part.view(target.shape)", "target.data = part.view(target.shape).clone()"),
        ("self.memory.copy_(self.packed[name])", "[a.copy_(b) for a, b in zip(self.memory, self.packed[name])]"),
        ("to(self.memory)\n", "to(self.memory) * 1.001\n"),
    ],
    "08": [
        ("padded(b * scaling", "padded(b"),
        (
            "self.a[row], self.b[row] = padded(a, self.a[row]), padded(b * scaling, self.b[row])",
            "self.a[row, : len(a)], self.b[row, :, : len(a)] = a, b * scaling",
        ),
        ("self.a[row], self.b[row] =", "self.a[:], self.b[row] ="),
        ("(inputs @ self.a.mT @ self.b.mT)", "torch.stack([i @ a.T @ b.T for i, a, b in zip(inputs, self.a, self.b)])"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", few_of(WRONG_PARTS, ["08"]))
def test_wrong_parts_are_refused(name, capsys):
    right = str(building.solution(name))
    for old, new in WRONG_PARTS[name]:
        assert old in right
        building.PARTS[name].check(right.replace(old, new))
        out = capsys.readouterr().out
        assert out.startswith("Not yet.\n"), new
        assert "your code runs" not in out, out
    building.PARTS[name].check(right)
    assert capsys.readouterr().out.startswith("Correct")


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


def test_without_the_solution_the_import_works_and_its_use_says_which_file_is_missing(monkeypatch):
    """As in a copy of the package without the notebooks."""
    monkeypatch.setattr(Path, "exists", lambda _: False)
    alone = importlib.util.module_from_spec(building.__spec__)
    building.__spec__.loader.exec_module(alone)
    monkeypatch.setattr(alone, "SOLUTION", Path("nowhere/mini_hotswap.py"))
    with pytest.raises(FileNotFoundError, match="mini_hotswap"):
        alone.built("01")


def test_each_exercise_has_wrong_answers():
    found = {name for each in MODULES for name, value in vars(each).items() if isinstance(value, Exercise)}
    assert {each for each in found if each[:5] != "part_"} == {each.split()[1].removeprefix("my_") for each in WRONG}


@pytest.mark.parametrize("which", few_of(WRONG, [each for each in WRONG if each.split()[1] not in SLOW]))
def test_wrong_answers_are_refused(which, capsys):
    place, name = which.split()
    (task,) = {getattr(each, name.removeprefix("my_")) for each in MODULES if hasattr(each, name.removeprefix("my_"))}
    for edits in WRONG[which]:
        made = vars(defined_in(f"solutions/{place}*.ipynb", *edits))
        answer = [made[each] for each in PROGRAMS if each in made] if name == "debug" else made[name]
        task.check(answer)
        out = capsys.readouterr().out
        assert out.startswith("Not yet.\n"), edits
        assert "your code runs" not in out, out  # a wrong answer is no error
        task.show(answer)
        assert "Not yet" not in capsys.readouterr().out


@pytest.mark.parametrize("name", few_of(PROGRAMS, ["ranks"]))
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
