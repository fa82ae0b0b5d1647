"""Guards: the assumptions of compiled graphs about an adapter, and those that a swap breaks.

Tests: ``tests/widgets/test_guards_checklist.py``.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from .. import compat, demo
from ..figures import Canvas, Figure
from ..figures.latency import readable, timeline
from ..figures.palette import RIGHT, WRONG
from ..swap import prepare_model_for_compiled_hotswap
from ..threads import in_use
from ..watch import RecompileWatch
from .switch import Switch, contents, switch_for
from .view import choices, counted, wrapping_row
from .work import WorkingView

#: calls after each swap
CALLS = 4
#: a guard in PyTorch's text of a graph's guards: on the size of a layer's tensor, or on a scaling that is a number
GUARD = re.compile(r"_MATCH: (\S*['.](lora_\w+|scaling)['.\[][^,\s]*)(?:, .*size=\[(.*?)\]| == ([-\d.e]+))")


class Guards(WorkingView):
    """A checklist for each model: the guards of its graph, and those that the last swap broke.

    Each model is compiled with its own graphs, without generating code, which doesn't change the guards. A click swaps
    an adapter into all models and calls each a few times. Broken guards are red, with the time of the call that
    recompiled. Below is the time of each call.

    Parameters
    ----------
    models:
        Models with an adapter, by the names of their columns.
    adapters:
        As for :class:`SwapPanel`.
    inputs:
        Keyword arguments of a call.

    Examples
    --------
    >>> from hotswap_lab import demo
    >>> from hotswap_lab.widgets import Guards
    >>> model, _ = demo.load("reverse")
    >>> folders = {"shout": demo.adapter_path("shout")}
    >>> guards = Guards({"not prepared": model}, folders, model.get_base_model().dummy_inputs)
    >>> guards.choose("shout")
    >>> print(guards)  # doctest: +ELLIPSIS
    Guards: shout is in
    not prepared
      compiled again
      ✓ lora_A 8 × 128: 24 layers
      ...
      ✗ scaling was 2, is 1: 14 layers
      ✓ scaling 2: 14 layers

    How to read it: a swap costs no compilation if it changes nothing on the list.
    """

    title = "Guards: what a graph was compiled for"
    #: the adapter that was swapped in last
    active: str | None

    def __init__(self, models: Mapping[str, torch.nn.Module], adapters: Mapping[str, Any], inputs: Mapping[str, Any]):
        self.adapters: Mapping[str, object] = adapters
        self.columns: dict[str, Column] = {name: Column(model, adapters, inputs) for name, model in models.items()}
        for title, column in self.columns.items():
            column.watch.began = partial(setattr, self, "doing", f"compiling again: {title}")
        self._run(self._visit)

    @classmethod
    def demo(cls) -> "Guards":
        """Make a checklist of two embedded models, one of them prepared for all of their adapters."""
        folders = {name: demo.adapter_path(name) for name in demo.adapter_names()}
        models = {name: demo.load("reverse")[0] for name in ("not prepared", "prepared")}
        prepare_model_for_compiled_hotswap(models["prepared"], adapters=[*folders.values()])
        return cls(models, folders, models["prepared"].get_base_model().dummy_inputs)

    def choose(self, name: str) -> None:
        """Swap an adapter into all models and call each."""
        self._run(partial(self._visit, name))

    def _visit(self, name: str | None = None) -> None:
        states = []
        for title, column in self.columns.items():
            self.doing: str = f"calling the model that is {title}"
            if name:
                self.swaps.append(self._when_free(partial(column.switch.swap, name)))
            states.append(contents(column.switch))
            column.visit(name or "the first", self._check)
        # only now, because after an error the picture is still that of the swap before, and must be marked as old
        self._seen, self.active, self.doing = states, name, ""
        self.summary: str = f"{name or 'the first adapter'} is in"

    def _now(self) -> object:
        return [contents(column.switch) for column in self.columns.values()]

    @property
    def _note(self) -> str:
        return self.doing if self.busy else super()._note

    # ---- text, picture and controls

    def _lines(self) -> list[str]:
        texts = []
        for title, column in self.columns.items():
            texts += [title, *(f"  {text}" for text, _ in column.checklist())]
        return texts

    def figure(self) -> Figure:
        """The checklists side by side, and below them the time of each of the last calls."""
        *lists, times = self._parts()
        width, top = lists[0].size
        canvas = Canvas(660, top + times.size[1])
        canvas.shapes += [part.svg.replace("<svg ", f"<svg x='{width * at}' ", 1) for at, part in enumerate(lists)]
        canvas.shapes.append(times.svg.replace("<svg ", f"<svg y='{top}' ", 1))
        return canvas.figure(str(self))

    def _inside(self) -> str:
        return self._framed(*self._parts())

    def _parts(self) -> list[Figure]:
        """A checklist for each model, and the time of each call."""
        lists = {title: column.checklist(timed=True) for title, column in self.columns.items()}
        parts = []
        for title, lines in lists.items():
            canvas = Canvas(660 // len(lists), 64 + 19 * max(map(len, lists.values())))
            canvas.text(20, 28, title, size=15, anchor="start", bold=True)
            for row, (text, holds) in enumerate(lines):
                canvas.text(20, 50 + 19 * row, text, anchor="start", color=RIGHT if holds else WRONG, bold=not row)
            parts.append(canvas.figure(title))
        return [*parts, timeline("Time of each call", {title: column.watch for title, column in self.columns.items()})]

    def _controls(self) -> list:
        self._with_stop()
        self._choices = choices(options=[*self.adapters], value=None)
        self._when_set(self._choices, lambda name: name and self._enqueue(name, partial(self._visit, name)))
        return [wrapping_row(self._choices, self._stop_button)]

    def _refresh(self) -> None:
        super()._refresh()
        if not self.busy:
            self._choices.value = None if self._note else self.active  # so that it can be chosen again


class Column:
    """A model with its own compiled graphs, and the guards of the graph that ran last and of the one before."""

    def __init__(self, model: torch.nn.Module, adapters: Mapping[str, object], inputs: Mapping[str, Any]):
        def call() -> None:
            model(**inputs)

        # PyTorch stores graphs with the code, so a copy of the code has no graphs of other models
        self._code = call.__code__ = call.__code__.replace()
        # fullgraph raises at a graph break or too many graphs, which would leave guards out
        self._call = torch.compile(call, backend="eager", dynamic=False, fullgraph=True)
        self.switch: Switch = switch_for(model, adapters)
        self.watch: RecompileWatch = RecompileWatch()
        #: whether a graph ran in the last visit
        self.ran: bool = False
        #: the kind of each tensor or scaling, and its size or value when the graph was compiled, by path
        self.guards: dict[str, tuple[str, str]] = {}
        self.previous: dict[str, tuple[str, str]] = {}

    def visit(self, label: str, check: Callable[[], None]) -> None:
        """Call the model a few times, and record the guards of the graph that ran."""
        runs_before, self.ran = self.watch.runs, False
        for _ in range(CALLS):
            check()
            with in_use(self.switch.model), torch.no_grad(), self.watch:
                self.watch.call(label, self._call)
        del self.watch.calls[: -10 * CALLS]  # the picture has room for these
        if runs_before is not None and self.watch.runs == runs_before:  # as with the stance "force_eager"
            return
        self.ran = True
        graph = compat.cache_entries(self._code)[0]  # the latest is first
        guards = {path: (kind, _readable(*value)) for path, kind, *value in GUARD.findall(str(graph.guard_manager))}
        self.previous, self.guards = self.guards or guards, guards

    def checklist(self, timed: bool = False) -> list[tuple[str, bool]]:
        """A verdict, and a line for each kind of guard of the previous graph, each with whether it holds now."""
        if not self.ran:
            return [("nothing compiled ran", False)]
        counts = Counter((*was, self.guards.get(path, was)[1]) for path, was in self.previous.items())
        lines = []
        for (kind, was, now), count in sorted(counts.items()):
            text = f"✓ {kind} {was}" if was == now else f"✗ {kind} was {was}, is {now}"
            lines.append((f"{text}: {counted(count, 'layer')}", was == now))
        all_hold = all(holds for _, holds in lines)
        recompiling = [call for call in self.watch.calls[-CALLS:] if call.recompiles]
        if not recompiling:
            return [("every guard holds", True) if all_hold else ("an earlier graph fits", False), *lines]
        if all_hold:  # for a reason that is not on the list
            lines.append((f"✗ {self.watch.reasons[-1]}", False))
        seconds = f": {readable(recompiling[0].seconds)}" if timed else ""
        return [(f"compiled again{seconds}", False), *lines]


def _readable(size: str, number: str) -> str:
    if number:
        return f"{float(number):.3g}"
    return "a tensor" if size == "1, 1" else size.replace(", ", " × ")
