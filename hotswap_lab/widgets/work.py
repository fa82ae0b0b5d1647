"""The base class of widgets with long jobs: one at a time, in a thread of its own, which can be stopped."""

import contextlib
import contextvars
import math
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from ..core.errors import refused
from ..core.journal import interrupts_held
from ..figures.latency import strip
from ..threads import ModelInUseError, waiting_at_most
from ..threads.turns import AROUND
from .clicks import Clicks, keep_apart_from_cells
from .view import View, escape, w

#: seconds that a swap waits before it checks whether it was stopped
PATIENCE = 0.5
#: seconds between updates of the live form while a job runs
SHOW_EVERY = 0.1
#: the swaps whose times are shown
SWAPS = 20


class Stopped(BaseException):
    """Raised in a job that was stopped. It is no ``Exception``, so code that handles errors doesn't catch it."""


def message(error: BaseException) -> str:
    """The type and the message of an error.

    >>> message(ValueError("no"))
    'ValueError: no'
    """
    return f"{type(error).__name__}: {error}"


def error_html(error: BaseException, trace: bool = False) -> str:
    """An error as HTML, with its traceback if ``trace``. A screen reader reads it out at once.

    >>> "&lt;b&gt;" in error_html(ValueError("no <b>"))
    True
    """
    lines = escape("".join(traceback.format_exception(error)))
    more = f"<details><summary>where it happened</summary><pre>{lines}</pre></details>" if trace else ""
    text = escape(message(error))
    return f'<div class="hotswap-error" role="alert"><strong>Error</strong><pre>{text}</pre>{more}</div>'


class WorkingView(View):
    """The base class of widgets with jobs: it runs one at a time, and shows errors.

    :meth:`_run` runs a job in the caller's thread, so that Jupyter's interrupt stops it. :meth:`_come` runs it in a
    thread of its own, as clicks do, so that the next cell doesn't wait for it; it computes in the modes (gradients,
    inference) of the cell that made the widget. A job calls :meth:`_check` now and then, which raises :class:`Stopped`
    if :meth:`stop` was called. A widget's main job is its ``_work``.

    >>> view = WorkingView()
    >>> view._run(lambda: 1 + 1)
    2
    >>> results = []
    >>> view._come("three", lambda: results.append(3))
    >>> view.wait(timeout=10), results
    (True, [3])
    """

    #: the error of the last job, None after a success
    error: BaseException | None = None
    #: a widget's main job
    _work: Callable[[], object]
    #: a description of the running job
    doing: str = ""

    def __new__(cls, *args: object, **options: object) -> "WorkingView":
        self = super().__new__(cls)
        self._lock = threading.Lock()
        # A compiled model recompiles for other modes. Each thread has its own, and a click may come in any thread.
        self._modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        self._stopped, self._shown = False, 0.0
        #: the times of the last swaps, in seconds
        self.swaps: deque[float] = deque(maxlen=SWAPS)
        #: the click that waits, with its job
        self._next: tuple[str, Callable[[], object]] | None = None
        #: the thread of the last job that was started
        self._thread: threading.Thread | None = None
        self._clicks = Clicks()
        return self

    def __str__(self) -> str:
        error = [f"error: {message(self.error)}"] if self.error else []
        return "\n".join([super().__str__(), *self._lines(), *filter(None, [self._note]), *error])

    def _lines(self) -> list[str]:
        """The lines of the text form after the first."""
        return []

    def to_html(self) -> str:
        return super().to_html() + (error_html(self.error) if self.error else "")

    @property
    def busy(self) -> bool:
        """Whether a job is running."""
        return self._lock.locked()

    def run(self) -> Any:
        """Run the widget's main job and return its result; None if :meth:`stop` ended it.

        Jupyter's interrupt ends it, too.
        """
        return self._run(self._work)

    def start(self) -> None:
        """Start the widget's main job in a thread of its own, as its button does. It waits for a running one to end."""
        self._come("run", self._work)

    def stop(self) -> None:
        """End the running job as soon as possible, and cancel a click that waits. The answer so far is kept."""
        self._next, self._stopped = None, True

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for started jobs to end, at most ``timeout`` seconds. Returns whether no job is running."""
        end = time.monotonic() + (math.inf if timeout is None else timeout)
        # the end of one job may have started another
        while self._thread is not None and self._thread.is_alive() and (left := end - time.monotonic()) > 0:
            self._thread.join(min(left, threading.TIMEOUT_MAX))
        return not self.busy

    # ---- jobs

    def _run(self, job: Callable[[], object]) -> object:
        """Run a job in this thread and return its result; None if it was stopped."""
        mine = False
        try:
            with interrupts_held():  # Ctrl-C between taking the lock and knowing about it would leave it taken
                mine = self._begin()
            if not mine:
                raise refused("widget_busy")
            return self._do(job)
        finally:
            if mine:
                self._free()

    def _come(self, what: str, job: Callable[[], object]) -> None:
        """Carry out a click, now or when the running job has ended. ``what`` describes it in the status line.

        If several wait, the last one counts. Controls that call this stay enabled and in place meanwhile. Otherwise a
        click would be lost if they changed between pressing and releasing the mouse, and so would the keyboard's focus.
        """
        self._next = what, job
        self._carry_on()

    def _carry_on(self) -> None:
        """Start the job of the click that waits, in a thread of its own. If another one runs, that one does it."""
        context = contextvars.copy_context()
        context.run(AROUND.set, ())  # a block that this code is in doesn't wait for the job
        # a daemon thread, so that a job that hangs doesn't keep the kernel alive
        thread = threading.Thread(target=context.run, args=(self._job,), name="hotswap-work", daemon=True)
        with interrupts_held():
            if self._next is not None and self._begin():
                self._thread = thread
                return thread.start()
        self._changed()

    def _job(self) -> None:
        (grad, inference), waiting, self._next = self._modes, self._next, None
        try:
            # the widget shows the error, because this thread has no caller to raise it to
            with torch.inference_mode(inference), torch.set_grad_enabled(grad), contextlib.suppress(Exception):
                self._do(waiting[1] if waiting else lambda: None)
        finally:
            self._free()

    def _begin(self) -> bool:
        begun = self._lock.acquire(blocking=False)
        self._stopped = self._stopped and not begun
        return begun

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

    def _free(self) -> None:
        self._lock.release()
        self._carry_on()

    # ---- for jobs

    def _check(self) -> None:
        """Raise :class:`Stopped` if :meth:`stop` was called."""
        if self._stopped:
            raise Stopped

    def _progressed(self) -> None:
        """Update the live form, unless that was done a moment ago."""
        if time.perf_counter() - self._shown > SHOW_EVERY:
            self._shown = time.perf_counter()
            self._changed()

    def _when_free(self, change: Callable[[], object]) -> float:
        """Make a change when no other thread computes with the model. Returns the seconds that the change took.

        The change waits by itself, and Jupyter's interrupt can end that. In a started job, only :meth:`stop` can.
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

    def _build(self) -> list[w.Widget]:
        self._problem = w.HTML()  # comes last, since its height changes
        return [*super()._build(), self._problem]

    def _button(self, label: str, tooltip: str, act: Callable[[], object], **options: object) -> w.Button:
        button = w.Button(description=label, tooltip=tooltip, **options)
        button.on_click(lambda _: self._clicked(act))
        return button

    def _clicked(self, act: Callable[[], object]) -> None:
        """Handle a click by calling ``act``, which must be quick, unless a later click was handled before."""
        if self._clicks.take(act):
            keep_apart_from_cells(self.box)
        else:
            self._changed()  # moves a slider back

    def _with_stop(self, *starters: w.Widget) -> list[w.Widget]:
        """Add a stop button to controls that start jobs."""
        self._starters = starters
        self._stop_button = self._button("Stop", "end what runs; the answer so far stays", self.stop)
        return [*starters, self._stop_button]

    def _state(self) -> str:
        """The text of the status line: why the widget is busy, or that the model has changed, or nothing."""
        return f"busy: {self.doing}" + (f"; then {self._next[0]}" if self._next else "") if self.busy else self._note

    def _refresh(self) -> None:
        super()._refresh()
        for control in self._starters:
            control.disabled = self.busy
        self._stop_button.disabled = not self.busy
        times = strip("swap", [*self.swaps]) if self.swaps else ""
        self._status.value = f'<div class="hotswap-status">{times}<span>{escape(self._state())}</span></div>'
        self._problem.value = error_html(self.error, trace=True) if self.error else ""
