"""SwapRace: the benchmark as bars, run on the reader's machine by a button."""

from __future__ import annotations

import tempfile
import threading
import traceback
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from ..bench.timing import machine
from .view import View, error_html, escape, fitting, speaking
from .work import Stopped, Work

if TYPE_CHECKING:
    import ipywidgets

    from ..bench import Report, Scene, Settings, Way

#: how often the progress bar moves, in seconds; a thread of its own does it, so that no timed call has to
SHOW_EVERY = 0.2


class SwapRace(View):
    """One swap, timed in several ways that take turns: PEFT's, ours, and a plain copy of the same bytes as the limit.

    Parameters
    ----------
    model, rank, n:
        The shape (``"tiny"``, ``"demo"`` or ``"smollm2"``), the adapters' rank, and how often each way is timed.
    **settings:
        Further :class:`hotswap_lab.bench.Settings`: ``threads``, ``device``, ``dtype``, ``layers``, ...

    Examples
    --------
    >>> race = SwapRace(model="tiny", rank=2, n=1)
    >>> print(race)
    SwapRace: not run yet
    >>> report = race.run()
    >>> sorted(race.seconds)[0], race.ok
    ('PEFT hotswap, disk', True)

    How to read it: ``ok`` says that every way of ours gave the outputs of a fresh load; a time means nothing otherwise.
    """

    def __init__(self, model: str = "demo", rank: int = 8, n: int = 25, **settings: object):
        from ..bench import Settings

        self.settings: Settings = Settings(model=model, ranks=(rank,), n=n, **settings)
        self.report: Report | None = None
        self.error: BaseException | None = None
        #: what is being done, and how far it is, from 0 to 1
        self.doing, self.progress = "", 0.0
        self._work = Work(self._changed)

    # ---- what came out

    @property
    def seconds(self) -> dict[str, float]:
        """The median of each way; empty before it was run."""
        rows = self.report.rows if self.report else ()
        return {row.way: row.timing.median for row in rows if row.timing}

    @property
    def ok(self) -> bool:
        """Whether it was run, and all ways but PEFT's gave the outputs of a fresh load."""
        return self.report is not None and self.report.ok

    @property
    def busy(self) -> bool:
        """Whether a race is running."""
        return self._work.busy

    # ---- what can be done

    def run(self) -> Report | None:
        """Runs the race and returns the report; None if it was stopped. Jupyter's interrupt ends it, too."""
        return self._work.run(self._race)

    def start(self) -> None:
        """What a click on the button does: runs the race beside the notebook."""

        def quietly() -> None:
            try:
                self._race()
            except Exception:  # shown by now
                return

        self._work.start(quietly)  # or not: it runs already

    def stop(self) -> None:
        """Ends the race before its next call."""
        self._work.stop()

    def wait(self, timeout: float | None = None) -> bool:
        """Waits until the race is over, at most ``timeout`` seconds. Returns whether it is."""
        return self._work.wait(timeout)

    def _race(self) -> Report | None:
        self.error, self.progress = None, 0.0
        threads = torch.get_num_threads()
        torch.set_num_threads(self.settings.threads)
        over = threading.Event()
        threading.Thread(target=self._show_progress, args=(over,), daemon=True).start()
        try:
            with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
                warnings.simplefilter("ignore")  # PEFT's, on random adapters
                self.report = self._measure(folder)
            self.doing = "done"
            return self.report
        except Stopped:
            self.doing = "stopped"
            return None
        except BaseException as error:
            self.doing = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            self.error = None if isinstance(error, KeyboardInterrupt) else error
            raise
        finally:
            over.set()
            torch.set_num_threads(threads)

    def _measure(self, folder: str) -> Report:
        from .. import bench

        settings, rank = self.settings, self.settings.ranks[0]
        self.doing = "making a model and two adapters"
        scene = bench.Scene(bench.make_base(settings), settings, rank, folder)
        ways = self._ways(scene)
        checks = {}
        for way in ways:
            self._step(f"checking: {way.name}", 0.3 / len(ways))
            checks[way.name] = way.check()
        self.doing = "timing"
        runs = {
            # each timed call has an uncounted one before it
            way.name: self._counted(way.alternating(settings.device), 0.5 / (len(ways) * settings.n * 2))
            for way in ways
            if checks[way.name][0] != "refused"
        }
        timings = bench.in_rounds(runs, settings.n)
        theirs, floor = timings.get(bench.PEFT_STATE_DICT), timings.get(bench.MEMCPY)
        rows = []
        for name, (state, note) in checks.items():
            timing = timings.get(name)
            as_fast = theirs.median / timing.median if timing and theirs else None
            times_memcpy = timing.median / floor.median if timing and floor else None
            rows.append(bench.Row(rank, name, state, timing, as_fast, times_memcpy, note))
        return bench.Report(machine(), bench.versions(), settings, (scene.size,), tuple(rows))

    def _ways(self, scene: Scene) -> list[Way]:
        from .. import bench

        makers = (
            bench.peft_load_way,
            bench.peft_hotswap_way,
            bench.peft_state_dict_way,
            lambda scene: bench.disk_way(scene, "hotswap_lab, disk, prepared", scene.load_prepared()),
            bench.pool_way,
            bench.memcpy_way,
        )
        ways = []
        for number, make in enumerate(makers, start=1):
            self._step(f"preparing way {number} of {len(makers)}", 0.2 / len(makers))
            ways.append(make(scene))
        return ways

    def _step(self, doing: str, share: float) -> None:
        self._work.check()
        self.doing = doing
        self.progress = min(1.0, self.progress + share)

    def _counted(self, run: Callable[[], object], share: float) -> Callable[[], None]:
        def counted() -> None:
            self._work.check()
            self.progress = min(1.0, self.progress + share)
            run()

        return counted

    def _show_progress(self, over: threading.Event) -> None:
        while not over.wait(SHOW_EVERY):
            self._changed()

    # ---- how it looks

    def __str__(self) -> str:
        return "SwapRace: not run yet" if self.report is None else f"SwapRace\n{self.report}"

    def to_html(self) -> str:
        """The static form: the bars, and the table as text."""
        if self.report is None:
            return f"<div><strong>SwapRace</strong>: {escape(self._plan())}. Not run yet.</div>"
        return (
            f"<div><strong>SwapRace</strong>{fitting(self.report.figure().svg)}<pre>{escape(self.report)}</pre></div>"
        )

    def _static(self) -> dict[str, str]:
        if self.report is None:
            return super()._static()
        # GitHub shows a picture that stands alone, and takes one in HTML out
        return {"image/svg+xml": self.report.figure().svg, "text/plain": str(self)}

    def _plan(self) -> str:
        settings = self.settings
        return f"the {settings.model} shape, rank {settings.ranks[0]}, each way {settings.n} times"

    def _build(self) -> list[ipywidgets.Widget]:
        import ipywidgets as w

        self._start_button = w.Button(description="Run the race", button_style="primary", tooltip="time all ways here")
        self._start_button.on_click(lambda _: self.start())
        self._stop_button = w.Button(description="Stop", tooltip="end the race before its next call")
        self._stop_button.on_click(lambda _: self.stop())
        self._bar = w.FloatProgress(min=0.0, max=1.0, description="progress", layout=w.Layout(max_width="100%"))
        self._status, self._picture, self._error = speaking(), w.HTML(), w.HTML()
        buttons = w.HBox([self._start_button, self._stop_button])
        title = w.HTML(f"<strong>SwapRace</strong>: {escape(self._plan())}")
        return [title, buttons, self._bar, self._status, self._picture, self._error]

    def _refresh(self) -> None:
        self._start_button.disabled, self._stop_button.disabled = self.busy, not self.busy
        self._bar.value = self.progress
        state = f"busy: {self.doing}" if self.busy else self.doing or "ready"
        self._status.value = f"{escape(state)}, {self.progress:.0%}"
        if self.report is not None:
            self._picture.value = fitting(self.report.figure().svg) + (
                f"<details><summary>the table</summary><pre>{escape(self.report)}</pre></details>"
            )
        trace = "" if self.error is None else "".join(traceback.format_exception(self.error))
        self._error.value = "" if self.error is None else error_html(str(self.error), trace)
