"""Jupyter widgets that swap adapters and show the results.

Each widget is one line in a notebook, and Python calls can do everything that clicks can. A saved notebook stores a
static view of it, ``str(...)`` and ``to_html()``, which needs no kernel. The widgets need ipywidgets:
``pip install "hotswap_lab[widgets]"``.

>>> from hotswap_lab.widgets import SwapPanel
>>> panel = SwapPanel.demo()
>>> panel.choose("shout")
'HOTSWAP!'
>>> print(panel)
SwapPanel: 8 adapters, shout is active at strength 1
shout: HOTSWAP!

A widget shows its model's current state, or it is gray with the note ``changed since: run again``, within a second of
any change by this package in the same kernel, whether a click, a cell or a thread makes it. Changes by other code
(PEFT's ``set_scale``, ``load_state_dict``, training) are noticed at the end of the cell. While a cell computes, widgets
follow clicks only.

Tested in JupyterLab 4, Notebook 7 and Voila, by keyboard and at a phone's width, and with ipywidgets 7.7.1 and 8.
While a cell computes, clicks act at once with JupyterLab 4.4 and ipykernel 7 or later (with ipykernel 7.4 from the
second click on). Otherwise the last click acts when the cell has ended. In ``with in_use(panel): ...``, swaps by clicks
wait. Clicks run in the modes of the cell that made the widget, so turn gradients off before you make it.

Files: ``view`` (the base class), ``work`` (the base class of widgets with jobs, which can be stopped), ``clicks`` (the
order of clicks), ``switch`` (swaps by name, in a pool or in a model), ``text`` (answers that grow token by token),
``results`` (an answer as text and HTML), ``live.css`` and ``live.js`` (for the page), and one file for each widget.
"""

from typing import NoReturn

from .. import _raise_missing
from .guards import Guards
from .row_panel import RowPanel
from .swap_panel import SwapPanel
from .view import View
from .weight_map import WeightMap
from .write_scrubber import WriteScrubber

__all__ = ["Guards", "RowPanel", "SwapPanel", "View", "WeightMap", "WriteScrubber"]


def __getattr__(name: str) -> NoReturn:
    _raise_missing(__name__, name)
