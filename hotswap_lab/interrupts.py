"""Ctrl-C waits until a write is complete."""

from __future__ import annotations

# what the module `signal` wraps: its conversions to and from enums take longer than the rest of a small swap's Python
import _signal
import contextlib
import threading
from collections.abc import Iterator

SIGINT = int(_signal.SIGINT)


@contextlib.contextmanager
def interrupts_held() -> Iterator[list]:
    """Holds KeyboardInterrupt back while the block runs (some milliseconds), then lets it through.

    Python delivers the signal between any two steps of a program, so without this it could hit after the last
    write of a swap, when there is nothing left to undo but a failure to report. Only the main thread receives
    the signal; elsewhere, and under handlers that weren't installed from Python, nothing needs to be done. The block
    gets a list of what was held back so far, so that one that waits for something can give up.

    >>> with interrupts_held():
    ...     done = True
    >>> done
    True
    """
    previous = _signal.getsignal(SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(previous):
        yield []
        return
    received: list[tuple] = []
    _signal.signal(SIGINT, lambda number, frame: received.append((number, frame)))
    try:
        yield received
    finally:
        _signal.signal(SIGINT, previous)
        if received:
            previous(*received[0])
