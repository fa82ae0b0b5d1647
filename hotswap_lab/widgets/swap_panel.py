"""SwapPanel: choose an adapter and its strength, run a prompt, and see the answer and the changed layers."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any
from urllib.parse import quote

import torch

from .. import demo
from ..core.errors import refused
from ..figures import Figure
from ..figures.palette import adapter_color, light
from ..pools.adapter_pool import AdapterPool
from ..threads import in_use
from .results import Run
from .switch import demo_pool, strength_of, switch_for, whereabouts
from .text import text_stream
from .view import FITS, announced, choices, counted, escape, w, wrapping_row
from .weight_map import WeightMap
from .work import WorkingView

#: the slider's range; 1 is the trained strength
STRENGTHS = (0.0, 1.5)
#: the colors of a toggle button, by its label as ipywidgets writes it into the page
RADIO = '.hotswap-choices button[data-value="{}"] {{ --light: {}; --full: {} }}'


class SwapPanel(WorkingView):
    """Controls for the adapter, its strength and the prompt, next to the answer and a :class:`WeightMap`.

    Parameters
    ----------
    pool_or_model:
        An :class:`AdapterPool`, or a model, together with ``adapters``.
    generate:
        A function that takes the prompt and returns text, or an object that Jupyter shows as an image or as HTML, such
        as audio. It may instead yield the text so far, which is shown as it grows. It runs inside
        ``with in_use(model)``, so swaps by other threads wait for its end, and it can't swap. Default: the model's
        greedy answer, which needs ``tokenizer``.
    run_on_swap:
        Whether a click on an adapter or a move of the slider also runs the prompt.
    prompt:
        The first text in the prompt box.
    tokenizer, template, max_new_tokens:
        For the default ``generate``, see :func:`hotswap_lab.widgets.text.text_stream`.
    adapters:
        For a model: a dict of names and sources for :func:`hotswap_adapter`.
    adapter_name:
        For a model: the adapter to swap.

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
    >>> panel.pin()                       # as "Compare with this" does
    >>> panel.choose("reverse")           # as a click on its name does
    'pawstoh'
    >>> print(panel)
    SwapPanel: 2 adapters, reverse is active at strength 1
    reverse: pawstoh
    compared with sort: ahopstw

    How to read it: an answer has the name and the color of the adapter that gave it. An error is shown in the panel,
    and calls from Python raise it. It leaves the model unchanged. For the map, see :class:`WeightMap`.
    """

    def __init__(
        self,
        pool_or_model: AdapterPool | torch.nn.Module,
        generate: Callable[[str], object] | None = None,
        *,
        run_on_swap: bool = True,
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
        # a tokenizer passed as generate is callable, too, and is recognized by its decode
        is_function = callable(generate) and not hasattr(generate, "decode")
        if not is_function and (generate is not None or tokenizer is None):
            raise refused("panel_cannot_run", generate=type(generate).__name__, tokenizer=type(tokenizer).__name__)
        options = dict(template=template, max_new_tokens=max_new_tokens)
        self.generate: Callable[[str], object] = generate or text_stream(self.model, tokenizer, **options)
        #: the text in the prompt box
        self.prompt: str = prompt
        self.run_on_swap: bool = run_on_swap
        #: the last answer, and the one to compare it with
        self.answer: Run | None = None
        self.pinned: Run | None = None
        self.map: WeightMap = WeightMap(self._switch)

    @classmethod
    def demo(cls, prompt: str = "hotswap", **options: object) -> Any:
        """Make a panel with the embedded model and all of its adapters.

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
        """The active adapter; None if it is off, or not one of the panel's. Setting it swaps."""
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

    # ---- actions

    def choose(self, name: str | None) -> object:
        """Swap (None: off) and, with ``run_on_swap``, run the prompt, like a click on an adapter."""
        return self._run(partial(self._then_run, self._swap, name))

    def pin(self) -> None:
        """Keep the answer, to compare later ones with it."""
        self.pinned = self.answer

    def _then_run(self, change: Callable[[object], object], value: object) -> object:
        change(value)
        return self._work() if self.run_on_swap else None

    def _swap(self, name: str | None) -> None:
        if name is None:
            self.swaps.append(self._change_model("turning the adapter off", self._switch.off))
        else:
            self.swaps.append(self._change_model(f"swapping {name} in", partial(self._switch.swap, name)))

    def _set_strength(self, value: float) -> None:
        self._change_model(f"setting the strength to {value}", lambda: setattr(self._switch, "strength", value))

    def _change_model(self, doing: str, change: Callable[[], object]) -> float:
        """Make a change, and return the seconds that it took. The status line shows whether it waits."""
        self.doing: str = f"{doing}, as soon as no other thread computes with the model"
        seconds = self._when_free(change)
        self.map.look()  # which may wait, unlike a refresh
        return seconds

    def _work(self) -> object:
        """Run the prompt."""
        self.doing = "running the prompt"
        # swaps by other threads wait, so that an answer comes from one adapter and has its name
        with in_use(self.model):
            self._seen = self._now()
            run = self.answer = Run(str(self.prompt), whereabouts(self._switch), strength_of(self._switch))
            generated = self.generate(run.prompt)
            for run.result in generated if isinstance(generated, Iterator) else [generated]:
                self._progressed()
                self._check()
            run.done = True
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
    def title(self) -> str:
        """A line above the panel."""
        return f"One model, {counted(len(self.names), 'adapter')}"

    @property
    def _answers(self) -> dict[str, Run]:
        """The answer and the pinned one, as far as there are such, by their labels."""
        runs = ("", self.answer), ("compared with ", self.pinned)
        return {f"{before}{run.label}": run for before, run in runs if run}

    def _lines(self) -> list[str]:
        return [f"{label}: {run.text}" for label, run in self._answers.items()]

    def figure(self) -> Figure:
        """The map, with the answers below it. Times are left out, so that the same state gives the same picture."""
        answers = [(f"{label}, asked “{run.prompt}”", run) for label, run in self._answers.items()]
        return self.map.figure(answers, str(self))

    def _build(self) -> list[w.Widget]:
        title, columns, *_, problem = super()._build()
        return [title, columns, problem]

    def _controls(self) -> list[w.Widget]:
        self._radios, self._style = choices(), w.HTML(layout=w.Layout(display="none"))
        self._when_clicked(self._radios, "adapter", lambda label: self._swap(None if label == "off" else label))
        look = dict(layout=w.Layout(width="340px", max_width=FITS), _dom_classes=["hotswap-strength"])
        self._slider = w.FloatSlider(step=0.05, description="strength", **look)
        self._when_clicked(self._slider, "strength", self._set_strength)
        self._box = w.Text(description="prompt", layout=w.Layout(width="320px", max_width=FITS))
        with warnings.catch_warnings():
            # the replacement that ipywidgets 8 recommends would also run the prompt when the box loses the focus
            warnings.simplefilter("ignore")
            self._box.on_submit(lambda _: self._clicked(self.start))
        self._when_set(self._box, lambda text: vars(self).update(prompt=text))  # no refresh while the user types
        self._run_button = self._button("Run", "run the prompt", self.start, button_style="primary")
        prompt_row = wrapping_row(self._box, *self._with_stop(self._run_button))
        left = [self._style, self._radios, self._slider, prompt_row, self._status]
        left = w.VBox(left, layout=w.Layout(flex="1 1 340px", min_width="0"))
        self._pin_button = self._button("Compare with this", "keep this answer next to later ones", self.pin)
        self._answer, self._kept, self._picture, self._painted = announced(), w.HTML(), w.HTML(), None
        shown = [self._answer, wrapping_row(self._pin_button, self._kept), self._picture]
        right = w.VBox(shown, layout=w.Layout(flex="1 1 320px", min_width="0"))
        return [w.HBox([left, right], layout=w.Layout(flex_flow="row wrap", align_items="flex-start"))]

    def _when_clicked(self, control: w.Widget, label: str, change: Callable[[object], object]) -> None:
        """Make a change and run the prompt when a control is set: at once, or after the running job."""

        def clicked(value: object) -> None:
            self._clicked(lambda: self._enqueue(f"{label} {value}", partial(self._then_run, change, value)))

        self._when_set(control, clicked)

    def _refresh(self) -> None:
        strength, where, labels = strength_of(self._switch), whereabouts(self._switch), (*self.names, "off")
        super()._refresh()
        self._box.value = str(self.prompt)
        self.map.look_now()
        if self._painted is not self.map.tiles:  # drawing takes a while, and a growing answer is shown often
            self._painted, self._picture.value = self.map.tiles, self.map._inside() if self.map.tiles else ""
        self._radios.options = labels  # a pool may have grown
        self._slider.disabled = strength is None
        # during a job, controls show the user's choice, which is not in the model yet
        if not self.busy and self._next is None:
            self._radios.value = where if where in labels else None
            if strength is not None:
                self._slider.max, self._slider.min = max(STRENGTHS[1], strength), min(STRENGTHS[0], strength)
                self._slider.value = strength
        self._style.value = f"<style>{self._rules()}</style>"
        run, kept = self.answer, self.pinned
        old, shown = " hotswap-old" if self._note else "", f"{run.chip}{run.shown}" if run else "no answer yet"
        self._answer.value, self._pin_button.disabled = f'<div class="hotswap-answer{old}">{shown}</div>', run is None
        asked = f", asked <code>{escape(kept.prompt)}</code>" if kept and run and kept.prompt != run.prompt else ""
        self._kept.value = f'<div class="hotswap-kept">{f"{kept.chip}{asked}{kept.shown}" if kept else ""}</div>'

    def _rules(self) -> str:
        one = (1 - self._slider.min) / (self._slider.max - self._slider.min)
        rules = [f".hotswap-live .hotswap-strength {{ --one: {one:.2%} }}"]
        rules += [RADIO.format(quote(name, safe="!'()*"), light(name), adapter_color(name)) for name in self.names]
        return "".join(rules)

    def _refresh_body(self) -> None:
        """Do nothing, because the answer and the map are next to the controls."""
