"""SwapPanel: swap adapters by buttons, run a prompt, and compare the answers before and after."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from typing import TYPE_CHECKING
from urllib.parse import quote

import torch

from .. import demo
from ..core.errors import refuse
from ..figures.latency import readable
from ..pools.adapter_pool import AdapterPool
from ..threads import in_use, in_use_now
from .results import Run, answering
from .switch import demo_pool, strength_of, switch_for, whereabouts
from .text import text_stream
from .view import CARD, CHIP, CHOSEN, FITS, counted, escape, speaking, wrapping_row
from .weight_map import WeightMap
from .work import WorkingView

if TYPE_CHECKING:
    import ipywidgets

#: the slider's range; 1 is the trained strength
STRENGTHS = (0.0, 1.5)
#: shown in place of an answer
NOTHING = {"before": "no earlier answer to this prompt", "after": "no answer yet"}
#: in front of an adapter's name: whether it is the active one, not by color alone, in the same width
MARKS = {True: "● ", False: "○ "}


class SwapPanel(WorkingView):
    """A button for each adapter, a strength, a prompt, and the answers before and after the last swap.

    Parameters
    ----------
    pool_or_model:
        An :class:`AdapterPool`, or a model, together with ``adapters``.
    generate:
        A function that takes the prompt, and returns text or an image, or yields its text so far, which is shown as it
        grows. Default: the model's greedy answer, which needs ``tokenizer``. It runs inside ``with in_use(model)``, so
        swaps by other threads wait for its end, and it can't swap.
    tokenizer, template, max_new_tokens:
        For the default ``generate``, see :func:`hotswap_lab.widgets.text.text_stream`.
    adapters:
        For a model: a dict of names and sources for :func:`hotswap_adapter`.
    adapter_name:
        For a model: the adapter to swap.
    prompt:
        The first text in the prompt box.
    run_on_swap:
        Whether a click on an adapter, or a move of the slider, runs the prompt as well.
    multiline:
        Whether the prompt box has several lines. In one line, Enter runs the prompt.

    Examples
    --------
    >>> from hotswap_lab import demo
    >>> from hotswap_lab.widgets import SwapPanel
    >>> model, tokenizer = demo.load("reverse")
    >>> folders = {name: demo.adapter_path(name) for name in ("reverse", "sort")}
    >>> panel = SwapPanel(model, lambda word: demo.ask(model, tokenizer, word), adapters=folders, prompt="hotswap")
    >>> panel.active = "sort"
    >>> panel.run()
    'ahopstw'
    >>> panel.choose("reverse")           # what a click on its button does
    'pawstoh'
    >>> print(panel)
    SwapPanel: 2 adapters, reverse is active at strength 1
    before, sort: ahopstw
    after, reverse: pawstoh

    How to read it: both answers are to the same prompt. An error is shown in the panel, and raised by calls from
    Python. The model is then as it was.
    """

    def __init__(
        self,
        pool_or_model: AdapterPool | torch.nn.Module,
        generate: Callable[[str], object] | None = None,
        *,
        tokenizer: object = None,
        template: str | None = None,
        max_new_tokens: int = 64,
        adapters: Mapping[str, object] | None = None,
        adapter_name: str | None = None,
        prompt: str = "",
        run_on_swap: bool = True,
        multiline: bool = False,
    ):
        self._switch = switch_for(pool_or_model, adapters, adapter_name)
        # a tokenizer is callable, too, so one passed as generate is recognized by its decode
        usable = tokenizer is not None if generate is None else callable(generate) and not hasattr(generate, "decode")
        if not usable:
            raise refuse("panel_cannot_run", generate=type(generate).__name__, tokenizer=type(tokenizer).__name__)
        self.generate: Callable[[str], object] = generate or text_stream(
            self._switch.model, tokenizer, template=template, max_new_tokens=max_new_tokens
        )
        self.run_on_swap = run_on_swap
        self._multiline = multiline
        self._looked: tuple[object, ...] | None = None
        self._painted: tuple[object, ...] | None = None
        #: the text in the prompt box
        self.prompt = prompt
        #: the last answer, and an earlier one to the same prompt with another adapter or strength
        self.after: Run | None = None
        self.before: Run | None = None

    @classmethod
    def demo(cls, prompt: str = "hotswap", **options: object) -> SwapPanel:
        """Make a panel with the embedded model and all of its adapters.

        >>> from hotswap_lab.widgets import SwapPanel
        >>> SwapPanel.demo().choose("pig_latin")
        'otswaphay'
        """
        pool, tokenizer = demo_pool()
        return cls(pool, tokenizer=tokenizer, template="{}" + demo.SEPARATOR, prompt=prompt, **options)

    # ---- state

    @property
    def model(self) -> torch.nn.Module:
        """The model that answers. Changes by clicks wait for the end of a block ``with in_use(panel):`` in a cell."""
        return self._switch.model

    @property
    def names(self) -> list[str]:
        """The names of the adapters, which have one button each."""
        return self._switch.names

    @property
    def active(self) -> str | None:
        """The active adapter; None if it is off, or not one of the panel's. Setting it swaps."""
        return self._switch.active

    @active.setter
    def active(self, name: str | None) -> None:
        self._run(lambda: self._change("adapter", name))

    @property
    def strength(self) -> float:
        """The strength of the adapter: 1 as trained, 0 for no effect. Can be set."""
        return self._switch.strength

    @strength.setter
    def strength(self, value: float) -> None:
        self._run(lambda: self._change("strength", value))

    @cached_property
    def map(self) -> WeightMap:
        """The map above the answers, as it was when it was last shown."""
        return WeightMap(self._switch)

    # ---- actions

    def choose(self, name: str | None) -> object:
        """Swap (None: off) and, with ``run_on_swap``, run the prompt, as a click on an adapter's button does."""
        return self._run(lambda: self._change_and_run("adapter", name))

    def start(self) -> None:
        """Run the prompt in a thread of its own, as the button does. During another run, this waits for its end."""
        self._come(f"run {self.prompt}", self._work)

    def _set_by_click(self, what: str, value: object) -> None:
        self._come(f"{what} {'off' if value is None else value}", partial(self._change_and_run, what, value))

    def _change_and_run(self, what: str, value: object) -> object:
        self._change(what, value)
        return self._work() if self.run_on_swap else None

    def _change(self, what: str, value: object) -> None:
        """Swap, or change the strength. The status shows if it waits for threads that compute with the model."""
        if what == "strength":
            doing, change = f"setting the strength to {value}", lambda: setattr(self._switch, "strength", value)
        elif value is None:
            doing, change = "turning the adapter off", self._switch.off
        else:
            doing, change = f"swapping {value} in", lambda: self._switch.swap(value)
        self.doing: str = f"{doing}, as soon as no other thread computes with the model"
        seconds = self._carried_out(change)
        self.swap_seconds: float | None = seconds if what == "adapter" else self.swap_seconds

    def _carried_out(self, change: Callable[[], object]) -> float:
        """Make a change, and look at the model. Returns the seconds that the change took."""
        seconds = self._when_free(change)
        with in_use(self.model):  # waits, as no refresh may
            self._looked = None
            self._look()
        return seconds

    def _work(self) -> object:
        """Run the prompt."""
        # swaps by other threads wait, so that an answer comes from one adapter and has its name
        with in_use(self.model):
            self.doing = "running"
            return self._answer()

    def _answer(self) -> object:
        run = Run(str(self.prompt), whereabouts(self._switch), strength_of(self._switch))
        # after an error, no old answer is shown next to a prompt that it does not answer
        with answering([run], lambda: vars(self).update(before=None, after=None)):
            self.before, self.after = _earlier(run, self.before, self.after), run
            given = self.generate(run.prompt)
            for run.result in given if isinstance(given, Iterator) else [given]:
                self._progressed()
                self._check()
        return run.result

    # ---- text, picture and controls

    @property
    def summary(self) -> str:
        """One line: the number of adapters, the active one, and its strength."""
        where, strength = whereabouts(self._switch), strength_of(self._switch)
        active = "the adapter is off" if where == "off" else f"{where} is active"
        at = "" if where == "off" or strength is None else f" at strength {strength:g}"
        return f"{counted(len(self.names), 'adapter')}, {active}{at}"

    @property
    def _answers(self) -> dict[str, Run | None]:
        return {"before": self.before, "after": self.after}

    def _lines(self) -> list[str]:
        return [f"{title}, {run.label}: {run.text}" for title, run in self._answers.items() if run]

    def _inside(self) -> str:
        # without times, which would make a stored notebook differ from run to run
        where = whereabouts(self._switch)
        chips = " ".join(
            f'<span style="{CHIP}{CHOSEN if name == where else ""}">{MARKS[name == where]}{escape(name)}</span>'
            for name in [*self.names, "off"]
        )
        prompt = f'<div style="margin:6px 0">prompt: <code>{escape(self.prompt)}</code></div>' if self.prompt else ""
        cards = [f'<td style="{CARD}">{run.to_html(title)}</td>' for title, run in self._answers.items() if run]
        answers = f'<table style="border-collapse:collapse;margin:4px 0"><tr>{"".join(cards)}</tr></table>'
        self._look()
        # an image, since JupyterLab leaves out drawings in the HTML of a notebook that it does not trust
        image = quote(self.map.figure().svg, safe=" '=:/;+,()")
        picture = f'<img alt="{escape(self.map)}" src="data:image/svg+xml,{image}">' if self.map.tiles else ""
        return f"<div>{chips}</div>{prompt}{picture}{answers if cards else ''}"

    def _build(self) -> list[ipywidgets.Widget]:
        import ipywidgets as w

        *frame, _ = super()._build()
        card = w.Layout(flex="1 1 220px", min_width="0", margin="2px")
        self._cards = [w.HTML(layout=card), speaking(layout=card)]
        self._picture = w.HTML()
        cards = w.HBox(self._cards, layout=w.Layout(flex_flow="row wrap", align_items="stretch"))
        cards.add_class("hotswap-cards")
        return [*frame, self._picture, cards]

    def _controls(self) -> list[ipywidgets.Widget]:
        import ipywidgets as w

        self._buttons, self._buttons_for = wrapping_row(), []
        wide = w.Layout(width="320px", max_width=FITS)
        self._slider = w.FloatSlider(step=0.05, description="strength", continuous_update=False, layout=wide)
        self._when_set(self._slider, self._slid)
        wider = w.Layout(width="440px", max_width=FITS, height="auto")
        kind = w.Textarea if self._multiline else w.Text
        self._box = kind(description="prompt", placeholder="what the model is asked", layout=wider)
        if not self._multiline:
            with warnings.catch_warnings():
                # what ipywidgets 8 recommends instead would run the prompt when the box loses the focus, too
                warnings.simplefilter("ignore")
                self._box.on_submit(lambda _: self._clicked(self.start))
        self._when_set(self._box, lambda text: vars(self).update(prompt=text))  # with no refresh while the user types
        self._run_button = self._button("Run", "run the prompt", self.start, button_style="primary")
        return [self._buttons, self._slider, wrapping_row(self._box, *self._with_stop(self._run_button))]

    def _slid(self, value: float) -> None:
        if value != strength_of(self._switch):
            self._clicked(lambda: self._set_by_click("strength", value))
        elif self._slider_waits:  # the slider was moved back before its change was made
            self._next = None

    @property
    def _slider_waits(self) -> bool:
        return (waiting := self._next) is not None and waiting[0].startswith("strength ")

    def _state(self) -> str:
        state = super()._state()
        if self.after is not None and self.after.state != "running":
            state += f"; run: {readable(self.after.seconds)}"
        return state

    def _refresh(self) -> None:
        strength = strength_of(self._switch)
        super()._refresh()
        self._refresh_buttons()
        self._look()
        if self._painted is not self._looked:
            self._painted = self._looked
            self._picture.value = self.map._inside() if self.map.tiles else ""
        self._slider.disabled = strength is None
        if strength is not None and not self.busy and not self._slider_waits:
            self._slider.max = max(STRENGTHS[1], strength)
            self._slider.min = min(STRENGTHS[0], strength)
            self._slider.value = strength
        self._box.value = str(self.prompt)

    def _look(self) -> None:
        """Look at the model's numbers again, if another adapter or strength is in it.

        It takes a while in a large model, and a growing answer is shown ten times a second.
        """
        if self._looked == (whereabouts(self._switch), strength_of(self._switch)):
            return
        # a swap may wait for a thread that computes, and that thread for the end of this refresh
        with in_use_now(self.model) as is_mine:
            if is_mine:
                now = whereabouts(self._switch), strength_of(self._switch)
                if "map" in vars(self):  # a new map has looked
                    self.map._look()
                else:
                    _ = self.map
                self._looked = now

    def _refresh_body(self) -> None:
        for card, (title, run) in zip(self._cards, self._answers.items(), strict=True):
            inner = run.to_html(title) if run else f"<strong>{title}</strong>: {NOTHING[title]}"
            card.value = f'<div class="hotswap-answer">{inner}</div>'

    def _refresh_buttons(self) -> None:
        """Update the buttons: one for each adapter, and one for none. A pool may have new adapters since."""
        choices = [*self.names, None]
        if self._buttons_for != choices:
            self._buttons.children, self._buttons_for = [self._choice(name) for name in choices], choices
        where = whereabouts(self._switch)
        for name, button in zip(choices, self._buttons.children, strict=True):
            label = name or "off"
            is_active = where == label
            button.description = MARKS[is_active] + label
            button.button_style = "info" if is_active else ""

    def _choice(self, name: str | None) -> ipywidgets.Button:
        tooltip = "turn the adapter off: the base model answers" if name is None else f"swap {name} in"
        tooltip += ", and run the prompt" if self.run_on_swap else ""
        return self._button("", tooltip, lambda: self._set_by_click("adapter", name))


def _earlier(run: Run, before: Run | None, after: Run | None) -> Run | None:
    """The answer to compare ``run`` with: the same prompt, with another adapter or strength; or None."""
    for each in (after, before):
        if each and each.prompt == run.prompt and (each.where, each.strength) != (run.where, run.strength):
            return each
    return None
