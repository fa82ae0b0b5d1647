"""RowPanel: everything a click does, done from Python, and by clicks on its controls."""

from __future__ import annotations

import pytest
from refusals import refused

from hotswap_lab import AdapterPool, demo
from hotswap_lab.widgets import RowPanel

WORDS = ["hotswap", "notebook", "adapter"]
NAMES = ["sort", "shout", None]
ANSWERS = ["ahopstw", "NOTEBOOK!", "adapter"]


@pytest.fixture(scope="module")
def pool():
    model, _ = demo.load("reverse")
    folders = {name: demo.adapter_path(name) for name in ("reverse", "sort", "shout")}
    return AdapterPool(model, adapters=folders, rows=3, progress=False)


def panel_with(pool, generate):
    return RowPanel(pool, generate, prompts=WORDS)


@pytest.fixture
def panel(pool):
    tokenizer = demo.load_tokenizer()
    return panel_with(pool, lambda words: demo.ask_all(pool.model, tokenizer, words))


def choose_all(panel):
    for row, name in enumerate(NAMES):
        panel.choose(row, name)


def test_each_row_is_answered_with_its_adapter_in_one_call(panel, pool):
    good, calls = panel.generate, []
    panel.generate = lambda words: calls.append((words, [row.adapter for row in pool.rows])) or good(words)
    choose_all(panel)
    assert panel.run() == ANSWERS
    assert calls == [(WORDS, NAMES)]
    assert [run.label for run in panel.runs] == ["sort", "shout", "no adapter"]
    assert {run.state for run in panel.runs} == {"done"}
    assert panel.swap_seconds > 0


def test_the_model_has_afterwards_what_it_had(panel, pool):
    pool.swap("reverse")
    choose_all(panel)
    panel.run()
    assert (pool.active, pool.rows) == ("reverse", [])
    panel.generate = lambda words: words[1:]
    refused("2 answers", panel.run)
    assert (pool.active, pool.rows) == ("reverse", [])


def test_clicks(panel):
    panel.box  # noqa: B018 - makes the controls
    panel._refresh()
    assert [label for label, _ in panel._menus[0].options] == ["base", "reverse", "sort", "shout"]
    for menu, name in zip(panel._menus, NAMES, strict=True):
        menu.value = name or ""
    assert panel.adapters == NAMES
    panel._boxes[2].value = "kernel"
    panel._run_button.click()
    assert panel.wait(60)
    assert [run.result for run in panel.runs] == [*ANSWERS[:2], "kernel"]
    assert "NOTEBOOK!" in panel._answers[1].value
    assert "shout" in panel._answers[1].value


def test_a_menu_has_what_has_joined_the_pool_since():
    panel = RowPanel.demo(WORDS)
    panel.box  # noqa: B018
    panel.pool.add("mine", demo.adapter_path("vowels_up"))
    panel.choose(1, "mine")
    assert panel._menus[1].value == "mine"
    assert panel.run()[1] == "nOtEbOOk"


def test_answers_grow_and_can_be_stopped(pool):
    def generate(words):
        yield [word[:1] for word in words]
        panel.stop()
        yield [word[:2] for word in words]
        yield words

    panel = panel_with(pool, generate)
    assert panel.run() is None
    assert [(run.result, run.state) for run in panel.runs] == [(word[:2], "stopped") for word in WORDS]
    assert "ho (stopped)" in str(panel)


def test_the_static_form(panel):
    panel.prompts[0] = "<b>"
    assert "<td" in panel.to_html()  # before a run: what is asked, and with which adapter
    assert "&lt;b&gt;" in panel.to_html()
    panel.prompts[0] = WORDS[0]
    choose_all(panel)
    panel.run()
    panel.choose(0, "shout")
    panel.prompts[0] = "other"
    assert "sort, hotswap: ahopstw" in str(panel)  # answers keep the adapter that they came from
    panel.generate = lambda words: ["<i>", *words[1:]]
    panel.run()
    assert "&lt;i&gt;" in panel.to_html()
    assert "<i>" not in panel.to_html()
    panel.generate, former = (lambda words: 1 / 0), [run.result for run in panel.runs]
    panel.box  # noqa: B018
    panel.start()
    assert panel.wait(30)
    assert "ZeroDivisionError" in panel._status.value
    assert "error: ZeroDivisionError" in str(panel)
    assert [run.result for run in panel.runs] == former  # the last good ones
