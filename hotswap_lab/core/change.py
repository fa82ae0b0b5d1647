"""Change: the writes that a swap makes to a model; and :func:`apply`, the only code that writes to one.

A change allocates, casts and moves what it needs when it is made, so running out of memory fails before anything is
written. :func:`apply` first makes the resizes and runs the steps. Each is noted in a journal, which takes it back if a
later one fails. The values are copied last, in one call that has no reason left to fail, so no copy ever has to be
taken back.
"""

import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .. import compat
from .errors import HotswapError, refused
from .journal import Journal, interrupts_held

LOG = logging.getLogger("hotswap_lab")
Step = Callable[[Journal], object]
#: replaced after every change of any model or pool, so that displays can poll it
LATEST: list[object] = [None]
#: in a block of :func:`together`, the changes so far, each with its ``log``
_COLLECTED: ContextVar[list[tuple[Sequence["Change"], Any]] | None] = ContextVar("hotswap_lab_collected", default=None)
#: a key that is in a table of parameters for a moment
RESIZED = "hotswap_resized"


@dataclass(eq=False)
class Change:
    """Everything that is written to one model: copies, resizes, and steps that can be undone.

    Parameters
    ----------
    inference:
        Whether it has to be written in inference mode.
    copies:
        Pairs of a target and a source, of the same shape, dtype and device.
    resizes:
        Pairs of a parameter and its new memory, of any shape.
    tables:
        The tables of the modules that have these parameters.
    sizes:
        Triples: a module, an attribute that repeats a parameter's size (``out_features`` of a ``lora_A``), its value.
    steps:
        All other writes. Each step gets the journal, and records there how to undo it.
    last_steps:
        Steps that run after all of ``steps``.
    """

    inference: bool = False
    copies: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    resizes: list[tuple[torch.nn.Parameter, torch.Tensor]] = field(default_factory=list)
    tables: list[dict[str, Any]] = field(default_factory=list)
    sizes: list[tuple[torch.nn.Module, str, int | None]] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    last_steps: list[Step] = field(default_factory=list)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Add a copy of ``source`` to ``target``. It is cast and moved now, while an error does no harm."""
        if source.dtype != target.dtype or source.device != target.device:
            source = source.to(target.device, target.dtype)
        self.copies.append((target, source))

    def zero(self, target: torch.Tensor) -> None:
        """Add a write of zeros to ``target``."""
        # a single zero, repeated without taking memory
        self.copies.append((target, target.new_zeros(()).expand(target.shape)))


def apply(changes: Sequence[Change], journal: Journal | None = None, log: Callable[[], object] | None = None) -> None:
    """Carry out changes of any number of models, all of them or none. No other thread may use the models meanwhile.

    The undo steps are recorded in ``journal``: a caller that has more to do can roll it back later, but not the copies.
    At the end, the change is noted in ``LATEST``, and ``log`` is called if the log is on: see
    :func:`hotswap_lab.core.log.log_event`.
    """
    if (collected := _COLLECTED.get()) is not None:
        return collected.append((changes, log))
    journal = Journal() if journal is None else journal
    copies, inference = [], False
    for change in changes:
        copies += change.copies
        inference = inference or change.inference
    with interrupts_held(), torch.inference_mode(inference), torch.no_grad():
        try:
            for change in changes:
                _write(change, journal)
            copy_all(copies)
        except BaseException:
            journal.roll_back()
            raise
        torch.clear_autocast_cache()  # it has casts of the previous values, until the outermost autocast block ends
    LATEST[0] = object()
    if log is not None and LOG.isEnabledFor(logging.INFO):
        log()


@contextmanager
def together(journal: Journal | None = None) -> Iterator[None]:
    """Carry out everything that is applied in a block at its end: all of it, or none; ``journal`` is as above."""
    token = _COLLECTED.set(found := [])
    try:
        yield
    finally:
        _COLLECTED.reset(token)
    apply([change for changes, _ in found for change in changes], journal, lambda: [log() for _, log in found if log])


def _write(change: Change, journal: Journal) -> None:
    """Make the resizes and run the steps of a change, so that the journal can undo them."""
    with torch.inference_mode(change.inference):
        if change.resizes:
            give_memory(change.resizes, journal)
            mark_changed(change.tables, journal)
        by_name: dict[str, list[tuple[dict[str, Any], int | None]]] = {}
        for owner, attribute, size in change.sizes:
            by_name.setdefault(attribute, []).append((owner.__dict__, size))
        for name, sized in by_name.items():
            journal.set_items([table for table, _ in sized], name, [size for _, size in sized])
        for step in (*change.steps, *change.last_steps):
            step(journal)


def give_memory(pairs: Sequence[tuple[torch.nn.Parameter, torch.Tensor]], journal: Journal) -> None:
    """Replace the memory of parameters, which may change their shapes."""
    # cleared first: a gradient must have the shape of its parameter at all times
    clear_gradients([parameter for parameter, _ in pairs], journal)
    old = [(parameter, parameter.data) for parameter, _ in pairs]

    def undo() -> None:
        for parameter, memory in old:
            parameter.data = memory

    journal.record(undo)
    watch_optimizers()
    for parameter, fresh in pairs:
        # A graph over the old shape may still be alive, and with it the parameter's gradient accumulator, which would
        # refuse gradients of the new shape. PyTorch gives a parameter a new one only when its dtype or device changes.
        other_dtype = torch.float32 if parameter.dtype == torch.float64 else torch.float64
        parameter.data = torch.empty(0, dtype=other_dtype, device=parameter.device)
        parameter.data = fresh
        # autograd doesn't notice a write through .data by itself
        torch.autograd.graph.increment_version(parameter)


@functools.cache
def watch_optimizers() -> None:
    """Have :func:`check_fused` look at each step of any optimizer in this process."""
    register_optimizer_step_pre_hook(check_fused)


def check_fused(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Refuse a step of a fused optimizer whose tensors are not laid out alike, before it writes anything.

    Its kernel takes each tensor for one piece of memory. On the CPU it checks neither shapes nor strides: with state of
    another shape it reads and writes beyond its end; in a room it would write to the weights of other layers. The other
    optimizers compute with any strides, and raise an error of their own for another shape.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group.get("fused") else ():
            if not parameter.requires_grad:
                continue
            is_contiguous, shape = parameter.is_contiguous(), parameter.shape
            # a tensor like it has the same strides if these leave no gaps
            if not is_contiguous and _strides(parameter) != torch.empty_like(_local(parameter), device="meta").stride():
                raise _misfit(optimizer, "a parameter", parameter)
            for name, value in [("gradient", parameter.grad), *optimizer.state.get(parameter, {}).items()]:
                if not isinstance(value, torch.Tensor) or not value.dim() or value.is_sparse:
                    continue
                if value.shape != shape:
                    state, shape = tuple(value.shape), tuple(shape)
                    raise refused("optimizer_of_another_shape", name=name, state=state, shape=shape)
                if not (is_contiguous and value.is_contiguous()) and _strides(value) != _strides(parameter):
                    raise _misfit(optimizer, f"{name} of a parameter with strides {_strides(parameter)},", value)


def _local(tensor: Any) -> torch.Tensor:
    """The part of a tensor that this process has."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _strides(tensor: torch.Tensor) -> tuple[int, ...]:
    return _local(tensor).stride()


def _misfit(optimizer: torch.optim.Optimizer, what: str, tensor: torch.Tensor) -> HotswapError:
    name, shape, strides = type(optimizer).__name__, tuple(tensor.shape), _strides(tensor)
    return refused("fused_optimizer", optimizer=name, what=what, shape=shape, strides=strides)


def mark_changed(tables: Sequence[dict[str, Any]], journal: Journal) -> None:
    """Change tables of parameters and change them back: PyTorch 2.8 checks no sizes where no table has changed."""
    journal.record(lambda: [table.pop(RESIZED, None) for table in tables])
    for table in tables:
        table[RESIZED] = None
        del table[RESIZED]


def clear_gradients(parameters: Iterable[torch.nn.Parameter], journal: Journal) -> None:
    """Remove gradients, because those of the old adapter's weights say nothing about the new one's."""
    for parameter in parameters:
        if parameter.grad is not None:
            journal.set_attribute(parameter, "grad", None)


def copy_all(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Copy the second tensor of each pair to the first, in one call where PyTorch has one."""
    try:
        copy = compat.foreach_copy
    except ImportError:
        for target, source in pairs:
            target.copy_(source)
        return
    if pairs:
        copy(*zip(*pairs, strict=True), non_blocking=True)
