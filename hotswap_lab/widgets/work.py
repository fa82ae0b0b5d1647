"""Long work: one piece at a time, beside the notebook's own thread, and it can be stopped."""

from __future__ import annotations

import contextvars
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import torch

from ..core.errors import refuse
from ..core.interrupts import interrupts_held

T = TypeVar("T")


class Stopped(Exception):  # noqa: N818 - it is no error: somebody wanted it
    """The work was stopped."""


class Work:
    """Runs one job at a time.

    :meth:`run` does it in the caller's thread, so that Jupyter's interrupt stops it. :meth:`start` does it in a thread
    of its own, so that it never keeps the next cell waiting. A job calls :meth:`check` now and then, which raises
    :class:`Stopped` once somebody has called :meth:`stop`.

    Parameters
    ----------
    on_change:
        Is called when work begins and when it ends, in the thread that does it.

    Examples
    --------
    >>> work = Work()
    >>> work.run(lambda: 1 + 1)
    2
    >>> results = []
    >>> work.start(lambda: results.append(3))
    True
    >>> work.wait(timeout=10), results
    (True, [3])
    """

    def __init__(self, on_change: Callable[[], object] = lambda: None):
        self._on_change = on_change
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        #: whether the job has a thread of its own
        self.beside = False

    @property
    def busy(self) -> bool:
        """Whether a job is running."""
        return self._lock.locked()

    def run(self, job: Callable[[], T]) -> T:
        """Does ``job`` here and now, and returns what it returns."""
        mine = False
        try:
            with interrupts_held():  # Ctrl-C between taking the lock and knowing about it would leave it taken
                mine = self._begin(beside=False)
            if not mine:
                raise refuse(
                    "This widget is busy.",
                    found="a run that has not ended",
                    expected="one run at a time, since each needs the model as it is",
                    next_step="wait with .wait(), or end it with .stop()",
                )
            self._on_change()
            return job()
        finally:
            if mine:
                self._lock.release()
                self._on_change()

    def start(self, job: Callable[[], object]) -> bool:
        """Does ``job`` in a thread of its own, unless one runs already: then it does nothing. Returns whether it did.

        The job shows its own errors; nobody else is there to do it.
        """
        # gradients are switched for each thread, and a compiled model would be compiled again for the other mode
        grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()

        def in_the_same_modes() -> None:
            try:
                with torch.inference_mode(inference), torch.set_grad_enabled(grad):
                    self._on_change()
                    job()
            finally:
                self._lock.release()
                self._on_change()

        context = contextvars.copy_context()
        # a daemon: work that hangs must not keep the kernel from ending
        thread = threading.Thread(target=context.run, args=(in_the_same_modes,), name="hotswap-work", daemon=True)
        with interrupts_held():
            if not self._begin(beside=True):
                return False
            self._thread = thread
            thread.start()
        return True

    def _begin(self, beside: bool) -> bool:
        if not self._lock.acquire(blocking=False):
            return False
        self._stop.clear()
        self.beside = beside
        return True

    def stop(self) -> None:
        """Asks the job to end. It does so at its next :meth:`check`."""
        self._stop.set()

    def check(self) -> None:
        """For the job: ends it if somebody asked for that."""
        if self._stop.is_set():
            raise Stopped

    def wait(self, timeout: float | None = None) -> bool:
        """Waits for the job that :meth:`start` began, at most ``timeout`` seconds. Returns whether it has ended."""
        deadline = None if timeout is None else time.monotonic() + timeout
        # when one job has ended, its `on_change` may have begun another one
        while (thread := self._thread) is not None and thread is not threading.current_thread() and thread.is_alive():
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                break
            thread.join(left)
        return not self.busy
