"""Chapter 03's exercises."""

from __future__ import annotations

import pytest
import torch
from exercises import assert_tells_right_from_wrong
from lengths import few_of

from hotswap_lab import demo, hotswap_adapter, prepare_model_for_compiled_hotswap
from hotswap_lab.lessons import compiling

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def scaling(config):
    return config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)


def will_recompile(old, new):
    return old.r != new.r or scaling(old) != scaling(new) or old.lora_dropout != new.lora_dropout


def make_ready(model, family):
    prepare_model_for_compiled_hotswap(model, adapters=family)
    return torch.compile(model, backend="eager", dynamic=False)


def prepares_too_late(model, family):
    compiled = torch.compile(model, backend="eager")
    prepare_model_for_compiled_hotswap(compiled, adapters=family)
    return compiled


def makes_room_but_no_layers(model, family):
    prepare_model_for_compiled_hotswap(model, target_rank=32)
    return torch.compile(model, backend="eager")


def forgets_to_compile(model, family):
    prepare_model_for_compiled_hotswap(model, adapters=family)
    return model


def compiles_again_each_time(model, family):
    """Right answers, but something that each swap changes is left in the graph: a Python number."""
    prepare_model_for_compiled_hotswap(model, adapters=family)
    layer, forward = model.get_base_model().model.layers[0].self_attn.q_proj, model.forward
    model.forward = lambda **inputs: forward(**inputs) if layer.r["default"] > 0 else None
    return torch.compile(model, backend="eager", dynamic=False)


SOLUTIONS = {
    "will_recompile": (
        compiling.will_recompile,
        will_recompile,
        [
            lambda old, new: False,
            lambda old, new: (old.r, old.lora_alpha) != (new.r, new.lora_alpha),
            lambda old, new: scaling(old) != scaling(new),
            lambda old, new: will_recompile(old, new) or old.target_modules != new.target_modules,
        ],
    ),
    "make_ready": (
        compiling.make_ready,
        make_ready,
        [lambda model, family: None, forgets_to_compile, prepares_too_late, makes_room_but_no_layers],
    ),
}


def prepared(model, folders):
    prepare_model_for_compiled_hotswap(model, adapters=folders)
    return torch.compile(model, backend="eager", dynamic=False)


def ranks(model, folders, x):
    yield from compiling.answers(prepared(model, folders), folders, x)


def warm_up(model, folders, x):
    compiled = prepared(model, folders)
    compiled(x)
    yield from compiling.answers(compiled, folders, x)


def temperatures(model, folders, x, number=torch.tensor):
    prepare_model_for_compiled_hotswap(model, adapters=folders)
    soften = torch.compile(lambda x, by: model(x) / by, backend="eager", dynamic=False)
    for by, folder in enumerate(folders, 1):
        hotswap_adapter(model, folder, "default")
        yield soften(x, number(by))


MENDED = {
    "ranks": ranks,
    "warm_up": warm_up,
    "temperatures": temperatures,
    # mended, these two are the program that does nothing special
    "names": ranks,
    "gradients": ranks,
}


def broken_ranks(model, folders, x):
    compiled = torch.compile(model, backend="eager", dynamic=False)
    yield from compiling.answers(compiled, folders, x)


def broken_warm_up(model, folders, x):
    compiled = prepared(model, folders)
    compiled(x[:, :2])
    yield from compiling.answers(compiled, folders, x)


def broken_temperatures(model, folders, x):
    yield from temperatures(model, folders, x, number=int)


def broken_names(model, folders, x):
    compiled = prepared(model, folders)
    for name, folder in zip("abc", folders, strict=True):
        model.load_adapter(folder, name)
        model.set_adapter(name)
        yield compiled(x)


def broken_gradients(model, folders, x):
    compiled = prepared(model, folders)
    with torch.enable_grad():
        compiled(x)
    yield from compiling.answers(compiled, folders, x)


#: the programs of the chapter, and what the watch says of each
BROKEN = {
    "ranks": (broken_ranks, "a tensor has another shape: base_model.model.0.lora_A.default.weight"),
    "warm_up": (broken_warm_up, "a tensor has another shape: args[0]"),
    "temperatures": (broken_temperatures, "a Python number in the graph has changed: by"),
    "names": (broken_names, "active_adapter"),
    "gradients": (broken_gradients, "grad_mode"),
}


def named(program, name):
    def run(*arguments):
        return program(*arguments)

    run.__name__ = name
    return run


def never_compiles(model, folders, x):
    yield from compiling.answers(model, folders, x)


def never_swaps(model, folders, x):
    compiled = prepared(model, folders)
    for _ in folders:
        yield compiled(x)


def stops_early(model, folders, x):
    yield from compiling.answers(prepared(model, folders), folders[:2], x)


@pytest.mark.long
def test_mended_programs_pass_and_broken_ones_do_not(capsys):
    right = [named(program, name) for name, program in MENDED.items()]
    wrong = [[ranks, program] for program in (never_compiles, never_swaps, stops_early)]
    wrong.append([named(ranks, "temperatures") if program.__name__ == "temperatures" else program for program in right])
    wrong.append(right[:4])
    assert_tells_right_from_wrong(compiling.debug, right, wrong, capsys)


@pytest.mark.parametrize("name", few_of(BROKEN, ["ranks", "names"]))
def test_the_watch_names_the_mistake_of_each_program(name, capsys):
    compiling.debug.check([named(BROKEN[name][0] if each == name else MENDED[each], each) for each in MENDED])
    said = capsys.readouterr().out
    assert said.startswith(f"Not yet.\n  {name}\n")
    assert BROKEN[name][1] in said
    assert "more that differ" not in said  # the answers are right


@pytest.mark.long
def test_a_fresh_load_judges_swaps_in_a_compiled_model():
    def compiled():
        model, _ = demo.load("reverse")
        return torch.compile(model, backend="eager", dynamic=False)

    def refuses(model, path, name):
        raise ValueError("Configs are incompatible: for use_rslora, False != True")

    assert compiling.judged(hotswap_adapter, compiled(), ["vowels_up", "shout"]) == (
        "right: vowels_up, shout\n1 recompile"
    )
    assert compiling.judged(lambda *_: None, compiled(), ["vowels_up", "reverse"]) == (
        "wrong, no error: vowels_up\nright: reverse\n0 recompiles"
    )
    assert compiling.judged(refuses, compiled(), ["vowels_up"]) == "refused (use_rslora): vowels_up\n0 recompiles"


@pytest.mark.parametrize("name", few_of(SOLUTIONS, SOLUTIONS.keys() - {"will_recompile", "make_ready"}))
def test_right_and_wrong_solutions(name, capsys):
    assert_tells_right_from_wrong(*SOLUTIONS[name], capsys, may_fail=True)


@pytest.mark.long
def test_a_solution_that_recompiles_is_told_how_often(capsys):
    compiling.make_ready.check(compiles_again_each_time)
    out = capsys.readouterr().out
    assert "recompiles in 5 swaps" in out
    assert "equal a fresh load" not in out


@pytest.mark.long
def test_the_scenarios_have_both_answers_and_are_independent_of_each_other():
    config = compiling._config
    answers = [compiling.recompiles(config(compiling.OLD_CONFIG), config(new)) for new in compiling.SCENARIOS.values()]
    assert answers == [0, 1, 1, 0, 1, 0]
    # a graph that is left over from one try would hide the recompile of the next
    assert compiling.recompiles(config(compiling.OLD_CONFIG), config(compiling.SCENARIOS["r=4 alpha=16"])) == 1
