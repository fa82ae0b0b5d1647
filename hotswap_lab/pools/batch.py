"""Batch: the rows of a model's batch, checked when the model is called, for all of its layers at once.

Tests: ``tests/pools/test_row_pool.py``.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch

from ..core.errors import HotswapError, refused
from ..core.journal import Journal
from .copies import ONCE, Copies, copies_in_generate
from .proof import FLAG, Probe, all_inputs, batch_name, kind_of, prove, size_of, tensor_inputs

#: the number in place of an entry's, where only a part of the model is called
PART = -1
#: a module's tables of hooks
HOOKS = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_always_called")


class Local(threading.local):
    """The state of a thread's call of the model."""

    #: the number of the entry that was called; None outside of a call
    outer: int | None = None
    #: how the batch of this call repeats the rows, where these differ
    copies: Copies | None = None
    #: the probe that the layers compute with during a proof
    probe: Probe | None = None


class Batch:
    """The division of a model's batch into rows.

    Its entries are the model, and those of its parts that are called alone (an encoder). Hooks check their inputs.
    Rows that differ are computed only after a proof that the model keeps them apart, for inputs of this kind and in the
    layers where one of the adapters acts.
    """

    known: ClassVar[weakref.WeakValueDictionary[int, Batch]] = weakref.WeakValueDictionary()

    def __init__(self, room: Any = None, is_tiled: bool = False):
        #: the room with the rows; None in a copy of a model, which has no room
        self.room = room
        self.rows: int = room.rows if room else 0
        #: whether the model is of diffusers, whose pipelines repeat a batch as a whole
        self.is_tiled = is_tiled
        #: how a batch may repeat its rows, as assigned; a compiled graph treats it as a constant
        self.copies: Copies = ONCE
        #: whether the assigned rows differ, and the numbers of the layers on which one of them has an adapter
        self.differs: bool = False
        self.acting: frozenset[int] = frozenset()
        #: the modules at which a model is called, which have the hooks
        self.entries: list[torch.nn.Module] = []
        #: the table of modules with the first layer, and its name there
        self.place: tuple[dict[str, Any], str] = {}, ""
        #: the layers that were proven, for each entry and kind of input
        self.proven: dict[tuple[Any, ...], frozenset[int]] = {}
        #: all layers for which there is a proof
        self.shown: frozenset[int] = frozenset()
        #: in a graph: the entry that is being traced, and the size of its batch
        self.traced: int | None = None
        self.total: int = 0
        self.local: Local = Local()
        self.number: int = max(self.known, default=0) + 1
        self.known[self.number] = self

    def __reduce__(self) -> tuple[type[Batch], tuple[()]]:
        return Batch, ()

    @property
    def size(self) -> int:
        """The number of assigned rows; 0 if all have the same adapter, and a batch may have any size."""
        return len(self.room.assigned) if self.room else 0

    def blocks_of(self, length: int) -> tuple[int, int]:
        """In a graph: the number of rows in the first axis of a layer's input, and the length of the block of each."""
        total = self.total or length
        count = total // self.copies.count
        return count, self.copies.repeats if length == total else length // (count * self.copies.tiles)

    def times_of(self, length: int) -> int:
        """How often the first axis of a layer's input, of this length, has all rows, outside of a graph."""
        copies = self.local.copies
        if copies is None:  # outside of a call of the model, or after a break in a graph
            return self._copies_of(length).tiles
        return copies.tiles if length % (copies.tiles * self.size) == 0 else 1

    # ---- calls of the model

    def watch(self, entries: Sequence[torch.nn.Module], journal: Journal) -> None:
        """Add hooks that check the inputs of the entries."""
        self.entries, slot = list(entries), self.room.slot
        tables, first = [module._modules for module in slot.modules], slot.layers[0].module
        self.place = next((table, name) for table in tables for name, child in table.items() if child is first)
        journal.record(lambda: self.unwatch(Journal()))
        for number, entry in enumerate(entries):
            entry.register_forward_pre_hook(functools.partial(self._begin, number), with_kwargs=True)
            entry.register_forward_hook(functools.partial(self._end, number), always_call=True)

    def unwatch(self, journal: Journal) -> None:
        """Remove the hooks."""
        for entry in self.entries:
            hooks = entry._forward_pre_hooks | entry._forward_hooks
            own = [key for key, hook in hooks.items() if getattr(hook, "func", None) in (self._begin, self._end)]
            for name in HOOKS:
                journal.remove(getattr(entry, name), *own)

    def _begin(self, number: int, entry: torch.nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if torch.compiler.is_compiling():
            if self.traced not in (None, number):
                return None
            self.traced = number
            return self._trace(number, arguments, named)
        if self._is_gone:
            self.unwatch(Journal())
        elif self.local.probe is None and self.local.outer in (None, number):
            self.local.outer = number
            if self.size and self._is_active:
                self.total = size_of(arguments, named)
                copies = self._copies_of(self.total)
                self.room.check_rows()
                if self.differs:
                    self.local.copies = copies
                    self._check_proof(number, arguments, named, False)
        return None

    def _end(self, number: int, *_: object) -> None:
        if torch.compiler.is_compiling():
            if self.traced == number:
                self.traced, self.total = None, 0
        elif self.local.probe is None and self.local.outer == number:
            self.local.outer, self.local.copies, self.total = None, None, 0

    def _copies_of(self, total: int) -> Copies:
        """How a batch repeats the assigned rows. Refuses an order that is not known, unless all rows are the same."""
        count, rest = divmod(total, size := self.size)
        if rest or not count:
            self._refuse_batch(total, ONCE)
        if not self.differs:
            return ONCE
        if copies := copies_in_generate(self.room.slot.host.base, size, total):
            return copies
        if count in (1, self.copies.count):
            return self.copies if count > 1 else ONCE
        if self.is_tiled:
            return Copies(count)
        raise refused("order_not_known", batch=total, size=size, count=count)

    @contextlib.contextmanager
    def around_call(self, arguments: tuple[Any, ...], named: dict[str, Any]) -> Iterator[None]:
        """A block around a call of the model that no hook sees, since its code was compiled ahead of time.

        In that code, ``copies`` is a constant, so that it would take other rows for those of a smaller batch.
        """
        if self.size and (total := size_of(arguments, named)) != self.size * self.copies.count:
            self._refuse_batch(total, self.copies)
        try:
            self._begin(0, self.entries[0], arguments, named)
            yield
        finally:
            self._end(0)

    def check_part(self) -> None:
        """Refuse layers that are computed outside of a call of the model, if no such call has proven them."""
        if self.differs and self.local.outer is None and not self.acting <= self.shown:
            raise refused("rows_not_in_layer", paths="a part of the model", found="no proof for this part")

    @property
    def _is_gone(self) -> bool:
        """Whether PEFT has taken the layers or the adapter out of the model: ``unload``, ``delete_adapter``."""
        if self.room is None:
            return False
        (table, place), layer = self.place, self.room.slot.layers[0].module
        module, variant = table.get(place), layer.lora_variant.get(self.room.slot.adapter_name)
        is_there = module is layer or (module is not None and layer in module.modules())  # as it is, or compiled since
        return not is_there or getattr(variant, "batch", None) is not self

    @property
    def _is_active(self) -> bool:
        layer, name = self.room.slot.layers[0].module, self.room.slot.adapter_name
        return not self._is_gone and name in layer.active_adapters and not layer.disable_adapters

    def _check_proof(self, number: int, arguments: tuple[Any, ...], named: Mapping[str, Any], in_graph: bool) -> None:
        inputs = all_inputs(arguments, named)
        kinds = {name: kind_of(value) for name, value in inputs.items()}
        in_graphs = [name for name, value in inputs.items() if isinstance(value, (torch.Tensor, *FLAG))]
        copies = self.local.copies or ONCE
        direct = copies, number, frozenset((name, kinds[name]) for name in in_graphs)
        key = direct if in_graph else (copies, number, frozenset(kinds.items()))
        proven = self.proven.get(key, frozenset())
        if copies.tiles == 1:  # where rows are kept apart, blocks of them are; blocks don't show it of the rows in them
            proven |= self.proven.get((ONCE, *key[1:]), frozenset())
        if self.acting <= proven:
            return
        layers = self.acting | proven
        called, holds_for_others = prove(self, self.entries[number], arguments, named, layers)
        if holds_for_others:
            self.proven[key] = self.proven[direct] = layers
            self.shown |= called

    def _refuse_batch(self, batch: int, expected: Copies, found: Copies = ONCE) -> None:
        if self.size:
            raise refused("batch_of_other_size", batch=batch, found=found, size=self.size, copies=expected)
        raise refused("batch_above_rows", batch=batch, rows=self.rows, copies=expected)

    # ---- in a graph

    def _trace(self, number: int, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        tensors = tensor_inputs(arguments, named)
        if not tensors:
            return None
        name = batch_name(tensors)
        self.total = tensors[name].shape[0]
        if torch.compiler.is_exporting():  # another process has another batch: it is checked where the code is called
            return None
        flags = repr({key: value for key, value in all_inputs(arguments, named).items() if isinstance(value, FLAG)})
        names, values = ",".join(tensors), list(tensors.values())
        checked = checked_inputs(tensors[name], values, names, flags, self.number, number, self.total, [*self.copies])
        if name.isdigit():
            position = int(name)
            return (*arguments[:position], checked, *arguments[position + 1 :]), named
        return arguments, {**named, name: checked}

    def checked_part(self, scaling: torch.Tensor, length: int) -> torch.Tensor:
        """In a graph of a part of the model: ``scaling``, with a check that the layer's input is made of the rows."""
        if self.traced is not None or torch.compiler.is_exporting():
            return scaling
        return checked_inputs(scaling, [], "", "{}", self.number, PART, length, [*self.copies])

    def check_in_graph(self, inputs: dict[str, Any], number: int, total: int, copies: Copies) -> None:
        """Check at run time what a graph can't: it takes sizes for constants or leaves them open."""
        if not self._is_active:
            return
        if total != self.size * copies.count if self.size else total > self.rows * copies.count:
            self._refuse_batch(total, copies)
        self.room.check_rows()
        if not self.differs:
            return
        copies_now = self.local.copies or self._copies_of(total)
        if copies_now != copies:
            self._refuse_batch(total, copies, copies_now)
        if number == PART:
            self.check_part()
        else:
            count = max((int(name) + 1 for name in inputs if name.isdigit()), default=0)
            # a number, which a graph takes for a constant, is missing here: a model that needs it raises
            arguments = tuple(inputs.get(str(position), ...) for position in range(count))
            named = {name: value for name, value in inputs.items() if not name.isdigit()}
            self.local.copies = copies_now
            try:
                self._check_proof(number, arguments, named, True)
            except HotswapError:
                raise
            except Exception as error:
                raise refused("rows_not_proven_in_graph", error=error) from error
            finally:
                self.local.copies = None


@torch.library.custom_op("hotswap_lab::checked_inputs", mutates_args=())
def checked_inputs(
    first: torch.Tensor,
    tensors: list[torch.Tensor],
    names: str,
    flags: str,
    number: int,
    entry: int,
    total: int,
    copies: list[int],
) -> torch.Tensor:
    """Check that the batch is made of the assigned rows, and these are proven; return a copy of an input, ``first``."""
    if (batch := Batch.known.get(number)) is not None:
        inputs = dict(zip(names.split(","), tensors, strict=False)) | ast.literal_eval(flags)
        batch.check_in_graph(inputs, entry, total, Copies(*copies))
    return first.clone()


@checked_inputs.register_fake
def _(first: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty_like(first)


def _count_tensors(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.tensors = len(inputs[1])


checked_inputs.register_autograd(
    lambda ctx, gradient: (gradient, [None] * ctx.tensors, *[None] * 6), setup_context=_count_tensors
)
