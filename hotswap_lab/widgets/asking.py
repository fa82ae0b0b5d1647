"""The base class of widgets that swap adapters by name, and run a prompt."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from .. import demo
from ..core.errors import refuse
from ..pools.adapter_pool import AdapterPool
from ..threads import in_use
from .results import Run
from .switch import demo_pool, strength_of, switch_for, whereabouts
from .text import text_stream
from .view import FITS, counted, w, wrapping_row
from .work import WorkingView


class AskingView(WorkingView):
    """The base class of widgets that swap, and run a prompt.

    Parameters
    ----------
    pool_or_model:
        An :class:`AdapterPool`, or a model, together with ``adapters``.
    generate:
        A function that takes the prompt, and returns text or anything that Jupyter shows as an image or as HTML, such
        as audio. Or it yields its text so far, which is shown as it grows. Default: the model's greedy answer, which
        needs ``tokenizer``. It runs inside ``with in_use(model)``, so swaps by other threads wait for its end, and it
        can't swap.
    prompt:
        The first text in the prompt box.
    tokenizer, template, max_new_tokens:
        For the default ``generate``, see :func:`hotswap_lab.widgets.text.text_stream`.
    adapters:
        For a model: a dict of names and sources for :func:`hotswap_adapter`.
    adapter_name:
        For a model: the adapter to swap.
    """

    def __init__(
        self,
        pool_or_model: AdapterPool | torch.nn.Module,
        generate: Callable[[str], object] | None = None,
        *,
        prompt: str = "",
        tokenizer: object = None,
        template: str | None = None,
        max_new_tokens: int = 64,
        adapters: Mapping[str, object] | None = None,
        adapter_name: str | None = None,
    ):
        self._switch = switch_for(pool_or_model, adapters, adapter_name)
        #: the model that answers; changes by clicks wait for the end of a block ``with in_use(panel):`` in a cell
        self.model: torch.nn.Module = self._switch.model
        # a tokenizer is callable, too, so one passed as generate is recognized by its decode
        usable = tokenizer is not None if generate is None else callable(generate) and not hasattr(generate, "decode")
        if not usable:
            raise refuse("panel_cannot_run", generate=type(generate).__name__, tokenizer=type(tokenizer).__name__)
        self.generate: Callable[[str], object] = generate or text_stream(
            self.model, tokenizer, template=template, max_new_tokens=max_new_tokens
        )
        #: the text in the prompt box
        self.prompt = prompt

    @classmethod
    def demo(cls, prompt: str = "hotswap", **options: object) -> Any:
        """Make a widget with the embedded model and all of its adapters.

        >>> from hotswap_lab.widgets import SwapPanel
        >>> SwapPanel.demo().choose("pig_latin")
        'otswaphay'
        """
        pool, tokenizer = demo_pool()
        return cls(pool, tokenizer=tokenizer, template="{}" + demo.SEPARATOR, prompt=prompt, **options)

    # ---- state

    @property
    def names(self) -> list[str]:
        """The names of the adapters."""
        return self._switch.names

    @property
    def active(self) -> str | None:
        """The active adapter; None if it is off, or not one of the widget's. Setting it swaps."""
        return self._switch.active

    @active.setter
    def active(self, name: str | None) -> None:
        self._run(lambda: self._swap(name))

    @property
    def strength(self) -> float:
        """The strength of the adapter: 1 as trained, 0 for no effect. Can be set."""
        return self._switch.strength

    @strength.setter
    def strength(self, value: float) -> None:
        self._run(lambda: self._set_strength(value))

    # ---- jobs

    def _swap(self, name: str | None, strength: float = 1.0) -> None:
        doing = "turning the adapter off" if name is None else f"swapping {name} in"
        change = self._switch.off if name is None else partial(self._switch.swap, name, strength)
        self.swaps.append(self._make(doing, change))

    def _set_strength(self, value: float) -> None:
        self._make(f"setting the strength to {value}", lambda: setattr(self._switch, "strength", value))

    def _make(self, doing: str, change: Callable[[], object]) -> float:
        """Make a change. The status shows if it waits for threads that compute. Returns the seconds that it took."""
        self.doing: str = f"{doing}, as soon as no other thread computes with the model"
        return self._when_free(change)

    def _ask(self, prompt: object, begin: Callable[[Run], object] = lambda run: None) -> Run:
        """Run a prompt. ``begin`` gets the answer when it begins."""
        # swaps by other threads wait, so that an answer comes from one adapter and has its name
        with in_use(self.model):
            run = Run(str(prompt), whereabouts(self._switch), strength_of(self._switch))
            begin(run)
            for _ in run.growing(self.generate(run.prompt)):
                self._progressed()
                self._check()
        return run

    # ---- text and controls

    @property
    def summary(self) -> str:
        """One line: the number of adapters, the active one, and its strength."""
        where, strength = whereabouts(self._switch), strength_of(self._switch)
        active = "the adapter is off" if where == "off" else f"{where} is active"
        at = "" if where == "off" or strength is None else f" at strength {strength:g}"
        return f"{counted(len(self.names), 'adapter')}, {active}{at}"

    def _prompt_box(self, label: str, tooltip: str) -> w.Widget:
        """The prompt, the button that runs it, and the one that stops."""
        self._box = w.Text(description="prompt", layout=w.Layout(width="320px", max_width=FITS))
        with warnings.catch_warnings():
            # what ipywidgets 8 recommends instead would run the prompt when the box loses the focus, too
            warnings.simplefilter("ignore")
            self._box.on_submit(lambda _: self._clicked(self.start))
        self._when_set(self._box, lambda text: vars(self).update(prompt=text))  # with no refresh while the user types
        self._run_button = self._button(label, tooltip, self.start, button_style="primary")
        return wrapping_row(self._box, *self._with_stop(self._run_button))

    def _refresh(self) -> None:
        super()._refresh()
        self._box.value = str(self.prompt)
