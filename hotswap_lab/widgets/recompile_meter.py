"""RecompileMeter: counts a compiled model's calls, swaps and recompiles while they happen."""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch

from ..core.compiled import is_compiled
from ..core.errors import refuse
from ..core.pool import AdapterPool
from ..lessons.compiling import timeline
from ..lessons.figures import Canvas, Figure
from ..threads import in_use
from ..watch import RecompileWatch
from .switch import patiently, switch_for, whereabouts
from .view import View, error_html, escape, fitting, readable, speaking, wrapping_row
from .work import Stopped, Work

if TYPE_CHECKING:
    import ipywidgets

#: how many of the last calls the picture shows
SHOWN = 40
#: calls of one click
CALLS = 4


class RecompileMeter(View):
    """A live counter and a latency timeline of a model's calls, with swaps and recompiles marked, and their reasons.

    Call the meter instead of the model. It watches from the moment it is made until :meth:`close`, or as a ``with``
    block.

    Parameters
    ----------
    model:
        What ``torch.compile`` gave.
    pool, adapters, adapter_name:
        What can be swapped in: an :class:`AdapterPool`, or names and for each what :func:`hotswap_adapter` takes.
    inputs:
        Keyword arguments of a call. With them the widget has buttons that call and swap.

    Examples
    --------
    >>> import torch
    >>> from hotswap_lab.widgets import RecompileMeter
    >>> model = torch.compile(lambda x, factor: x * factor, backend="eager", dynamic=False)
    >>> with RecompileMeter(model) as meter:
    ...     for factor in (2.0, 2.0, 3.0):
    ...         _ = meter(torch.ones(2), factor)
    >>> print(meter)
    RecompileMeter: 3 calls, 0 swaps, 1 compiled, 1 recompile
    >>> print(meter.reasons[0])
    a Python number in the graph has changed: factor was 2.0
    """

    def __init__(
        self,
        model: Callable[..., object],
        *,
        pool: AdapterPool | None = None,
        adapters: Mapping[str, object] | None = None,
        adapter_name: str = "default",
        inputs: Mapping[str, object] | None = None,
    ):
        if not callable(model):
            raise refuse(
                "There is nothing to count the calls of.",
                found=f"a {type(model).__name__}",
                expected="what torch.compile gave",
                next_step="pass that",
            )
        if pool is not None and adapters:
            switch_for(pool, adapters)  # says that it is one or the other
        if inputs is not None and not isinstance(inputs, Mapping):
            raise refuse(
                "The inputs of a call have no names.",
                found=f"inputs as a {type(inputs).__name__}",
                expected="a dict of keyword arguments, inputs={'input_ids': ...}",
                next_step="pass inputs with their names",
            )
        self.model, self.inputs = model, inputs
        self._switch = None
        if pool is not None or adapters:
            self._switch = switch_for(model if pool is None else pool, adapters, adapter_name)
        self.watch = RecompileWatch()
        self.watch.__enter__()
        #: how many swaps there were, and how long the last one took
        self.swaps, self.swap_seconds = 0, None
        self.error: BaseException | None = None
        self._show_reasons = False
        self._work = Work(self._changed)

    def __enter__(self) -> RecompileMeter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the watching. What was counted stays."""
        self.watch.__exit__()

    # ---- what is counted

    @property
    def calls(self) -> int:
        """How often the model was called."""
        return len(self.watch.calls)

    @property
    def recompiles(self) -> int:
        """How many graphs had to be compiled because those that were there did not do."""
        return self.watch.recompiles

    @property
    def reasons(self) -> list[str]:
        """Why, for each recompile."""
        return self.watch.reasons

    @property
    def show_reasons(self) -> bool:
        """Whether the live form lists the reasons. May be set."""
        return self._show_reasons

    @show_reasons.setter
    def show_reasons(self, show: bool) -> None:
        self._show_reasons = bool(show)
        self._changed()

    @property
    def names(self) -> list[str]:
        """What can be swapped in."""
        return self._switch.names if self._switch else []

    @property
    def busy(self) -> bool:
        """Whether something is running that a click began."""
        return self._work.busy

    # ---- what can be done

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Calls the model, and counts. Swaps from elsewhere wait meanwhile."""
        with in_use(self._switch.model) if self._switch else contextlib.nullcontext():
            label = whereabouts(self._switch) if self._switch else "call"
            try:
                return self.watch.call(label, self.model, *args, **kwargs)
            finally:
                self._changed()

    def swap(self, name: str) -> None:
        """Swaps an adapter in, and counts it."""
        if self._switch is None:
            raise refuse(
                "The meter has nothing to swap in.",
                found="neither a pool nor adapters",
                expected="RecompileMeter(model, pool=pool) or adapters={name: folder, ...}",
                next_step="pass one of these",
            )
        self.swap_seconds = seconds_of(lambda: self._switch.swap(name))
        self.swaps += 1
        self._changed()

    def visit(self, *names: str, calls: int = CALLS) -> None:
        """Swaps each of ``names`` in, one after the other, and calls the model with ``inputs`` after each swap."""
        self._check_inputs()
        self._work.run(lambda: self._visit(names, calls))

    def stop(self) -> None:
        """Ends a visit after its present call."""
        self._work.stop()

    def wait(self, timeout: float | None = None) -> bool:
        """Waits until nothing runs, at most ``timeout`` seconds. Returns whether that is so."""
        return self._work.wait(timeout)

    def _check_inputs(self) -> None:
        if self.inputs is None:
            raise refuse(
                "The meter does not know what to call the model with.",
                found="no inputs",
                expected="RecompileMeter(model, inputs={...}): the keyword arguments of a call",
                next_step="pass inputs, or swap and call by hand: meter.swap(name), meter(...)",
            )

    def _visit(self, names: tuple[str, ...], calls: int) -> None:
        try:
            for name in names:
                if self._work.beside:
                    patiently(lambda name=name: self.swap(name), self._work.check)
                else:
                    self.swap(name)
                self._call(calls)
        except Stopped:
            return

    def _call(self, calls: int) -> None:
        for _ in range(calls):
            self._work.check()
            self(**self.inputs)

    def _click(self, job: Callable[[], object]) -> None:
        def quietly() -> None:
            try:
                job()
                self.error = None
            except Stopped:
                return
            except Exception as error:  # shown; there is nobody to raise it to
                self.error = error

        self._work.start(quietly)  # or not: a second click, before the buttons were greyed out

    # ---- how it looks

    @property
    def summary(self) -> str:
        """One line with all counts."""
        calls, swaps = (
            f"{count} {what}{'' if count == 1 else 's'}" for count, what in ((self.calls, "call"), (self.swaps, "swap"))
        )
        never = isinstance(self.model, torch.nn.Module) and not is_compiled(self.model)
        return f"{calls}, {swaps}, {self.watch.summary}{'; the model is not compiled' if never else ''}"

    def __str__(self) -> str:
        return f"RecompileMeter: {self.summary}"

    def figure(self) -> Figure:
        """The latency of the last calls, on a logarithmic scale. Its text form has the figures."""
        if not self.watch.calls:
            canvas = Canvas(660, 60)
            canvas.text(330, 36, "no call yet")
            return canvas.figure("no call yet")
        last = SimpleNamespace(calls=self.watch.calls[-SHOWN:], summary=self.watch.summary)
        return timeline("Latency of each call", {_panel_title(self): last})

    def to_html(self) -> str:
        """The static form: counts, picture, reasons."""
        return f"<div>{self._head()}{fitting(self.figure().svg)}{self._reasons()}</div>"

    def _static(self) -> dict[str, str]:
        # GitHub shows a picture that stands alone, and takes one in HTML out
        return {"image/svg+xml": self.figure().svg, "text/plain": str(self)}

    def _head(self) -> str:
        swapped = "" if self.swap_seconds is None else f". Last swap: {readable(self.swap_seconds)}"
        return f"<div><strong>RecompileMeter</strong>: {escape(self.summary)}{swapped}</div>"

    def _reasons(self) -> str:
        recompiled = [each for each in self.watch.compilations if each.kind == "recompile"]
        if not recompiled:
            return "<div>Nothing was compiled again.</div>"
        return f"<pre>{escape(chr(10).join(map(str, recompiled)))}</pre>"

    def _build(self) -> list[ipywidgets.Widget]:
        import ipywidgets as w

        self._counts, self._picture, self._why, self._error = speaking(), w.HTML(), w.HTML(), w.HTML()
        self._reasons_button = w.Button(tooltip="why the model was compiled again")
        self._reasons_button.on_click(lambda _: setattr(self, "show_reasons", not self.show_reasons))
        self._actions, controls = [], []
        if self.inputs is not None:
            call = w.Button(description=f"Call {CALLS} times", tooltip="call the model with its inputs")
            call.on_click(lambda _: self._click(lambda: self._call(CALLS)))
            self._actions.append(call)
            if self._switch:
                menu = w.Dropdown(options=self.names, description="adapter", layout=w.Layout(width="230px"))
                swap = w.Button(description="Swap and call", tooltip="swap this adapter in, then call the model")
                swap.on_click(lambda _: self._click(lambda: self._visit((menu.value,), CALLS)))
                self._actions += [menu, swap]
            stop = w.Button(description="Stop", tooltip="end after the present call")
            stop.on_click(lambda _: self.stop())
            controls = [*self._actions, stop]
        return [self._counts, wrapping_row(*controls, self._reasons_button), self._error, self._picture, self._why]

    def _refresh(self) -> None:
        for control in self._actions:
            control.disabled = self.busy
        self._counts.value = self._head() + ("busy" if self.busy else "")
        self._reasons_button.description = "Hide reasons" if self._show_reasons else "Show reasons"
        self._picture.value = fitting(self.figure().svg)
        self._why.value = self._reasons() if self._show_reasons else ""
        trace = "" if self.error is None else "".join(traceback.format_exception(self.error))
        self._error.value = "" if self.error is None else error_html(str(self.error), trace)


def _panel_title(meter: RecompileMeter) -> str:
    return f"the last {SHOWN} of {meter.calls} calls" if meter.calls > SHOWN else "all calls"


def seconds_of(run: Callable[[], object]) -> float:
    """Seconds of one call.

    >>> 0 <= seconds_of(lambda: None) < 1
    True
    """
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
