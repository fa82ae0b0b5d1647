"""StrengthLattice: the answers of all adapters at several strengths, in a table of buttons that swap."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import product

import torch

from ..core.report import text_table
from ..pools.adapter_pool import AdapterPool
from .asking import AskingView
from .results import Run
from .switch import strength_of
from .tables import chip, table, tint
from .view import escape, w

#: the columns; 1 is the trained strength
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
#: put before the active cell
MARK = "● "
#: characters of an answer on a button and in the text form
SHOWN = 24
#: a space at which a cell's text is not broken into lines
NO_BREAK = "\N{NO-BREAK SPACE}"
#: the style of a cell with the base model's answer
UNTINTED = "color:inherit;background:none"


class StrengthLattice(AskingView):
    """A table of adapters by strengths. A cell has the answer to one prompt, and a click on it swaps and sets both.

    Parameters
    ----------
    strengths:
        The columns: 1 is the trained strength. 0 is always one of them: the base model, with which all are compared.

    The others are those of :class:`~hotswap_lab.widgets.asking.AskingView`; all cells answer the same ``prompt``.

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
        super().__init__(pool_or_model, generate, prompt=prompt, **options)
        self.strengths: list[float] = sorted({0.0, *(round(float(each), 6) for each in strengths)})
        self._columns = [f"{strength:g}" for strength in self.strengths]
        #: the prompt of the answers
        self.asked: str = prompt
        #: the answers by adapter and strength
        self.runs: dict[str, dict[float, Run]] = {}

    # ---- state

    @property
    def answers(self) -> dict[str, dict[float, object]]:
        """The answers by adapter and strength, as many as there are yet."""
        rows = self.runs.copy()  # copies, since a run may add to them
        return {name: {at: run.result for at, run in row.copy().items()} for name, row in rows.items()}

    @property
    def cell(self) -> tuple[str | None, float]:
        """The adapter and the strength that the model has now; the adapter is None if it is off, or another one."""
        strength = strength_of(self._switch)
        return self.active, 1.0 if strength is None else strength

    # ---- actions

    def choose(self, name: str, strength: float = 1.0) -> object:
        """Swap an adapter in at a strength, as a click on its cell does. Returns the answer in it."""
        return self._run(lambda: self._choose(name, strength))

    def _choose(self, name: str, strength: float) -> object:
        self._swap(name, strength)
        return self.answers.get(name, {}).get(strength)

    def _work(self) -> dict[str, dict[float, object]]:
        """Fill all cells."""
        with ExitStack() as stack:
            first = (self.names or [None])[0]
            self._make("beginning", lambda: stack.enter_context(self._switch.using(first)))
            self.asked, self.runs = str(self.prompt), {}
            for name in self.names:
                self._fill(name)
        return self.answers

    def _fill(self, name: str) -> None:
        self._swap(name)
        row = self.runs[name] = {}
        can_set = strength_of(self._switch) is not None
        for strength in self.strengths if can_set else [1.0]:
            if can_set:
                self._set_strength(strength)
            self.doing: str = f"asking {name} at strength {strength:g}"
            # one prompt for all, even if the user types meanwhile
            row[strength] = self._ask(self.asked)

    # ---- text, picture and controls

    @property
    def title(self) -> str:
        """What the table shows."""
        return f"Answers to “{self.asked}” by adapter and strength"

    def _grid(self) -> dict[str, list[tuple[str, str | None]]]:
        """For each adapter its cells: the answer, and the adapter's name if it differs from the base model's."""
        here, shown = self.cell, {name: [] for name in self.names}
        base = next((row[0.0] for row in self.runs.copy().values() if 0.0 in row), None)
        for name, strength in product(shown, self.strengths):
            # at strength 0, all rows are the base model
            run, mark = self.runs.get(name, {}).get(strength), MARK * ((name if strength else None, strength) == here)
            differs = run is not None and base is not None and run.result != base.result
            text = mark + (" ".join(run.text.split()) if run else "-")
            shown[name].append((text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…", name if differs else None))
        return shown

    def _lines(self) -> list[str]:
        rows = [[name, *(text for text, _ in cells)] for name, cells in self._grid().items()]
        return text_table([self.asked, *self._columns], rows)

    def _inside(self, tag: str = "span") -> str:
        rows = []
        for name, cells in self._grid().items():
            row = [chip(name)]
            for strength, (text, colored) in zip(self.strengths, cells, strict=True):
                style = f"border:0;padding:2px 4px;border-radius:4px;{tint(colored) if colored else UNTINTED}"
                at = f'title="swap {escape(name)} in at strength {strength:g}" data-choose="{escape(name)}@{strength}"'
                row.append(f'<{tag} {at} style="{style}">{escape(text.replace(" ", NO_BREAK))}</{tag}>')
            rows.append(row)
        return table([f"<code>{escape(self.asked)}</code>", *self._columns], rows)

    def _refresh_body(self) -> None:
        self._body.value = self._inside("button")

    def _controls(self) -> list[w.Widget]:
        return [self._prompt_box("Fill", "ask all adapters at all strengths"), self._chooser(self._chosen)]

    def _chosen(self, cell: str) -> None:
        name, _, strength = cell.rpartition("@")
        self._come(f"{name} at strength {float(strength):g}", lambda: self._choose(name, float(strength)))
