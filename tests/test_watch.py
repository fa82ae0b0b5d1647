"""RecompileWatch counts what PyTorch compiles, whatever the backend, and says why."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch
from lengths import long
from torch._dynamo.callback import callback_handler

from hotswap_lab import (
    RecompileError,
    RecompileWatch,
    compat,
    demo,
    hotswap_adapter,
    prepare_model_for_compiled_hotswap,
)
from hotswap_lab.watch import explain

pytestmark = pytest.mark.usefixtures("fresh_compiler")
BACKENDS = ["eager", long("aot_eager"), long("inductor")]


class Scaled(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = torch.nn.Linear(4, 4)
        self.scaling = {"default": 2.0}

    def forward(self, x):
        return self.lin(x) * self.scaling["default"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_and_recompiles_and_their_reasons(backend):
    model = Scaled()
    compiled = torch.compile(model, backend=backend, dynamic=False)
    with torch.no_grad(), RecompileWatch() as watch:
        watch.call("first", compiled, torch.ones(3, 4))
        watch.call("again", compiled, torch.ones(3, 4))
        model.scaling["default"] = 3.0
        watch.call("other scaling", compiled, torch.ones(3, 4))
        watch.call("other length", compiled, torch.ones(5, 4))
    assert (watch.compiles, watch.recompiles) == (1, 2)
    assert [call.label for call in watch.calls] == ["first", "again", "other scaling", "other length"]
    assert [call.recompiles for call in watch.calls] == [0, 0, 1, 1]
    assert [len(call.compilations) for call in watch.calls] == [1, 0, 1, 1]
    assert watch.calls[0].seconds > watch.calls[1].seconds > 0
    assert watch.reasons[0] == "a Python number in the graph has changed: scaling['default'] was 2.0"
    assert "x, axis 0, was 3, is 5" in watch.compilations[2].reason or "was 2.0" in watch.compilations[2].reason
    assert watch.summary == "1 compiled, 2 recompiles"
    assert "recompile in 'other scaling': a Python number" in str(watch)
    html = watch._repr_html_()
    assert "1 compiled, 2 recompiles" in html
    assert "a Python number in the graph has changed" in html


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_recompile_too_many_raises_where_it_happens(backend):
    model = Scaled()
    compiled = torch.compile(model, backend=backend, dynamic=False)
    x = torch.ones(3, 4)
    with torch.no_grad():
        compiled(x)
        with RecompileWatch(allow=1) as watch:
            model.scaling["default"] = 3.0
            compiled(x)
            model.scaling["default"] = 4.0
            with pytest.raises(RecompileError, match="recompile number 2, 1 allowed: a Python number"):
                compiled(x)
        assert watch.recompiles == 2
        assert torch.allclose(compiled(x), model.lin(x) * 4), "the model goes on to work"


def test_the_first_compilation_and_the_backward_pass_are_no_recompiles():
    compiled = torch.compile(Scaled(), backend="aot_eager")
    with RecompileWatch(allow=0) as watch:
        compiled(torch.ones(3, 4)).sum().backward()
    assert (watch.compiles, watch.recompiles) == (1, 0)


def test_only_the_block_is_watched():
    compiled = torch.compile(Scaled(), backend="eager", dynamic=False)
    before = len(callback_handler.start_callbacks)
    watch = RecompileWatch(allow=0)
    compiled(torch.ones(3, 4))
    with pytest.raises(ZeroDivisionError), watch:
        _ = 1 / 0
    compiled(torch.ones(4, 4))
    watch.call("afterwards", compiled, torch.ones(5, 4))
    assert watch.compilations == []
    assert len(callback_handler.start_callbacks) == before


def test_a_reset_of_the_compiler_does_not_make_it_deaf():
    compiled = torch.compile(Scaled(), backend="eager", dynamic=False)
    with RecompileWatch() as watch:
        for _ in range(2):
            torch.compiler.reset()  # forgets all graphs, and all listeners but ours
            compiled(torch.ones(3, 4))
        watch.call("other length", compiled, torch.ones(5, 4))
        seen: list = []
        callback_handler.register_start_callback(seen.append)  # of others, and no Python function
        compiled(torch.ones(7, 4))
        torch.compiler.reset()
        compiled(torch.ones(3, 4))
    assert (watch.compiles, watch.recompiles, len(seen)) == (3, 2, 1)
    torch.compiler.reset()
    compiled(torch.ones(3, 4))
    assert watch.compiles == 3, "the block is over"
    assert watch._on_start not in callback_handler.start_callbacks


def test_a_block_of_the_same_watch_inside_its_own():
    with RecompileWatch() as watch, watch:
        pass
    assert watch._on_start not in callback_handler.start_callbacks


def test_watches_can_be_nested():
    model = Scaled()
    compiled = torch.compile(model, backend="eager", dynamic=False)
    with RecompileWatch() as outer:
        compiled(torch.ones(3, 4))
        model.scaling["default"] = 3.0
        with RecompileWatch() as inner:
            compiled(torch.ones(3, 4))
    assert (outer.compiles, outer.recompiles) == (1, 1)
    assert (inner.compiles, inner.recompiles) == (0, 1)


def test_a_call_that_fails_is_noted_and_its_error_let_through():
    with RecompileWatch() as watch:
        with pytest.raises(KeyError):
            watch.call("fails", {}.__getitem__, "nothing")
        torch.compile(Scaled(), backend="eager")(torch.ones(3, 4))
    assert watch.calls[0].seconds > 0
    assert ([each.call for each in watch.compilations], watch.calls[0].compilations) == ([""], [])


@pytest.mark.parametrize(
    ("guard", "words"),
    [
        ("0/0: self.training == True  # if", "a Python number in the graph has changed: training was True"),
        (
            "0/1: tensor 'self._modules['a']._parameters['weight']' size mismatch at index 1. expected 8, actual 4.",
            "a tensor has another shape: a.weight, axis 1, was 8, is 4",
        ),
        ("0/0: ___check_type_id(self._modules['a'], 94106), type=<class 'x'>", "an object of another type: a"),
        ("0/0: len(L['x']) == 2 and more", "this no longer holds: len(L['x']) == 2 and more"),
        ("", "the reason is not reported by this version of PyTorch"),
    ],
)  # fmt: skip
def test_guards_in_words(guard, words):
    assert explain(guard) == words


def test_a_call_in_a_call():
    compiled = torch.compile(torch.nn.Linear(4, 2), backend="eager", dynamic=False)
    first, other = torch.ones(3, 4), torch.ones(5, 4)
    with RecompileWatch() as watch:
        compiled(first)
        watch.call("outer", lambda: (watch.call("inner", compiled, first), compiled(other)))
    assert [(call.label, call.recompiles) for call in watch.calls] == [("inner", 0), ("outer", 1)]


def test_a_call_is_noted_at_its_end():
    """A widget may draw the calls in another thread meanwhile, on an axis without a place for 0 seconds."""
    watch = RecompileWatch()
    assert watch.call("now", lambda: len(watch.calls)) == 0
    assert [call.seconds > 0 for call in watch.calls] == [True]


# --- whether compiled code runs


def idle(watch: RecompileWatch) -> bool:
    """Whether the watch says that nothing compiled ran."""
    assert ("nothing that torch.compile compiled ran" in watch.summary) == (watch.runs == 0)
    return watch.runs == 0


def test_a_block_without_compiled_code_is_not_content():
    model = Scaled()
    compiled, x = torch.compile(model, backend="eager", dynamic=False), torch.ones(3, 4)
    compiled(x)
    with pytest.warns(UserWarning, match="nothing that torch.compile compiled ran in this block"):  # noqa: SIM117
        with RecompileWatch(allow=0) as watch:
            model(x)
    assert idle(watch)
    assert "0 compiled, 0 recompiles, nothing that torch.compile compiled ran" in watch._repr_html_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with RecompileWatch() as silent:
            model(x)
        with RecompileWatch(allow=0) as content:
            compiled(x)
        with pytest.raises(ZeroDivisionError), RecompileWatch(allow=0):
            _ = 1 / 0
        with pytest.raises(UserWarning, match="nothing"), RecompileWatch(allow=0) as strict:
            pass
        assert strict._on_start not in callback_handler.start_callbacks
        model.scaling["default"] = 3.0
        with RecompileWatch(allow=0), pytest.raises(RecompileError):  # caught inside, and no longer content
            compiled(x)
    assert (idle(silent), content.runs, content.summary) == (True, 1, "0 compiled, 0 recompiles")
    with pytest.warns(UserWarning, match="nothing"), content:  # each of its blocks
        pass
    assert not idle(content)
    assert RecompileWatch().summary == "0 compiled, 0 recompiles", "no block yet"


@pytest.mark.parametrize("backend", ["eager", "aot_eager", long("inductor")])
def test_a_first_call_is_a_run_and_so_is_each_other_call(backend):
    compiled, x = torch.compile(Scaled(), backend=backend, dynamic=False), torch.ones(3, 4)
    with torch.no_grad(), RecompileWatch() as watch:
        compiled(x)
        assert watch.runs == 1
        compiled(torch.ones(5, 4))
        compiled(x)
    assert (watch.compiles, watch.recompiles, watch.runs) == (1, 1, 3)


def test_after_the_recompile_limit_nothing_compiled_runs():
    model, x = Scaled(), torch.ones(3, 4)
    compiled = torch.compile(model, backend="eager", dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=1):
        compiled(x)
        model.scaling["default"] = 3.0
        compiled(x)
        with pytest.warns(UserWarning, match="nothing that"), RecompileWatch(allow=0) as watch:
            assert torch.equal(compiled(x), model.lin(x) * 3)
        assert idle(watch)
        model.scaling["default"] = 2.0  # what it was compiled for
        with RecompileWatch(allow=0) as watch:
            compiled(x)
    assert not idle(watch)


def test_a_call_after_the_limit_is_not_hidden_by_one_that_has_a_graph():
    """Nothing recompiles, and the first call is a run of compiled code; but the second one is not."""
    model, x = Scaled(), torch.ones(3, 4)
    compiled = torch.compile(model, backend="eager", dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=1):
        compiled(x)
        with warnings.catch_warnings(record=True) as warned, RecompileWatch(allow=0) as watch:
            for model.scaling["default"] in (2.0, 3.0):
                compiled(x)
        assert "no graph fitted" in str(warned[0].message)
        assert (watch.runs, watch.recompiles, watch.uncompiled) == (1, 0, 1)
        assert watch.summary == "0 compiled, 0 recompiles, 1 without a graph"
        model.scaling["default"] = 2.0
        with warnings.catch_warnings(), watch:  # a block that is content
            warnings.simplefilter("error")
            compiled(x)
    model.scaling["default"] = 4.0
    torch.compiler.reset()
    compiled(x)
    model.scaling["default"] = 5.0
    with RecompileWatch(allow=1) as watch:  # a call that is compiled again is none without a graph
        compiled(x)
    assert (watch.recompiles, watch.uncompiled) == (1, 0)


def test_a_watch_goes_on_after_a_block_of_its_own_inside():
    model = Scaled()
    compiled = torch.compile(model, backend="eager", dynamic=False)
    with RecompileWatch() as watch:
        with watch:
            compiled(torch.ones(3, 4))
        model.scaling["default"] = 3.0
        compiled(torch.ones(3, 4))
    assert (watch.compiles, watch.recompiles, watch.runs) == (1, 1, 2)
    assert watch._on_start not in callback_handler.start_callbacks


def test_what_a_stance_or_a_failing_backend_leaves_eager():
    compiled, x = torch.compile(Scaled(), backend="eager"), torch.ones(3, 4)
    compiled(x)
    with torch.compiler.set_stance("force_eager"), RecompileWatch() as watch:
        compiled(x)
    assert idle(watch)

    def fails(*_):
        raise NotImplementedError

    failing = torch.compile(lambda x: x * 2, backend=fails)
    with torch._dynamo.config.patch(suppress_errors=True), RecompileWatch() as watch:
        failing(x)
    assert (watch.compiles, idle(watch)) == (1, True)


def in_place(model):
    model.compile(backend="eager")
    return model


def per_layer(model):
    for layer in model.get_base_model().model.layers:
        layer.compile(backend="eager")
    return model


def base(model):
    model.get_base_model().compile(backend="eager")
    return model


def base_forward(model):
    inner = model.get_base_model()
    inner.forward = torch.compile(inner.forward, backend="eager")
    return model


def forward(model):
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def wrapper(model):
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize(
    ("compile", "called", "generates"),
    [
        (wrapper, True, False), (forward, True, False), (in_place, True, False),
        (base, True, True), (base_forward, True, True), (per_layer, True, True),
    ],
)  # fmt: skip
def test_which_ways_of_compiling_generate_runs(compile, called, generates):
    """README and the recipes show the one that it does; after a swap nothing recompiles, and the answer is right."""
    model, tokenizer = demo.load("reverse")
    prepare_model_for_compiled_hotswap(model, adapters=[demo.adapter_path("shout")])
    model, inputs = compile(model), tokenizer("hotswap>", return_tensors="pt")
    options = {"max_new_tokens": 9, "do_sample": False}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with RecompileWatch() as watch:
            model(**inputs)
        assert idle(watch) is not called
        with RecompileWatch() as watch:
            model.generate(**inputs, **options)
            model.generate(**inputs, **options)  # for the lengths that the first one has taken for constants
        assert idle(watch) is not generates
        hotswap_adapter(model, demo.adapter_path("shout"), "default")
        with RecompileWatch(allow=0) as watch:
            answer = model.generate(**inputs, **options)
    assert idle(watch) is not generates
    fresh, _ = demo.load("shout")
    assert torch.equal(answer, fresh.generate(**inputs, **options))


def test_hooks_of_others_stay_and_are_asked():
    compiled, x = torch.compile(Scaled(), backend="eager", dynamic=False), torch.ones(3, 4)
    asked: list[bool] = []

    def theirs(fits):
        asked.append(fits)
        return fits

    compiled(x)
    set_hook = compat.set_guard_complete_hook
    set_hook(theirs)
    try:
        with RecompileWatch() as outer:
            compiled(x)
            with RecompileWatch() as inner:
                compiled(x)
            inside = threading.Thread(target=lambda: [compiled(x) for _ in range(2)])
            inside.start()
            inside.join(60)
        assert (outer.runs, inner.runs, asked) == (4, 1, [True] * 4)
        assert set_hook(theirs) is theirs
        ours = []
        with RecompileWatch(allow=0) as watch:  # theirs in the block takes our place
            ours.append(set_hook(lambda fits: ours[0](fits)))
            compiled(x)
            set_hook(None)
            compiled(x)
        assert watch.runs is None, "it does not know"
        assert watch.summary == "0 compiled, 0 recompiles"
        with RecompileWatch() as again:
            compiled(x)
        assert again.runs == 1
    finally:
        assert set_hook(None) is None


def test_a_version_of_pytorch_that_does_not_say_it_is_not_guessed(monkeypatch):
    monkeypatch.setitem(compat.NAMES, "set_guard_complete_hook", "torch._C._dynamo.eval_frame:renamed")
    monkeypatch.delitem(vars(compat), "set_guard_complete_hook", raising=False)
    with warnings.catch_warnings(), RecompileWatch(allow=0) as watch:
        warnings.simplefilter("error")
        Scaled()(torch.ones(3, 4))
    assert (watch.runs, watch.summary) == (None, "0 compiled, 0 recompiles")


def test_an_error_in_a_guard_is_not_a_guard():
    def shape(x, y):
        return x if y is None else x * 2 if y.shape[0] > 2 else x * y.shape[0]

    def only_shapes(guards):
        return [each.guard_type == "SHAPE_ENV" for each in guards]

    compiled = torch.compile(shape, backend="eager", dynamic=True, options={"guard_filter_fn": only_shapes})
    x = torch.ones(2, 4)
    with RecompileWatch() as watch:
        compiled(x, torch.ones(5))
        compiled(x, None)
    assert watch.reasons == ["a guard could not be evaluated: 'NoneType' object has no attribute 'size'"]


@pytest.mark.parametrize(
    ("guard", "words"),
    [
        ("expected type of 'L['y']' to be a tensor type, ' but found <class 'NoneType'>", "PyTorch reports"),
        ("GLOBAL_STATE changed: grad_mode", "PyTorch reports"),
        ("Cache line invalidated because L['x'] got deallocated", "PyTorch reports"),
        ("getattr failed on source o", "a guard could not be evaluated"),
        ("KeyError on d['x']", "a guard could not be evaluated"),
        ("tuple index out of range", "a guard could not be evaluated"),
        ("'x'", "a guard could not be evaluated"),  # the message of a KeyError
        ("unsupported operand type(s) for +: 'int' and 'NoneType'", "a guard could not be evaluated"),
        ("'<=' not supported between instances of 'int' and 'NoneType'", "a guard could not be evaluated"),
        ("3 <= y.size()[0]", "this no longer holds"),
        ("___dict_contains('a', G['m']._modules)", "this no longer holds"),
        ("not hasattr(x, 'y')", "this no longer holds"),
    ],
)
def test_what_is_not_an_expression_is_not_said_to_hold_no_longer(guard, words):
    assert explain(f"0/0: {guard}") == f"{words}: {guard}"
