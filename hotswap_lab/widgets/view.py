"""The base class of all widgets: a static form that is stored, and a live form that replaces it while a kernel runs."""

from __future__ import annotations

import html
import threading
from collections.abc import Callable
from functools import cached_property
from importlib.util import find_spec
from string import Template
from typing import TYPE_CHECKING

from ..figures import palette

if TYPE_CHECKING:
    import ipywidgets

    from ..figures import Figure

# checked on import, so that the error comes before anything is loaded for a widget; the import itself waits
if find_spec("ipywidgets") is None:
    raise ImportError(
        "hotswap_lab.widgets needs ipywidgets 7.7 or newer, below 9, and found none: "
        'pip install "hotswap_lab[widgets]"',
        name="ipywidgets",
    )

WIDGET_MIME = "application/vnd.jupyter.widget-view+json"
#: the width of a page minus the margins that ipywidgets puts around a control
FITS = "calc(100% - 4px)"
#: styles of the static forms: a button, the chosen one, and a card
CHIP = "display:inline-block;padding:2px 10px;margin:2px;border:1px solid rgba(128,128,128,.4);border-radius:3px;"
CHOSEN = f"background:{palette.ACTIVE};color:{palette.WHITE};"
CARD = "padding:8px 14px;text-align:left;vertical-align:top;min-width:180px;border:1px solid rgba(128,128,128,.4)"

# Colors come from the theme if there is one. The first rule hides the stored static form while the live one is shown.
# Without a kernel, nothing has the class hotswap-live, so the static form is shown.
STYLE = Template("""<style>
.jp-OutputArea-child:has(+ .jp-OutputArea-child .hotswap-live) { display: none }
.hotswap-live { color: var(--jp-ui-font-color1, inherit); max-width: 760px; overflow: visible }
.hotswap-live .widget-html, .hotswap-live .widget-html-content, .hotswap-live .jupyter-widgets.widget-html
  { height: auto; max-width: 100%; line-height: 1.45; overflow: visible; margin: 2px 0 }
.hotswap-live .widget-html-content { width: 100%; white-space: normal; font-size: 13px }
.hotswap-live .hotswap-picture { overflow-x: auto }
.hotswap-live .hotswap-picture svg { min-width: 500px }
.hotswap-live pre { white-space: pre-wrap; word-break: normal; overflow-wrap: anywhere; margin: 4px 0; padding: 6px 8px;
  color: inherit; background: rgba(128, 128, 128, .14); border-radius: 4px; font-size: 12px; line-height: 1.45 }
.hotswap-live .hotswap-error pre { border-left: 4px solid $WRONG }
.hotswap-live .hotswap-muted { opacity: .8 }
.hotswap-live .hotswap-cards .jupyter-widgets, .hotswap-live .hotswap-cards .widget-html-content { display: flex }
.hotswap-live .hotswap-answer { border: 1px solid rgba(128, 128, 128, .45); border-radius: 6px; padding: 8px 12px;
  box-sizing: border-box; min-height: 84px; overflow-wrap: anywhere; flex: 1; min-width: 0 }
.hotswap-live .hotswap-answer .hotswap-text { font-size: 18px; white-space: pre-wrap; margin: 4px 0 }
.hotswap-live .hotswap-answer img { max-width: 100%; height: auto }
.hotswap-live .jupyter-button { width: auto; height: auto; min-height: 30px; padding: 2px 12px; line-height: 24px }
.hotswap-live .jupyter-button.mod-info, .hotswap-live .jupyter-button.mod-primary
  { background: $ACTIVE; color: $WHITE }
.hotswap-live .hotswap-time { font-size: 22px }
.hotswap-live select { background: linear-gradient(45deg, transparent 50%, currentColor 50%) right 10px center / 5px 5px
  no-repeat, linear-gradient(-45deg, transparent 50%, currentColor 50%) right 5px center / 5px 5px no-repeat,
  var(--jp-widgets-input-background-color, transparent) }
.hotswap-live :focus-visible { outline: 3px solid $ACTIVE; outline-offset: 2px; box-shadow: 0 0 0 2px $WHITE }
</style>""").substitute(vars(palette))

# Attributes that ipywidgets can't set: a slider's handle and number get the label next to them as their name for screen
# readers. Text that changes by itself is read out; the attribute is on a permanent element, since a widget's content is
# replaced each time. The notebook leaves keys pressed in here to the controls, while Notebook 7 would use arrow keys.
# Nothing is loaded: the picture is empty, and only starts the script when the widget is in the page.
FOR_SCREEN_READERS = """<img alt="" src="data:image/gif;base64,R0lGODlhAQABAAAAACw=" onload="this.onerror()" onerror="
  setTimeout(() => {
    const root = this.closest('.hotswap-live');
    root?.querySelectorAll('.noUi-handle').forEach(handle => handle.setAttribute(
      'aria-label', handle.closest('.jupyter-widgets').querySelector('label').textContent));
    root?.querySelectorAll('.widget-readout').forEach(readout => readout.setAttribute(
      'aria-label', readout.closest('.jupyter-widgets').querySelector('label').textContent + ', as a number'));
    root?.addEventListener('focusin', ({target}) => target.matches('.noUi-handle, button, select') &&
      target.setAttribute('data-lm-suppress-shortcuts', 'true'));
    root?.querySelectorAll('.hotswap-says').forEach(each => each.setAttribute('aria-live', 'polite'));
  }, 300)">"""


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


def wrapping_row(*children: ipywidgets.Widget) -> ipywidgets.HBox:
    """A row of controls that wraps on a narrow page."""
    import ipywidgets

    return ipywidgets.HBox(list(children), layout=ipywidgets.Layout(flex_flow="row wrap", align_items="center"))


def speaking(**options: object) -> ipywidgets.HTML:
    """A text widget that a screen reader reads out when it changes."""
    import ipywidgets

    widget = ipywidgets.HTML(**options)
    widget.add_class("hotswap-says")
    return widget


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

    def __new__(cls, *args: object, **options: object) -> View:
        self = super().__new__(cls)
        # one refresh at a time, so that a delayed thread doesn't overwrite a newer state with an older one
        self._refreshes = threading.RLock()
        return self

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        if not name.startswith("_"):
            self._changed()

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
        return f"<strong>{type(self).__name__}</strong>: {escape(self.summary)}"

    def _inside(self) -> str:
        figure = self.figure()
        if figure is None:
            return ""
        shrinking = figure.svg.replace("<svg ", "<svg style='max-width:100%;height:auto' ", 1)
        return f"<div class='hotswap-picture'>{shrinking}</div>"

    def _static(self) -> dict[str, str]:
        """The output that a saved notebook keeps. The same state gives the same output."""
        figure = self.figure()
        # GitHub shows a picture by itself, but removes pictures in HTML
        shown = {"text/html": self.to_html()} if figure is None else {"image/svg+xml": figure.svg}
        return {**shown, "text/plain": str(self)}

    # ---- the live form

    @cached_property
    def box(self) -> ipywidgets.VBox:
        """The live form, an ipywidgets ``VBox``, which can be put into another layout."""
        import ipywidgets

        hidden = ipywidgets.Layout(display="none")
        box = ipywidgets.VBox([ipywidgets.HTML(STYLE + FOR_SCREEN_READERS, layout=hidden), *self._build()])
        box.add_class("hotswap-live")
        return box

    def _build(self) -> list[ipywidgets.Widget]:
        """Create the live form's widgets, once."""
        import ipywidgets

        self._title, self._status, self._body = speaking(), speaking(), ipywidgets.HTML()
        return [self._title, *self._controls(), self._status, self._body]

    def _controls(self) -> list[ipywidgets.Widget]:
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

        display(self._static(), raw=True)
        self._refresh_box()
        live = {"version_major": 2, "version_minor": 0, "model_id": self.box.model_id}
        display({WIDGET_MIME: live}, raw=True)

    def _when_set(self, control: ipywidgets.Widget, act: Callable[[object], object]) -> None:
        """Call ``act`` with a control's value when the user sets it, but not when a refresh does.

        Another thread may have changed the state since the refresh read it, and that change would be lost.
        """

        def changed(change: dict[str, object]) -> None:
            if not self._refreshes._is_owned():
                act(change["new"])

        control.observe(changed, "value")
