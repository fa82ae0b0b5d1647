"""Views of one model: each shows what is in it now, or is gray and says so, whoever changed the model."""

from __future__ import annotations

import asyncio
import copy
import gc
import re
import threading
import weakref

import pytest
import torch
from lengths import few_of
from shown import WORD, folders

from hotswap_lab import Adapter, AdapterPool, demo, hotswap_adapter, prepare_model_for_compiled_hotswap, set_strength
from hotswap_lab.core import change
from hotswap_lab.figures.palette import ADAPTERS
from hotswap_lab.threads import locked
from hotswap_lab.widgets import RowPanel, SwapPanel, View, WeightMap, view
from hotswap_lab.widgets.view import CHANGED, note_cell

NAMES = ("reverse", "sort", "shout")
SHOUT = demo.adapter_path("shout")


def weights_of(name):
    adapter = Adapter.load(demo.adapter_path(name))
    return adapter.tensors, adapter.config


def layers_of(pool):
    return [module for module in pool.model.modules() if hasattr(module, "set_scale")]


def train(pool):
    parameters = [each for name, each in pool.model.named_parameters() if "lora_" in name]
    for each in parameters:
        each.requires_grad_().grad = torch.ones_like(each)
    torch.optim.SGD(parameters, lr=0.1, foreach=False).step()


#: what changes the model, and what the panels then say of it; by this package
OURS = {
    "a pool's swap": (lambda pool: pool.swap("shout"), "shout is in 14 of 28"),
    "a swap from a file": (
        lambda pool: hotswap_adapter(pool.model, SHOUT, "default"),
        "another adapter is in 14 of 28",
    ),
    "the strength": (lambda pool: set_strength(pool.model, 0.5), "reverse is in 28"),
    "off": (lambda pool: pool.off(), "the adapter is off"),
    "an update": (lambda pool: pool.update("reverse", *weights_of("shout")), "reverse is in 14 of 28"),
}
#: and by other code
OTHERS = {
    "PEFT's set_scale": (lambda pool: [each.set_scale("default", 0.5) for each in layers_of(pool)], "reverse is in 28"),
    "PEFT's disable": (lambda pool: pool.model.base_model.disable_adapter_layers(), "the adapter is off"),
    "PEFT's merge": (lambda pool: pool.model.merge_adapter(), "reverse is in 28"),
    "load_state_dict": (
        lambda pool: pool.model.load_state_dict({key: each * 2 for key, each in pool.model.state_dict().items()}),
        "another adapter is in 28",
    ),
    "training": (train, "another adapter is in 28"),
}


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(view, "EVERY", 0.01)


def a_pool(**options):
    return AdapterPool(demo.load("reverse")[0], adapters=folders(*NAMES), progress=False, **options)


def a_panel(pool):
    panel = SwapPanel(pool, str.upper, prompt=WORD)
    panel.run()
    return panel


async def soon(shows):
    """Wait until it is shown, at most as long as a person would."""
    for _ in range(100):
        await asyncio.sleep(0.01)
        if shows():
            return True
    return False


@pytest.mark.parametrize("what", few_of([*OURS, *OTHERS], ("a pool's swap", "PEFT's set_scale", "load_state_dict")))
def test_two_of_each_show_a_change_by_whomever(quick, what):
    act, says = (OURS | OTHERS)[what]

    async def watch():
        pool = a_pool()
        panels, maps = [a_panel(pool), a_panel(pool)], [WeightMap(pool), WeightMap(pool)]
        others = [a_panel(a_pool()), WeightMap(pool, "default")]
        for each in (*panels, *maps, *others):
            each._refresh_box()
        assert await soon(lambda: "reverse is in 28" in panels[0]._picture.value)
        assert not any(CHANGED in each._status.value for each in panels)
        await asyncio.to_thread(act, pool)
        if what in OTHERS:
            note_cell()
        assert await soon(lambda: all(CHANGED in each._status.value for each in panels))
        for panel in panels:
            assert "hotswap-old" in panel._answer.value
            assert says in panel._picture.value
            assert str(panel).endswith(CHANGED)
            assert panel._radios.value == ("off" if "off" in says else panel.active)
            assert panel._slider.value == panel.strength
        assert all(says in each._body.value for each in maps)
        assert all("data-note=''" in each._body.value for each in maps)
        assert CHANGED not in others[0]._status.value  # of another model
        if "merge" not in what:  # which a run would end
            await asyncio.to_thread(panels[0].run)
            assert "hotswap-old" not in panels[0]._answer.value
            assert CHANGED not in str(panels[0])

    asyncio.run(watch())


def test_two_panels_of_a_model_without_a_pool_have_one_name_for_what_is_in_it():
    model, _ = demo.load("reverse")
    shout = Adapter.load(SHOUT)
    sources = [
        folders("sort") | {"loud": shout, "same": SHOUT, "twin": SHOUT},
        folders("sort") | {"mine": shout},
        {"sort": SHOUT},
    ]
    panels = [SwapPanel(model, str.upper, adapters=each, prompt=WORD) for each in sources]
    for name, says in (
        ("sort", ["sort", "sort", None]),
        ("loud", ["loud", "mine", None]),
        ("twin", ["twin", None, "sort"]),
    ):
        panels[0].active = name
        assert [panel.active for panel in panels] == says
        assert f"{name} is in" in panels[0].figure().svg
    hotswap_adapter(model, SHOUT, "default")
    assert [panel.active for panel in panels] == [None] * 3
    panels[2].active = "sort"
    assert [panel.active for panel in panels] == ["same", None, "sort"]
    assert SwapPanel(copy.deepcopy(model), str.upper, adapters=sources[0]).active is None


@pytest.mark.parametrize("inference", [False, True])
def test_without_a_pool_each_write_is_a_change(inference):
    with torch.inference_mode(inference):
        model, _ = demo.load("reverse")
    panel = SwapPanel(model, str.upper, adapters=folders(*NAMES), prompt=WORD)
    writes = [lambda: hotswap_adapter(model, SHOUT, "default"), lambda: set_strength(model, 0.5)]
    for write in (*writes, *[lambda: train(panel)] * (0 if inference else 2)):
        panel.run()
        assert CHANGED not in str(panel)
        write()
        assert CHANGED in str(panel)
        assert CHANGED in str(panel)  # looking changes nothing


def test_a_block_that_puts_the_adapter_back_is_no_change():
    pool = a_pool(rows=2)
    panel = a_panel(pool)
    with pool.using("shout"):
        assert CHANGED in str(panel)
    with pool.assigned(["sort", "shout"]):
        assert CHANGED in str(panel)
    assert CHANGED not in str(panel)


#: what is done in a pool, and which rows' answers are then gray, of an adapter, the base model and a stranger
ROWS = {
    "swap": (lambda pool: pool.swap("shout"), []),
    "update": (lambda pool: pool.update("sort", *weights_of("shout")), [0]),
    "another one of the same name": (lambda pool: (pool.remove("sort"), pool.add("sort", SHOUT)), [0]),
    "a new one": (lambda pool: pool.add("new", SHOUT), []),
    "PEFT's disable": (lambda pool: pool.model.base_model.disable_adapter_layers(), [0, 1]),
}


@pytest.mark.parametrize("what", ROWS)
def test_answers_of_rows_are_gray_if_they_would_be_others(quick, what):
    act, old = ROWS[what]

    async def watch():
        pool = a_pool(rows=2)
        rows = RowPanel(pool, list, prompts=[WORD, WORD])
        rows.choose(0, "sort")
        rows.run()
        rows._refresh_box()
        act(pool)
        if "PEFT" in what:
            note_cell()
        names = ["base", *pool]
        menu = rows._rows[0][0]
        assert await soon(lambda: bool(old) == (CHANGED in rows._status.value) and len(menu.options) == len(names))
        assert [number for number, row in enumerate(rows._rows) if "hotswap-old" in row[2].value] == old
        assert [label for label, _ in rows._rows[0][0].options] == names

    asyncio.run(watch())


#: what is told besides, which no view of the model shows
TOLD = {
    "preparing": lambda pool: prepare_model_for_compiled_hotswap(demo.load("reverse")[0], target_rank=32),
    "add": lambda pool: pool.add("new", SHOUT),
    "remove": lambda pool: pool.remove("sort"),
    "update of one that is not in": lambda pool: pool.update("sort", *weights_of("shout")),
    "assign": lambda pool: pool.assign(["sort", None]),
}


@pytest.mark.parametrize("what", TOLD)
def test_every_change_is_noted_whatever_the_log_level(what):
    assert not change.LOG.isEnabledFor(20)
    pool = a_pool(rows=2)
    before = change.LATEST[0]
    TOLD[what](pool)
    assert change.LATEST[0] is not before


class Counting(View):
    summary = "so many refreshes"

    def __init__(self, model=None):
        self.model, self._threads = model, []

    def _refresh(self):
        super()._refresh()
        self._threads.append(threading.get_ident())


def test_a_view_looks_in_its_loop_and_not_in_the_lock_of_the_thread_that_swaps(quick):
    async def watch():
        pool = a_pool()
        counting, panel = Counting(pool.model), a_panel(pool)
        for each in (counting, panel):
            each._refresh_box()
        entered, leave = threading.Event(), threading.Event()

        def swap():
            with locked(pool._room.slot.host.base):
                pool.swap("shout")
                entered.set()
                assert leave.wait(60)

        thread = threading.Thread(target=swap)
        thread.start()
        assert await soon(lambda: entered.is_set() and CHANGED in panel._status.value)  # while the lock is held
        assert "reverse is in" in panel._picture.value  # the weights are not read meanwhile
        leave.set()
        thread.join(60)
        assert await soon(lambda: "shout is in" in panel._picture.value)
        assert {*counting._threads} == {threading.get_ident()}

    asyncio.run(watch())


def test_one_that_is_not_shown_or_was_closed_costs_nothing_and_none_is_kept(quick):
    async def watch():
        loop, hidden, closed, gone = asyncio.get_running_loop(), Counting(), Counting(), Counting()
        assert not loop._scheduled
        for each in (closed, gone):
            each._refresh_box()
        await asyncio.sleep(0.05)
        counts = [len(each._threads) for each in (hidden, closed)]
        await asyncio.sleep(0.05)
        assert [len(each._threads) for each in (hidden, closed)] == counts  # nothing has changed
        assert len([each for each in loop._scheduled if not each.cancelled()]) >= 2
        closed.box.close()
        gone, each = weakref.ref(gone), None
        gc.collect()
        assert gone() is None
        note_cell()
        await asyncio.sleep(0.05)
        assert [len(each._threads) for each in (hidden, closed)] == counts
        assert not loop._scheduled

    asyncio.run(watch())


def test_one_whose_adapter_is_gone_says_so(quick):
    async def watch():
        pool = a_pool()
        views = [a_panel(pool), WeightMap(pool)]
        for each in views:
            each._refresh_box()
        pool.model.delete_adapter("default")
        note_cell()
        assert await soon(lambda: all("hotswap-lost" in each._title.value for each in views))
        assert "No adapter layers" in views[0]._title.value

    asyncio.run(watch())


def test_without_a_loop_it_looks_at_the_next_click():
    pool = a_pool()
    panel = a_panel(pool)
    panel._refresh_box()
    pool.swap("shout")
    assert "hotswap-old" not in panel._answer.value
    panel._pin_button.click()
    assert "hotswap-old" in panel._answer.value


def test_the_static_form_says_it_too():
    model, _ = demo.load("reverse")
    panel = SwapPanel(model, str.upper, adapters=folders(*NAMES), prompt=WORD)
    panel.run()
    assert "image/svg+xml" in panel._static()
    hotswap_adapter(model, SHOUT, "default")
    static = panel._static()
    assert [*static] == ["text/html", "text/plain"]
    assert all(CHANGED in each for each in static.values())


def test_an_adapter_that_a_view_does_not_know_has_no_color_of_another():
    model, _ = demo.load("reverse")
    panel = SwapPanel(model, str.upper, adapters=folders(*NAMES), prompt=WORD)
    panel.run()
    svg = panel.figure().svg
    assert "another adapter is in" in svg
    assert not {*re.findall(r"#\w{6}", svg)} & {*ADAPTERS}
    svg = WeightMap(model).figure().svg
    assert "default is in" in svg
    assert not {*re.findall(r"#\w{6}", svg)} & {*ADAPTERS}
