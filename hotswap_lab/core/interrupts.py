"""Ctrl-C comes when it does no harm: while a model is written it waits."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """Ctrl-C that is pressed in the block comes at its end. May be nested.

    Only the main thread receives signals. Elsewhere, and under handlers that weren't installed from Python, this does
    nothing.

    Examples
    --------
    >>> with interrupts_held():
    ...     done = True
    >>> done
    True
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    pressed: list[tuple] = []
    try:
        signal.signal(signal.SIGINT, lambda *how: pressed.append(how))
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if pressed:
            before(*pressed[0])
