"""Every exercise's check refuses plausible wrong answers.

That it accepts a right one, the solutions' notebooks show, from which the right answers here are taken.
"""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import torch
import torch.nn.functional as F
from lengths import few_of

from hotswap_lab import demo, hotswap_adapter, lessons, prepare_model_for_compiled_hotswap
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


# --- wrong answers that a line can't say


def swap(model, name):
    hotswap_adapter(model, demo.adapter_path(name), "default")


def reload(model):
    model.delete_adapter("default")
    model.load_adapter(demo.adapter_path("shout"), "default")
    model.set_adapter("default")


def new_tensors(model, tensors):
    """Right values, new addresses."""
    for key, tensor in tensors.items():
        model.get_parameter(key.replace(".weight", ".default.weight")).data = tensor.clone()


def one_factor_for_all(tensors, rank):
    own = sum(tensor.nbytes for tensor in tensors.values())
    return own, own * rank // next(iter(tensors.values())).shape[0]


def scaling(config):
    return config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)


def forgets_to_compile(model, family):
    prepare_model_for_compiled_hotswap(model, adapters=family)
    return model


def makes_room_but_no_layers(model, family):
    prepare_model_for_compiled_hotswap(model, target_rank=32)
    return torch.compile(model, backend="eager")


def compiles_again_each_time(model, family):
    """Right answers, but something that each swap changes is left in the graph: a Python number."""
    prepare_model_for_compiled_hotswap(model, adapters=family)
    layer, forward = model.get_base_model().model.layers[0].self_attn.q_proj, model.forward
    model.forward = lambda **inputs: forward(**inputs) if layer.r["default"] > 0 else None
    return torch.compile(model, backend="eager", dynamic=False)


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


def all_a_first(pairs):
    without_b = [(a, b.new_zeros(0, b.shape[1])) for a, b in pairs]
    return RIGHT.pack(without_b + [(b.T, a.new_zeros(0, len(a))) for a, b in pairs])


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


def with_a_loop(base, x, a, b, scaling):
    return torch.cat([base(x[i : i + 1]) + scaling[i] * x[i : i + 1] @ a[i].T @ b[i] for i in range(len(x))])


def last_of_equals(name, replicas, most):
    numbers = range(len(replicas))[::-1]
    having = [n for n in numbers if name in replicas[n]["held"] and replicas[n]["waiting"] < most]
    return min(having or numbers, key=lambda n: replicas[n]["waiting"])


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
    start.make_it_shout: [lambda model: swap(model, "sort"), reload],
    uncompiled.swap_by_hand: [lambda model, tensors: None, new_tensors],
    uncompiled.layers_to_turn_off: [
        lambda old, new: RIGHT.layers_to_turn_off(new, old),
        lambda old, new: {f"{path}?" for path in RIGHT.layers_to_turn_off(old, new)},
    ],
    padding.pad: [
        lambda a, b, rank: (F.pad(a, (0, 0, 0, rank - len(a)), value=9), RIGHT.pad(a, b, rank)[1]),
        lambda a, b, rank: (RIGHT.pad(a, b, rank)[0], F.pad(b, (0, rank - len(a)), value=9)),
        lambda a, b, rank: RIGHT.pad(a.float(), b.float(), rank),
    ],
    padding.bytes_held: [lambda tensors, rank: (0, 0), one_factor_for_all],
    compiling.will_recompile: [
        lambda old, new: (old.r, old.lora_alpha) != (new.r, new.lora_alpha),
        lambda old, new: scaling(old) != scaling(new),
        lambda old, new: RIGHT.will_recompile(old, new) or old.target_modules != new.target_modules,
    ],
    compiling.make_ready: [forgets_to_compile, makes_room_but_no_layers, compiles_again_each_time],
    compiling.debug: [
        *([RIGHT.ranks, program] for program in (never_compiles, never_swaps, stops_early)),
        [*MENDED[:2], temperatures, *MENDED[3:]],
        MENDED[:4],
    ],
    pools.pack: [lambda pairs: pairs[0][0], all_a_first],
    pools.swap_bytes: [
        lambda row, new, old: RIGHT.swap_bytes(row, old, new),
        lambda row, new, old: (new * row, (old - new) * row),
    ],
    real_llm.take_turns: [reads_all_again, takes_any_prompt_for_the_same, swaps_too_late, lambda *_: None],
    diffusion.one_filter: [lambda a, b, scaling: a, lambda a, b, scaling: RIGHT.one_filter(a, b, 1)],
    diffusion.halfway: [lambda *given: RIGHT.halfway(*given[:-1], given[-1] + 1), twice_over],
    beyond.turn_off: [all_zeros, new_memory],
    beyond.make_equal: [
        parameters_and_buffers,
        lambda live, fresh: setattr(live, "base_model", fresh.base_model),  # right outputs, new addresses
    ],
    rows.own_adapters: [
        lambda base, x, a, b, scaling: RIGHT.own_adapters(base, x, a, b, torch.ones_like(scaling)),
        lambda base, x, *own: RIGHT.own_adapters(base, x, *(each[-len(x) :] for each in own)),
        with_a_loop,
    ],
    serving.choose_replica: [
        lambda name, replicas, most: min(range(len(replicas)), key=lambda n: replicas[n]["waiting"]),
        lambda name, replicas, most: RIGHT.choose_replica(name, replicas, most + 1),
        last_of_equals,
    ],
    ahead.unreached: [
        lambda constants, bound, swapped: sorted(swapped.keys() - set(constants)),
        lambda constants, bound, swapped: sorted(name for name in swapped if swapped[name] is not bound.get(name)),
        lambda constants, bound, swapped: RIGHT.unreached(constants, bound, swapped)[::-1],
    ],
    engine.gains: [
        lambda draft: gains(draft, sets=True),
        lambda draft: gains(draft, takes_all=True),
        writes_while_it_decides,
    ],
}
MODULES = [each for _, each in inspect.getmembers(lessons, inspect.ismodule)]
TASKS = {name: each for module in MODULES for name, each in vars(module).items() if isinstance(each, Exercise)}
#: these compile, or take long
SLOW = {"will_recompile", "make_ready", "debug", "take_turns", "halfway"}
#: wrong answers that raise an error, which is not judged
MAY_FAIL = {"make_ready"}


@pytest.mark.parametrize("name", few_of(TASKS, TASKS.keys() - SLOW))
def test_wrong_answers_are_refused(name, capsys):
    for solution in WRONG[TASKS[name]]:
        TASKS[name].check(solution)
        out = capsys.readouterr().out
        assert out.startswith("Not yet.\n")
        assert name in MAY_FAIL or "your code runs" not in out  # a wrong answer is no error
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
