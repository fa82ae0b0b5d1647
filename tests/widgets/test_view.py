"""What all widgets share: two outputs, the static one first; light to import; work that never hangs a kernel."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch

from hotswap_lab.widgets import RankPaddingView, RowPanel, StrengthLattice, SwapPanel, View, WeightMap
from hotswap_lab.widgets.view import WIDGET_MIME
from hotswap_lab.widgets.work import WorkingView


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
    for make in (SwapPanel.demo, RowPanel.demo, StrengthLattice.demo, RankPaddingView, WeightMap.demo):
        assert make()._static() == make()._static()


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
    code = """
import hotswap_lab, sys; print('hotswap_lab.widgets' in sys.modules, 'diffusers' in sys.modules)
import hotswap_lab.widgets; print('ipywidgets' in sys.modules, 'hotswap_lab.bench' in sys.modules)
print('hotswap_lab.lessons' in sys.modules)"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.split() == ["False"] * 5


def test_without_ipywidgets_the_import_says_what_to_install():
    code = """
import importlib.util, hotswap_lab
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name == "ipywidgets" else find_spec(name)
try:
    import hotswap_lab.widgets
except ImportError as error:
    print(error)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith(': pip install "hotswap_lab[widgets]"\n')


@pytest.mark.parametrize("modes", [(False, False), (False, True), (True, False)])
def test_a_click_has_the_modes_of_the_cell_that_made_the_widget(modes):
    """A kernel may deliver a click in any thread, where gradients are on, and a compiled model would recompile."""
    grad, inference = modes
    with torch.inference_mode(inference), torch.set_grad_enabled(grad):
        work = WorkingView()
    found = []
    click = partial(work._start, lambda: found.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled())))
    for turn_off in (torch.enable_grad, torch.no_grad):
        with turn_off(), ThreadPoolExecutor(1) as subshell:
            click()
            assert work.wait(30)
            subshell.submit(click).result()
            assert work.wait(30)
    assert found == [modes] * 4
