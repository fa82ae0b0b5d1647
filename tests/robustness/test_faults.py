"""A fault at every step of every operation: afterwards all is as before, or as after, never in between.

The steps are found by running (see ``faults.py``), so nothing has to be added here when the code changes. The tests
raise at each line of what writes, and at some lines of what reads and decides, with the kinds of errors in turn; the
short form of them at every tenth of these, of every third operation. ``TIMES=2`` and more: every step of every
operation, and as many times as many real signals, which also come where nothing of Python's is about to run.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import gc
import itertools
import math
import random
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch
from faults import FAULTS, Outcome, list_steps, run_with_ctrl_c, run_with_fault
from lengths import TIMES, long
from operations import OPERATIONS, Case, Shelf, around, held
from oracle import contents, differences, identities

UNITS = ("line", "call", "deep", "signal")
#: the modules whose first line says that what was decided is being written from here on
WRITING = ("core/journal.py", "files/saving.py")
#: in the short form, how many steps of each operation that come before writing
BEFORE_WRITING = {"line": 25, "call": 15, "deep": 15, "signal": 30}
#: and how many after
WHILE_WRITING = {"line": 90, "call": 50, "deep": 20, "signal": 60}


class Hunt:
    """Faults in one operation, one after another."""

    def __init__(self, make: Callable[[], Case], temporary: Path):
        self.make, self.temporary = make, temporary
        self.counts: collections.Counter = collections.Counter()
        self.goals = [self._goal(lambda case: [case.action])]
        stations = len(make().stations)
        self.goals += [self._goal(lambda case, number=number: [case.stations[number]]) for number in range(stations)]
        self._renew()
        if self.case.changes:
            assert self.before not in self.goals, "the operation does nothing, so nothing could be found out"

    def _goal(self, actions: Callable[[Case], Iterable[Callable[[], object]]]) -> tuple:
        case = self.make()
        for action in actions(case):
            action()
        return self._contents(case)

    def _renew(self) -> None:
        self.case = self.make()
        self.before, self.objects = self._contents(self.case), self._objects()

    def _contents(self, case: Case) -> tuple:
        return [contents(model) for model in case.models], case.extra()

    def _objects(self) -> list:
        return [identities(model) for model in self.case.models]

    def places(self, unit: str) -> list[str]:
        return list_steps(self.make().action, unit)

    def run(self, step: int, kind: str, unit: str) -> None:
        """One fault, and a look at what it has left behind."""
        before = around()
        kind = "Ctrl-C" if unit == "signal" else kind
        fault = functools.partial(run_with_fault, self.case.action, step, FAULTS.get(kind), unit)
        self._look(fault, before, kind, f"{kind} at {unit} {step}")

    def interrupt(self, delay: float) -> None:
        """The same with a real Ctrl-C, after so many seconds."""
        before = around()
        self._look(functools.partial(run_with_ctrl_c, self.case.action, delay), before, "Ctrl-C", "Ctrl-C", real=True)

    def duration(self) -> float:
        """How long the operation takes, in seconds."""
        case = self.make()
        start = time.perf_counter()
        case.action()
        return time.perf_counter() - start

    def _look(self, fault: Callable[[], Outcome], surroundings: dict, kind: str, what: str, real: bool = False) -> None:
        outcome = fault()
        if not outcome:
            self.counts["no such step"] += 1
            self._renew()
            return
        what = f"{what}, {outcome.where}"
        now = self._contents(self.case)
        if now == self.before and self._objects() == self.objects:
            assert outcome.error is not None or not self.case.changes, f"{what}: ended well, and did nothing"
            assert around()["randomness"] == surroundings["randomness"], f"{what}: random numbers were drawn"
            ended = "before"
        elif any(self._is_at(goal, now) for goal in self.goals):
            ended = "after"
        else:
            raise AssertionError(f"{what}: in between\n" + "\n".join(self._differences(now))) from outcome.error
        self.counts.update((ended, kind, "all"))
        if real:
            # where it came just when a block was left, the block's end comes when the error is forgotten, if at all
            outcome = dataclasses.replace(outcome, error=None)
            gc.collect()
            torch.set_grad_enabled(surroundings["gradients"])
        assert not (locks := held(self.case.locks)), f"{what}: left locks behind: {locks}"
        assert outcome.handler_kept, f"{what}: Ctrl-C is not handled as before"
        del outcome, now
        if not real:
            self._look_around(surroundings, ended, what)
        if ended == "after":
            self._renew()

    def _look_around(self, before: dict, ended: str, what: str) -> None:
        """At what is no part of the model."""
        now = around()
        if now["files"] != before["files"] or now["threads"] != before["threads"]:
            gc.collect()  # what hangs on the error's traceback
            now = around()
        if ended == "after":
            now["randomness"] = before["randomness"]  # a prepared model's dropouts, and the like, may draw some
        left = collections.Counter(now["files"]) - collections.Counter(before["files"])
        assert not left, f"{what}: left open: {list(left)}"
        assert now["threads"] <= before["threads"], f"{what}: left {threading.enumerate()}"
        for same in ("files", "threads"):
            now[same] = before[same]
        found = "\n".join(differences(before, now))
        assert not found, f"{what}: around the model\n{found}"
        assert not list(self.temporary.iterdir()), f"{what}: left {list(self.temporary.iterdir())}"

    @staticmethod
    def _is_at(goal: tuple, now: tuple) -> bool:
        if now == goal:
            return True
        models, extra = now
        if not isinstance(extra, dict) or "active" not in extra or models != goal[0]:
            return False
        # Right after the copy, the pool has not looked yet at what is in the memory and doesn't vouch for it by a name.
        return extra["active"] is None and {**extra, "active": goal[1]["active"]} == goal[1]

    def _differences(self, now: tuple) -> Iterator[str]:
        yield "from before:"
        yield from differences(self.before, now)
        if self._objects() != self.objects:
            yield "objects:"
            yield from differences(self.objects, self._objects())
        for goal in self.goals:
            yield "from after:"
            yield from differences(goal, now)

    def finish(self) -> None:
        """After all these faults the same operation does what it should."""
        if self._contents(self.case) != self.before:
            self._renew()
        # in another thread: if a fault has left a lock behind, it waits there for ever
        thread = threading.Thread(target=self.case.action, daemon=True)
        thread.start()
        thread.join(120)
        assert not thread.is_alive(), "a lock was left behind"
        assert self._contents(self.case) in self.goals or not self.case.changes
        self.case.check()


@contextlib.contextmanager
def _quiet(folder: Path) -> Iterator[Path]:
    """Temporary files go to an empty folder of their own, and warnings nowhere."""
    temporary, former = folder / "temporary", tempfile.tempdir
    temporary.mkdir()
    tempfile.tempdir = str(temporary)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield temporary
    finally:
        tempfile.tempdir = former


@contextlib.contextmanager
def _hunting(name: str, folder: Path) -> Iterator[Hunt]:
    """A hunt for faults in one operation, which has to do its work once more afterwards."""
    (folder / "shelf").mkdir()
    gc.freeze()  # each fault is followed by a look for garbage, which isn't in what other tests have left
    try:
        with _quiet(folder) as temporary:
            hunt = Hunt(OPERATIONS[name](Shelf(folder / "shelf")), temporary)
            yield hunt
            hunt.finish()
    finally:
        gc.unfreeze()


def chosen(places: list[str], unit: str, share: float = 1) -> list[int]:
    """Steps for the short form: while writing, each place the first and the last time; before, some of them."""
    start = next((number for number, place in enumerate(places) if place.startswith(WRITING)), len(places))
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for number, place in enumerate(places[start:], start):
        first.setdefault(place, number)
        last[place] = number
    deciding = list(dict.fromkeys(places[:start]))
    early = sorted({places.index(place) for place in _some(deciding, math.ceil(BEFORE_WRITING[unit] * share))})
    late = sorted({*first.values(), *last.values()})
    return [number + 1 for number in (*early, *_some(late, math.ceil(WHILE_WRITING[unit] * share)))]


def _some(items: list, count: int) -> list:
    return items[:: -(-len(items) // count)] if items else []


@pytest.mark.usefixtures("python_sigint")
@pytest.mark.parametrize(
    ("name", "share"), [*((name, 0.1) for name in list(OPERATIONS)[::3]), *(long(name, 1) for name in OPERATIONS)]
)
def test_a_fault_at_every_step(name, share, tmp_path):
    with _hunting(name, tmp_path) as hunt:
        kinds = itertools.cycle(FAULTS)
        for unit in UNITS:
            places = hunt.places(unit)
            # a pipeline takes long to make and to look at
            steps = chosen(places, unit, share * (0.3 if "pipeline" in name else 1))
            if TIMES > 1:
                steps = _some(list(range(1, len(places) + 1)), 100 * TIMES if unit == "deep" else len(places))
            for step in steps:
                hunt.run(step, next(kinds), unit)
    assert hunt.counts["all"] >= (3 if name == "waiting_at_most" else 10 * share), hunt.counts


@pytest.mark.usefixtures("python_sigint")
@pytest.mark.parametrize(
    ("name", "count"), [*((name, 3) for name in list(OPERATIONS)[::9]), *(long(name, 15) for name in OPERATIONS)]
)
def test_a_real_ctrl_c(name, count, tmp_path):
    with _hunting(name, tmp_path) as hunt:
        for interrupt in _signals(hunt, 400 * TIMES):
            interrupt()
            if hunt.counts["all"] >= count * TIMES:
                break
    assert hunt.counts["all"], hunt.counts


def _signals(hunt: Hunt, count: int) -> Iterator[Callable[[], None]]:
    duration, moments = sorted(hunt.duration() for _ in range(5))[2], random.Random(0)
    for _ in range(count):
        yield functools.partial(hunt.interrupt, moments.uniform(0, duration))
