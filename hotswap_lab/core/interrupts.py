"""Ctrl-C comes when it does no harm.

Python delivers the signal between any two steps of a program, also where a ``with`` block is just being left: what its
end should have put back stays as it is then, such as torch's modes, for which the error leaves a guard behind that
switches gradients off whenever it happens to be collected. Hence what changes a model, or anything else of the user's,
holds Ctrl-C back (:class:`interrupts_held`), and lets it through at moments of its own choice: between two steps
(:func:`let_through`), and while it calls for what may take long and is not its own (:class:`interruptible`).

For all of that there is one handler, installed as long as something holds Ctrl-C back or a block of the user's is open,
in whatever order these end. It passes the signal on to the handler that was there before. (``asyncio.run`` inside such
a block doesn't install its own then: Ctrl-C is raised where it comes, as in Python 3.10.)

Only the main thread receives signals. Elsewhere, and under handlers that weren't installed from Python, all of this
does nothing.
"""

from __future__ import annotations

# what the module `signal` wraps: its conversions to and from enums take longer than the rest of a small swap's Python
import _signal
import _thread
import contextlib
import os
import sys
import threading
from types import CodeType, FrameType

SIGINT = int(_signal.SIGINT)

#: seconds after which Ctrl-C that came while a block was entered comes again, in the block
SOON = 0.001


class _Hold:
    """From where Ctrl-C is first held back to the end of that block."""

    def __init__(self) -> None:
        self.received: list[tuple[int, FrameType | None]] = []
        #: the thread; a process that another one forks has only that other one
        self.thread = threading.get_ident()
        #: the handler that ours was installed over; None if ours was there already
        self.found: object = None
        self.original_before: object = None
        #: whether blocks of the user's were open when it was installed
        self.in_blocks = False

    def install(self, present: object) -> None:
        """Puts our handler in place of ``present``."""
        global _original
        self.found, self.original_before, self.in_blocks = present, _original, bool(_blocks)
        _original = present
        _signal.signal(SIGINT, _dispatch)


#: of the main thread; None as well while it is suspended
_hold: _Hold | None = None
#: those of the user's blocks that are open, of the main thread
_blocks: list[interruptible] = []
#: whom our handler passes the signal on to
_original: object = _signal.default_int_handler


def _dispatch(number: int, frame: FrameType | None) -> None:
    """The handler."""
    if _hold is not None:
        _hold.received.append((number, frame))
        return
    for block in reversed(_blocks):
        if block._puts_off(number, frame):
            return
    if callable(_original):
        _original(number, frame)


def _is_main() -> bool:
    return threading.current_thread() is threading.main_thread()


class interrupts_held:  # noqa: N801 - used as a function
    """Holds KeyboardInterrupt back while the block runs, then lets it through. May be nested.

    Examples
    --------
    >>> with interrupts_held():
    ...     done = True
    >>> done
    True
    """

    __slots__ = ("_hold",)

    def __init__(self) -> None:
        #: if this is the outermost block
        self._hold: _Hold | None = None

    def __enter__(self) -> None:
        global _hold
        if _hold is not None or not _is_main():
            return
        present = _signal.getsignal(SIGINT)
        if not callable(present):
            return
        hold = _hold = _Hold()
        if present is not _dispatch:
            try:
                hold.install(present)
            except BaseException:  # Ctrl-C came before
                _hold = None
                raise
        self._hold = hold

    def __exit__(self, *error: object) -> None:
        global _hold
        hold, self._hold = self._hold, None
        if hold is None:
            return
        if _hold is not hold and (_hold is not None or not _is_main()):
            _leave_to(_hold, hold)
            return
        handler: object = _dispatch
        try:
            handler = _give_back(hold)
        finally:
            _hold = None
        if hold.received and callable(handler):
            handler(SIGINT, sys._getframe())


def _give_back(hold: _Hold) -> object:
    """Gives the handler back that ours stands in place of, unless it is still wanted. Returns the one in force now."""
    global _original
    if _signal.getsignal(SIGINT) is not _dispatch:
        return _signal.getsignal(SIGINT)
    if hold.found is not None and (hold.in_blocks or not _blocks):
        handler, before = hold.found, hold.original_before
    elif hold.found is None and not _blocks:
        handler, before = _original, _original
    else:
        return _dispatch
    _signal.signal(SIGINT, handler)
    _original = before if callable(before) else _original
    return handler


def _leave_to(other: _Hold | None, hold: _Hold) -> None:
    """A block ends in another thread, or, collected as garbage, in the midst of another block: that one tidies up."""
    if other is not None and _is_main():
        other.received += hold.received
        if other.found is None:
            other.found, other.original_before, other.in_blocks = hold.found, hold.original_before, hold.in_blocks


def let_through() -> None:
    """A moment at which Ctrl-C may end what is being done: raises KeyboardInterrupt if it was pressed by now.

    >>> let_through()
    """
    hold = _hold
    if hold is None or not hold.received or not _is_main():
        return
    first = hold.received[0]
    hold.received.clear()
    try:
        if callable(_original):
            _original(*first)
    finally:
        present = _signal.getsignal(SIGINT)
        if present is not _dispatch and callable(present):
            hold.install(present)  # the user's handler has installed another one, for the next time


class interruptible:  # noqa: N801 - used as a function
    """A block in a block that holds Ctrl-C back, in which it comes at any time: for reading files, and for waiting.

    Parameters
    ----------
    block_of:
        Where the block is the user's, the context manager that it belongs to; ``"generator"`` around the ``yield`` of a
        function that ``contextlib.contextmanager`` made into one. Ctrl-C that comes while the block is just being
        entered comes a moment later then, and while it is being left, when all is put back: else Python would leave
        the block and never call the context manager's end.

    Examples
    --------
    >>> with interrupts_held():
    ...     with interruptible():
    ...         content = "is read"
    """

    def __init__(self, block_of: object = None):
        self._generator = sys._getframe(1) if block_of == "generator" else None
        self._manager = block_of if self._generator is None else contextlib._GeneratorContextManager
        self._suspended: _Hold | None = None

    def __enter__(self) -> None:
        global _hold
        if _hold is None or not _is_main():
            return
        let_through()
        if self._manager is not None:
            _blocks.append(self)
        self._suspended, _hold = _hold, None
        if self._suspended.received:  # in the last moment
            self._suspended.received.clear()
            if self._manager is not None:
                _press_soon()
            else:
                self.__exit__()
                _original(SIGINT, sys._getframe())

    def __exit__(self, *error: object) -> None:
        global _hold
        if self._suspended is not None and _hold is None and _is_main():
            _hold = self._suspended
        if self in _blocks:
            _blocks.remove(self)
        self._suspended = self._generator = self._manager = None

    def _puts_off(self, number: int, frame: FrameType | None) -> bool:
        """Whether the block is just being entered or left. It has Ctrl-C come later then."""
        entering, leaving = self._codes()
        in_generator = False
        while frame is not None:
            in_generator = in_generator or frame is self._generator
            if frame.f_code in (entering, leaving) and (in_generator or self._is_mine(frame)):
                if frame.f_code is entering:
                    _press_soon()
                else:
                    self._suspended.received.append((number, frame))
                return True
            frame = frame.f_back
        return False

    def _codes(self) -> tuple[CodeType, CodeType]:
        manager = self._manager if self._generator is not None else type(self._manager)
        return manager.__enter__.__code__, manager.__exit__.__code__

    def _is_mine(self, frame: FrameType) -> bool:
        manager = frame.f_locals["self"]
        return manager is self._manager if self._generator is None else manager.gen.gi_frame is self._generator


def _press_soon() -> None:
    threading.Timer(SOON, _press).start()


def _press() -> None:
    if hasattr(_signal, "pthread_kill"):
        _signal.pthread_kill(threading.main_thread().ident, SIGINT)  # wakes the thread where it waits
    else:
        _thread.interrupt_main()


def _forget_the_parent() -> None:
    """In a process that another thread has forked, nobody is in the main thread's blocks."""
    global _hold
    hold = _hold or next((block._suspended for block in _blocks), None)
    if hold is None or hold.thread == threading.get_ident():
        return
    _hold = None
    _blocks.clear()
    if _signal.getsignal(SIGINT) is _dispatch and callable(_original):
        _signal.signal(SIGINT, _original)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_the_parent)
