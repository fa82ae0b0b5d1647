"""The base class of all widgets: a static view that is stored, and a live view that hides it while a kernel runs."""

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
from ..figures import Figure, palette
from .switch import contents

try:
    import ipywidgets as w
    from IPython import get_ipython
except ModuleNotFoundError as _error:
    raise ImportError(f'{_error}: pip install "hotswap_lab[widgets]"', name="ipywidgets") from _error

#: the note on a view of a previous state of a model
CHANGED = "changed since: run again"
#: seconds between two looks for a change
EVERY = 0.5
WIDGET_MIME = "application/vnd.jupyter.widget-view+json"
#: the width of a page minus the margins that ipywidgets puts around a control
FITS = "calc(100% - 4px)"

FOLDER = Path(__file__).parent
STYLE = f"<style>{Template((FOLDER / 'live.css').read_text('utf-8')).substitute(vars(palette))}</style>"
# nothing is loaded: the image is empty, and starts the script once the widget is in the page
_script = re.sub("//.*", "", (FOLDER / "live.js").read_text("utf-8"))
SCRIPT = f'<img alt="" src="data:image/gif;base64,R0lGODlhAQABAAAAACw=" onload="this.onerror()" onerror="{_script}">'
# comes before the static view: hides JupyterLab's "Loading widget..." below it, in a saved notebook without a kernel
QUIET = (FOLDER / "quiet.html").read_text("utf-8")


def escape(text: object) -> str:
    """Escape text for HTML, so that prompts, names and errors can't become markup.

    >>> escape("<b>")
    '&lt;b&gt;'
    """
    return html.escape(str(text))


def counted(count: int, noun: str) -> str:
    """Return a count with a noun, singular or plural.

    >>> counted(1, "swap"), counted(2, "swap")
    ('1 swap', '2 swaps')
    """
    return f"{count} {noun}{'' if count == 1 else 's'}"


def wrapping_row(*children: w.Widget) -> w.HBox:
    """Return a row of controls that wraps on a narrow page."""
    return w.HBox(list(children), layout=w.Layout(flex_flow="row wrap", align_items="center"))


def announced(**options: object) -> w.HTML:
    """Return a text widget that a screen reader reads out when it changes."""
    return w.HTML(_dom_classes=["hotswap-says"], **options)


def choices(**options: object) -> w.ToggleButtons:
    """Return toggle buttons for adapters."""
    return w.ToggleButtons(_dom_classes=["hotswap-choices"], **options)


def note_cell(*_: object) -> None:
    """Make all live views check for a change, because other code may have changed a model in the cell that ended."""
    LATEST[0] = object()


def _follow(view: "weakref.ref[View]", loop: asyncio.AbstractEventLoop, seen: object = None) -> None:
    """Update a live view after each change, until it is closed or gone.

    It runs in an event loop, where the code that made the change holds no lock.
    """
    now, shown = LATEST[0], view()
    if shown and shown.box.comm:
        try:
            if now is not seen:
                shown._changed()
        except Exception as error:  # its adapter may be gone
            shown._title.value = f'<span class="hotswap-lost">{escape(error)}</span>'
        loop.call_later(EVERY, _follow, view, loop, now)


class View:
    """The base class of widgets: a title, controls, a status, and a body.

    A subclass defines ``summary``, ``figure`` or ``_inside``, and for the live view ``_controls`` and ``_refresh``.
    A notebook shows two outputs: the static view, which stays in the saved notebook, and the live view, which hides the
    static one. Setting a public attribute updates the live view.

    >>> class Hello(View):
    ...     summary = "hello"
    >>> Hello(), Hello().to_html()
    (Hello: hello, '<div><strong>Hello</strong>: hello</div>')
    """

    #: one line that describes the widget's state
    summary = ""
    #: the widget's title; without one, the head is the class and the summary
    title = ""
    #: whether a job is running
    busy = False
    #: the state of the model when the view read it, or began to run it
    _seen: object = None

    def __new__(cls, *args: object, **options: object) -> "View":
        self = super().__new__(cls)
        # one refresh at a time, so that a delayed thread doesn't overwrite a newer state with an older one
        self._refreshes = threading.RLock()
        return self

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        if not name.startswith("_"):
            self._changed()

    # ---- changes of the model

    def _now(self) -> object:
        """The model's state. Store it as ``_seen`` where no other thread can change it: inside ``in_use``."""
        return contents(self)

    @property
    def _note(self) -> str:
        """The note on a view that doesn't show the model's state, and is gray; empty if it does."""
        return CHANGED if self._seen and not self.busy and self._seen != self._now() else ""

    # ---- the static view

    def __str__(self) -> str:
        return f"{type(self).__name__}: {self.summary}"

    def __repr__(self) -> str:
        return str(self)

    def figure(self) -> Figure | None:
        """The widget's picture, or None."""
        return None

    def to_html(self) -> str:
        """The static view as HTML, which needs no kernel, network or scripts."""
        return f"<div>{self._head()}{f'<div>{self._note}</div>' if self._note else ''}{self._inside()}</div>"

    def _head(self) -> str:
        text = f"<strong>{escape(self.title or type(self).__name__)}</strong>"
        return text if self.title else f"{text}: {escape(self.summary)}"

    def _inside(self) -> str:
        figure = self.figure()
        return self._framed(figure) if figure else ""

    def _framed(self, *parts: Figure) -> str:
        """The parts of a picture, next to each other on a wide page, and below each other on a narrow one."""
        resizable = []
        for part in parts:
            width, _ = part.size
            style = f"flex:1 1 {0.8 * width:g}px;min-width:0;max-width:{1.4 * width:g}px;height:auto"
            resizable.append(part.svg.replace("<svg ", f"<svg style='{style}' ", 1))
        look = f"data-note='{escape(self._note)}' style='display:flex;flex-wrap:wrap'"
        return f"<div class='hotswap-picture' {look}>{''.join(resizable)}</div>"

    def _static(self) -> dict[str, str]:
        """The output in a saved notebook. The same state gives the same output."""
        figure = self.figure()
        # GitHub removes pictures from HTML, so a picture is HTML only where it needs the note
        shown = figure._repr_mimebundle_() if figure and not self._note else {"text/html": self.to_html()}
        return {**shown, "text/plain": str(self)}

    # ---- the live view

    @cached_property
    def box(self) -> w.VBox:
        """The live view, an ipywidgets ``VBox``, which can be put into another layout."""
        with contextlib.suppress(RuntimeError):  # in a thread without an event loop, only clicks update the view
            (loop := asyncio.get_running_loop()).call_soon(_follow, weakref.ref(self), loop)
        look = w.HTML(STYLE + SCRIPT, layout=w.Layout(display="none"))
        return w.VBox([look, *self._build()], _dom_classes=["hotswap-live"])

    def _build(self) -> list[w.Widget]:
        """Create the live view's widgets, once."""
        self._title, self._status, self._body = announced(), announced(), w.HTML()
        return [self._title, *self._controls(), self._status, self._body]

    def _controls(self) -> list[w.Widget]:
        """Create the controls, once."""
        return []

    def _refresh(self) -> None:
        """Update the live view to the current state."""
        self._title.value = self._head()
        self._refresh_body()

    def _refresh_body(self) -> None:
        self._body.value = self._inside()

    def _changed(self) -> None:
        """Update the live view, if there is one. Call it after a change of state that sets no public attribute."""
        if "box" in self.__dict__ and not self._refreshes._is_owned():
            self._refresh_box()

    def _refresh_box(self) -> None:
        with self._refreshes:
            _ = self.box  # created before the refresh, which needs it
            self._refresh()

    def _ipython_display_(self) -> None:
        from IPython.display import display

        if shell := get_ipython():
            shell.events.register("post_run_cell", note_cell)
        display({"text/html": QUIET, "text/plain": ""}, raw=True)
        display(self._static(), raw=True)
        self._refresh_box()
        display({WIDGET_MIME: {"version_major": 2, "version_minor": 0, "model_id": self.box.model_id}}, raw=True)

    def _when_set(self, control: w.Widget, act: Callable[[object], object]) -> None:
        """Call ``act`` with a control's value when the user sets it, but not when a refresh does.

        Acting on a refresh would lose a change that another thread made after the refresh had read the state.
        """

        def changed(change: dict[str, object]) -> None:
            if not self._refreshes._is_owned():
                act(change["new"])

        control.observe(changed, "value")
