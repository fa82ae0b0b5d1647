"""Every exercise's check refuses plausible wrong answers and accepts a right one.

The solutions' notebooks show right answers as well. What is here is what they can't show: that a check says no.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import nbformat
import pytest
import torch
from lengths import few_of

from hotswap_lab import demo, hotswap_adapter, prepare_model_for_compiled_hotswap
from hotswap_lab.core.change import Change
from hotswap_lab.lessons import (
    ahead,
    beyond,
    compiling,
    diffusion,
    engine,
    padding,
    pools,
    real_llm,
    rows,
    serving,
    start,
    uncompiled,
)
from hotswap_lab.lessons.exercise import Exercise

pytestmark = pytest.mark.usefixtures("fresh_compiler")


NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
MODULES = (ahead, beyond, compiling, diffusion, engine, padding, pools, real_llm, rows, serving, start, uncompiled)


class Answers(NamedTuple):
    task: Exercise
    right: object
    wrong: list


TABLE: dict[str, Answers] = {}


def defined_in(notebooks: str) -> SimpleNamespace:
    """The functions that these notebooks define; nothing else of them is run."""
    found: dict[str, object] = {}
    for path in sorted(NOTEBOOKS.glob(notebooks)):
        names: dict[str, object] = {}
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "code" and "google.colab" not in cell.source:
                tree = ast.parse(cell.source)
                kinds = (ast.FunctionDef, ast.Import, ast.ImportFrom)
                tree.body = [each for each in tree.body if isinstance(each, kinds)]
                exec(compile(tree, str(path), "exec"), names)
        found |= names
    return SimpleNamespace(**found)


RIGHT = defined_in("solutions/[0-9]*.ipynb")
#: the programs that are to be mended
BROKEN = defined_in("03_compiled_swap.ipynb")


def answers(task: Exercise, right: Callable, *wrong: Callable) -> Callable:
    """Add an exercise to the table; returns the right answer, for others to be made from it."""
    name = next(name for module in MODULES for name, each in vars(module).items() if each is task)
    TABLE[name] = Answers(task, right, list(wrong))
    return right


def wrong(name: str) -> Callable:
    """Another wrong answer of an exercise."""
    return TABLE[name].wrong.append


# --- 00, 01


make_it_shout = answers(start.make_it_shout, RIGHT.make_it_shout, lambda model: None, lambda model: swap(model, "sort"))


def swap(model, name):
    hotswap_adapter(model, demo.adapter_path(name), "default")


@wrong("make_it_shout")
def reload(model):
    model.delete_adapter("default")
    model.load_adapter(demo.adapter_path("shout"), "default")
    model.set_adapter("default")


swap_by_hand = answers(uncompiled.swap_by_hand, RIGHT.my_swap, lambda model, tensors: None)


@wrong("swap_by_hand")
def new_tensors(model, tensors):
    """Right values, new addresses."""
    for key, tensor in tensors.items():
        model.get_parameter(key.replace(".weight", ".default.weight")).data = tensor.clone()


layers_to_turn_off = answers(
    uncompiled.layers_to_turn_off,
    RIGHT.layers_to_turn_off,
    lambda old, new: set(),
    lambda old, new: layers_to_turn_off(new, old),
    lambda old, new: set(old) - set(new),
    lambda old, new: layers_to_turn_off(old, new) | layers_to_turn_off(new, old),
)


# --- 02


pad = answers(padding.pad, RIGHT.pad, lambda a, b, rank: (a, b))


@wrong("pad")
def only_a_is_zero(a, b, rank):
    big_a, big_b = pad(a, b, rank)
    big_b[:, b.shape[1] :] = 9
    return big_a, big_b


@wrong("pad")
def only_b_is_zero(a, b, rank):
    big_a, big_b = pad(a, b, rank)
    big_a[len(a) :] = 9
    return big_a, big_b


TABLE["pad"].wrong.append(lambda a, b, rank: pad(a.float(), b.float(), rank))
TABLE["pad"].wrong.append(lambda a, b, rank: (pad(a, b, rank)[0], b))


bytes_held = answers(padding.bytes_held, RIGHT.bytes_held, lambda tensors, rank: (0, 0))


@wrong("bytes_held")
def one_factor_for_all(tensors, rank):
    own = sum(tensor.nbytes for tensor in tensors.values())
    return own, own * rank // next(iter(tensors.values())).shape[0]


# --- 03


def scaling(config):
    return config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)


will_recompile = answers(
    compiling.will_recompile,
    RIGHT.will_recompile,
    lambda old, new: False,
    lambda old, new: (old.r, old.lora_alpha) != (new.r, new.lora_alpha),
    lambda old, new: scaling(old) != scaling(new),
    lambda old, new: will_recompile(old, new) or old.target_modules != new.target_modules,
)


make_ready = answers(compiling.make_ready, RIGHT.make_ready, lambda model, family: None)


@wrong("make_ready")
def forgets_to_compile(model, family):
    prepare_model_for_compiled_hotswap(model, adapters=family)
    return model


@wrong("make_ready")
def prepares_too_late(model, family):
    compiled = torch.compile(model, backend="eager")
    prepare_model_for_compiled_hotswap(compiled, adapters=family)
    return compiled


@wrong("make_ready")
def makes_room_but_no_layers(model, family):
    prepare_model_for_compiled_hotswap(model, target_rank=32)
    return torch.compile(model, backend="eager")


@wrong("make_ready")
def compiles_again_each_time(model, family):
    """Right answers, but something that each swap changes is left in the graph: a Python number."""
    prepare_model_for_compiled_hotswap(model, adapters=family)
    layer, forward = model.get_base_model().model.layers[0].self_attn.q_proj, model.forward
    model.forward = lambda **inputs: forward(**inputs) if layer.r["default"] > 0 else None
    return torch.compile(model, backend="eager", dynamic=False)


def never_compiles(model, folders, x):
    yield from compiling.answers(model, folders, x)


def never_swaps(model, folders, x):
    compiled = make_ready(model, folders)
    for _ in folders:
        yield compiled(x)


def stops_early(model, folders, x):
    yield from compiling.answers(make_ready(model, folders), folders[:2], x)


def named(program: Callable, name: str) -> Callable:
    def run(*arguments) -> Iterator[torch.Tensor]:
        return program(*arguments)

    run.__name__ = name
    return run


#: the programs of the chapter, and what the watch says of each
PROGRAMS = {
    "ranks": "a tensor has another shape: base_model.model.0.lora_A.default.weight",
    "warm_up": "a tensor has another shape: args[0]",
    "temperatures": "a Python number in the graph has changed: by",
    "names": "active_adapter",
    "gradients": "grad_mode",
}
MENDED = [getattr(RIGHT, name) for name in PROGRAMS]
UNFIT = [[RIGHT.ranks, program] for program in (never_compiles, never_swaps, stops_early)]
WITHOUT_DIVISION = [named(RIGHT.ranks, name) for name in PROGRAMS]
answers(compiling.debug, MENDED, *UNFIT, WITHOUT_DIVISION, MENDED[:4])


@pytest.mark.parametrize("name", few_of(PROGRAMS, ["ranks", "names"]))
def test_the_watch_names_the_mistake_of_each_program(name, capsys):
    compiling.debug.check([getattr(BROKEN if each == name else RIGHT, each) for each in PROGRAMS])
    said = capsys.readouterr().out
    assert said.startswith(f"Not yet.\n  {name}\n")
    assert PROGRAMS[name] in said
    assert "more that differ" not in said  # the answers are right


# --- 04


pack = answers(pools.pack, RIGHT.pack, lambda pairs: pairs[0][0])


@wrong("pack")
def all_a_first(pairs):
    return pack([(a, b.new_zeros(0, b.shape[1])) for a, b in pairs] + [(b.T, a.new_zeros(0, len(a))) for a, b in pairs])


@wrong("pack")
def b_not_turned(pairs):
    return pack([(a, b.T.reshape(b.shape[1], -1).flip(1).T) for a, b in pairs])


@wrong("pack")
def nines_beyond_the_rank(pairs):
    packed = pack(pairs)
    packed[len(pairs[0][0]) :, 0] = 9
    return packed


swap_bytes = answers(
    pools.swap_bytes,
    RIGHT.swap_bytes,
    lambda row, new, old: (0, 0),
    lambda row, new, old: swap_bytes(row, old, new),
    lambda row, new, old: (new * row, old * row),
    lambda row, new, old: (new * row, (old - new) * row),
)


# --- 05


take_turns = answers(
    real_llm.take_turns,
    RIGHT.take_turns,
    lambda chat, pool, kept, name, ids: None,
    lambda chat, pool, kept, name, ids: chat.read(ids),
)


@wrong("take_turns")
def reads_all_again(chat, pool, kept, name, ids):
    pool.swap(name)
    chat.forget()
    return chat.read(ids)


@wrong("take_turns")
def one_memory_for_both(chat, pool, kept, name, ids):
    pool.swap(name)
    return chat.read(ids[chat.length :])


@wrong("take_turns")
def takes_any_prompt_for_the_same(chat, pool, kept, name, ids):
    pool.swap(name)
    chat.forget()
    if name in kept:
        chat.restore(kept[name])
    logits = chat.read(ids[chat.length :])
    kept[name] = chat.save()
    return logits


@wrong("take_turns")
def keeps_only_the_length(chat, pool, kept, name, ids):
    pool.swap(name)
    chat.length = kept.get(name, 0)
    logits = chat.read(ids[chat.length :])
    kept[name] = chat.length
    return logits


@wrong("take_turns")
def without_the_swap(chat, pool, kept, name, ids):
    chat.forget()
    return chat.read(ids)


@wrong("take_turns")
def swaps_too_late(chat, pool, kept, name, ids):
    logits = take_turns(chat, pool, kept, pool.active, ids)
    pool.swap(name)
    return logits


# --- 06


one_filter = answers(
    diffusion.one_filter,
    RIGHT.one_filter,
    lambda a, b, scaling: a,
    lambda a, b, scaling: one_filter(a, b, 1),
    lambda a, b, scaling: one_filter(a, b, scaling).flip(-1),
)


halfway = answers(
    diffusion.halfway,
    RIGHT.halfway,
    lambda *arguments: arguments[2],
    lambda *arguments: halfway(*arguments[:-1], arguments[-1] + 1),
)


@wrong("halfway")
def twice_over(model, scheduler, picture, first, second, at):
    return halfway(model, scheduler, halfway(model, scheduler, picture, first, first, at), second, second, at)


# --- 07


turn_off = answers(beyond.turn_off, RIGHT.turn_off, lambda layer: None)


@wrong("turn_off")
def all_zeros(layer):
    for parameters in (getattr(layer, "ia3_l", {}), getattr(layer, "lora_B", {})):
        for each in parameters.values():
            getattr(each, "weight", each).zero_()


@wrong("turn_off")
def lengths_of_the_columns(layer):
    turn_off(layer)
    if hasattr(layer, "lora_B"):
        norms = layer.get_base_layer().weight.norm(dim=0)
        magnitude = layer.lora_magnitude_vector["default"].weight
        magnitude.copy_(norms[: len(magnitude)] if len(norms) >= len(magnitude) else norms.mean())


@wrong("turn_off")
def new_memory(layer):
    turn_off(layer)
    for parameter in layer.parameters():
        if parameter is not layer.get_base_layer().weight:
            parameter.data = parameter.data.clone()


make_equal = answers(beyond.make_equal, RIGHT.make_equal, lambda live, fresh: None)


@wrong("make_equal")
def parameters_only(live, fresh):
    for name, parameter in fresh.named_parameters():
        live.get_parameter(name).copy_(parameter)


def parameters_and_buffers(live, fresh):
    tensors = dict(live.named_parameters()) | dict(live.named_buffers())
    for name, tensor in [*fresh.named_parameters(), *fresh.named_buffers()]:
        tensors[name].copy_(tensor)


@wrong("make_equal")
def modules_of_the_fresh_one(live, fresh):
    """Right outputs, new addresses."""
    live.base_model = fresh.base_model


wrong("make_equal")(parameters_and_buffers)

# --- 08


own_adapters = answers(
    rows.own_adapters,
    RIGHT.own_adapters,
    lambda base, x, a, b, scaling: base(x),
    lambda base, x, a, b, scaling: None,
    lambda base, x, a, b, scaling: own_adapters(base, x, a, b, torch.ones_like(scaling)),
    lambda base, x, *own: own_adapters(base, x, *(each[-len(x) :] for each in own)),
    lambda base, x, *own: own_adapters(base, x, *(each[:1].expand_as(each) for each in own)),
)


@wrong("own_adapters")
def with_a_loop(base, x, a, b, scaling):
    return torch.cat([base(x[i : i + 1]) + scaling[i] * x[i : i + 1] @ a[i].T @ b[i] for i in range(len(x))])


# --- 09


choose_replica = answers(
    serving.choose_replica,
    RIGHT.choose_replica,
    lambda *_: None,
    lambda name, replicas, most: min(range(len(replicas)), key=lambda n: replicas[n]["waiting"]),
    lambda name, replicas, most: choose_replica(name, replicas, 10**6),
    lambda name, replicas, most: choose_replica(name, replicas, most + 1),
)


@wrong("choose_replica")
def last_of_equals(name, replicas, most):
    numbers = range(len(replicas))[::-1]
    having = [n for n in numbers if name in replicas[n]["held"] and replicas[n]["waiting"] < most]
    return min(having or numbers, key=lambda n: replicas[n]["waiting"])


# --- 10, and the engine


unreached = answers(
    ahead.unreached,
    RIGHT.unreached,
    lambda constants, bound, swapped: [],
    lambda constants, bound, swapped: sorted(swapped.keys() - set(constants)),
    lambda constants, bound, swapped: sorted(name for name in swapped if swapped[name] is not bound.get(name)),
    lambda constants, bound, swapped: unreached(constants, bound, swapped)[::-1],
)


def gains(draft, sets=False, takes_all=False):
    layers = {layer.path: layer.module for layer in draft.slot.layers}
    change = Change()
    for path, gain in engine.gains_of(draft).items():
        if path in layers:
            table = layers[path].scaling
            value = gain if sets else table["default"] * gain
            change.steps.append(lambda journal, table=table, value=value: journal.set_item(table, "default", value))
        elif not takes_all:
            draft.refuse("not_in_pool", name=path, found="others")
    return engine.as_plan(draft, change)


answers(
    engine.gains,
    engine.reference_gains,
    lambda draft: None,
    lambda draft: gains(draft, sets=True),
    lambda draft: gains(draft, takes_all=True),
)


@wrong("gains")
def writes_while_it_decides(draft):
    for path, gain in engine.gains_of(draft).items():
        for layer in draft.slot.layers:
            if layer.path == path:
                layer.module.scaling["default"] *= gain
    plan = gains(draft)
    return engine.as_plan(draft, Change()) if plan.ok else plan


# --- the table

#: these compile, or take long
SLOW = {"will_recompile", "make_ready", "debug", "take_turns", "halfway"}
#: wrong answers that raise an error, which is not judged
MAY_FAIL = {"make_ready", "take_turns", "choose_replica"}


def test_every_exercise_is_in_the_table():
    tasks = {name for module in MODULES for name, each in vars(module).items() if isinstance(each, Exercise)}
    assert tasks == TABLE.keys()
    assert all(len(each.wrong) >= 2 for each in TABLE.values())


@pytest.mark.parametrize("name", few_of(TABLE, TABLE.keys() - SLOW))
def test_wrong_answers_are_refused_and_the_right_one_is_accepted(name, capsys):
    task, right, wrong_ones = TABLE[name]
    task.check(right)
    assert capsys.readouterr().out.startswith("Correct: ")
    for solution in wrong_ones:
        task.check(solution)
        out = capsys.readouterr().out
        assert out.startswith("Not yet.\n")
        assert "yours:" in out
        assert "expected:" in out
        assert name in MAY_FAIL or "your code runs" not in out  # a wrong answer is no error
    task.show(right)
    assert "yours" not in capsys.readouterr().out


# --- what a check says


def test_a_failed_check_gives_one_answer_away_and_says_how_many_more_differ(capsys):
    uncompiled.layers_to_turn_off.check(lambda old, new: set())
    out = capsys.readouterr().out
    assert out == (
        "Not yet.\n  reverse to shout\n    yours:    0 layers\n    expected: 14 layers\n  and 2 more that differ\n"
    )


def test_an_error_in_the_readers_code_is_one_line(capsys):
    def broken(model):
        raise KeyError("nope")

    start.make_it_shout.check(broken)
    assert "yours:    KeyError: 'nope' (line 2 of broken: raise KeyError(\"nope\"))" in capsys.readouterr().out
