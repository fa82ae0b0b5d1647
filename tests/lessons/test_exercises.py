"""Every exercise's check refuses plausible wrong answers.

That it accepts a right one, the solutions' notebooks show, from which the right answers here are taken.
"""

from __future__ import annotations

import ast
import inspect
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from lengths import few_of

from hotswap_lab import demo, hotswap_adapter, lessons
from hotswap_lab.core.change import Change
from hotswap_lab.lessons import (
    ahead,
    beyond,
    building,
    compiling,
    diffusion,
    engine,
    policy,
    real_llm,
    serving,
    start,
)
from hotswap_lab.lessons.exercise import Exercise

pytestmark = pytest.mark.usefixtures("fresh_compiler")

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


def defined_in(notebooks: str) -> SimpleNamespace:
    """The functions that these notebooks define; nothing else of them is run."""
    found: dict[str, object] = {}
    for path in sorted(NOTEBOOKS.glob(notebooks)):
        names: dict[str, object] = {}
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "code" and "google.colab" not in cell.source and not cell.source.startswith("%%"):
                tree = ast.parse(re.sub(r"^%.*", "", cell.source, flags=re.MULTILINE))
                kinds = (ast.FunctionDef, ast.Import, ast.ImportFrom)
                tree.body = [each for each in tree.body if isinstance(each, kinds)]
                exec(compile(tree, str(path), "exec"), names)
        found |= names
    return SimpleNamespace(**found)


RIGHT = defined_in("solutions/[0-9]*.ipynb")
#: the programs that are to be mended
BROKEN = defined_in("03_compiled_swap.ipynb")


# --- wrong answers that a line can't say


def swap(model, name):
    hotswap_adapter(model, demo.adapter_path(name), "default")


def beside(model):
    model.load_adapter(demo.adapter_path("shout"), "shout")
    model.set_adapter("shout")


def reload(model):
    model.delete_adapter("default")
    model.load_adapter(demo.adapter_path("shout"), "default")
    model.set_adapter("default")


def never_compiles(model, folders, x):
    yield from compiling.answers(model, folders, x)


def never_swaps(model, folders, x):
    compiled = RIGHT.make_ready(model, folders)
    yield from (compiled(x) for _ in folders)


def stops_early(model, folders, x):
    yield from compiling.answers(RIGHT.make_ready(model, folders), folders[:2], x)


def temperatures(model, folders, x):
    """Without the division."""
    yield from RIGHT.ranks(model, folders, x)


def reads_all_again(chat, pool, kept, name, ids):
    pool.swap(name)
    chat.forget()
    return chat.read(ids)


def takes_any_prompt_for_the_same(chat, pool, kept, name, ids):
    pool.swap(name)
    chat.forget()
    if name in kept:
        chat.restore(kept[name])
    logits = chat.read(ids[chat.length :])
    kept[name] = chat.save()
    return logits


def swaps_too_late(chat, pool, kept, name, ids):
    logits = RIGHT.take_turns(chat, pool, kept, pool.active, ids)
    pool.swap(name)
    return logits


def twice_over(model, scheduler, picture, first, second, at):
    once = RIGHT.halfway(model, scheduler, picture, first, first, at)
    return RIGHT.halfway(model, scheduler, once, second, second, at)


def all_zeros(layer):
    for parameters in (getattr(layer, "ia3_l", {}), getattr(layer, "lora_B", {})):
        for each in parameters.values():
            getattr(each, "weight", each).zero_()


def new_memory(layer):
    RIGHT.turn_off(layer)
    for parameter in layer.parameters():
        if parameter is not layer.get_base_layer().weight:
            parameter.data = parameter.data.clone()


def parameters_and_buffers(live, fresh):
    tensors = dict(live.named_parameters()) | dict(live.named_buffers())
    for name, tensor in [*fresh.named_parameters(), *fresh.named_buffers()]:
        tensors[name].copy_(tensor)


def last_of_equals(name, replicas, most):
    numbers = range(len(replicas))[::-1]
    having = [n for n in numbers if name in replicas[n]["held"] and replicas[n]["waiting"] < most]
    return min(having or numbers, key=lambda n: replicas[n]["waiting"])


def two_tricks(rows, prompts, texts, rewards, now, by_prompt=False, one_reward=False, old_in_mean=False):
    groups, found = {}, []
    for row, prompt, text in zip(rows, prompts, texts, strict=True):
        reward = rewards["shout" if one_reward else row.adapter](text)
        group = groups.setdefault(prompt if by_prompt else (row.adapter, prompt), [])
        is_now = row.version == now[row.adapter]
        group += [reward] if is_now or old_in_mean else []
        found.append((is_now, reward, group))
    return [reward - sum(group) / len(group) if is_now else 0.0 for is_now, reward, group in found]


def gains(draft, sets=False, takes_all=False, no_journal=False):
    layers = {layer.path: layer.module for layer in draft.slot.layers}
    change = Change()
    for path, gain in engine.gains_of(draft).items():
        if path in layers:
            table = layers[path].scaling
            value = gain if sets else table["default"] * gain
            change.steps.append(
                lambda journal, table=table, value=value: (
                    table.update(default=value) if no_journal else journal.set_item(table, "default", value)
                )
            )
        elif not takes_all:
            draft.refuse("not_in_pool", name=path, found="others")
    return engine.as_plan(draft, change)


def writes_while_it_decides(draft):
    for path, gain in engine.gains_of(draft).items():
        for layer in draft.slot.layers:
            if layer.path == path:
                layer.module.scaling["default"] *= gain
    plan = gains(draft)
    return engine.as_plan(draft, Change()) if plan.ok else plan


#: the programs of chapter 03, and what the watch says of each
PROGRAMS = {
    "ranks": "a tensor has another shape: base_model.model.0.lora_A.default.weight",
    "warm_up": "a tensor has another shape: args[0]",
    "temperatures": "a Python number in the graph has changed: by",
    "names": "active_adapter",
    "gradients": "grad_mode",
}
MENDED = [getattr(RIGHT, name) for name in PROGRAMS]

#: for each exercise wrong answers, no two for the same reason
WRONG = {
    start.make_it_shout: [lambda model: swap(model, "sort"), reload, beside],
    compiling.debug: [
        *([RIGHT.ranks, program] for program in (never_compiles, never_swaps, stops_early)),
        [*MENDED[:2], temperatures, *MENDED[3:]],
        MENDED[:4],
    ],
    real_llm.take_turns: [reads_all_again, takes_any_prompt_for_the_same, swaps_too_late, lambda *_: None],
    diffusion.one_filter: [
        lambda a, b, scaling: a,
        lambda a, b, scaling: RIGHT.one_filter(a, b, 1),
        lambda a, b, scaling: RIGHT.one_filter(a, b, scaling).transpose(2, 3),
    ],
    diffusion.halfway: [
        lambda *given: RIGHT.halfway(*given[:-1], given[-1] + 1),
        lambda model, scheduler, picture, first, second, at: RIGHT.halfway(
            model, scheduler, picture, second, first, at
        ),
        twice_over,
    ],
    beyond.turn_off: [
        all_zeros,
        new_memory,
        lambda layer: RIGHT.turn_off(layer) if hasattr(layer, "lora_B") else None,
    ],
    beyond.make_equal: [
        parameters_and_buffers,
        lambda live, fresh: live.load_state_dict(fresh.state_dict()),
        lambda live, fresh: setattr(live, "base_model", fresh.base_model),  # right outputs, new addresses
    ],
    serving.choose_replica: [
        lambda name, replicas, most: min(range(len(replicas)), key=lambda n: replicas[n]["waiting"]),
        lambda name, replicas, most: RIGHT.choose_replica(name, replicas, most + 1),
        last_of_equals,
        lambda name, replicas, most: RIGHT.choose_replica(name, replicas, 999),
    ],
    ahead.unreached: [
        lambda constants, bound, swapped: sorted(swapped.keys() - set(constants)),
        lambda constants, bound, swapped: sorted(name for name in swapped if swapped[name] is not bound.get(name)),
        lambda constants, bound, swapped: [n for n in swapped if n in RIGHT.unreached(constants, bound, swapped)],
    ],
    policy.two_tricks: [
        lambda *given: two_tricks(*given, by_prompt=True),
        lambda *given: two_tricks(*given, one_reward=True),
        lambda *given: two_tricks(*given, old_in_mean=True),
        lambda rows, *given: two_tricks([replace(each, version=5) for each in rows], *given),
    ],
    engine.gains: [
        lambda draft: gains(draft, sets=True),
        lambda draft: gains(draft, takes_all=True),
        lambda draft: gains(draft, no_journal=True),
        writes_while_it_decides,
    ],
}
MODULES = [each for _, each in inspect.getmembers(lessons, inspect.ismodule)]
TASKS = {
    name: each
    for module in MODULES
    for name, each in vars(module).items()
    if isinstance(each, Exercise) and module is not building
}
#: these compile, or take long
SLOW = {"debug", "take_turns", "halfway"}

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


@pytest.mark.parametrize("name", few_of(WRONG_PARTS, ["01", "02", "08"]))
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


@pytest.mark.parametrize("name", few_of(TASKS, TASKS.keys() - SLOW))
def test_wrong_answers_are_refused(name, capsys):
    for solution in WRONG[TASKS[name]]:
        TASKS[name].check(solution)
        out = capsys.readouterr().out
        assert out.startswith("Not yet.\n")
        assert "your code runs" not in out  # a wrong answer is no error
        TASKS[name].show(solution)
        assert "Not yet" not in capsys.readouterr().out


@pytest.mark.parametrize("name", few_of(PROGRAMS, ["ranks", "names"]))
def test_the_watch_names_the_mistake_of_each_program(name, capsys):
    compiling.debug.check([getattr(BROKEN if each == name else RIGHT, each) for each in PROGRAMS])
    said = capsys.readouterr().out
    assert said.startswith(f"Not yet.\n  {name}\n")
    assert PROGRAMS[name] in said
    assert "more that differ" not in said  # the answers are right


def test_an_error_in_the_readers_code_is_one_line(capsys):
    def broken(model):
        raise KeyError("nope")

    start.make_it_shout.check(broken)
    assert "yours:    KeyError: 'nope' (line 2 of broken: raise KeyError(\"nope\"))" in capsys.readouterr().out
