"""Ctrl-C is held back where it would do harm, and comes where it is let through."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import threading
import time
import warnings

import pytest

from hotswap_lab import RecompileWatch, waiting_at_most
from hotswap_lab.core import interrupts
from hotswap_lab.core.interrupts import interruptible, interrupts_held, let_through

pytestmark = pytest.mark.usefixtures("python_sigint")


@pytest.fixture(autouse=True)
def _given_back(python_sigint):
    """Whatever happens, the handler is Python's own again."""
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert interrupts._hold is None


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.02)


def test_held_and_then_let_through():
    reached = []
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012 - the point is what runs before it is raised
        with interrupts_held():
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


def test_let_through_between_two_steps():
    reached = []
    with pytest.raises(KeyboardInterrupt), interrupts_held():  # noqa: PT012
        let_through()
        press()
        reached.append("a step")
        let_through()
        reached.append("never")
    assert reached == ["a step"]
    let_through()


def test_pressed_often_counts_once():
    with interrupts_held():
        press()
        press()
        with pytest.raises(KeyboardInterrupt):
            let_through()
        let_through()


def test_what_may_take_long_is_interrupted_at_once_and_what_follows_is_not():
    reached = []
    with pytest.raises(KeyboardInterrupt), interrupts_held():  # noqa: PT012
        try:
            with interruptible():
                press()
                reached.append("never")
        finally:
            press()
            reached.append("put back")
    assert reached == ["put back"]


def test_what_was_pressed_before_comes_first():
    with pytest.raises(KeyboardInterrupt), interrupts_held():  # noqa: PT012
        press()
        with interruptible():
            pytest.fail("begins to read")


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
            let_through()
            assert heard == [1]
            press()
        assert heard == [1, 1]
    finally:
        signal.signal(signal.SIGINT, before)


def test_handlers_that_are_not_of_python_stay():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupts_held(), interruptible():
            press()
            let_through()
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_neither_hold_nor_receive():
    seen = []

    def other() -> None:
        with interrupts_held(), interruptible():
            let_through()
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=other)
    with pytest.raises(KeyboardInterrupt), interrupts_held():  # noqa: PT012
        mine = signal.getsignal(signal.SIGINT)
        press()
        thread.start()
        thread.join()
    assert seen == [mine]


@contextlib.contextmanager
def managed(log: list):
    with interrupts_held():
        try:
            with interruptible(block_of="generator"):
                yield
        finally:
            log.append("put back")


def test_the_users_own_block_is_interrupted():
    log = []
    with pytest.raises(KeyboardInterrupt), managed(log):  # noqa: PT012
        press()
        log.append("never")
    assert log == ["put back"]


@pytest.mark.parametrize("method", ["__enter__", "__exit__"])
def test_ctrl_c_while_the_users_block_is_entered_or_left(method):
    """As far as Python is concerned, contextlib's frame is interrupted then, and the block is never left."""
    log = []
    manager = managed(log)

    def block() -> None:
        with manager:
            code = getattr(contextlib._GeneratorContextManager, method).__code__
            signal.getsignal(signal.SIGINT)(signal.SIGINT, _Frame(code, manager))
            if method == "__enter__":
                threading.Event().wait(30)  # it comes in here, and wakes whoever waits
                log.append("never")

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        block()
    assert log == ["put back"]
    assert time.monotonic() - start < 20


class _Frame:
    """A frame of contextlib's, as a handler gets it."""

    f_back = None

    def __init__(self, code, manager):
        self.f_code, self.f_locals = code, {"self": manager}


@pytest.mark.parametrize("handler", [lambda *_: None, signal.SIG_IGN])
def test_a_handler_that_the_user_installs_in_the_block_stays(handler):
    log = []
    with managed(log):
        signal.signal(signal.SIGINT, handler)
        with interrupts_held():
            pass
        assert signal.getsignal(signal.SIGINT) is handler
    assert signal.signal(signal.SIGINT, signal.default_int_handler) is handler
    assert log == ["put back"]


def test_a_handler_that_the_user_saved_in_the_block_and_puts_back_after_it():
    with contextlib.ExitStack() as stack:
        stack.enter_context(managed([]))
        saved = signal.signal(signal.SIGINT, lambda *_: pytest.fail("this handler is gone"))
    signal.signal(signal.SIGINT, saved)
    with pytest.raises(KeyboardInterrupt):
        press()
    with interrupts_held():
        pass  # from now on it is the one from before, as the fixture sees


def test_a_handler_that_installs_another_one_for_the_second_time():
    def once(*_: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, once)
    with interrupts_held():
        press()
        let_through()
        press()
        with pytest.raises(KeyboardInterrupt):
            let_through()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0), (1, 0, 2)])
@pytest.mark.parametrize("make", [lambda: managed([]), RecompileWatch], ids=["generator", "watch"])
def test_blocks_that_are_left_in_any_order(order, make):
    blocks = [make() for _ in order]
    for each in blocks:
        each.__enter__()
    for number in order:
        with pytest.raises(KeyboardInterrupt):
            press()
        blocks[number].__exit__(None, None, None)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_requests_that_overlap():
    async def request(seconds: float) -> None:
        with waiting_at_most(1):
            await asyncio.sleep(seconds)

    async def both() -> None:
        first = asyncio.create_task(request(0.02))
        await asyncio.sleep(0.01)
        await asyncio.gather(first, request(0.04))

    asyncio.run(both())
    with pytest.raises(KeyboardInterrupt):
        press()


def test_a_block_that_another_thread_leaves():
    watch = RecompileWatch()
    watch.__enter__()
    thread = threading.Thread(target=watch.__exit__)
    thread.start()
    thread.join()
    assert not watch._watching
    with pytest.raises(KeyboardInterrupt):
        press()
    with interrupts_held():
        pass


def test_a_block_that_is_collected_in_the_midst_of_another():
    class Stream:
        def __init__(self) -> None:
            self.items = self.run()
            next(self.items)

        def run(self):
            with waiting_at_most(5):
                yield self

    stream = Stream()
    assert stream.items.gi_frame is not None
    del stream
    with pytest.raises(KeyboardInterrupt), interrupts_held():  # noqa: PT012
        gc.collect()
        press()
        assert interrupts._hold is not None
    with pytest.raises(KeyboardInterrupt):
        press()


def test_a_watch_that_is_closed_twice_or_was_never_open():
    watch = RecompileWatch()
    watch.__exit__()
    with watch, watch:
        pass
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    watch.__exit__()
    assert signal.signal(signal.SIGINT, signal.default_int_handler) is signal.SIG_IGN


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks as Unix does")
@pytest.mark.parametrize("block", [interrupts_held, RecompileWatch])
def test_a_process_that_another_thread_forks(block):
    codes = []

    def fork() -> None:
        if child := os.fork():
            codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
            return
        code = 1
        try:
            press()
        except KeyboardInterrupt:
            code = 0
        os._exit(code)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12, on forks beside threads
        with block():
            thread = threading.Thread(target=fork)
            thread.start()
            thread.join()
    assert codes == [0]
