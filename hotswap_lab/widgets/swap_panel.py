"""SwapPanel: swap by a button, run a prompt, see before and after side by side."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch

from .. import demo
from ..core.errors import refuse
from ..core.pool import AdapterPool
from ..core.strength import check_strength
from ..threads import in_use
from .clicks import Clicks, keep_apart_from_cells
from .results import Run, steps
from .switch import patiently, strength_of, switch_for, whereabouts
from .text import text_stream
from .view import FITS, View, error_html, escape, readable, speaking, wrapping_row
from .work import Stopped, Work

if TYPE_CHECKING:
    import ipywidgets

#: the slider's range: 1 is as trained
STRENGTHS = (0.0, 1.5)
#: how often the growing answer is shown anew, in seconds
SHOW_EVERY = 0.05


class SwapPanel(View):
    """A button for each adapter, a strength, a prompt, and the answers before and after the last swap.

    Parameters
    ----------
    pool_or_model:
        An :class:`AdapterPool`, or a model; then ``adapters`` says what can be swapped in.
    generate:
        Your own function: takes the prompt, and returns text or an image, or yields what there is so far, which is
        shown as it grows. Default: the model's greedy answer; that needs ``tokenizer``. It runs inside
        ``with in_use(model)``: swaps from elsewhere wait until it has ended, and it can't swap itself.
    tokenizer, template, max_new_tokens:
        For the default ``generate``, see :func:`hotswap_lab.widgets.text.text_stream`.
    adapters:
        With a model: names, and for each what :func:`hotswap_adapter` takes.
    adapter_name:
        With a model: which of its adapters is swapped.
    prompt:
        What is in the prompt box at first.
    run_on_swap:
        Whether a click on an adapter, or a move of the slider, runs the prompt as well.

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

    How to read it: both answers are to the same prompt. An error is shown in the panel, and raised to whoever
    called from Python; the model is then as it was.
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
        adapter_name: str = "default",
        prompt: str = "",
        run_on_swap: bool = True,
    ):
        self._switch = switch_for(pool_or_model, adapters, adapter_name)
        if generate is None and tokenizer is None:
            raise refuse(
                "The panel does not know how to run a prompt.",
                found="neither generate nor tokenizer",
                expected="a function generate(prompt), or the tokenizer of a causal language model",
                next_step="pass one of these",
            )
        if generate is not None and (not callable(generate) or hasattr(generate, "decode")):
            raise refuse(
                "The panel does not know how to run a prompt.",
                found=f"generate={type(generate).__name__}(...)",
                expected="a function generate(prompt) that gives the answer",
                next_step="pass a tokenizer as tokenizer=...",
            )
        self.generate = generate or text_stream(
            self._switch.model, tokenizer, template=template, max_new_tokens=max_new_tokens
        )
        self.run_on_swap = run_on_swap
        self._prompt = str(prompt)
        self._work = Work(self._work_changed)
        #: what is being done, in words
        self._doing = ""
        #: the click that is being carried out, and one that came meanwhile: what shall change, and to what
        self._present: tuple[str, object] | None = None
        self._next: tuple[str, object] | None = None
        self._clicks = Clicks()
        #: the last answer, and the one before it to the same prompt, with another adapter or strength
        self.after: Run | None = None
        self.before: Run | None = None
        #: what went wrong last, None after a success
        self.error: BaseException | None = None
        #: how long the last swap took
        self.swap_seconds: float | None = None
        self._shown = 0.0

    @classmethod
    def demo(cls, prompt: str = "hotswap", **options: object) -> SwapPanel:
        """A panel with the embedded model and all of its adapters, in one line.

        >>> from hotswap_lab.widgets import SwapPanel
        >>> SwapPanel.demo().choose("pig_latin")
        'otswaphay'
        """
        model, tokenizer = demo.load("reverse")
        folders = {name: demo.adapter_path(name) for name in demo.adapter_names()}
        pool = AdapterPool(model, adapters=folders, progress=False)
        return cls(pool, tokenizer=tokenizer, template="{}" + demo.SEPARATOR, prompt=prompt, **options)

    # ---- state

    @property
    def model(self) -> torch.nn.Module:
        """The model that answers. ``with in_use(panel):`` in a cell holds back what clicks would change meanwhile."""
        return self._switch.model

    @property
    def names(self) -> list[str]:
        """The adapters, one button each."""
        return self._switch.names

    @property
    def active(self) -> str | None:
        """The adapter that the model computes with; None if it is off, or not one of these. Setting it swaps."""
        return self._switch.active

    @active.setter
    def active(self, name: str | None) -> None:
        self._do(lambda: self._swap(name))

    @property
    def strength(self) -> float:
        """How strongly it acts: 1 as trained, 0 not at all. May be set."""
        return self._switch.strength

    @strength.setter
    def strength(self, value: float) -> None:
        self._do(lambda: self._scale(value))

    @property
    def prompt(self) -> str:
        """What is in the prompt box. May be set."""
        return self._prompt

    @prompt.setter
    def prompt(self, text: str) -> None:
        self._prompt = str(text)
        self._changed()

    @property
    def busy(self) -> bool:
        """Whether something is running that a click began."""
        return self._work.busy

    # ---- what can be done

    def run(self) -> object:
        """Runs the prompt and returns the answer. Jupyter's interrupt stops it and leaves what there is so far."""
        return self._do(self._generate)

    def choose(self, name: str | None) -> object:
        """What a click on an adapter's button does: swaps (None: off) and, with ``run_on_swap``, runs the prompt."""
        return self._do(lambda: self._choose(name))

    def off(self) -> None:
        """Turns the adapter off: the base model answers."""
        self.active = None

    def start(self) -> None:
        """What a click on Run does: runs the prompt beside the notebook, which can go on."""
        self._beside(self._generate)

    def stop(self) -> None:
        """Ends a run at its next token or step; what there is so far stays. A swap that still waits is called off."""
        self._next = None
        self._work.stop()

    def wait(self, timeout: float | None = None) -> bool:
        """Waits until nothing runs, at most ``timeout`` seconds. Returns whether that is so."""
        return self._work.wait(timeout)

    def _do(self, job: Callable[[], object]) -> object:
        """Here and now: what goes wrong is shown and raised."""
        return self._work.run(lambda: self._showing_errors(job))

    def _beside(self, job: Callable[[], object]) -> bool:
        """Beside the notebook: what goes wrong is shown. Does nothing while something runs; says whether it did."""

        def quietly() -> None:
            try:
                self._showing_errors(job)
            except Exception:  # shown by now, and there is nobody to raise it to
                return

        return self._work.start(quietly)

    def _click(self, what: str, value: object) -> None:
        """What the buttons and the slider do: now, or once what runs has ended. Of several that wait, the last counts.

        The buttons stay as they are meanwhile. Were they greyed out, or moved by another one that grows, a click would
        be lost whenever that came between pressing and releasing the mouse, and so would the keyboard's focus.
        """

        def note() -> None:
            self._next = what, value

        if not self._clicks.take(note):
            self._changed()  # the slider goes back
            return
        self._keep_hearing()
        if not self._beside(self._carry_out):
            if self._next == self._present:  # a double click
                self._next = None
            self._changed()

    def _run_clicked(self) -> None:
        self._keep_hearing()
        self.start()

    def _keep_hearing(self) -> None:
        keep_apart_from_cells([*self._buttons.children, self._slider, self._box])

    def _carry_out(self) -> None:
        self._present, self._next = self._next, None
        try:
            if self._present is not None:
                what, value = self._present
                change = self._swap if what == "adapter" else self._scale
                change(value)
                if self.run_on_swap:
                    self._generate()
        finally:
            self._present = None

    def _work_changed(self) -> None:
        if self._next is None or self.busy or not self._beside(self._carry_out):
            self._changed()

    def _showing_errors(self, job: Callable[[], object]) -> object:
        try:
            result = job()
        except Stopped:
            raise
        except BaseException as error:
            self.error = error
            self._changed()
            raise
        self.error = None
        return result

    def _choose(self, name: str | None) -> object:
        self._swap(name)
        return self._generate() if self.run_on_swap else None

    def _scale(self, value: float) -> None:
        check_strength(value)
        self._change(f"setting the strength to {value:g}", lambda: setattr(self._switch, "strength", value))

    def _swap(self, name: str | None) -> None:
        def swap() -> None:
            start = time.perf_counter()
            if name is None:
                self._switch.off()
            else:
                self._switch.swap(name)
            self.swap_seconds = time.perf_counter() - start

        self._change("turning the adapter off" if name is None else f"swapping {name} in", swap)

    def _change(self, doing: str, change: Callable[[], object]) -> None:
        """Changes the adapter. Where threads that compute have to be waited for, a reader sees that."""
        self._doing = f"{doing}, as soon as no other thread computes with the model"
        self._changed()
        if self._work.beside:
            patiently(change, self._work.check)
        else:
            change()  # Jupyter's interrupt ends the waiting
        self._changed()

    def _generate(self) -> object:
        self._doing = "running"
        # whatever swaps elsewhere, an answer comes from one adapter, and is labelled with it
        with in_use(self._switch.model):
            return self._answer()

    def _answer(self) -> object:
        former = self.before, self.after
        run = Run(self._prompt, whereabouts(self._switch), strength_of(self._switch))
        start = time.perf_counter()
        try:
            self.before, self.after = _earlier(run, *former), run
            for result in steps(self.generate, run.prompt):
                run.result, run.seconds = result, time.perf_counter() - start
                self._grew()
                self._work.check()
            run.state = "done"
        except (Stopped, KeyboardInterrupt) as why:
            run.state = "stopped"
            if isinstance(why, KeyboardInterrupt):
                raise
        except BaseException:
            self.before, self.after = former  # as if it had not been tried
            raise
        finally:
            run.seconds = time.perf_counter() - start
            self._changed()
        return run.result

    def _grew(self) -> None:
        """Shows the growing answer, but not more often than somebody can read."""
        if time.perf_counter() - self._shown > SHOW_EVERY:
            self._shown = time.perf_counter()
            if "box" in self.__dict__:
                self._refresh_answers()  # the rest of the panel stays as it is meanwhile

    # ---- how it looks

    @property
    def summary(self) -> str:
        """One line: how many adapters there are, and which one is active, in words."""
        where, strength = whereabouts(self._switch), strength_of(self._switch)
        names = len(self.names)
        active = "the adapter is off" if where == "off" else f"{where} is active"
        at = "" if where == "off" or strength is None else f" at strength {strength:g}"
        return f"{names} adapter{'' if names == 1 else 's'}, {active}{at}"

    def __str__(self) -> str:
        lines = [f"SwapPanel: {self.summary}"]
        lines += [f"{title}, {run.label}: {run.text}" for title, run in self._answers() if run]
        if self.error is not None:
            lines.append(f"error: {_message(self.error)}")
        return "\n".join(lines)

    def _answers(self) -> list[tuple[str, Run | None]]:
        return [("before", self.before), ("after", self.after)]

    def to_html(self, *, times: bool = True) -> str:
        """The static form: the adapters, which one is active, and both answers."""
        cell = "padding:4px 12px;text-align:left;vertical-align:top;border:1px solid rgba(128,128,128,.4)"
        cards = "".join(f'<td style="{cell}">{run.to_html(title, times)}</td>' for title, run in self._answers() if run)
        prompt = f"<div>prompt: <code>{escape(self.prompt)}</code></div>" if self.prompt else ""
        error = error_html(_message(self.error)) if self.error is not None else ""
        names = ", ".join(f"{name} (active)" if name == self.active else name for name in self.names)
        answers = f'<table style="border-collapse:collapse;margin:4px 0"><tr>{cards}</tr></table>' if cards else ""
        took = f"<div>{escape(self._took())}</div>" if times and self._took() else ""
        return (
            f"<div><strong>SwapPanel</strong>: {escape(self.summary)}<div>adapters: {escape(names)}</div>"
            f"{prompt}{answers}{took}{error}</div>"
        )

    def _static(self) -> dict[str, str]:
        # times differ from run to run; stored notebooks don't
        return {"text/html": self.to_html(times=False), "text/plain": str(self)}

    def _took(self) -> str:
        parts = [] if self.swap_seconds is None else [f"swap: {readable(self.swap_seconds)}"]
        if self.after is not None and self.after.state != "running":
            parts.append(f"run: {readable(self.after.seconds)}")
        return ", ".join(parts)

    def _build(self) -> list[ipywidgets.Widget]:
        import ipywidgets as w

        low, high = STRENGTHS
        self._title = w.HTML()
        self._off_button = w.Button(tooltip="turn the adapter off: the base model answers")
        self._off_button.on_click(lambda _: self._click("adapter", None))
        self._buttons = w.HBox([], layout=w.Layout(flex_flow="row wrap"))
        self._slider = w.FloatSlider(
            value=1.0,
            min=low,
            max=high,
            step=0.05,
            description="strength",
            continuous_update=False,
            readout_format=".2f",
            layout=w.Layout(width="320px", max_width=FITS),
        )
        self._when_set(self._slider, self._slid)
        self._box = w.Textarea(
            value=self._prompt,
            description="prompt",
            rows=2,
            placeholder="what the model is asked",
            layout=w.Layout(width="440px", max_width=FITS, height="auto"),
        )
        self._when_set(self._box, self._typed)
        self._run_button = w.Button(description="Run", button_style="primary", tooltip="run the prompt")
        self._run_button.on_click(lambda _: self._run_clicked())
        self._stop_button = w.Button(description="Stop", tooltip="end the run; what there is so far stays")
        self._stop_button.on_click(lambda _: self._clicks.take(self.stop))
        self._status = speaking()
        card = w.Layout(flex="1 1 220px", min_width="0", margin="2px")
        self._cards = [w.HTML(layout=card), speaking(layout=card)]
        self._error = w.HTML()
        return [
            self._title,
            self._buttons,
            self._slider,
            wrapping_row(self._box, self._run_button, self._stop_button),
            self._status,
            w.HBox(self._cards, layout=w.Layout(flex_flow="row wrap", align_items="stretch")),
            self._error,
        ]

    def _slid(self, change: Mapping[str, object]) -> None:
        if change["new"] != strength_of(self._switch):
            self._click("strength", change["new"])
        elif self._slider_waits:  # and was moved back
            self._next = None

    @property
    def _slider_waits(self) -> bool:
        return self._next is not None and self._next[0] == "strength"

    def _typed(self, change: Mapping[str, object]) -> None:
        self._prompt = change["new"]

    def _refresh(self) -> None:
        busy, active, strength = self.busy, self.active, strength_of(self._switch)
        off = whereabouts(self._switch) == "off"
        self._title.value = f"<strong>SwapPanel</strong>: {escape(self.summary)}"
        self._refresh_buttons()
        for name, button in zip(self.names, self._buttons.children, strict=False):
            _mark(button, name, name == active)
        _mark(self._off_button, "off", off)
        self._slider.disabled = strength is None
        if strength is not None and not busy and not self._slider_waits:
            self._slider.max = max(STRENGTHS[1], strength)
            self._slider.min = min(STRENGTHS[0], strength)
            self._slider.value = strength
        if self._box.value != self._prompt:
            self._box.value = self._prompt
        self._run_button.disabled = busy
        self._stop_button.disabled = not busy
        state = f"busy: {self._doing}" if busy else "ready"
        if busy and self._next is not None:
            what, value = self._next
            state += f"; then {what} {'off' if value is None else value}"
        took = self._took()
        self._status.value = escape(f"{state}{'. ' if took else ''}{took}")
        self._refresh_answers()
        self._error.value = "" if self.error is None else error_html(_message(self.error), _trace(self.error))

    def _refresh_answers(self) -> None:
        for card, (title, run) in zip(self._cards, self._answers(), strict=True):
            inner = run.to_html(title) if run else f"<strong>{title}</strong>: {self._nothing(title)}"
            card.value = f'<div class="hotswap-answer">{inner}</div>'

    def _refresh_buttons(self) -> None:
        """A pool may have got further adapters since."""
        import ipywidgets as w

        if len(self._buttons.children) != len(self.names) + 1 or self._button_names != self.names:
            buttons = []
            for name in self.names:
                button = w.Button(tooltip=f"swap {name} in" + (" and run the prompt" if self.run_on_swap else ""))
                button.on_click(lambda _, name=name: self._click("adapter", name))
                buttons.append(button)
            self._buttons.children = [*buttons, self._off_button]
            self._button_names = self.names

    def _nothing(self, title: str) -> str:
        return "nothing was run yet" if title == "after" else "no earlier answer to this prompt"


def _mark(button: ipywidgets.Button, name: str, is_active: bool) -> None:
    """In words, not by colour alone. The style of ``hotswap-choice`` keeps room for them: no other button moves."""
    button.description = f"{name} (active)" if is_active else name
    button.button_style = "info" if is_active else ""
    button.add_class("hotswap-choice")


def _earlier(run: Run, before: Run | None, after: Run | None) -> Run | None:
    """The answer to compare ``run`` with: to the same prompt, and from something else."""
    for each in (after, before):
        if each and each.prompt == run.prompt and (each.where, each.strength) != (run.where, run.strength):
            return each
    return None


def _message(error: BaseException) -> str:
    """What an error says; its type as well, unless it is one of ours, which explains itself."""
    text = str(error).strip()
    kind = type(error).__name__
    if kind == "HotswapError":
        return text
    return f"{kind}: {text}" if text else kind


def _trace(error: BaseException) -> str:
    return "".join(traceback.format_exception(type(error), error, error.__traceback__))
