"""A fault at every step of every operation: afterwards all is as before, or as after, never in between.

The steps are found by running (see ``faults.py``), so nothing has to be added here when the code changes. The tests
raise at each line of what writes, and at some lines of what reads and decides, with the kinds of errors in turn; the
short form of them at every tenth of these, of every fifth operation. ``TIMES=2`` and more: every step of every
operation.
"""

from __future__ import annotations

import gc
import itertools
import math
import re
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from faults import FAULTS, list_steps, run_with_fault
from lengths import TIMES, few_of, long
from operations import OPERATIONS, Case, Shelf, around, held
from oracle import assert_nothing_left, contents, differences, identities, notes_on
from refusals import refused

from hotswap_lab import HotswapError

UNITS = ("line", "call", "deep", "signal")
#: the modules whose first line says that what was decided is being written from here on
WRITING = ("core/journal.py", "files/saving.py")
#: in the short form, how many steps of each operation that come before writing
BEFORE_WRITING = {"line": 25, "call": 15, "deep": 15, "signal": 30}
#: and how many after
WHILE_WRITING = {"line": 90, "call": 50, "deep": 20, "signal": 60}
#: at how many steps each operation fails before it is done again
RETRIES = 3
#: what a swap leaves to the next one to look up
LOOKED_UP = re.compile(r"\[hotswap_(slots|targets)\]")


class Hunt:
    """Faults in one operation, one after another."""

    def __init__(self, make: Callable[[], Case], temporary: Path):
        self.make, self.temporary = make, temporary
        self.faults = 0
        self.goals = [self._goal(lambda case: case.action)]
        for number in range(len(make().stations)):
            self.goals.append(self._goal(lambda case, number=number: case.stations[number]))
        self._renew()
        if self.case.changes:
            assert self.before not in self.goals, "the operation does nothing, so nothing could be found out"

    def _goal(self, action_of: Callable[[Case], Callable[[], object]]) -> tuple:
        case = self.make()
        action_of(case)()
        return self._contents(case)

    def _renew(self) -> None:
        self.case = self.make()
        self.before, self.objects = self._contents(self.case), self._objects()

    def _contents(self, case: Case) -> tuple:
        return [contents(model) for model in case.models], case.extra()

    def _objects(self) -> list:
        return [identities(model) for model in self.case.models]

    def run(self, step: int, kind: str, unit: str) -> None:
        """One fault, and a look at what it has left behind."""
        surroundings = around()
        kind = "Ctrl-C" if unit == "signal" else kind
        outcome = run_with_fault(self.case.action, step, FAULTS.get(kind), unit)
        if not outcome:
            self._renew()
            return
        what = f"{kind} at {unit} {step}, {outcome.where}"
        now = self._contents(self.case)
        if now == self.before and self._objects() == self.objects:
            assert outcome.error is not None or not self.case.changes, f"{what}: ended well, and did nothing"
            assert around()["randomness"] == surroundings["randomness"], f"{what}: random numbers were drawn"
            ended = "before"
        elif any(self._is_at(goal, now) for goal in self.goals):
            ended = "after"
        else:
            raise AssertionError(f"{what}: in between\n" + "\n".join(self._differences(now))) from outcome.error
        self.faults += 1
        assert not (locks := held(self.case.locks)), f"{what}: left locks behind: {locks}"
        assert outcome.handler_kept, f"{what}: Ctrl-C is not handled as before"
        del outcome, now
        self._look_around(surroundings, ended, what)
        if ended == "after":
            self._renew()

    def _look_around(self, before: dict, ended: str, what: str) -> None:
        """At an attribute of an object outside of the model."""
        now = around()
        if now["files"] != before["files"] or now["threads"] != before["threads"]:
            gc.collect()  # what hangs on the error's traceback
            now = around()
        if ended == "after":
            now["randomness"] = before["randomness"]  # a prepared model's dropouts, and the like, may draw some
        found = "\n".join(differences(before, assert_nothing_left(before, now, what)))
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
        yield from differences([self.before, self.objects], [now, self._objects()], "from before")
        for goal in self.goals:
            yield from differences(goal, now, "from after")

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


def chosen(places: list[str], unit: str, share: float) -> list[int]:
    """Steps for the short form: while writing, each place the first and the last time; before, some."""
    numbered = list(enumerate(places, 1))
    start = next((number for number, place in numbered if place.startswith(WRITING)), len(places) + 1) - 1
    firsts = [{place: number for number, place in reversed(each)} for each in (numbered[:start], numbered[start:])]
    late = {*firsts[1].values(), *{place: number for number, place in numbered[start:]}.values()}
    return [
        *_some(sorted(firsts[0].values()), math.ceil(BEFORE_WRITING[unit] * share)),
        *_some(sorted(late, reverse=True), math.ceil(WHILE_WRITING[unit] * share)),
    ]


def _some(items: list, count: int) -> list:
    return items[:: -(-len(items) // count)] if items else []


@pytest.mark.usefixtures("python_sigint", "without_garbage")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "share"),
    [
        *((name, 0.1) for name in ("hotswap: IA3", "pool.swap of a dropped adapter", "Adapter.load")),
        *(long(name, 1) for name in OPERATIONS),
    ],
)
def test_a_fault_at_every_step(name, share, tmp_path, monkeypatch):
    for folder in (shelf := tmp_path / "shelf", temporary := tmp_path / "temporary"):
        folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    hunt, kinds = Hunt(OPERATIONS[name](Shelf(shelf)), temporary), itertools.cycle(FAULTS)
    for unit in UNITS:
        places = list_steps(hunt.make().action, unit)
        # a pipeline takes long to make and to look at
        steps = chosen(places, unit, share * (0.3 if "pipeline" in name else 1))
        if TIMES > 1:
            steps = _some(list(range(1, len(places) + 1)), 100 * TIMES if unit == "deep" else len(places))
        for step in steps:
            hunt.run(step, next(kinds), unit)
    hunt.finish()
    assert hunt.faults >= 10 * share


@pytest.mark.usefixtures("python_sigint")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", few_of(OPERATIONS, [name for name in list(OPERATIONS)[::7] if "pipeline" not in name]))
def test_again(name, tmp_path):
    """After its own failure, a second time, and there and back: as if nothing had been before."""
    make = OPERATIONS[name](Shelf(tmp_path))
    (done := make()).action()
    goal = whole(done)
    places = list_steps(make().action)
    start = next((number for number, place in enumerate(places) if place.startswith(WRITING)), 0)
    for number, step in enumerate(_some(range(start + 1, len(places) + 1), RETRIES)):
        case = make()
        before = [contents(model) for model in case.models], case.extra()
        outcome = run_with_fault(case.action, step, [*FAULTS.values()][number % len(FAULTS)])
        if ([contents(model) for model in case.models], case.extra()) == before:
            case.action()
            found = list(differences(goal, whole(case)))
            assert not found, f"again after {outcome.where}\n" + "\n".join(found[:12])
            case.check()
    if not is_refused_again(done):
        found = [each for each in differences(goal, whole(done)) if not LOOKED_UP.search(each)]
        assert not found or "update" in name, "twice\n" + "\n".join(found[:12])
        done.check()
    if done.back:
        done.back()
        done.action()
        done.check()


def whole(case: Case) -> tuple:
    """All of its models, and our notes on them, in values that those of another case may equal."""
    return [(contents(model), notes_on(model, which=False)) for model in case.models], case.extra()


def is_refused_again(case: Case) -> bool:
    try:
        case.action()
    except HotswapError as error:
        refused(re.escape(str(error)), case.action)
        return True
    return False
