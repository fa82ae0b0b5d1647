"""What all widgets share: two outputs, the static one first; no markup; light to import; work in a click's modes."""

from __future__ import annotations

import importlib
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import ipywidgets
import pytest
import torch
from shown import live

from hotswap_lab import AdapterPool, demo
from hotswap_lab.widgets import RowPanel, SwapPanel, View
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
    quiet, static, now = shown
    assert "hotswap-quiet" in quiet["text/html"]
    assert static == {
        "text/html": "<div><strong>Hello</strong>: hello &lt;you&gt;</div>",
        "text/plain": "Hello: hello <you>",
    }
    assert list(now) == [WIDGET_MIME]  # nothing else, so that a saved notebook can leave it out
    assert now[WIDGET_MIME]["model_id"]


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


@pytest.mark.parametrize("kind", [SwapPanel, RowPanel])
def test_nothing_becomes_markup(kind):
    name, prompt, options = "<i>x", "<b>", {"rows": 2} if kind is RowPanel else {}
    pool = AdapterPool(demo.load("reverse")[0], adapters={name: demo.adapter_path("sort")}, progress=False, **options)
    widget = live(RowPanel(pool, list, prompts=[prompt]) if kind is RowPanel else kind(pool, str, prompt=prompt))
    widget.choose(*((0, name) if kind is RowPanel else (name,)))
    widget.run()

    def values(box):
        yield from (each for part in getattr(box, "children", ()) for each in values(part))
        if isinstance(box, ipywidgets.HTML):
            yield box.value

    shown = "".join([widget.to_html(), *values(widget.box)])
    assert "<i>x" not in shown
    assert "<b>" not in shown
    assert all(shown.count(each) >= 2 for each in ("&lt;i&gt;x", "&lt;b&gt;"))


def test_without_ipywidgets_the_import_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    for name in [name for name in sys.modules if name.startswith("hotswap_lab.widgets")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=r': pip install "hotswap_lab\[widgets\]"$'):
        importlib.import_module("hotswap_lab.widgets")


@pytest.mark.parametrize("modes", [(False, False), (False, True), (True, False)])
def test_a_click_has_the_modes_of_the_cell_that_made_the_widget(modes):
    """A kernel may deliver a click in any thread, where gradients are on, and a compiled model would recompile."""
    grad, inference = modes
    with torch.inference_mode(inference), torch.set_grad_enabled(grad):
        work = WorkingView()
    found = []
    click = partial(
        work._enqueue, "", lambda: found.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
    )
    for turn_off in (torch.enable_grad, torch.no_grad):
        with turn_off(), ThreadPoolExecutor(1) as subshell:
            click()
            assert work.wait(30)
            subshell.submit(click).result(30)
            assert work.wait(30)
    assert found == [modes] * 4
