"""The base class of all widgets: a static form that is stored, and a live form that replaces it while a kernel runs."""

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

#: what a view says that shows what was in a model before
CHANGED = "changed since: run again"
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
QUIET = (FOLDER / "quiet.html").read_text("utf-8")


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
    return w.HTML(_dom_classes=["hotswap-says"], **options)


def choices(**options: object) -> w.ToggleButtons:
    """Toggle buttons for adapters."""
    return w.ToggleButtons(_dom_classes=["hotswap-choices"], **options)


def note_cell(*_: object) -> None:
    """Have all live forms look for a change: a cell has ended, and may have changed a model by other code."""
    LATEST[0] = object()


def _follow(view: "weakref.ref[View]", loop: asyncio.AbstractEventLoop, seen: object = None) -> None:
    """Update a live form if anything has changed, again and again until it is closed or gone.

    In an event loop, where the code that made the change holds no lock.
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
    #: what was in the model when the view read it, or began to compute with it
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

    # ---- whether it is still so

    def _now(self) -> object:
        """What is in the model now. Note it as ``_seen`` where no other thread can change it: inside ``in_use``."""
        return contents(self)

    @property
    def _note(self) -> str:
        """Why the view doesn't show what is in the model: it is gray then, and says so."""
        return CHANGED if self._seen and not self.busy and self._seen != self._now() else ""

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
        return f"<div>{self._head()}{f'<div>{self._note}</div>' if self._note else ''}{self._inside()}</div>"

    def _head(self) -> str:
        text = f"<strong>{escape(self.title or type(self).__name__)}</strong>"
        return text if self.title else f"{text}: {escape(self.summary)}"

    def _inside(self) -> str:
        figure = self.figure()
        return self._framed(figure) if figure else ""

    def _framed(self, *parts: Figure) -> str:
        """The parts of a picture next to each other where there is room, else below each other."""
        shrinking = []
        for part in parts:
            width, _ = part.size  # as wide as there is room, within reason
            style = f"flex:1 1 {0.8 * width:g}px;min-width:0;max-width:{1.4 * width:g}px;height:auto"
            shrinking.append(part.svg.replace("<svg ", f"<svg style='{style}' ", 1))
        look = f"data-note='{escape(self._note)}' style='display:flex;flex-wrap:wrap'"
        return f"<div class='hotswap-picture' {look}>{''.join(shrinking)}</div>"

    def _static(self) -> dict[str, str]:
        """The output that a saved notebook keeps. The same state gives the same output."""
        figure = self.figure()
        # GitHub shows a picture by itself, but removes pictures in HTML: an old one has to be with its note
        shown = figure._repr_mimebundle_() if figure and not self._note else {"text/html": self.to_html()}
        return {**shown, "text/plain": str(self)}

    # ---- the live form

    @cached_property
    def box(self) -> w.VBox:
        """The live form, an ipywidgets ``VBox``, which can be put into another layout."""
        with contextlib.suppress(RuntimeError):  # a thread without an event loop: its clicks update it
            (loop := asyncio.get_running_loop()).call_soon(_follow, weakref.ref(self), loop)
        look = w.HTML(STYLE + SCRIPT, layout=w.Layout(display="none"))
        return w.VBox([look, *self._build()], _dom_classes=["hotswap-live"])

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
            _ = self.box  # which a refresh needs
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

        Another thread may have changed the state since the refresh read it, and that change would be lost.
        """

        def changed(change: dict[str, object]) -> None:
            if not self._refreshes._is_owned():
                act(change["new"])

        control.observe(changed, "value")
