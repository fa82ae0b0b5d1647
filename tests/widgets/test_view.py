"""What all widgets share: two outputs, the static one first; light to import; work that never hangs a kernel."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest
import torch
from refusals import refused

from hotswap_lab.widgets import PlanView, RankPaddingView, RowPanel, SwapPanel, SwapRace, View
from hotswap_lab.widgets.view import WIDGET_MIME
from hotswap_lab.widgets.work import Stopped, WorkingView, error_html


class Hello(View):
    summary = "hello <you>"

    def __init__(self):
        self.refreshed = 0

    def _refresh(self):
        super()._refresh()
        self.refreshed += 1


def test_two_outputs_the_static_one_first(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw: shown.append(data))
    Hello()._ipython_display_()
    static, live = shown
    assert static == {
        "text/html": "<div><strong>Hello</strong>: hello &lt;you&gt;</div>",
        "text/plain": "Hello: hello <you>",
    }
    assert list(live) == [WIDGET_MIME]  # nothing else, so that a saved notebook can leave it out
    assert live[WIDGET_MIME]["model_id"]


def test_every_widget_has_a_deterministic_static_form():
    for make in (SwapPanel.demo, RowPanel.demo, RankPaddingView, SwapRace):
        assert make()._static() == make()._static()
    assert PlanView.__doc__


def test_nothing_is_refreshed_before_it_is_shown():
    view = Hello()
    view._changed()
    assert view.refreshed == 0
    assert view.box is view.box
    view._changed()
    assert view.refreshed == 1
    view.summary = "bye"  # what is public shows at once
    assert view.refreshed == 2
    assert "bye" in view._title.value


@pytest.mark.long
def test_importing_is_light():
    code = "import hotswap_lab.widgets, sys; print('ipywidgets' in sys.modules, 'hotswap_lab.bench' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "False False"


@pytest.mark.long
def test_the_package_does_not_import_the_widgets():
    code = "import hotswap_lab, sys; print('hotswap_lab.widgets' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "False"


def test_errors_are_escaped_and_read_out():
    html = error_html(ValueError("<a>"))
    assert "<a>" not in html
    assert 'role="alert"' in html


def test_work_goes_on_beside():
    go, work = threading.Event(), WorkingView()
    start = time.perf_counter()
    work._start(lambda: go.wait(30))
    assert time.perf_counter() - start < 5
    assert work.busy
    assert not work.wait(timeout=0.01)
    refused("busy", work._run, lambda: None)
    go.set()
    assert work.wait(30)


def test_work_that_fails_can_be_followed_by_more():
    work = WorkingView()
    with pytest.raises(ZeroDivisionError):
        work._run(lambda: 1 / 0)
    assert work._run(lambda: 2) == 2


def test_stop_ends_work_at_its_next_check():
    work, ended = WorkingView(), []

    def job():
        try:
            while True:
                work._check()
        except Stopped:
            ended.append(True)

    work._start(job)
    work.stop()
    assert work.wait(30)
    assert ended == [True]
    assert work._run(lambda: work._check() or "done") == "done"  # the next one is not stopped


def test_work_has_the_modes_of_who_started_it():
    modes, work = [], WorkingView()
    with torch.no_grad():
        work._start(lambda: modes.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled())))
        work.wait(30)
    with torch.inference_mode():
        work._start(lambda: modes.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled())))
        work.wait(30)
    work._start(lambda: modes.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled())))
    work.wait(30)
    assert modes == [(False, False), (False, True), (True, False)]
