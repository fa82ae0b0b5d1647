"""Quick clicks, other threads, asyncio and Ctrl-C: whatever comes at once, the model is exactly one adapter."""

from __future__ import annotations

import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

import pytest
from faults import list_steps, run_with_fault
from lengths import few_of
from refusals import refused
from shown import WORD, folders, live, panel_with

from hotswap_lab import AdapterPool, demo, in_use
from hotswap_lab.threads import bases_of, locked
from hotswap_lab.widgets import RowPanel, SwapPanel, View
from hotswap_lab.widgets.clicks import Clicks

NAMES = ("reverse", "sort", "shout")
#: seconds for what must happen; nothing takes as long
SOON = 60


class Gate:
    """A ``generate`` that notes its adapter, and waits in its first call until it is let go."""

    def __init__(self, panel: SwapPanel):
        self.panel = panel
        self.entered, self.leave = threading.Event(), threading.Event()
        self.calls = []

    def __call__(self, prompt):
        self.calls.append(f"{self.panel.active} at {self.panel.strength:g}")
        before = fingerprint(self.panel)
        yield "so far"
        self.entered.set()
        assert self.leave.wait(SOON)
        assert fingerprint(self.panel) == before  # nobody swapped on the way
        yield self.calls[-1]


def fingerprint(panel) -> list[float]:
    """What tells one adapter in the model from another one: the sum of each of its tensors, and its scalings."""
    model = panel._switch.model
    sums = [tensor.double().sum().item() for name, tensor in model.state_dict().items() if "lora_" in name]
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    # where the adapter has nothing, the scaling is of what was there before
    return [*sums, *(float(each.scaling["default"]) for each in layers if each.lora_B["default"].weight.any())]


def make(kind="pool"):
    if kind == "model":
        return live(panel_with(str, *NAMES))
    pool = AdapterPool(demo.load("reverse")[0], adapters=folders(*NAMES), progress=False)
    return live(SwapPanel(pool, str, prompt=WORD))


@pytest.fixture(scope="module")
def pure():
    """The fingerprint of each adapter."""
    found, panel = {}, make()
    for panel.active in NAMES:
        found[panel.active] = fingerprint(panel)
    return found


@pytest.fixture
def running():
    """A panel whose run waits in the middle."""
    panel = make()
    panel.active = "reverse"
    gate = panel.generate = Gate(panel)
    panel.start()
    assert gate.entered.wait(SOON)
    yield panel, gate
    gate.leave.set()
    assert panel.wait(SOON)


# ---- quick clicks


def choose(panel, *names):
    for panel._radios.value in names:
        pass


def slide(panel, *values):
    for panel._slider.value in values:
        pass


#: what is clicked during a run, what is said to come next, and what was run in the end
CLICKS = {
    "two adapters": (lambda panel: choose(panel, "shout", "sort"), "then adapter sort", ["reverse at 1", "sort at 1"]),
    "the slider": (lambda panel: slide(panel, 0.4, 0.5), "then strength 0.5", ["reverse at 1", "reverse at 0.5"]),
    "the slider, and back": (lambda panel: slide(panel, 0.5, 1.0), "then strength 1.0", ["reverse at 1"] * 2),
    "the slider, and stop": (lambda panel: (slide(panel, 0.5), panel._stop_button.click()), "busy", ["reverse at 1"]),
}


@pytest.mark.parametrize("what", few_of(CLICKS, list(CLICKS)[:2]))
def test_the_last_click_during_a_run_comes_next(running, pure, what):
    (panel, gate), (click, said, runs) = running, CLICKS[what]
    click(panel)
    assert said in panel._status.value
    assert fingerprint(panel) == pure["reverse"]
    assert not panel._slider.disabled  # or the keyboard's focus would be gone
    gate.leave.set()
    assert panel.wait(SOON)
    assert gate.calls == runs
    assert (panel.strength, panel.active) == (panel._slider.value, panel._radios.value)
    assert "busy" not in panel._status.value
    if "stop" not in what:
        assert panel.answer.result == runs[-1]
    if what == "two adapters":
        assert fingerprint(panel) == pure["sort"]


def test_a_refresh_is_no_click(monkeypatch):
    """Not even if another thread changes the strength just when the slider is about to show it."""
    panel = make()
    panel.active, pool = "reverse", panel._switch
    pool.strength = 0.5
    monkeypatch.setattr(panel.map, "look_now", lambda: setattr(pool, "strength", 1.0))
    panel._changed()
    assert panel._slider.value == 0.5  # until the refresh of whoever changed the strength
    assert (panel.busy, panel.answer, pool.strength) == (False, None, 1)
    monkeypatch.undo()
    panel._changed()
    assert panel._slider.value == 1


def test_what_is_shown_last_is_the_last_state():
    """A thread that is held up in the middle of a refresh doesn't write over what others have shown meanwhile."""
    read, go_on = threading.Event(), threading.Event()

    class Slow(View):
        _now, shown = "busy", None

        def _refresh(self):
            state = self._now
            if state == "busy":
                read.set()
                assert go_on.wait(SOON)
            self.shown = state

    view = Slow()
    view.box  # noqa: B018
    with ThreadPoolExecutor(2) as threads:
        threads.submit(view._changed)
        assert read.wait(SOON)
        view._now = "ready"
        threads.submit(view._changed)
        time.sleep(0.1)
        go_on.set()
    assert view.shown == "ready"


def test_a_click_that_comes_late_does_not_count(monkeypatch):
    """ipykernel 7.4 may hand over a click at the end of a cell, and later ones to other buttons before that."""
    given, taken = iter([(1, "a"), (3, "b"), (2, "late"), (3, "same moment"), (0, "other page"), (None, "cell")]), []
    moments = {None: None, **{second: datetime(2030, 1, 1, second=second) for second in range(4)}}
    clicks = Clicks()
    for second, what in given:
        monkeypatch.setattr(
            "hotswap_lab.widgets.clicks._session_and_time", lambda s=second, w=what: (w[:5] == "other", moments[s])
        )
        assert clicks.accept(lambda what=what: taken.append(what)) == (what != "late")
    assert taken == ["a", "b", "same moment", "other page", "cell"]


# ---- a swap while something computes


def test_swaps_by_others_wait_while_it_computes():
    pool, swaps = make()._switch, []

    def probe(*_):
        if not swaps:
            swaps.append(threading.Thread(target=pool.swap, args=("shout",)))
            swaps[0].start()
            swaps[0].join(0.3)
            assert swaps[0].is_alive()
        return WORD

    SwapPanel(pool, probe).run()
    swaps[0].join(SOON)
    assert pool.active == "shout"


LONG = {
    "panel": make,
    "panel of a model": lambda: make("model"),
    "rows": lambda: RowPanel.demo([WORD]),
}


@pytest.mark.long
@pytest.mark.parametrize("what", LONG)
def test_work_waits_for_a_thread_that_computes_and_the_wait_can_be_stopped(what):
    widget = LONG[what]()
    model, previous = (getattr(widget, "pool", None) or widget).model, str(widget)
    numbers = itertools.cycle((0.5, 0.25))
    start = (lambda: slide(widget, next(numbers))) if "panel" in what else widget.start
    with in_use(model):
        start()
        assert not widget.wait(0.7)  # longer than it waits at a time
        assert "no other thread computes" in widget._state()
        widget.stop()
        assert widget.wait(SOON)
        assert (str(widget), widget.error) == (previous, None)
        start()
        assert not widget.wait(0.1)
    assert widget.wait(SOON)
    assert widget.error is None
    assert str(widget) != previous


def test_inside_a_computation_the_panel_refuses_to_swap(pure):
    panel = make()
    panel.active = "reverse"
    with in_use(panel.model):
        refused("computing with the model", panel.choose, "shout")
        assert panel.run() == WORD
    assert fingerprint(panel) == pure["reverse"]
    assert panel.choose("shout") == WORD


# ---- Ctrl-C


@pytest.mark.long
@pytest.mark.usefixtures("python_sigint")
def test_an_interrupt_at_any_step(pure):
    """Of the panel's own code; the engine's steps have tests of their own."""
    panel = make()
    panel.active = "reverse"
    places = list_steps(lambda: panel.choose("sort"), "signal")
    steps = {place: step for step, place in enumerate(places, 1) if place.startswith("widgets/")}
    came_to = set()
    for step in steps.values():
        panel.active = "reverse"
        outcome = run_with_fault(lambda: panel.choose("sort"), step, unit="signal")
        where = outcome.where
        if not where:  # it draws itself once more the first time
            continue
        came_to.add(where)
        assert isinstance(outcome.error, KeyboardInterrupt), where
        assert outcome.handler_kept, where
        assert not panel.busy, where
        assert fingerprint(panel) in (pure["reverse"], pure["sort"]), where
        assert panel.choose("shout") == WORD, where
        assert "busy" not in panel._status.value, where
    assert len(came_to) > 10


def test_a_refresh_neither_waits_for_a_swap_nor_looks_at_a_half_written_model():
    panel = make()
    panel.choose("reverse")
    picture, pool = panel._picture.value, panel._switch
    entered, leave, waits = threading.Event(), threading.Event(), threading.Event()

    def swap():
        with locked(pool._room.slot.host.base):
            pool._room.bands[0].memory.zero_()
            entered.set()
            assert leave.wait(SOON)
            pool.swap("sort")

    writing = threading.Thread(target=swap)
    writing.start()
    assert entered.wait(SOON)
    panel.map.name = ""
    panel._changed()
    assert panel._picture.value == picture
    assert "reverse is in" in picture
    leave.set()
    writing.join(SOON)
    panel._changed()
    assert "sort is in" in panel._picture.value != picture

    def also_swap():
        waits.set()
        pool.swap("shout")

    with in_use(panel.model):
        waiting = threading.Thread(target=also_swap)
        waiting.start()
        assert waits.wait(SOON)
        panel.map.name = ""
        panel._changed()  # the thread that computes: a swap that waits can't be halfway
        assert "sort is in" in panel._picture.value
    waiting.join(SOON)
    panel.choose("sort")  # the job itself waits for its turn to look
    assert "sort is in" in panel._picture.value


def test_a_panel_is_in_use_as_its_model_is():
    panel = SwapPanel.demo()
    (of_panel,), (of_model,) = bases_of(panel), bases_of(panel.model)
    assert of_panel is of_model
