"""Ctrl-C waits while a model is written, and nowhere else."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from hotswap_lab.core.journal import interrupts_held

pytestmark = pytest.mark.usefixtures("python_sigint")


@pytest.fixture(autouse=True)
def _given_back(python_sigint):
    """Whatever happens, the handler is Python's own again."""
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.02)


def test_held_and_then_let_through():
    reached = []
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012 - the point is what runs before it is raised
        with interrupts_held():
            press()
            press()
            reached.append("the end of the block")
        reached.append("never")
    assert reached == ["the end of the block"]


def test_nested_blocks_are_one():
    reached = []
    with pytest.raises(KeyboardInterrupt), interrupts_held():  # noqa: PT012
        with interrupts_held():
            press()
        reached.append("after the inner block")
    assert reached == ["after the inner block"]


def test_an_error_inside_is_not_lost():
    with pytest.raises(KeyboardInterrupt) as caught, interrupts_held():  # noqa: PT012
        press()
        raise ValueError("the file is damaged")
    assert isinstance(caught.value.__context__, ValueError)


def test_a_handler_that_only_listens():
    heard = []
    before = signal.signal(signal.SIGINT, lambda *_: heard.append(1))
    try:
        with interrupts_held():
            press()
            assert heard == []
        assert heard == [1]
    finally:
        signal.signal(signal.SIGINT, before)


def test_handlers_that_are_not_of_python_stay():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupts_held():
            press()
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
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
        thread.join()
    assert seen == [mine]
