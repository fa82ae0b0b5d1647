"""RecompileMeter: a live count of a compiled model's calls, swaps and recompiles."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch

from ..core.compiled import compiled_in
from ..core.errors import refuse
from ..figures.latency import timeline
from ..pools.adapter_pool import AdapterPool
from ..threads import in_use
from ..watch import RecompileWatch
from .switch import switch_for, whereabouts
from .view import counted, escape, wrapping_row
from .work import WorkingView

if TYPE_CHECKING:
    import ipywidgets

    from ..figures import Figure

#: how many of the last calls the picture shows
SHOWN = 40
#: calls for one click
CALLS = 4


class RecompileMeter(WorkingView):
    """A live counter and a latency timeline of a model's calls, with swaps and recompiles marked, and their reasons.

    Call the meter instead of the model. It counts until :meth:`close`, or until the end of its ``with`` block.

    Parameters
    ----------
    model:
        The result of ``torch.compile``.
    pool, adapters, adapter_name:
        The adapters to swap in: an :class:`AdapterPool`, or a dict of names and sources for :func:`hotswap_adapter`.
    inputs:
        Keyword arguments of a call. With them, the widget has buttons that call and swap.

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
    >>> print(meter.watch.reasons[0])
    a Python number in the graph has changed: factor was 2.0
    """

    doing = "calling the model"

    def __init__(
        self,
        model: Callable[..., object],
        *,
        pool: AdapterPool | None = None,
        adapters: Mapping[str, object] | None = None,
        adapter_name: str | None = None,
        inputs: Mapping[str, object] | None = None,
    ):
        if not callable(model) or not isinstance(inputs, Mapping | None):
            raise refuse("nothing_to_call", model=type(model).__name__, inputs=type(inputs).__name__)
        self.model = model
        self.inputs = inputs
        self._switch = None
        if pool is not None or adapters:
            self._switch = switch_for(model if pool is None else pool, adapters, adapter_name)
        #: the count of compilations and recompiles, with their reasons
        self.watch: RecompileWatch = RecompileWatch()
        self.watch.__enter__()
        #: the number of swaps
        self.swaps: int = 0

    def __enter__(self) -> RecompileMeter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop counting. The counts are kept."""
        self.watch.__exit__()

    # ---- counts

    @property
    def calls(self) -> int:
        """The number of calls of the model."""
        return len(self.watch.calls)

    # ---- actions

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Call the model, and count the call. Swaps by other threads wait meanwhile."""
        switch = self._switch
        with contextlib.nullcontext() if switch is None else in_use(switch.model):
            label = "call" if switch is None else whereabouts(switch)
            try:
                return self.watch.call(label, self.model, *args, **kwargs)
            finally:
                self._changed()

    def swap(self, name: str) -> None:
        """Swap an adapter in, and count the swap."""
        if self._switch is None:
            raise refuse("meter_without_adapters")
        self.swap_seconds: float | None = self._when_free(lambda: self._switch.swap(name))
        self.swaps += 1

    def visit(self, *names: str, calls: int = CALLS) -> None:
        """Swap each of ``names`` in, one after the other, and call the model with ``inputs`` after each swap."""
        if self.inputs is None:
            raise refuse("meter_without_inputs")
        self._run(lambda: self._visit(names, calls))

    def _visit(self, names: tuple[str, ...], calls: int) -> None:
        for name in names:
            self.swap(name)
            self._call(calls)

    def _call(self, calls: int) -> None:
        for _ in range(calls):
            self._check()
            self(**self.inputs)

    # ---- text, picture and controls

    @property
    def summary(self) -> str:
        """One line with all counts."""
        never = isinstance(self.model, torch.nn.Module) and not compiled_in(self.model)
        counts = f"{counted(self.calls, 'call')}, {counted(self.swaps, 'swap')}, {self.watch.summary}"
        return f"{counts}{'; the model is not compiled' if never else ''}"

    def figure(self) -> Figure | None:
        """A picture of the last calls' latency, on a logarithmic scale. Its text form has the numbers."""
        if not self.watch.calls:
            return None
        last = SimpleNamespace(calls=self.watch.calls[-SHOWN:], summary=self.watch.summary)
        title = f"the last {SHOWN} of {self.calls} calls" if self.calls > SHOWN else "all calls"
        return timeline("Latency of each call", {title: last})

    def _inside(self) -> str:
        recompiled = [str(each) for each in self.watch.compilations if each.kind == "recompile"]
        reasons = "\n".join(recompiled) or "Nothing was compiled again."
        return f"{super()._inside()}<pre>{escape(reasons)}</pre>"

    def _controls(self) -> list[ipywidgets.Widget]:
        import ipywidgets as w

        starters = []
        if self.inputs is not None:
            call = partial(self._come, f"{CALLS} calls", partial(self._call, CALLS))
            starters.append(self._button(f"Call {CALLS} times", "call the model with its inputs", call))
        if self.inputs is not None and self._switch is not None:
            menu = w.Dropdown(options=self._switch.names, description="adapter", layout=w.Layout(width="230px"))

            def visit() -> None:
                self._come(f"{CALLS} calls of {menu.value}", partial(self._visit, (menu.value,), CALLS))

            starters += [menu, self._button("Swap and call", "swap this adapter in, then call the model", visit)]
        return [wrapping_row(*self._with_stop(*starters))]
