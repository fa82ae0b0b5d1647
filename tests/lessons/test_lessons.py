"""What the chapters show beyond their exercises is true: measurements, pictures, code and the project's rubric."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import torch

from hotswap_lab import Adapter, AdapterPool, demo, figures, verify_hotswap
from hotswap_lab.beyond.passes import PASSES
from hotswap_lab.lessons import beyond, pools, project

# --- 04


def test_layers_of_the_large_model_share_base_weights_and_random_adapters_differ(tmp_path):
    """Its sizes are compared in the chapter itself."""
    model = pools.smol(blocks=2)
    one, two = (layer.mlp.up_proj for layer in model.get_base_model().model.layers)
    assert one.base_layer.weight is two.base_layer.weight
    assert one.lora_A["default"].weight is not two.lora_A["default"].weight
    blocks = pools.smol(blocks=2, own=True).get_base_model().model.layers
    assert len({each.data_ptr() for each in blocks.parameters()}) == len([*blocks.parameters()])
    folders = pools.random_adapters(model, ["a", "b"], str(tmp_path))
    assert verify_hotswap(model, folders["b"])
    assert not verify_hotswap(model, folders["a"])


# --- 07, 08


def test_random_adapters_leave_the_random_numbers_of_others_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    beyond.load(beyond.PAIRS["LoHa"].old)
    beyond.adapter(beyond.PAIRS["VeRA"].new)
    assert torch.equal(torch.rand(3), expected)


# --- 10


@pytest.fixture
def chapter_10() -> dict[str, str]:
    notebook = nbformat.read(Path(__file__).parents[2] / "notebooks" / "10_compiled_ahead.ipynb", as_version=4)
    return {cell.id: cell.source for cell in notebook.cells}


@pytest.fixture
def starts(chapter_10) -> dict:
    """What the chapter's own cells define, up to that which measures."""
    found: dict = {"sys": sys, "bare": {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}}
    exec(chapter_10["32df7891"].partition("torch.set_grad_enabled")[0] + chapter_10["starts-program"], found)
    return found


@pytest.mark.long
def test_a_cold_start_in_this_process_can_be_right_and_wrong(starts, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["", "eager", str(tmp_path), str(time.time())])
    with torch.no_grad():  # for the program turns gradients off
        exec(starts["STARTED"], {})
        found = json.loads(capsys.readouterr().out)
        assert 0 < found["imports"] < found["first"]
        swap = AdapterPool.swap
        monkeypatch.setattr(AdapterPool, "swap", lambda pool, name: name == "sort" or swap(pool, name))
        with pytest.raises(AssertionError, match="sort is wrong"):
            exec(starts["STARTED"], {})


def test_each_cold_start_is_a_process_with_its_own_cache_and_says_why_it_failed(chapter_10, starts, monkeypatch):
    tried: list = []
    result = SimpleNamespace(returncode=0, stdout='a line\n{"first": 9.0, "imports": 2.0}\n', stderr="")

    def run(command, env, **_):
        cache = Path(env["TORCHINDUCTOR_CACHE_DIR"])
        tried.append((command[3], os.listdir(cache) if cache.exists() else [], env))
        cache.mkdir(exist_ok=True)
        (cache / command[3]).touch()
        return result

    monkeypatch.setattr(subprocess, "run", run)
    starts["bare"]["CXX"] = "g++"
    exec(chapter_10["ce3a279e"], starts)
    assert starts["starts"] == {way: {"first": 9.0, "imports": 2.0} for way, *_ in tried}
    assert {way: cached for way, cached, _ in tried if cached} == {starts["WAYS"][3]: [starts["WAYS"][1]]}
    assert all(env["CXX"] == "g++" and shutil.which("python3", path=env["PATH"]) for *_, env in tried[:-1])
    *_, (way, _, env) = tried
    assert (way, env["CXX"], shutil.which("g++", path=env["PATH"])) == (starts["WAYS"][-1], "", None)
    result.returncode, result.stderr = 1, "Traceback\nNo compiler"
    with pytest.raises(AssertionError, match=r"^eager: Traceback\nNo compiler$"):
        exec(chapter_10["ce3a279e"], starts)


@pytest.mark.long
def test_cold_starts(chapter_10, starts):
    """Every way in a process of its own, as the chapter runs it."""
    exec(chapter_10["ce3a279e"], starts)
    assert len(starts["starts"]) == 5
    assert all(0 < each["imports"] < each["first"] for each in starts["starts"].values())


# --- the engine


def test_the_engine_names_passes_as_the_code_does():
    """Where a text or a picture says ``check_...``, ``plan_...`` or the like, there is such a pass."""
    passes = {each.__name__ for each in PASSES}
    notebook = nbformat.read(Path(__file__).parents[2] / "notebooks" / "engine.ipynb", as_version=4)
    texts = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    verbs = "|".join({each.partition("_")[0] for each in passes})
    named = set(re.findall(rf"\b(?:{verbs})_\w+", "\n".join([*texts, figures.drawing("engine").svg])))
    assert named - passes == set()
    assert {"plan_layers", "plan_beyond", "stop_if_refused"} <= named


# --- the last project: its rubric says yes to the solution, which nbval runs, and no to what isn't right


def judged(capsys, **made):
    """The mark of each step, and what is said of it."""
    done = project.rubric(**made)
    lines = [line for line in capsys.readouterr().out.splitlines() if line[:1] in ("✓", "✗", "-")]
    assert len(lines) == len(project.STEPS)
    assert done is all(line[0] == "✓" for line in lines)
    return {line[2:].partition(":")[0]: (line[0], line.partition(": ")[2]) for line in lines}


@pytest.mark.long
def test_each_step_can_say_no(capsys):
    """With an adapter that ships with the package."""
    path, seen = demo.adapter_path("sort"), []
    tensors = Adapter.load(path).tensors
    for share, word in ((0, "hotswap"), (0.5, "hooppp"), (1, "ahopstw")):
        seen.append(({key: value * (share if "lora_B" in key else 1) for key, value in tensors.items()}, word))
    live, _ = demo.load("reverse")
    pool = AdapterPool(live, adapters={"reverse": demo.adapter_path("reverse"), "mine": path}, rows=4, progress=False)
    pool.swap("mine")
    trainee = demo.load("sort")[0]
    made = dict(trick=demo.TASKS["sort"], adapter=path, trainee=trainee, live=live, seen=seen, pool=pool)
    found = judged(capsys, **made)
    assert [found[step][0] for step in ("a new trick", "trained", "swapped in while it trained")] == ["✗", "✓", "✓"]
    assert found["a new trick"][1] == "hotswap -> ahopstw, as sort does"
    for lie in (seen[:2], [(tensors, word) for _, word in seen], [(each, "x") for each, _ in seen[:2]] + seen[2:]):
        assert judged(capsys, **made | dict(seen=lie))["swapped in while it trained"][0] == "✗"
    stronger = {key: value * (1.01 if "lora_B" in key else 1) for key, value in tensors.items()}
    for lie, reason in (
        (dict(seen=[seen[0], *seen[2:] * 3]), "3 or more different weights were seen"),
        (dict(seen=[*seen[:2], (stronger, "ahopstw")]), "the last weights are the folder's"),
        (dict(seen=[seen[2], *seen]), "the first answer is wrong, and the last is right"),
        (dict(live=demo.load("sort")[0]), "live was swapped into"),
        (dict(trainee=live), "live and trainee share nothing"),
        (dict(live=demo.load("shout")[0]), "the live model matches a fresh load; not so: live was swapped into"),
        (
            dict(seen=seen[2:]),
            "3 or more different weights were seen; not so: the first answer is wrong, and the last is right",
        ),
    ):
        mark, said = judged(capsys, **made | lie)["swapped in while it trained"]
        assert (mark, said.partition("not so: ")[2]) == ("✗", reason), said
    assert judged(capsys, **made | dict(seen=[]))["swapped in while it trained"][0] == "✗"
    made |= dict(adapter=demo.adapter_path("shout"), package="nowhere.pt2")
    found = judged(capsys, **made, compiled=lambda **inputs: demo.load_base()(**inputs))
    assert {mark for mark, _ in found.values()} == {"✗"}
    assert found["trained"][1].startswith("0 of 40")
    assert "Error" in found["packaged"][1]


@pytest.mark.long
def test_compiled_means_a_graph_for_all_nine_also_at_a_second_try(capsys):
    folders = {"mine": demo.adapter_path("sort")}
    two = folders | {"reverse": demo.adapter_path("reverse")}
    nine = folders | {name: demo.adapter_path(name) for name in demo.adapter_names()}
    for family, marks in ((nine, "✓✓"), (nine, "✓✓"), (two, "✗✓")):  # the second is a right redo in the same process
        live = demo.load("reverse")[0]
        pool = AdapterPool(live, adapters=family, rows=4, progress=False)
        compiled = torch.compile(pool.model, backend="eager", dynamic=False)
        for given, mark in ((compiled, marks[1]), (pool.model, "✗")):
            found = judged(capsys, adapter=folders["mine"], live=live, pool=pool, compiled=given)
            assert (found["in a pool with rows"][0], found["compiled once"][0]) == (marks[0], mark), found


def test_a_trick_that_is_the_same_for_each_word(capsys):
    assert judged(capsys, trick=lambda word: "x")["a new trick"] == ("✗", "hotswap -> x, whatever the word is")


@pytest.mark.parametrize(
    ("trick", "why"),
    [
        (lambda word: word.replace("e", "3"), "the same word"),
        (lambda word: word.replace("t", "é"), "not printable ASCII, 40 characters at most"),
        (lambda word: word * 9, "not printable ASCII, 40 characters at most"),
        (len, "not printable ASCII, 40 characters at most"),
        (lambda word: f"{word}{time.perf_counter_ns()}", "another answer each time"),
        (lambda word: word[::-1], "as reverse does"),
    ],
)
def test_a_trick_that_is_none(capsys, trick, why):
    mark, said = judged(capsys, trick=trick)["a new trick"]
    assert (mark, said.partition(", ")[2]) == ("✗", why)


@pytest.mark.parametrize("trick", [lambda word: word[:1], lambda word: word + "?"])
def test_a_trick_that_is_new(capsys, trick):
    assert judged(capsys, trick=trick)["a new trick"][0] == "✓"
