"""RowPanel: a table of requests, each with its own adapter, answered in one call."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from .. import demo
from ..core.errors import refused
from ..pools.adapter_pool import AdapterPool
from .results import Run
from .switch import contents, demo_pool
from .view import announced, counted, escape, w, wrapping_row
from .work import WorkingView

#: the prompts of the demo
WORDS = ("hotswap", "notebook", "adapter", "kernel")
#: the style of a cell: inline, so that a page without the styles shows a table, too
CELL = "padding:4px 6px;font-size:12px;text-align:left;border:1px solid rgba(128,128,128,.4)"
#: the frame of an answer, at least one line high, so that nothing moves when an answer comes
LARGE = '<div class="{}" style="display:flex;gap:8px;font-size:17px;line-height:26px;min-height:26px">{}</div>'


class RowPanel(WorkingView):
    """A table of requests, answered in one call, with a menu of adapters and a prompt in each row.

    Parameters
    ----------
    pool:
        An :class:`AdapterPool` with at least as many ``rows`` as there are requests.
    generate:
        A function that takes the list of prompts, and returns a list of texts or images, one for each row. Or it yields
        lists of the texts so far, which are shown as they grow. It runs inside ``with pool.assigned(...)``.
    prompts:
        The first prompt of each row.

    Examples
    --------
    >>> from hotswap_lab.widgets import RowPanel
    >>> panel = RowPanel.demo(["hotswap", "hotswap"])
    >>> panel.choose(0, "shout")          # as its menu does
    >>> panel.run()
    ['HOTSWAP!', 'hotswap']
    >>> print(panel)
    RowPanel: 2 requests, 8 adapters
    shout, hotswap: HOTSWAP!
    no adapter, hotswap: hotswap

    How to read it: next to each answer is the adapter that gave it, even if another one was chosen later. A run leaves
    the model's own adapter in place.
    """

    title = "One batch, another adapter in each row"

    def __init__(self, pool: AdapterPool, generate: Callable[[list[str]], object], *, prompts: Sequence[str]):
        if not isinstance(pool, AdapterPool) or not callable(generate) or isinstance(prompts, str):
            kinds = [type(argument).__name__ for argument in (pool, generate, prompts)]
            raise refused("rows_cannot_run", pool=kinds[0], generate=kinds[1], prompts=kinds[2])
        with pool.assigned([None] * len(prompts)):
            pass  # raises if the pool has too few rows
        self.pool: AdapterPool = pool
        self.generate: Callable[[list[str]], object] = generate
        #: the prompt of each row
        self.prompts: list[str] = list(prompts)
        #: the adapter that will answer each row; None for the base model
        self.adapters: list[str | None] = [None] * len(prompts)
        #: the last answers, one for each row
        self.runs: list[Run] = []

    @classmethod
    def demo(cls, prompts: Sequence[str] = WORDS) -> "RowPanel":
        """Make a panel with the embedded model and all of its adapters.

        >>> RowPanel.demo(["hotswap"]).run()
        ['hotswap']
        """
        pool, tokenizer = demo_pool(rows=max(len(prompts), 2))
        return cls(pool, partial(demo.ask_all, pool.model, tokenizer), prompts=prompts)

    # ---- actions

    def choose(self, row: int, adapter: str | None) -> None:
        """Set the adapter of a row's later answers (None: the base model), as its menu does."""
        if adapter and adapter not in self.pool:
            raise refused("no_adapter_of_this_name", name=adapter, adapters=", ".join(map(repr, self.pool)))
        self.adapters[row] = adapter or None
        self._changed()

    def _work(self) -> list[object]:
        """Answer all rows."""
        adapters, runs = list(self.adapters), self._now()
        with contextlib.ExitStack() as stack:
            self.doing: str = "giving each row its adapter, as soon as no other thread computes with the model"
            # a new context manager for each try, because one that timed out can't be used again
            self.swaps.append(self._when_free(lambda: stack.enter_context(self.pool.assigned(adapters))))
            self.doing = "answering all rows in one call"
            generated = self.generate([run.prompt for run in runs])
            for results in generated if isinstance(generated, Iterator) else [generated]:
                if len(answers := list(results)) != len(runs):
                    raise refused("answers_of_other_rows", answers=len(answers), rows=len(runs))
                for run, answer in zip(runs, answers, strict=True):
                    run.result = answer
                self.runs = self._seen = runs
                self._progressed()
                self._check()
            for run in runs:
                run.done = True
        return [run.result for run in runs]

    def _now(self) -> list[Run]:
        """The current requests, as runs without results."""
        base, runs = contents(self.pool)[0], []
        for prompt, name in zip(self.prompts, self.adapters, strict=True):
            member = self.pool._members.get(name)
            runs.append(Run(prompt, name or "off", state=(base, member, member and member.version)))
        return runs

    # ---- text, picture and controls

    @property
    def summary(self) -> str:
        """One line: the numbers of requests and of adapters."""
        return f"{counted(len(self.prompts), 'request')}, {counted(len(self.pool), 'adapter')}"

    def _lines(self) -> list[str]:
        return [f"{run.label}, {run.prompt}: {run.text}" for run in self.runs]

    def _inside(self) -> str:
        # without times, which would make a stored notebook differ from run to run
        names = "".join(f'<th scope=col style="{CELL}">{name}</th>' for name in ("adapter", "request", "answer"))
        lines = [f"<tr>{names}</tr>"]
        for run in self.runs or self._now():
            cells = (run.chip, escape(run.prompt), LARGE.format("", run.shown))
            lines.append("<tr>" + "".join(f'<td style="{CELL}">{cell}</td>' for cell in cells) + "</tr>")
        table = f'<table style="border-collapse:collapse">{"".join(lines)}</table>'
        return f'<div class="hotswap-scroll">{table}</div>'

    def _controls(self) -> list[w.Widget]:
        """Return a menu, a request box and a note for each row, and the button that answers all."""
        menu_layout, menu_style = w.Layout(width="164px"), {"description_width": "40px"}
        box_layout = w.Layout(flex="1 1 184px", min_width="0", max_width="284px")
        box_style = {"description_width": "64px"}
        note_layout = w.Layout(flex="1 1 180px", min_width="0", margin="2px 8px")
        self._rows = []
        for row in range(len(self.prompts)):
            menu = w.Dropdown(description=f"row {row}", style=menu_style, layout=menu_layout)
            box = w.Text(description=f"request {row}", style=box_style, layout=box_layout)
            self._when_set(menu, partial(self.choose, row))
            self._when_set(box, partial(self._write, row))
            self._rows.append((menu, box, announced(layout=note_layout)))
        self._run_button = self._button("Answer all", "answer all rows in one call", self.start, button_style="primary")
        return [*(wrapping_row(*row) for row in self._rows), wrapping_row(*self._with_stop(self._run_button))]

    def _write(self, row: int, prompt: str) -> None:
        self.prompts[row] = prompt
        self._changed()

    def _refresh(self) -> None:
        super()._refresh()
        requests = self._now()
        for (menu, box, answer), run, request in zip(self._rows, self.runs or requests, requests, strict=True):
            # the base's value can't be None, which would select nothing
            menu.options = [("base", ""), *((name, name) for name in self.pool)]
            menu.value, box.value = "" if request.where == "off" else request.where, request.prompt
            answer.value = LARGE.format("hotswap-old" * (run != request), f"{run.chip} {run.shown}")

    def _refresh_body(self) -> None:
        """Do nothing, because the live view shows each answer in its row."""
