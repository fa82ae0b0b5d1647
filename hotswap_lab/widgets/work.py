"""Widgets that do long work: one piece at a time, next to the notebook's own thread, and it can be stopped."""

from __future__ import annotations

import contextlib
import contextvars
import math
import threading
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ..core.errors import refuse
from ..core.journal import interrupts_held
from ..threads import ModelInUseError, waiting_at_most
from ..watch import readable
from .clicks import Clicks, keep_apart_from_cells
from .view import View, escape

if TYPE_CHECKING:
    import ipywidgets

#: how long a swap waits at a time before it looks whether it was called off, in seconds
PATIENCE = 0.5
#: how often a reader is shown how far it is, in seconds
SHOW_EVERY = 0.1


class Stopped(BaseException):
    """The work was stopped. Nobody who handles errors on the way takes it for one."""


def message(error: BaseException) -> str:
    """What an error is and says.

    >>> message(ValueError("no"))
    'ValueError: no'
    """
    return f"{type(error).__name__}: {error}"


def error_html(error: BaseException, trace: bool = False) -> str:
    """An error, in full, and under it where it happened. A screen reader reads it out at once.

    >>> "&lt;b&gt;" in error_html(ValueError("no <b>"))
    True
    """
    lines = escape("".join(traceback.format_exception(error)))
    more = f"<details><summary>where it happened</summary><pre>{lines}</pre></details>" if trace else ""
    text = escape(message(error))
    return f'<div class="hotswap-error" role="alert"><strong>Error</strong><pre>{text}</pre>{more}</div>'


class WorkingView(View):
    """The frame of a widget that works: what it does, it does one at a time, and shows what goes wrong.

    :meth:`_run` does a job in the caller's thread, so that Jupyter's interrupt stops it. :meth:`_start` does it in a
    thread of its own, so that it never keeps the next cell waiting. A job calls :meth:`_check` now and then, which
    raises :class:`Stopped` once :meth:`stop` was called. A widget's own job is its ``_work``.

    >>> view = WorkingView()
    >>> view._run(lambda: 1 + 1)
    2
    >>> results = []
    >>> view._start(lambda: results.append(3))
    True
    >>> view.wait(timeout=10), results
    (True, [3])
    """

    #: what went wrong last, None after a success
    error: BaseException | None = None
    #: what is being done, in words
    doing: str = ""
    #: how long the last swap took
    swap_seconds: float | None = None

    def __new__(cls, *args: object, **options: object) -> WorkingView:
        self = super().__new__(cls)
        self._lock = threading.Lock()
        self._stopped = False
        #: of the last job that did not run in the caller's
        self._thread: threading.Thread | None = None
        self._shown = 0.0
        self._clicks = Clicks()
        return self

    def __str__(self) -> str:
        error = [f"error: {message(self.error)}"] if self.error else []
        return "\n".join([super().__str__(), *self._lines(), *error])

    def _lines(self) -> list[str]:
        """What there is to see, as text."""
        return []

    def to_html(self) -> str:
        return super().to_html() + (error_html(self.error) if self.error else "")

    @property
    def busy(self) -> bool:
        """Whether something is running."""
        return self._lock.locked()

    def run(self) -> Any:
        """Does what the widget is there for, and returns what came out; None if it was stopped, by :meth:`stop`.

        Jupyter's interrupt ends it, too.
        """
        return self._run(self._work)

    def start(self) -> None:
        """What a click on the widget's first button does: the same next to the notebook, which can go on."""
        self._start(self._work)

    def _work(self) -> object:
        raise NotImplementedError

    def stop(self) -> None:
        """Ends what is running as soon as it can; the answer so far stays."""
        self._stopped = True

    def wait(self, timeout: float | None = None) -> bool:
        """Waits until nothing runs that a click began, at most ``timeout`` seconds. Returns whether that is so."""
        end = time.monotonic() + (math.inf if timeout is None else timeout)
        # when one job has ended, another one may have been begun
        while self._thread is not None and self._thread.is_alive() and (left := end - time.monotonic()) > 0:
            self._thread.join(min(left, threading.TIMEOUT_MAX))
        return not self.busy

    # ---- jobs

    def _run(self, job: Callable[[], object]) -> object:
        """Does ``job`` here and now, and returns what it returns; None if it was stopped."""
        mine = False
        try:
            with interrupts_held():  # Ctrl-C between taking the lock and knowing about it would leave it taken
                mine = self._begin()
            if not mine:
                raise refuse("widget_busy")
            return self._do(job)
        finally:
            if mine:
                self._lock.release()
                self._ended()

    def _start(self, job: Callable[[], object]) -> bool:
        """Does ``job`` in a thread of its own, unless one runs already. Returns whether it does."""
        # gradients are switched for each thread, and a compiled model would be compiled again for the other mode
        grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()

        def in_the_same_modes() -> None:
            try:
                # what goes wrong is shown, and there is nobody to raise it to
                with torch.inference_mode(inference), torch.set_grad_enabled(grad), contextlib.suppress(Exception):
                    self._do(job)
            finally:
                self._lock.release()
                self._ended()

        context = contextvars.copy_context()
        # a daemon: work that hangs must not keep the kernel from ending
        thread = threading.Thread(target=context.run, args=(in_the_same_modes,), name="hotswap-work", daemon=True)
        with interrupts_held():
            if not self._begin():
                return False
            self._thread = thread
            thread.start()
        return True

    def _begin(self) -> bool:
        if not self._lock.acquire(blocking=False):
            return False
        self._stopped = False
        return True

    def _do(self, job: Callable[[], object]) -> object:
        self._changed()
        try:
            result = job()
        except Stopped:
            return None
        except Exception as error:
            self.error = error
            raise
        self.error = None
        return result

    def _ended(self) -> None:
        """After each job."""
        self._changed()

    # ---- for jobs

    def _check(self) -> None:
        """Ends the job if :meth:`stop` was called."""
        if self._stopped:
            raise Stopped

    def _progressed(self) -> None:
        """Shows the present state, but not more often than a person can read."""
        if time.perf_counter() - self._shown > SHOW_EVERY:
            self._shown = time.perf_counter()
            self._changed()

    def _when_free(self, change: Callable[[], object]) -> float:
        """Makes a change as soon as no other thread computes with the model. Returns how long the change took.

        It waits by itself, and Jupyter's interrupt ends that. For what a click began, there is only :meth:`stop`.
        """
        beside = threading.current_thread() is self._thread
        while True:
            start = time.perf_counter()
            try:
                with waiting_at_most(PATIENCE) if beside else contextlib.nullcontext():
                    change()
                return time.perf_counter() - start
            except ModelInUseError:
                if not beside:
                    raise
            self._check()

    # ---- the live form

    def _button(self, label: str, tooltip: str, act: Callable[[], object], **options: object) -> ipywidgets.Button:
        import ipywidgets

        button = ipywidgets.Button(description=label, tooltip=tooltip, **options)
        button.on_click(lambda _: self._clicked(act))
        return button

    def _clicked(self, act: Callable[[], object]) -> None:
        """Does what a control is there for, which must be quick, unless a later click was faster."""
        if self._clicks.take(act):
            keep_apart_from_cells(self.box)
        else:
            self._changed()  # a slider goes back

    def _with_stop(self, *starters: ipywidgets.Widget) -> list[ipywidgets.Widget]:
        """Controls that begin something, and a button that ends it."""
        self._starters = starters
        self._stop_button = self._button("Stop", "end what runs; the answer so far stays", self.stop)
        return [*starters, self._stop_button]

    def _state(self) -> str:
        """What the status says."""
        state = f"busy: {self.doing}" if self.busy else "ready"
        return state if self.swap_seconds is None else f"{state}; swap: {readable(self.swap_seconds)}"

    def _refresh(self) -> None:
        super()._refresh()
        for control in self._starters:
            control.disabled = self.busy
        self._stop_button.disabled = not self.busy
        self._status.value = escape(self._state()) + (error_html(self.error, trace=True) if self.error else "")
