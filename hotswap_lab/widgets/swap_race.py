"""SwapRace: the benchmark of swaps as a bar chart, run by a button."""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING

from .view import escape, wrapping_row
from .work import WorkingView

if TYPE_CHECKING:
    import ipywidgets

    from ..bench import Report, Scene, Settings, Way
    from ..figures import Figure


class SwapRace(WorkingView):
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
    SwapRace: the tiny shape, rank 2, each way 1 times. Not run yet.
    >>> report = race.run()
    >>> sorted(race.seconds)[0], race.ok
    ('PEFT hotswap, disk', True)

    How to read it: ``ok`` is true if all ways except PEFT's gave the outputs of a fresh load. If not, ignore the times.
    """

    def __init__(self, model: str = "demo", rank: int = 8, n: int = 25, **settings: object):
        from ..bench import Settings

        self.settings: Settings = Settings(model=model, ranks=(rank,), n=n, **settings)
        self.report: Report | None = None
        #: the share of the race that is done, from 0 to 1
        self.progress: float = 0.0

    # ---- results

    @property
    def seconds(self) -> dict[str, float]:
        """The median seconds of each way; empty before the race."""
        rows = self.report.rows if self.report else ()
        return {row.way: row.timing.median for row in rows if row.timing}

    @property
    def ok(self) -> bool:
        """Whether the race was run, and all ways except PEFT's gave the outputs of a fresh load."""
        return self.report is not None and self.report.ok

    # ---- actions

    def _work(self) -> Report:
        from .. import bench

        self.progress = 0.0
        try:
            self.report = bench.run(self.settings, self._say, self._ways)
            self.doing, self.progress = "done", 1.0
        except BaseException as why:
            self.doing = "failed" if isinstance(why, Exception) else "stopped"
            raise
        return self.report

    def _say(self, doing: str) -> None:
        self._check()
        self.doing: str = doing

    def _ways(self, scene: Scene) -> list[Way]:
        from ..bench import ways

        chosen = [
            ways.peft_load_way(scene),
            ways.peft_hotswap_way(scene),
            ways.peft_state_dict_way(scene),
            ways.disk_way(scene, "hotswap_lab, disk, prepared", scene.load_prepared()),
            ways.pool_way(scene),
            ways.memcpy_way(scene),
        ]
        # the check swaps twice, and an untimed call precedes each timed one
        return [self._counted(way, 1 / (len(chosen) * 2 * (1 + self.settings.n))) for way in chosen]

    def _counted(self, way: Way, share: float) -> Way:
        """The same way, with a swap that stops if asked to, and updates the progress."""
        numbers = itertools.count()

        def swap(number: int) -> None:
            self._check()
            vars(self)["progress"] += share
            if next(numbers) % 2 == 0:
                self._progressed()  # only in untimed calls
            way.swap(number)

        return dataclasses.replace(way, swap=swap)

    # ---- text, picture and controls

    @property
    def summary(self) -> str:
        """One line: the shape, the rank, and the number of timed calls."""
        settings = self.settings
        plan = f"the {settings.model} shape, rank {settings.ranks[0]}, each way {settings.n} times"
        return plan if self.report else f"{plan}. Not run yet."

    def __str__(self) -> str:
        return super().__str__() if self.report is None else f"SwapRace\n{self.report}"

    def figure(self) -> Figure | None:
        """The bar chart; None before the race."""
        return self.report.figure() if self.report else None

    def _inside(self) -> str:
        return super()._inside() + (f"<pre>{escape(self.report)}</pre>" if self.report else "")

    def _controls(self) -> list[ipywidgets.Widget]:
        start = self._button("Run the race", "time all ways here", self.start, button_style="primary")
        return [wrapping_row(*self._with_stop(start))]

    def _state(self) -> str:
        return f"{'busy: ' if self.busy else ''}{self.doing or 'ready'}, {self.progress:.0%}"
