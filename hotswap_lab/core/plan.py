"""Plan: what a swap will write, decided in advance.

A plan says for every layer whether its tensors are copied, padded, resized, turned off or added, and which scalars
and config go with them; or it says why the swap is refused. The user sees it as the compatibility report. To carry it
out, it is turned into a :class:`~hotswap_lab.core.change.Change`.
"""

from __future__ import annotations

import enum
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch

from . import lora
from .adapter import ORIGIN, WHEN, Adapter
from .added_layers import attach
from .change import Change, clear_gradients
from .errors import HotswapError, Refusal, refusal
from .host import Config
from .journal import Journal
from .prepared import mark, ranks_before
from .report import html_table, readable_bytes
from .settings import LayerSettings
from .slot import Slot, SlotLayer, begin_change, room_left_by
from .tensors import PREPARED_ATTRIBUTE, is_prepared
from .writing import write_scalings, write_settings


class Action(enum.Enum):
    """The action of a swap on one layer."""

    COPY = "copy"  #: same shapes: new values at the old addresses
    PAD = "pad"  #: a lower rank than the model was prepared for: new values at the old addresses, then zeros
    RESIZE = "resize"  #: another rank: the same parameters with new memory
    OFF = "off"  #: the new adapter has nothing here: zeros
    ADD = "add"  #: the old adapter had nothing here: a new LoRA layer

    def __str__(self) -> str:
        return self.value


@dataclass(eq=False)
class LayerPlan:
    """The plan for one layer. ``settings`` is None if the adapter is turned off there.

    ``sources`` are the tensors to write, as they are in the adapter's file; None means zeros.
    """

    layer: SlotLayer
    action: Action
    rank_before: int | None
    settings: LayerSettings | None
    sources: tuple[torch.Tensor | None, ...]
    #: whether the adapter's config names the layer
    is_targeted: bool = True

    @property
    def path(self) -> str:
        return self.layer.path

    @property
    def rank_after(self) -> int | None:
        return self.settings.rank if self.settings else None

    @property
    def nbytes(self) -> int:
        """The number of bytes written to the model's tensors."""
        keeps_size, total = self.action is Action.PAD, 0
        for target, source in zip(self.layer.tensors, self.sources, strict=True):
            written = target.parameter if source is None or keeps_size else source
            total += written.numel() * target.parameter.element_size()
        return total

    @property
    def row(self) -> tuple[Action, str, str]:
        """The layer's line in a report: action, rank, scaling."""
        before, after = self.rank_before, self.rank_after
        if self.settings is None:
            return self.action, "off" if before is None else f"{before} -> off", "-"
        rank, scaling = "none" if after is None else str(after), self.settings.scaling
        if before != after:
            rank = f"{'none' if before is None else before} -> {rank}"
        return self.action, rank, "-" if scaling is None else f"{scaling:.4g}"


@dataclass(eq=False)
class Plan:
    """A swap that is decided but not yet done: the dry run.

    Parameters
    ----------
    slot, adapter:
        The place of the loaded adapter, and the adapter that replaces it.
    config:
        The config that the model has after the swap.
    layers:
        The plan for each layer.
    refusals:
        The reasons why the swap can't be done; empty if it can.
    notes:
        Remarks for the reader that don't prevent the swap.

    Examples
    --------
    >>> from hotswap_lab import demo, plan_hotswap
    >>> model, _ = demo.load("reverse")
    >>> plan = plan_hotswap(model, demo.adapter_path("double"), "default")
    >>> plan.ok, plan.counts
    (True, {'copy': 0, 'pad': 0, 'resize': 16, 'off': 12, 'add': 0})

    How to read it: 16 attention layers get another rank, 12 MLP layers of ``reverse`` are turned off.
    """

    slot: Slot
    adapter: Adapter
    config: Config
    #: the compiled modules and functions in the model
    compiled: list[object]
    add_layers: bool = False
    #: whether the adapter's config must target the layers of its tensors; if not, the tensors alone decide
    check_targets: bool = True
    base_weights: Mapping[str, torch.Tensor] | None = None
    layers: list[LayerPlan] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    #: warnings to show when the swap is done, each once per model
    warnings: list[str] = field(default_factory=list)
    #: tensors that no layer of the slot and no pass has taken so far, by their names in the base model
    unknown: dict[str, torch.Tensor] = field(default_factory=dict)
    #: whether the remaining passes are skipped
    is_decided: bool = False
    #: the error that caused a refusal
    cause: Exception | None = None
    #: the :attr:`answer` at the time the plan was made, if it is kept for a later commit
    first_answer: tuple[object, ...] | None = None

    def refuse(self, which: str, /, **values: object) -> None:
        """Add a reason against the swap."""
        self.refusals.append(refusal(which, **values))

    @cached_property
    def prepared(self) -> list[bool]:
        """For each layer of the slot, whether it was prepared, and so keeps its shapes."""
        return [is_prepared(layer.module, self.slot.adapter_name) for layer in self.slot.layers]

    @cached_property
    def ranks_before(self) -> list[int | None]:
        """For each layer of the slot, the rank that the adapter has there now; None where it is off."""
        room = self.slot.room
        return ranks_before(self.slot) if room is None else room.state.ranks

    @property
    def is_prepared(self) -> bool:
        """Whether all layers keep their shapes, so that a compiled graph stays valid."""
        return False not in self.prepared

    def kept(self) -> Plan:
        """Return this plan, with its answer noted. A later commit refuses it if the answer has changed by then."""
        self.first_answer = self.answer
        return self

    def change(self) -> Change:
        """Return the change to write, allocated next to the model. Call it only if nothing was refused."""
        adapter, noted = self.adapter, vars(self.config)
        noted[ORIGIN], noted[WHEN] = (adapter.source, adapter.revision, adapter.file), time.time()
        with self.slot.write_mode(), torch.no_grad():
            return self.build_change()

    def build_change(self) -> Change:
        """Build the change: in the room if all layers have one, or else tensor by tensor."""
        slot, room = self.slot, self.slot.room
        adds = Action.ADD in [layer.action for layer in self.layers]
        if room is not None and not adds:
            change = room.change_without_weights([layer.settings for layer in self.layers], self.config)
            for layer in self.layers:
                room.write(layer.layer, layer.rank_after, layer.sources, change)
            return change
        # the slot lacks the layers that are added, so it has to be looked for again afterwards
        change = begin_change(slot, self.config, None if adds else slot)
        if (previous_room := room_left_by(slot)) is not None:
            change.steps.append(partial(previous_room.unpatch_layers, is_lost=room is None))
        tables, scalings, added = [], [], []
        for layer in self.layers:
            for target, source in zip(layer.layer.tensors, layer.sources, strict=True):
                target.write(source, change, layer.action is Action.PAD)
            if layer.settings is not None:
                tables.append(layer.layer.module.scaling)
                scalings.append(layer.settings.scaling)
            if layer.action is Action.ADD:
                added.append(partial(attach, slot, layer.layer))
        change.steps.append(partial(_write_layers, self))
        write_scalings(change, tables, slot.adapter_name, scalings)
        change.steps += added
        return change

    @property
    def answer(self) -> tuple[object, ...]:
        """The report that the user saw, and the state that it is about, in a form that can be compared."""
        layers = [(layer.path, layer.action, layer.rank_before, layer.settings) for layer in self.layers]
        writes = [] if self.slot.is_inference else [parameter._version for parameter in self.slot.parameters]
        return str(self), layers, writes, self.config.to_dict()

    @property
    def ok(self) -> bool:
        """Whether the swap can be done."""
        return not self.refusals

    @property
    def counts(self) -> dict[str, int]:
        """The number of layers that are copied, padded, resized, turned off and added."""
        return {str(action): [layer.action for layer in self.layers].count(action) for action in Action}

    @property
    def will_recompile(self) -> bool:
        """Whether a compiled model must be recompiled after this swap."""
        return bool(self.compiled) and not self.writes_values_only

    @property
    def writes_values_only(self) -> bool:
        """Whether only values of tensors change, so that a compiled graph stays valid."""
        changes, name = lora.changes_constants, self.slot.adapter_name
        if not {layer.action for layer in self.layers}.isdisjoint((Action.RESIZE, Action.ADD)):
            return False
        # in a room, no setting is a constant of a graph
        return self.slot.room is not None or not any(
            changes(layer.layer.module, name, layer.settings) for layer in self.layers
        )

    @property
    def nbytes(self) -> int:
        """The number of bytes that the swap writes to the model's tensors."""
        return sum(layer.nbytes for layer in self.layers)

    def raise_if_refused(self) -> None:
        """Raise a :class:`HotswapError` with all refusals, if there are any."""
        if self.refusals:
            raise HotswapError(*self.refusals) from self.cause

    @property
    def rows(self) -> list[tuple[str, int, str, str]]:
        """The lines of the report: action, number of layers, rank, scaling; layers that are alike share a line."""
        order, rows = list(Action), Counter(layer.row for layer in self.layers).items()
        in_order = sorted(rows, key=lambda row: (order.index(row[0][0]), row[0][1:]))
        return [(str(action), count, rank, scaling) for (action, rank, scaling), count in in_order]

    @property
    def title(self) -> str:
        """A short description of the swap."""
        return f"Swap {self.adapter.label} into {self.slot.adapter_name!r}"

    @property
    def verdict(self) -> str:
        """Whether the swap is possible, in a few words."""
        if self.refusals:
            return f"refused, {len(self.refusals)} reason{'s' if len(self.refusals) > 1 else ''}; nothing is written"
        return f"possible, {readable_bytes(self.nbytes)} to write"

    def __str__(self) -> str:
        table = [("action", "layers", "rank", "scaling"), *self.rows] if self.layers else ()
        rows = [f"  {action:8}{layers!s:>6}  {rank:14}{scaling}" for action, layers, rank, scaling in table]
        notes = [f"  note: {note}" for note in self.notes]
        return "\n".join([f"{self.title}: {self.verdict}", *self._reasons, *map(str.rstrip, rows), *notes])

    __repr__ = __str__

    @property
    def _reasons(self) -> list[str]:
        """The first reason for a refusal, and how many more there are."""
        more = f"... and {len(self.refusals) - 1} more, all in the `refusals` of this plan"
        return [*map(str, self.refusals[:1]), *([more] if len(self.refusals) > 1 else [])]

    def _repr_html_(self) -> str:
        head, above = ["action", "layers", "rank", "scaling"], self._reasons
        return html_table(self.title, head, self.rows, caption=self.verdict, above=above, notes=self.notes)


def _write_layers(plan: Plan, journal: Journal) -> None:
    slot, layers = plan.slot, [layer.layer for layer in plan.layers]
    clear_gradients(slot.parameters, journal)
    # layers that are added come last, without an entry in `prepared`
    for layer, is_fixed in zip(layers, plan.prepared, strict=False):
        if is_fixed:
            mark(layer.module, PREPARED_ATTRIBUTE, slot.adapter_name, True, journal)
    write_settings(slot, layers, [layer.settings for layer in plan.layers], journal)
