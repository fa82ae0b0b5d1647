"""StrengthLattice: the answers of all adapters at several strengths, in a table of buttons that swap."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import chain, product
from typing import TYPE_CHECKING

import torch

from ..core.report import text_table
from ..figures.palette import INK, light
from ..pools.adapter_pool import AdapterPool
from ..threads import in_use
from .results import Run
from .swap_panel import SwapPanel
from .switch import strength_of
from .tables import chip, table, tint
from .view import escape

if TYPE_CHECKING:
    import ipywidgets

#: the columns; 1 is the trained strength
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
#: put before the active cell
MARK = "● "
#: characters of an answer on a button and in the text form
SHOWN = 24
STYLE = """.hotswap-live .hotswap-cell.jupyter-button { min-width: 0; padding: 0 2px; font-size: 12px; white-space: pre;
  border: 2px solid transparent }
.hotswap-live .hotswap-cell.hotswap-here { border-color: var(--jp-ui-font-color1, currentColor) }
"""
COLOR = ".hotswap-live .hotswap-cell.{} {{ background: {}; color: {} }}"


class StrengthLattice(SwapPanel):
    """A table of adapters by strengths. A cell has the answer to one prompt, and a click on it swaps and sets both.

    Parameters
    ----------
    pool_or_model, generate:
        As for :class:`SwapPanel`.
    prompt:
        The prompt that all cells answer.
    strengths:
        The columns: 1 is the trained strength. 0 is always one of them: the base model, with which all are compared.
    **options:
        ``tokenizer``, ``template``, ``max_new_tokens``, ``adapters`` and ``adapter_name``, as for :class:`SwapPanel`.

    Examples
    --------
    >>> from hotswap_lab import demo
    >>> from hotswap_lab.widgets import StrengthLattice
    >>> model, tokenizer = demo.load("reverse")
    >>> folders = {name: demo.adapter_path(name) for name in ("no_vowels", "pig_latin")}
    >>> ask = lambda word: demo.ask(model, tokenizer, word)
    >>> lattice = StrengthLattice(model, ask, adapters=folders, strengths=(0, 0.5, 1))
    >>> lattice.run()["no_vowels"][0.5]
    'hotsw*p'
    >>> lattice.choose("pig_latin", 1)    # what a click on its cell does
    'otswaphay'
    >>> print(lattice)
    StrengthLattice: 2 adapters, pig_latin is active at strength 1
    hotswap    0        0.5      1
    no_vowels  hotswap  hotsw*p  h*tsw*p
    pig_latin  hotswap  otswap   ● otswaphay

    How to read it: a cell has its adapter's color where the answer differs from the base model's. The active cell is
    marked with ● and a frame, a cell without an answer has a -. An adapter whose strength can't be set, such as DoRA,
    has one answer, at strength 1; if all are like this, no cell has a color. After :meth:`run`, also when it was
    stopped or has failed, the model has the adapter and the strength that it had before. Meanwhile, swaps by other
    threads wait.
    """

    def __init__(
        self,
        pool_or_model: AdapterPool | torch.nn.Module,
        generate: Callable[[str], object] | None = None,
        *,
        prompt: str = "hotswap",
        strengths: Sequence[float] = STRENGTHS,
        **options: object,
    ):
        super().__init__(pool_or_model, generate, prompt=prompt, run_on_swap=False, **options)
        self.strengths: list[float] = sorted({0.0, *(round(float(each), 6) for each in strengths)})
        self._columns = [f"{strength:g}" for strength in self.strengths]
        #: the prompt of the answers
        self.asked: str = prompt
        #: the answers by adapter and strength
        self.runs: dict[str, dict[float, Run]] = {}
        #: the row of the cell that was chosen last: at strength 0, all rows are the base model
        self._row: str | None = None

    # ---- state

    @property
    def answers(self) -> dict[str, dict[float, object]]:
        """The answers by adapter and strength, as many as there are yet."""
        rows = self.runs.copy()  # copies, since a run may add to them
        return {name: {at: run.result for at, run in row.copy().items()} for name, row in rows.items()}

    @property
    def base(self) -> Run | None:
        """The base model's answer."""
        return next((row[0.0] for row in self.runs.copy().values() if 0.0 in row), None)

    @property
    def cell(self) -> tuple[str | None, float]:
        """The adapter and the strength that the model has now; the adapter is None if it is not one of these."""
        strength = strength_of(self._switch)
        return self.active or (self._row if strength == 0 else None), 1.0 if strength is None else strength

    # ---- actions

    def choose(self, name: str, strength: float = 1.0) -> object:
        """Swap an adapter in at a strength, as a click on its cell does. Returns the answer in it."""
        self._run(lambda: self._change("cell", (name, strength)))
        return self.answers.get(name, {}).get(strength)

    def _change(self, what: str, value: object) -> None:
        if what != "cell":
            return super()._change(what, value)
        self.doing: str = f"swapping {value[0]} in, as soon as no other thread computes with the model"
        self.swap_seconds: float | None = self._carried_out(lambda: self._switch.swap(*value))
        self._row = value[0]

    def _work(self) -> dict[str, dict[float, object]]:
        """Fill all cells."""
        with ExitStack() as stack:
            self.doing = "waiting until no other thread computes with the model"
            self._when_free(lambda: stack.enter_context(self._switch.using((self.names or [None])[0])))
            self.asked, self.runs = str(self.prompt), {}
            for name in self.names:
                self._fill(name)
        return self.answers

    def _fill(self, name: str) -> None:
        self._change("adapter", name)
        self.runs[name] = {}
        can_set = strength_of(self._switch) is not None
        for strength in self.strengths if can_set else [1.0]:
            if can_set:
                self._change("strength", strength)
            self.doing = f"asking {name} at strength {strength:g}"
            self.prompt: str = self.asked  # one for all, even if the user types meanwhile
            with in_use(self.model):
                self._answer()
            self.runs[name][strength] = self.after

    # ---- text, picture and controls

    @property
    def _answers(self) -> dict[str, Run | None]:
        name, strength = self.cell
        return {"before": self.base, "after": self.runs.get(name, {}).get(strength)}

    def _grid(self) -> dict[str, list[tuple[str, str, str | None]]]:
        """For each adapter its cells: as text, as HTML, and its name if the answer differs from the base model's."""
        here, base, shown = self.cell, self.base, {name: [] for name in self.names}
        for name, strength in product(shown, self.strengths):
            run, mark = self.runs.get(name, {}).get(strength), MARK * ((name, strength) == here)
            differs = run is not None and base is not None and run.result != base.result
            text = mark + (" ".join(run.text.split()) if run else "-")
            style = f"display:flex;gap:4px;padding:2px 6px;border-radius:4px;{tint(name) if differs else ''}"
            html = f'<div style="{style}">{mark}{run.shown if run else "-"}</div>'
            short = text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"
            shown[name].append((short, html, name if differs else None))
        return shown

    def _lines(self) -> list[str]:
        rows = [[name, *(text for text, _, _ in cells)] for name, cells in self._grid().items()]
        return text_table([self.asked, *self._columns], rows)

    def _inside(self) -> str:
        rows = [[chip(name), *(cell for _, cell, _ in cells)] for name, cells in self._grid().items()]
        return table([f"<code>{escape(self.asked)}</code>", *self._columns], rows)

    def _controls(self) -> list[ipywidgets.Widget]:
        import ipywidgets as w

        *_, ask = super()._controls()
        self._run_button.description, self._run_button.tooltip = "Fill", "ask all adapters at all strengths"
        columns = f"max-content repeat({len(self.strengths)}, minmax(64px, 1fr))"
        self._buttons.layout = w.Layout(
            display="grid", grid_template_columns=columns, overflow="auto", align_items="center"
        )
        self._colors = w.HTML(layout=w.Layout(display="none"))
        return [self._colors, ask, self._buttons]

    def _refresh_buttons(self) -> None:
        import ipywidgets as w

        if self._buttons_for != self.names:
            self._buttons_for = self.names
            self._cells = [[self._cell(name, at) for at in self.strengths] for name in self.names]
            head = [w.HTML(f"<center>{each}</center>") for each in ["", *self._columns]]
            rows = [[w.HTML(chip(name)), *cells] for name, cells in zip(self.names, self._cells, strict=True)]
            self._buttons.children = [*head, *chain(*rows)]
            colors = [COLOR.format(_of(name), light(name), INK) for name in self.names]
            self._colors.value = f"<style>{STYLE}{''.join(colors)}</style>"
        for button, (text, _, name) in zip(chain(*self._cells), chain(*self._grid().values()), strict=True):
            classes = "hotswap-cell", "hotswap-here" if text.startswith(MARK) else "", _of(name) if name else ""
            with button.hold_sync():  # one message, or for a moment a cell would have another answer's color
                button.description, button._dom_classes = text, tuple(filter(None, classes))

    def _cell(self, name: str, strength: float) -> ipywidgets.Button:
        swap = partial(self._change_and_run, "cell", (name, strength))
        act = partial(self._come, f"{name} at strength {strength:g}", swap)
        return self._button("", f"swap {name} in at strength {strength:g}", act)


def _of(name: str) -> str:
    """The class of buttons in an adapter's color."""
    return f"hotswap-{light(name)[1:]}"
