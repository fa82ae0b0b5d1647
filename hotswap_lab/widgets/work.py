"""The base class of widgets with long jobs, which run one at a time, in their own threads, and can be stopped.

Tests: ``tests/widgets/test_view.py`` and ``tests/widgets/test_two_at_once.py``.
"""

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
#: seconds between updates of the live view while a job runs
SHOW_EVERY = 0.1
#: the number of swaps whose times are shown
SWAPS = 20


class Stopped(BaseException):
    """Raised in a job that was stopped. It isn't an ``Exception``, so code that handles errors doesn't catch it."""


def message(error: BaseException) -> str:
    """Return the type and the message of an error.

    >>> message(ValueError("no"))
    'ValueError: no'
    """
    return f"{type(error).__name__}: {error}"


def error_html(error: BaseException, trace: bool = False) -> str:
    """Return an error as HTML, with its traceback if ``trace``. A screen reader reads it out at once.

    >>> "&lt;b&gt;" in error_html(ValueError("no <b>"))
    True
    """
    lines = escape("".join(traceback.format_exception(error)))
    more = f"<details><summary>where it happened</summary><pre>{lines}</pre></details>" if trace else ""
    text = escape(message(error))
    return f'<div class="hotswap-error" role="alert"><strong>Error</strong><pre>{text}</pre>{more}</div>'


class WorkingView(View):
    """The base class of widgets with jobs. It runs one job at a time, and shows errors.

    :meth:`_run` runs a job in the caller's thread, so that Jupyter's interrupt stops it. :meth:`_enqueue`, which clicks
    call, runs it in a new thread, so that the next cell doesn't wait for it. That thread has the modes (gradients,
    inference) of the cell that made the widget. A job often calls :meth:`_check`, which raises :class:`Stopped` if
    :meth:`stop` was called. A widget's main job is its ``_work``.

    >>> view = WorkingView()
    >>> view._run(lambda: 1 + 1)
    2
    >>> results = []
    >>> view._enqueue("three", lambda: results.append(3))
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
        # A compiled model recompiles if the modes change. Each thread has its own, and any thread may get a click.
        self._modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        self._stopped, self._shown = False, 0.0
        #: the times of the last swaps, in seconds
        self.swaps: deque[float] = deque(maxlen=SWAPS)
        #: the label and the job of the waiting click
        self._next: tuple[str, Callable[[], object]] | None = None
        #: the thread of the job that was started last
        self._thread: threading.Thread | None = None
        self._clicks = Clicks()
        return self

    def __str__(self) -> str:
        error = [f"error: {message(self.error)}"] if self.error else []
        return "\n".join([super().__str__(), *self._lines(), *filter(None, [self._note]), *error])

    def _lines(self) -> list[str]:
        """The lines of the text after the first."""
        return []

    def to_html(self) -> str:
        return super().to_html() + (error_html(self.error) if self.error else "")

    @property
    def busy(self) -> bool:
        """Whether a job is running."""
        return self._lock.locked()

    def run(self) -> Any:
        """Run the widget's main job and return its result, or None if :meth:`stop` ended it.

        Jupyter's interrupt ends it, too.
        """
        return self._run(self._work)

    def start(self) -> None:
        """Start the widget's main job in a new thread, as its button does. It waits for a running job to end."""
        self._enqueue("run", self._work)

    def stop(self) -> None:
        """End the running job as soon as possible, and cancel a waiting click. The answer so far is kept."""
        self._next, self._stopped = None, True

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for started jobs to end, at most ``timeout`` seconds. Return whether no job is running."""
        end = time.monotonic() + (math.inf if timeout is None else timeout)
        # the end of one job may have started another
        while self._thread is not None and self._thread.is_alive() and (left := end - time.monotonic()) > 0:
            self._thread.join(min(left, threading.TIMEOUT_MAX))
        return not self.busy

    # ---- jobs

    def _run(self, job: Callable[[], object]) -> object:
        """Run a job in this thread and return its result, or None if it was stopped."""
        has_begun = False
        try:
            with interrupts_held():  # Ctrl-C between acquiring the lock and recording that would leave it locked
                has_begun = self._begin()
            if not has_begun:
                raise refused("widget_busy")
            return self._run_job(job)
        finally:
            if has_begun:
                self._end()

    def _enqueue(self, label: str, job: Callable[[], object]) -> None:
        """Run a click's job, now or when the running job has ended. ``label`` describes it in the status line.

        If several clicks wait, the last one counts. Controls that call this stay enabled and in place during a job. If
        they changed between pressing and releasing the mouse, the click and the keyboard's focus would be lost.
        """
        self._next = label, job
        self._start_next()

    def _start_next(self) -> None:
        """Start the waiting click's job in a new thread. If a job is running, its end calls this again."""
        context = contextvars.copy_context()
        context.run(AROUND.set, ())  # a block around this code doesn't wait for the job
        # a daemon thread, so that a job that hangs doesn't keep the kernel alive
        thread = threading.Thread(target=context.run, args=(self._run_next,), name="hotswap-work", daemon=True)
        with interrupts_held():
            if self._next is not None and self._begin():
                self._thread = thread
                return thread.start()
        self._changed()

    def _run_next(self) -> None:
        (grad, inference), click, self._next = self._modes, self._next, None
        try:
            # the widget shows the error, because this thread has no caller to raise it to
            with torch.inference_mode(inference), torch.set_grad_enabled(grad), contextlib.suppress(Exception):
                self._run_job(click[1] if click else lambda: None)
        finally:
            self._end()

    def _begin(self) -> bool:
        begun = self._lock.acquire(blocking=False)
        self._stopped = self._stopped and not begun
        return begun

    def _run_job(self, job: Callable[[], object]) -> object:
        """Run a job; return None if it was stopped. Keep an error in ``error``, and raise it."""
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

    def _end(self) -> None:
        self._lock.release()
        self._start_next()

    # ---- for jobs

    def _check(self) -> None:
        """Raise :class:`Stopped` if :meth:`stop` was called."""
        if self._stopped:
            raise Stopped

    def _progressed(self) -> None:
        """Update the live view, unless it was updated a moment ago."""
        if time.perf_counter() - self._shown > SHOW_EVERY:
            self._shown = time.perf_counter()
            self._changed()

    def _when_free(self, change: Callable[[], object]) -> float:
        """Make a change when no other thread computes with the model. Return the seconds that the change took.

        The change itself waits. Jupyter's interrupt can end the wait, but in a started job only :meth:`stop` can.
        """
        is_started_job = threading.current_thread() is self._thread
        while True:
            start = time.perf_counter()
            try:
                with waiting_at_most(PATIENCE) if is_started_job else contextlib.nullcontext():
                    change()
                return time.perf_counter() - start
            except ModelInUseError:
                if not is_started_job:
                    raise
            self._check()

    # ---- the live view

    def _build(self) -> list[w.Widget]:
        self._problem = w.HTML()  # comes last, because its height changes
        return [*super()._build(), self._problem]

    def _button(self, label: str, tooltip: str, act: Callable[[], object], **options: object) -> w.Button:
        button = w.Button(description=label, tooltip=tooltip, **options)
        button.on_click(lambda _: self._clicked(act))
        return button

    def _clicked(self, act: Callable[[], object]) -> None:
        """Handle a click by calling ``act``, which must be quick, unless a later click was already handled."""
        if self._clicks.accept(act):
            keep_apart_from_cells(self.box)
        else:
            self._changed()  # moves a slider back

    def _with_stop(self, *starters: w.Widget) -> list[w.Widget]:
        """Add a stop button to controls that start jobs."""
        self._starters = starters
        self._stop_button = self._button("Stop", "end what runs; the answer so far stays", self.stop)
        return [*starters, self._stop_button]

    def _state(self) -> str:
        """The text of the status line: the running job and the waiting click, or the view's note."""
        if not self.busy:
            return self._note
        return f"busy: {self.doing}" + (f"; then {self._next[0]}" if self._next else "")

    def _refresh(self) -> None:
        super()._refresh()
        for control in self._starters:
            control.disabled = self.busy
        self._stop_button.disabled = not self.busy
        times = strip("swap", [*self.swaps]) if self.swaps else ""
        self._status.value = f'<div class="hotswap-status">{times}<span>{escape(self._state())}</span></div>'
        self._problem.value = error_html(self.error, trace=True) if self.error else ""
