"""RowPanel: a table of requests, each with its own adapter, answered in one call."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from .. import demo
from ..core.errors import refuse
from ..engine import AdapterPool
from .results import Run, answering
from .view import counted, escape, speaking, wrapping_row
from .work import WorkingView

if TYPE_CHECKING:
    import ipywidgets

#: the words that the demo begins with
WORDS = ("hotswap", "notebook", "adapter", "kernel")
#: what the menu calls no adapter; in a menu, None would be no choice at all
BASE = ("base", "")
#: the headings of the columns
HEAD = ("request", "adapter", "answer")


class RowPanel(WorkingView):
    """A row for each request, with a menu of adapters and a prompt; all are answered in one call.

    Parameters
    ----------
    pool:
        An :class:`AdapterPool` that was made with as many ``rows`` as there are requests, or more.
    generate:
        Your own function: takes the list of prompts, and returns a list of texts or images, one for each row, or yields
        its text so far, which is shown as it grows. It runs inside ``with pool.assigned(...)``.
    prompts:
        What is asked in each row at first.

    Examples
    --------
    >>> from hotswap_lab.widgets import RowPanel
    >>> panel = RowPanel.demo(["hotswap", "hotswap"])
    >>> panel.choose(0, "shout")          # what its menu does
    >>> panel.run()
    ['HOTSWAP!', 'hotswap']
    >>> print(panel)
    RowPanel: 2 requests, 8 adapters
    shout, hotswap: HOTSWAP!
    no adapter, hotswap: hotswap

    How to read it: next to each answer is the adapter that it came from, whatever has been chosen since. After a run,
    the model has what it had before.
    """

    def __init__(self, pool: AdapterPool, generate: Callable[[list[str]], object], *, prompts: Sequence[str]):
        if not isinstance(pool, AdapterPool) or not callable(generate) or isinstance(prompts, str):
            kinds = [type(each).__name__ for each in (pool, generate, prompts)]
            raise refuse("rows_cannot_run", pool=kinds[0], generate=kinds[1], prompts=kinds[2])
        with pool.assigned([None] * len(prompts)):
            pass  # refused now, if there is no room for so many
        self.pool = pool
        self.generate = generate
        #: what is asked in each row
        self.prompts: list[str] = list(prompts)
        #: the adapter that each row will be answered with; None: the base model
        self.adapters: list[str | None] = [None] * len(prompts)
        #: the last answers, one for each row
        self.runs: list[Run] = []

    @classmethod
    def demo(cls, prompts: Sequence[str] = WORDS) -> RowPanel:
        """A panel with the embedded model and all of its adapters, in one line.

        >>> RowPanel.demo(["hotswap"]).run()
        ['hotswap']
        """
        model, tokenizer = demo.load("reverse")
        folders = {name: demo.adapter_path(name) for name in demo.adapter_names()}
        pool = AdapterPool(model, adapters=folders, rows=max(len(prompts), 2), progress=False)
        return cls(pool, partial(demo.ask_all, model, tokenizer), prompts=prompts)

    # ---- what can be done

    def choose(self, row: int, adapter: str | None) -> None:
        """What a row's menu does: the row is answered with this adapter from now on, or with none."""
        if adapter and adapter not in self.pool:
            raise refuse("no_adapter_of_this_name", name=adapter, adapters=", ".join(map(repr, self.pool)))
        self.adapters[row] = adapter or None
        self._changed()

    def _work(self) -> list[object]:
        """Answers all rows."""
        adapters, runs, former = list(self.adapters), self._requests(), self.runs
        with answering(runs, lambda: setattr(self, "runs", former)), contextlib.ExitStack() as stack:
            self.doing: str = "giving each row its adapter, as soon as no other thread computes with the model"
            # one that had to wait in vain can't be entered again
            enter = lambda: stack.enter_context(self.pool.assigned(adapters))  # noqa: E731
            self.swap_seconds: float | None = self._when_free(enter)
            self.doing = "answering all rows in one call"
            self.runs = runs
            given = self.generate([run.prompt for run in runs])
            for results in given if isinstance(given, Iterator) else [given]:
                self._show(runs, list(results))
        return [run.result for run in runs]

    def _requests(self) -> list[Run]:
        return [Run(prompt, name or "off") for prompt, name in zip(self.prompts, self.adapters, strict=True)]

    def _show(self, runs: list[Run], results: list[object]) -> None:
        if len(results) != len(runs):
            raise refuse("answers_of_other_rows", answers=len(results), rows=len(runs))
        for run, result in zip(runs, results, strict=True):
            run.result = result
        self._progressed()
        self._check()

    # ---- how it looks

    @property
    def summary(self) -> str:
        """One line: how many requests there are, and adapters to choose from."""
        return f"{counted(len(self.prompts), 'request')}, {counted(len(self.pool), 'adapter')}"

    def _lines(self) -> list[str]:
        return [f"{run.label}, {run.prompt}: {run.text}" for run in self.runs]

    def _inside(self) -> str:
        # no times, which differ from run to run: stored notebooks don't
        cell = '<td style="padding:4px 12px;text-align:left;border:1px solid rgba(128,128,128,.4)">'
        parts = [(escape(run.prompt), escape(run.label), run.shown) for run in self.runs or self._requests()]
        lines = ["<tr>" + "".join(f"{cell}{part}</td>" for part in line) + "</tr>" for line in [HEAD, *parts]]
        return f'<table style="border-collapse:collapse;margin:4px 0">{"".join(lines)}</table>'

    def _controls(self) -> list[ipywidgets.Widget]:
        import ipywidgets as w

        slim, named = {"description_width": "16px"}, {"description_width": "40px"}
        narrow, wide = w.Layout(width="140px"), w.Layout(flex="1 1 160px", min_width="0", max_width="260px")
        rest = w.Layout(flex="1 1 180px", min_width="0", margin="2px 8px")
        self._menus = [w.Dropdown(description=str(row), style=slim, layout=narrow) for row in range(len(self.prompts))]
        self._boxes = [w.Text(description="asked", style=named, layout=wide) for _ in self.prompts]
        self._answers = [speaking(layout=rest) for _ in self.prompts]
        for number, (menu, box) in enumerate(zip(self._menus, self._boxes, strict=True)):
            self._when_set(menu, partial(self.choose, number))
            self._when_set(box, partial(self.prompts.__setitem__, number))
        rows = [wrapping_row(*each) for each in zip(self._menus, self._boxes, self._answers, strict=True)]
        self._run_button = self._button("Answer all", "answer all rows in one call", self.start, button_style="primary")
        return [*rows, wrapping_row(*self._with_stop(self._run_button))]

    def _refresh(self) -> None:
        super()._refresh()
        options = [BASE, *((name, name) for name in self.pool)]
        for number, run in enumerate(self.runs or [None] * len(self.prompts)):
            menu = self._menus[number]
            if menu.options != tuple(options):
                menu.options = options
            menu.value, self._boxes[number].value = self.adapters[number] or BASE[1], self.prompts[number]
            label = f'<div class="hotswap-muted">{escape(run.label)}</div>' if run else ""
            self._answers[number].value = label + run.shown if run else ""

    def _refresh_body(self) -> None:
        """Each answer is in its row already."""
