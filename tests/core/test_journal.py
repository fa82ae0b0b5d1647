"""All is put back, in its place; and Ctrl-C waits while a model is written, and nowhere else."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import SimpleNamespace

import pytest

from hotswap_lab.core.journal import Journal, interrupts_held

HEARD: list[int] = []
pytestmark = pytest.mark.usefixtures("python_sigint")


@pytest.fixture(autouse=True)
def _given_back(python_sigint):
    """Whatever happens, the handler is Python's own again."""
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.02)


def test_what_is_rolled_back_is_as_it_was():
    journal, table, thing = Journal(), {"a": 1, "b": 2}, SimpleNamespace(x=1)
    journal.set_item(table, "a", 5)
    journal.set_item(table, "c", 3)
    journal.remove(table, "b", "d")
    journal.set_items([table], "a", [7])
    journal.set_attribute(thing, "x", 2)
    assert (table, thing.x) == ({"a": 7, "c": 3}, 2)
    journal.roll_back()
    assert ([*table.items()], thing.x) == ([("a", 1), ("b", 2)], 1)


def test_held_and_then_let_through():
    """Nested blocks are one."""
    reached = []
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012 - the point is what runs before it is raised
        with interrupts_held():
            with interrupts_held():
                press()
                press()
            reached.append("the end of the outer block")
        reached.append("never")
    assert reached == ["the end of the outer block"]


def test_an_error_inside_is_not_lost():
    with pytest.raises(KeyboardInterrupt) as caught, interrupts_held():  # noqa: PT012
        press()
        raise ValueError("the file is damaged")
    assert isinstance(caught.value.__context__, ValueError)


@pytest.mark.parametrize("handler", [lambda *_: HEARD.append(1), signal.SIG_IGN], ids=["listens", "not of Python"])
def test_other_handlers(handler):
    before = signal.signal(signal.SIGINT, handler)
    HEARD.clear()
    try:
        with interrupts_held():
            press()
            assert HEARD == []
            assert handler is not signal.SIG_IGN or signal.getsignal(signal.SIGINT) is handler
        assert [1] * (handler is not signal.SIG_IGN) == HEARD
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_neither_hold_nor_receive():
    seen = []

    def other() -> None:
        with interrupts_held():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=other)
    with pytest.raises(KeyboardInterrupt), interrupts_held():  # noqa: PT012
        mine = signal.getsignal(signal.SIGINT)
        press()
        thread.start()
        thread.join(60)
    assert seen == [mine]
