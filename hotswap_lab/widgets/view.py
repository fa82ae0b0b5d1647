"""The base class of all widgets: a static form that is stored, and a live form that replaces it while a kernel runs."""

from __future__ import annotations

import asyncio
import contextlib
import html
import re
import threading
import weakref
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from string import Template

from ..core.change import LATEST
from ..figures import FONT, Figure, palette
from .switch import contents

try:
    import ipywidgets as w
    from IPython import get_ipython
except ModuleNotFoundError as _error:
    raise ImportError(f'{_error}: pip install "hotswap_lab[widgets]"', name="ipywidgets") from _error

#: what a view says that shows what was in a model before, and what its picture becomes
CHANGED = "changed since: run again"
OLD = rf"""\1<g opacity='.35'>\2</g><text x='50%' y='50%' font-size='18' text-anchor='middle' fill='{palette.INK}'
stroke='{palette.CARD}' stroke-width='5' paint-order='stroke' {FONT}>{CHANGED}</text>\3"""
#: seconds between two looks for a change
EVERY = 0.5
WIDGET_MIME = "application/vnd.jupyter.widget-view+json"
#: the width of a page minus the margins that ipywidgets puts around a control
FITS = "calc(100% - 4px)"

FOLDER = Path(__file__).parent
STYLE = f"<style>{Template((FOLDER / 'live.css').read_text('utf-8')).substitute(vars(palette))}</style>"
# nothing is loaded: the picture is empty, and only starts the script when the widget is in the page
_script = re.sub("//.*", "", (FOLDER / "live.js").read_text("utf-8"))
SCRIPT = f'<img alt="" src="data:image/gif;base64,R0lGODlhAQABAAAAACw=" onload="this.onerror()" onerror="{_script}">'
# before the static form: hides JupyterLab's "Loading widget..." below it, in a saved notebook without a kernel
QUIET = """<i class="hotswap-quiet"></i><style>.jp-OutputArea-child:has(.hotswap-quiet),
.jp-OutputArea-child:has(.hotswap-quiet) + * + .jp-OutputArea-child:not(:has(.hotswap-live, [data-mime-type]))
{ display: none }</style>"""


def escape(text: object) -> str:
    """Escape text for HTML, so that nothing in a prompt, a name or an error becomes markup.

    >>> escape("<b>")
    '&lt;b&gt;'
    """
    return html.escape(str(text))


def counted(count: int, what: str) -> str:
    """A count with a noun, singular or plural.

    >>> counted(1, "swap"), counted(2, "swap")
    ('1 swap', '2 swaps')
    """
    return f"{count} {what}{'' if count == 1 else 's'}"


def wrapping_row(*children: w.Widget) -> w.HBox:
    """A row of controls that wraps on a narrow page."""
    return w.HBox(list(children), layout=w.Layout(flex_flow="row wrap", align_items="center"))


def speaking(**options: object) -> w.HTML:
    """A text widget that a screen reader reads out when it changes."""
    widget = w.HTML(**options)
    widget.add_class("hotswap-says")
    return widget


#: the views with a live form, and the event loops that update them
_live: weakref.WeakSet[View] = weakref.WeakSet()
_loops: weakref.WeakSet[asyncio.AbstractEventLoop] = weakref.WeakSet()


def follow(*_: object) -> None:
    """Have all live forms updated now, and after each change of a model or a pool from now on.

    Called when a live form is made, and at the end of each cell, since other code may have changed a model there.
    """
    LATEST[0] = object()
    with contextlib.suppress(RuntimeError):  # no loop in this thread: there is one at the end of the next cell
        if (loop := asyncio.get_running_loop()) not in _loops:
            _loops.add(loop)
            loop.call_soon(_update, loop)


def _update(loop: asyncio.AbstractEventLoop, seen: object = None) -> None:
    """Update the live forms if anything has changed, in an event loop: the code that made the change holds no lock."""
    if seen is not LATEST[0]:
        seen = LATEST[0]
        for view in [*_live]:
            with contextlib.suppress(Exception):  # its adapter may be gone
                view._changed()
    if any(view.box.comm for view in _live):
        loop.call_later(EVERY, _update, loop, seen)
    else:
        _loops.discard(loop)


class View:
    """The base class of widgets: a title, controls, a status, and a body.

    A subclass defines ``summary``, ``figure`` or ``_inside``, and for the live form ``_controls`` and ``_refresh``.
    A notebook shows two outputs: the static form, which stays in the saved notebook, and the live form, which hides the
    static one while it is shown. Setting a public attribute updates the live form.

    >>> class Hello(View):
    ...     summary = "hello"
    >>> Hello(), Hello().to_html()
    (Hello: hello, '<div><strong>Hello</strong>: hello</div>')
    """

    #: one line that describes the widget's state
    summary = ""
    #: a title that says what the widget shows; without one, it is the class and the summary
    title = ""
    #: whether it is at work, and shows that
    busy = False
    #: what was in the model when the view read it, or began to compute with it; None before that
    _seen: object = None

    def __new__(cls, *args: object, **options: object) -> View:
        self = super().__new__(cls)
        # one refresh at a time, so that a delayed thread doesn't overwrite a newer state with an older one
        self._refreshes = threading.RLock()
        return self

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        if not name.startswith("_"):
            self._changed()

    # ---- whether it is still so

    def _now(self) -> object:
        """What is in the model now, to be compared with what was there."""
        return contents(self)

    def _saw(self) -> None:
        """Note what is in the model. Call it where no other thread can change that: inside ``in_use``."""
        self._seen = self._now()

    @property
    def _is_old(self) -> bool:
        """Whether the model has changed since: then the view is gray, and says so."""
        return not self.busy and self._seen is not None and self._seen != self._now()

    # ---- the static form

    def __str__(self) -> str:
        return f"{type(self).__name__}: {self.summary}"

    def __repr__(self) -> str:
        return str(self)

    def figure(self) -> Figure | None:
        """The widget's picture, or None."""
        return None

    def to_html(self) -> str:
        """The static form as HTML, which needs no kernel, network or scripts."""
        return f"<div>{self._head()}{self._inside()}</div>"

    def _head(self) -> str:
        text = f"<strong>{escape(self.title or type(self).__name__)}</strong>"
        return text if self.title else f"{text}: {escape(self.summary)}"

    def _inside(self) -> str:
        figure = self.figure()
        if figure is None:
            return ""
        width = int(re.search(r"width='(\d+)'", figure.svg)[1])  # as wide as there is room, but still readable
        style = f"width:100%;min-width:{min(0.9 * width, 480):g}px;max-width:{1.4 * width:g}px;height:auto"
        shrinking = self._marked(figure.svg).replace("<svg ", f"<svg style='{style}' ", 1)
        return f"<div class='hotswap-picture'>{shrinking}</div>"

    def _marked(self, svg: str) -> str:
        """A picture; if it is old, pale and with a note on it."""
        return re.sub("(<svg .*?>)(.*)(</svg>)", OLD, svg, flags=re.DOTALL) if self._is_old else svg

    def _static(self) -> dict[str, str]:
        """The output that a saved notebook keeps. The same state gives the same output."""
        figure = self.figure()
        # GitHub shows a picture by itself, but removes pictures in HTML
        shown = {"text/html": self.to_html()} if figure is None else {"image/svg+xml": self._marked(figure.svg)}
        return {**shown, "text/plain": str(self)}

    # ---- the live form

    @cached_property
    def box(self) -> w.VBox:
        """The live form, an ipywidgets ``VBox``, which can be put into another layout."""
        box = w.VBox([w.HTML(STYLE + SCRIPT, layout=w.Layout(display="none")), *self._build()])
        box.add_class("hotswap-live")
        _live.add(self)
        if shell := get_ipython():
            shell.events.register("post_run_cell", follow)
        follow()
        return box

    def _build(self) -> list[w.Widget]:
        """Create the live form's widgets, once."""
        self._title, self._status, self._body = speaking(), speaking(), w.HTML()
        return [self._title, *self._controls(), self._status, self._body]

    def _controls(self) -> list[w.Widget]:
        """Create the controls, once."""
        return []

    def _refresh(self) -> None:
        """Update the live form to the current state."""
        self._title.value = self._head()
        self._refresh_body()

    def _refresh_body(self) -> None:
        self._body.value = self._inside()

    def _changed(self) -> None:
        """Update the live form, if there is one. Call it after a change of state that sets no public attribute."""
        if "box" in self.__dict__ and not self._refreshes._is_owned():
            self._refresh_box()

    def _refresh_box(self) -> None:
        with self._refreshes:
            _ = self.box
            self._refresh()

    def _ipython_display_(self) -> None:
        from IPython.display import display

        display({"text/html": QUIET, "text/plain": ""}, raw=True)
        display(self._static(), raw=True)
        self._refresh_box()
        display({WIDGET_MIME: {"version_major": 2, "version_minor": 0, "model_id": self.box.model_id}}, raw=True)

    def _when_set(self, control: w.Widget, act: Callable[[object], object]) -> None:
        """Call ``act`` with a control's value when the user sets it, but not when a refresh does.

        Another thread may have changed the state since the refresh read it, and that change would be lost.
        """

        def changed(change: dict[str, object]) -> None:
            if not self._refreshes._is_owned():
                act(change["new"])

        control.observe(changed, "value")
