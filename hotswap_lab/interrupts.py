"""Ctrl-C comes when it does no harm.

Python delivers the signal between any two steps of a program, also where a ``with`` block is just being left: what its
end should have put back stays as it is then, such as torch's modes, for which the error leaves a guard behind that
switches gradients off whenever it happens to be collected. Hence what changes a model, or anything else of the user's,
holds Ctrl-C back, and lets it through at moments of its own choice: between two steps (:func:`let_through`), and
while it calls for what may take long and is not its own (:class:`interruptible`).

Only the main thread receives signals. Elsewhere, and under handlers that weren't installed from Python, all of this
does nothing.
"""

from __future__ import annotations

# what the module `signal` wraps: its conversions to and from enums take longer than the rest of a small swap's Python
import _signal
import _thread
import sys
import threading
from collections.abc import Callable
from types import FrameType

SIGINT = int(_signal.SIGINT)

#: seconds after which Ctrl-C that came while a block was entered comes again, in the block
SOON = 0.001


class _Hold:
    """The outermost block that holds Ctrl-C back."""

    def __init__(self, previous: Callable | int):
        self.previous = previous
        self.received: list[tuple] = []
        #: how many blocks are under way that have to come to their end
        self.firm = 0
        self.over = False

    def note(self, number: int, frame: FrameType | None) -> None:
        """The handler of the signal meanwhile."""
        self.received.append((number, frame))

    def deliver(self) -> None:
        if self.received:
            first = self.received[0]
            self.received.clear()
            if callable(self.previous):
                self.previous(*first)


#: of the main thread
_hold: _Hold | None = None


def _is_main() -> bool:
    return threading.current_thread() is threading.main_thread()


class interrupts_held:  # noqa: N801 - used as a function
    """Holds KeyboardInterrupt back while the block runs, then lets it through. May be nested.

    Parameters
    ----------
    firmly:
        Whether the block has to come to its end: nothing in it lets Ctrl-C through.

    Examples
    --------
    >>> with interrupts_held():
    ...     done = True
    >>> done
    True
    """

    __slots__ = ("_firmly", "_hold", "_is_outermost")

    def __init__(self, firmly: bool = False):
        self._firmly = firmly
        self._hold: _Hold | None = None
        self._is_outermost = False

    def __enter__(self) -> None:
        global _hold
        if not _is_main():
            return
        hold = _hold
        if hold is None:
            previous = _signal.getsignal(SIGINT)
            if not callable(previous):
                return
            hold = _Hold(previous)
            _signal.signal(SIGINT, hold.note)
            _hold = hold
            self._is_outermost = True
        self._hold = hold
        hold.firm += self._firmly

    def __exit__(self, *error: object) -> None:
        global _hold
        hold = self._hold
        if hold is None:
            return
        hold.firm -= self._firmly
        if self._is_outermost:
            hold.over = True
            _hold = None
            _signal.signal(SIGINT, hold.previous)
            hold.deliver()


def let_through() -> None:
    """A moment at which Ctrl-C may end what is being done: raises KeyboardInterrupt if it was pressed by now.

    >>> let_through()
    """
    hold = _hold
    if hold is not None and hold.received and not hold.firm and _is_main():
        hold.deliver()


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
        self._manager = block_of
        self._suspended: _Hold | None = None
        self._handler: Callable | None = None

    def __enter__(self) -> None:
        global _hold
        let_through()
        if _hold is None or _hold.firm or not _is_main():
            return
        self._suspended, _hold = _hold, None
        self._handler = self._suspended.previous if self._manager is None else self._raise_in_block
        _signal.signal(SIGINT, self._handler)

    def __exit__(self, *error: object) -> None:
        global _hold
        if self._suspended is None or self._suspended.over:
            return
        present = _signal.getsignal(SIGINT)
        if present != self._handler and present is not None:
            self._suspended.previous = present  # the user has installed another one meanwhile: it stays
        _signal.signal(SIGINT, self._suspended.note)
        _hold = self._suspended
        self._generator = self._manager = None

    def _raise_in_block(self, number: int, frame: FrameType | None) -> None:
        each = frame
        while each is not None:
            if each is self._generator:
                self._suspended.note(number, frame)
                return
            if each.f_code.co_name in ("__enter__", "__exit__") and self._is_manager(each.f_locals.get("self")):
                if each.f_code.co_name == "__exit__":
                    self._suspended.note(number, frame)
                else:
                    threading.Timer(SOON, _thread.interrupt_main).start()
                return
            each = each.f_back
        self._suspended.previous(number, frame)

    def _is_manager(self, candidate: object) -> bool:
        if self._generator is None:
            return candidate is self._manager
        return getattr(getattr(candidate, "gen", None), "gi_frame", None) is self._generator
