"""Rooms with the memory of a prepared slot once for each row of a batch.

Row 0 is the slot: the parameters are views of it, and PEFT shows and saves it. All tensors of one row are
contiguous, so that one copy puts an adapter into a row.

Tests: ``tests/pools/test_row_pool.py`` and ``tests/pools/test_arrangements.py``.
"""

import contextlib
import functools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from ..core.adapter import WHEN
from ..core.arena import Band, Span, build_band
from ..core.change import Change
from ..core.errors import refused
from ..core.host import Config
from ..core.journal import Journal
from ..core.prepared import mark, new_scalings
from ..core.room import SCALING_STEP, Packed, Room, State
from ..core.settings import LayerSettings, settings_of
from ..core.slot import Slot, SlotLayer, begin_change
from ..core.tensors import ROOM_ATTRIBUTE, SlotTensor, is_shared
from ..core.writing import write_packed_scalings
from .batch import Batch
from .copies import ONCE, Copies
from .layers import READ, TRAINED, variant_for
from .proof import name_of_like

#: how many numbers of each tensor are compared before a forward
FEW = 8
#: the rank from which a compiled sum reads ``lora_B`` faster in PEFT's layout than one component after the other
LONG = 16


@dataclass(frozen=True)
class Row:
    """The adapter of one row of a batch.

    ``adapter`` is a name, the weights of a mix, or None; ``version`` counts the updates of each; ``strength`` is that
    of the row times that of the pool.
    """

    adapter: str | dict[str, float] | None
    version: int | dict[str, int] | None
    strength: float


@dataclass(frozen=True, eq=False)
class RowSpan(Span):
    """The location of one tensor in a row: one rank component after the other, if there are few of these."""

    def view(self, memory: torch.Tensor) -> torch.Tensor:
        """The tensor in the memory of one row."""
        return self.of_rows(memory[None])[0].movedim(0, self.tensor.rank_axis or 0)

    def of_rows(self, memory: torch.Tensor) -> torch.Tensor:
        """``[rows, rank, ...]`` in the memory of several rows."""
        axis, shape = self.tensor.rank_axis or 0, self.shape
        first = axis if shape[axis] < LONG else 0
        share = (shape[first], *shape[:first], *shape[first + 1 :])
        flat = memory[:, self.start : self.start + math.prod(shape)].unflatten(1, share)
        return flat if first else flat.movedim(1 + axis, 1)

    def few(self) -> torch.Tensor:
        """The positions in a row of at least :data:`FEW` numbers of the first component, which is never padding."""
        positions = replace(self, start=0).view(torch.arange(math.prod(self.shape), device="cpu"))
        first = self.tensor.own(positions, 1).flatten()
        return self.start + first[:: max(len(first) // FEW, 1)]


class RowRoom(Room):
    """A room with space for several adapters, one for each row of a batch."""

    rows: ClassVar[int]

    @classmethod
    @functools.cache
    def of(cls, rows: int) -> type[Room]:
        """The class of rooms with this many rows; a plain :class:`Room` for one."""
        return type("RowRoom", (cls,), {"rows": rows}) if rows > 1 else Room

    def __init__(self, slot: Slot, bands: Sequence[Band], *rest: Any):
        super().__init__(slot, bands, *rest)
        for tensor in self.spans:
            if is_shared(tensor.parameter):
                raise refused("not_shared")
            if tensor.rank_axis is None:
                raise refused("no_rows_for_kind", adapter_name=slot.adapter_name, key=tensor.key)
            if tensor.parameter.requires_grad:
                raise refused("rows_not_trained", adapter_name=slot.adapter_name, found=TRAINED)
        families = {cls.__module__.partition(".")[0] for cls in type(slot.host.base).__mro__}
        self.batch: Batch = Batch(self, is_tiled="diffusers" in families)
        #: for each band, the positions of a few numbers of each tensor
        self.few: list[torch.Tensor] = [torch.cat([span.few() for span in band.spans]) for band in self.bands]

    @classmethod
    def new_bands(cls, tensors: Sequence[tuple[SlotTensor, tuple[int, ...]]], like: torch.Tensor) -> list[Band]:
        """A single band: a tail, which is row 0 of a larger memory."""
        tail = build_band(0, tensors, like.to("meta"), RowSpan)
        return [replace(tail, memory=like.new_zeros((cls.rows, len(tail.memory)))[0])]

    @classmethod
    def new_scalings(cls, layers: int, device: torch.device) -> torch.Tensor:
        """Zeros for the layers' scalings. The same memory continues with those at strength 1, and those of each row."""
        return new_scalings((cls.rows + 2, layers, SCALING_STEP), device)[0]

    def patch_layers(self, slot: Slot, journal: Journal) -> None:
        """Fill the other rows like the first one, and make the layers compute row by row."""
        for band in self.bands:
            self._rows_of(band)[1:] = band.memory
        trained = self.scalings_of(self.state)
        for scalings in self._all_scalings():
            scalings[1] = trained
            scalings[2:] = trained * self.state.acts
        self._note_write(journal)
        gates: dict[str, int] = {}
        for index, layer in enumerate(slot.layers):
            is_gate = gates.setdefault(name_of_like(layer.path), index) == index
            variant = variant_for(layer.module, layer.path)
            (band, a), (_, b) = (self.spans[tensor] for tensor in layer.tensors[:2])
            memory = self._rows_of(band)
            scalings = next(x[:, index, 0] for x in self._all_scalings() if x.device == memory.device)
            weights = a.of_rows(memory), b.of_rows(memory).flatten(2)
            scaled = scalings[1:2], scalings[2:]
            own = variant(*weights, *scaled, layer.tensors[:2], self.batch, index, layer.path, is_gate)
            journal.set_item(layer.module.lora_variant, slot.adapter_name, own)
            mark(layer.module, ROOM_ATTRIBUTE, slot.adapter_name, True, journal)
        self.batch.watch(_entries(slot), journal)

    @contextlib.contextmanager
    def exporting(self) -> Iterator[None]:
        """Make the weights and scalings of all rows buffers of their layers in a block, so that exports name them."""
        try:
            for layer in self.slot.layers:
                own = layer.module.lora_variant[self.slot.adapter_name]
                layer.module._buffers.update({buffer: getattr(own, name) for name, buffer in READ.items()})
            yield
        finally:
            for layer in self.slot.layers:
                for buffer in READ.values():
                    layer.module._buffers.pop(buffer, None)

    def _rows_of(self, band: Band) -> torch.Tensor:
        """The memory of a band, ``[rows, numbers]``."""
        return _repeated(band.memory, self.rows)

    def _bands_of(self, row: Packed | None) -> Sequence[torch.Tensor]:
        """The weights of a row: zeros if it has no adapter, because 0 times an overflow would not be 0."""
        return row.bands if row else [memory.new_zeros(()).expand_as(memory) for memory in self._memories]

    def _all_scalings(self) -> list[torch.Tensor]:
        """All scalings on each device, ``[2 + rows, layers, SCALING_STEP]``: the slot's, at strength 1, of each row."""
        return [_repeated(scalings, self.rows + 2) for scalings in self.scalings]

    def unpatch_layers(self, journal: Journal, is_lost: bool = False) -> None:
        """Make the layers compute with their own parameters again."""
        if self.assigned and not is_lost:
            raise refused("rows_differ", adapter_name=self.slot.adapter_name)
        for layer in self.slot.layers:
            journal.remove(layer.module.lora_variant, self.slot.adapter_name)
            mark(layer.module, ROOM_ATTRIBUTE, self.slot.adapter_name, False, journal)
        self.batch.unwatch(journal)

    def check_rows(self) -> None:
        """Refuse writes and moves by other code, which reach row 0 only; and dropout in training mode.

        Each forward calls this. So it compares a few numbers of each tensor, where any write to a whole tensor shows,
        and all of them only after a write that was counted.
        """
        if self._parameters[0].data_ptr() != self._addresses_now()[0]:
            raise refused("rows_lost_their_place", adapter_name=self.slot.adapter_name)
        rows = self.assigned if self.slot.host.base.training else ()
        if any(any(row.state.columns["dropout"]) for row in rows if row):
            raise refused("rows_not_trained", adapter_name=self.slot.adapter_name, found="dropout, in training mode")
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            return  # nothing can be read while CUDA records a graph, and when it replays one, no Python runs
        expected = (
            self._bands_of(self.assigned[0]) if self.assigned else [self._rows_of(band)[1] for band in self.bands]
        )
        versions = self._versions_now()
        for memory, own, few in zip(self._memories, expected, self.few, strict=True):
            at = few if versions == self._versions else slice(None)
            if not torch.equal(memory[at], own[at].to(memory.device)):
                raise refused("rows_written_by_others", adapter_name=self.slot.adapter_name)
        self._versions = versions  # if it moved, the same values were written again, or restored

    # ---- scalings

    def scalings_of(self, state: State, strength: float | torch.Tensor = 1.0) -> torch.Tensor:
        """The scalings of all layers; nonzero also where the adapter is off, since they are a factor of all rows."""
        scalings = super().scalings_of(state, strength)
        if (off := state.scalings == 0).any():  # the scaling that set_scale(1) would give it
            live = [settings_of(layer.module, self.slot.adapter_name) for layer in self.slot.layers]
            trained = [(own or kept).scaling or 1.0 for own, kept in zip(state.settings, live, strict=True)]
            scalings[:, 0] += off * torch.tensor(trained, dtype=torch.float64, device="cpu") * strength
        return scalings

    def at_strength(self, packed: Packed, strength: float) -> Packed:
        """A packed adapter at the strength of a row."""
        return packed if strength == 1 else replace(packed, scalings=self.scalings_of(packed.state, strength))

    # ---- one adapter for all rows

    def change_to_packed(self, packed: Packed, strength: float = 1.0) -> Change:
        change = super().change_to_packed(packed, strength)
        for band, own in zip(self.bands, packed.bands, strict=True):
            others = self._rows_of(band)[1:]
            change.copies.append((others, own.expand(others.shape)))
        return self._for_all(change, packed.state)

    def change_without_weights(self, settings: Sequence[LayerSettings | None], config: Config) -> Change:
        change = super().change_without_weights(settings, config)
        for band in self.bands:
            change.zero(self._rows_of(band)[1:])
        return self._for_all(change, State(tuple(settings), config))

    def _for_all(self, change: Change, state: State) -> Change:
        """Extend a change of row 0's scalings to all other rows."""
        trained = self.scalings_of(state)
        for scalings in self._all_scalings():
            write_packed_scalings(change, [scalings[1]], trained)
            write_packed_scalings(change, [scalings[2:]], trained * state.acts)
        return self._with_record(change, ())

    def write(self, layer: SlotLayer, rank: int | None, sources: Sequence[torch.Tensor | None], change: Change) -> None:
        for tensor, source in zip(layer.tensors, sources, strict=True):
            if source is not None:
                band, span = self.spans[tensor]
                own = span.of_rows(self._rows_of(band))[:, :rank]
                change.copy(own, source.movedim(tensor.rank_axis or 0, 0).expand_as(own))

    # ---- one adapter for each row

    def change_rows(
        self, rows: Sequence[Packed | None], copies: Copies, strength: float | torch.Tensor = 1.0
    ) -> Change:
        """The change that puts an adapter, or none, into each row.

        A row that has it already is not written again, but for row 0, which other code may have written to.
        """
        first = rows[0]
        state = self.state if first is None else first.state
        wanted = [row.bands if row else None for row in rows]
        previous = [row.bands if row else None for row in self.assigned]
        changed = [n for n, bands in enumerate(wanted) if n >= len(previous) or bands is not previous[n]]
        if first is not None and 0 in changed:
            change = self._change(state, None, list(map(len, first.bands)))
        else:
            change = begin_change(self.slot)
            change.steps.append(self._note_write)
        for number in {0, *changed}:
            targets = [self._rows_of(band)[number] for band in self.bands]
            change.copies += zip(targets, self._bands_of(rows[number]), strict=True)
        trained = self.scalings_of(state)
        row_scalings = [row.scalings * row.state.acts if row else torch.zeros_like(trained) for row in rows]
        # in this order: live, trained, and each row's own
        scalings = torch.stack([self.scalings_of(state, strength), trained, *row_scalings])
        write_packed_scalings(change, [table[: len(scalings)] for table in self._all_scalings()], scalings)
        return self._with_record(change, tuple(rows), copies)

    def _with_record(self, change: Change, rows: tuple[Packed | None, ...], copies: Copies = ONCE) -> Change:
        """Add a step to a change that records the rows."""
        acting = {index for row in rows if row for index in row.state.scalings.nonzero().flatten().tolist()}
        contents = {row and (id(row.bands), *row.scalings[:, 0].tolist()) for row in rows}

        def record(journal: Journal) -> None:
            journal.set_attribute(self, "assigned", rows)
            journal.set_item(vars(self.slot.config), WHEN, time.time())
            journal.set_attribute(self.batch, "copies", copies)
            journal.set_attribute(self.batch, "differs", len(contents) > 1)
            journal.set_attribute(self.batch, "acting", frozenset(acting))

        change.steps.append(record)
        return change


def _repeated(first: torch.Tensor, times: int) -> torch.Tensor:
    """All of a larger memory, by the first of its ``times`` parts, which :class:`RowRoom` allocated."""
    return first.as_strided((times, *first.shape), (first.numel(), *first.stride()), first.storage_offset())


def _entries(slot: Slot) -> list[torch.nn.Module]:
    """The base model, and the modules above the first list of layers, which some models call directly."""
    entries = {"": slot.host.base}
    for path in {layer.path for layer in slot.layers}:
        names = path.split(".")
        for end in range(1, len(names)):
            module = slot.host.base.get_submodule(above := ".".join(names[:end]))
            if isinstance(module, (torch.nn.ModuleList, torch.nn.Sequential, torch.nn.ModuleDict)):
                break
            entries[above] = module
    return list(dict.fromkeys(entries.values()))
