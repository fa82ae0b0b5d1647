"""RowPanel: everything a click does, done from Python, and by clicks on its controls."""

from __future__ import annotations

import pytest
from refusals import refused
from shown import folders, live

from hotswap_lab import AdapterPool, demo
from hotswap_lab.figures.palette import light
from hotswap_lab.widgets import RowPanel

WORDS = ["hotswap", "notebook", "adapter"]
NAMES = ["sort", "shout", None]
ANSWERS = ["ahopstw", "NOTEBOOK!", "adapter"]


@pytest.fixture
def panel():
    model, tokenizer = demo.load("reverse")
    pool = AdapterPool(model, adapters=folders("reverse", "sort", "shout"), rows=3, progress=False)
    return RowPanel(pool, lambda words: demo.ask_all(pool.model, tokenizer, words), prompts=WORDS)


def choose_all(panel):
    for row, name in enumerate(NAMES):
        panel.choose(row, name)


def test_each_row_is_answered_with_its_adapter_in_one_call_and_the_model_has_afterwards_what_it_had(panel):
    pool, good, calls = panel.pool, panel.generate, []
    panel.generate = lambda words: calls.append((words, [row.adapter for row in pool.rows])) or good(words)
    pool.swap("reverse")
    choose_all(panel)
    assert panel.run() == ANSWERS
    assert calls == [(WORDS, NAMES)]
    assert [(run.label, run.done) for run in panel.runs] == [(name or "no adapter", True) for name in NAMES]
    assert panel.swaps[-1] > 0
    assert (pool.active, pool.rows) == ("reverse", [])
    panel.choose(0, "shout")
    panel.prompts[0] = "other"
    assert "sort, hotswap: ahopstw" in str(panel)  # answers keep the adapter that they came from
    panel.generate, previous = (lambda words: words[1:]), [run.result for run in panel.runs]
    live(panel).start()
    assert panel.wait(30)
    assert "2 answers" in panel._problem.value
    assert "error: HotswapError" in str(panel)
    assert [run.result for run in panel.runs] == previous  # the last good ones
    assert (pool.active, pool.rows) == ("reverse", [])
    refused("2 answers", panel.run)


def test_each_control_has_its_own_name(panel):
    names = [control.description for menu, box, _ in live(panel)._rows for control in (menu, box)]
    assert names == ["row 0", "request 0", "row 1", "request 1", "row 2", "request 2"]


def test_clicks(panel):
    panel.pool.add("mine", demo.adapter_path("vowels_up"))
    assert [label for label, _ in live(panel)._rows[0][0].options] == ["base", "reverse", "sort", "shout", "mine"]
    for (menu, _, _), name in zip(panel._rows, ["mine", *NAMES[1:]], strict=True):
        menu.value = name or ""
    panel._rows[2][1].value = "kernel"
    panel._run_button.click()
    assert panel.wait(60)
    assert [run.result for run in panel.runs] == ["hOtswAp", "NOTEBOOK!", "kernel"]
    for part in ("shout", "NOTEBOOK!", light("shout")):
        assert part in panel._rows[1][2].value
        assert part in panel.to_html()
    panel._rows[0][0].value = "shout"
    panel._rows[1][1].value = "other"
    # dim: they answer what is no longer asked
    assert ["hotswap-old" in answer.value for _, _, answer in panel._rows] == [True, True, False]


def test_answers_grow_and_can_be_stopped(panel):
    def generate(words):
        yield [word[:1] for word in words]
        panel.stop()
        yield [word[:2] for word in words]
        yield words

    panel.generate = generate
    assert "notebook" in panel.to_html()  # before a run: what is asked
    assert panel.run() is None
    assert [(run.result, run.done) for run in panel.runs] == [(word[:2], False) for word in WORDS]
    assert "ho ..." in str(panel)
