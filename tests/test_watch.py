"""RecompileWatch counts what PyTorch compiles, whatever the backend, and says why."""

from __future__ import annotations

import pytest
import torch
from lengths import long
from torch._dynamo.callback import callback_handler

from hotswap_lab import RecompileError, RecompileWatch
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
