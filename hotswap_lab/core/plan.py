"""Plan: what a swap will write, decided without writing anything.

A plan says for every layer whether its tensors are copied, padded, resized, turned off or added, and which scalars
and config go with them; or it says why the swap can't be right. It is what the user sees as the
compatibility report. What it comes to is a :class:`~hotswap_lab.change.Change`.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

import torch

from .adapter import Adapter
from .change import Change
from .errors import HotswapError, Refusal
from .host import Config
from .parts import LayerSettings, SlotTensor
from .report import html_table
from .slot import Slot, SlotLayer


class Action(enum.Enum):
    """What happens to a layer."""

    COPY = "copy"  #: same shapes: new values at the old addresses
    PAD = "pad"  #: a lower rank than the model was prepared for: new values at the old addresses, then zeros
    RESIZE = "resize"  #: another rank: the same parameters with new memory
    OFF = "off"  #: the new adapter has nothing here: zeros
    ADD = "add"  #: the old adapter had nothing here: a new LoRA layer

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, eq=False)
class TensorPlan:
    """One tensor to write: ``source`` goes to ``target``; None means zeros.

    Where the target has a ``fixed_size``, the source fills the part of it that belongs to its rank.
    """

    target: SlotTensor
    source: torch.Tensor | None
    fixed_size: bool = False

    @property
    def keeps_address(self) -> bool:
        return self.source is None or self.fixed_size or self.source.shape == self.target.parameter.shape

    @property
    def nbytes(self) -> int:
        """The bytes that are written to the model."""
        elements = self.target.parameter if self.source is None or self.fixed_size else self.source
        return elements.numel() * self.target.parameter.element_size()


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """What happens to one layer. ``settings`` is None where the adapter is turned off."""

    layer: SlotLayer
    action: Action
    rank_before: int | None
    settings: LayerSettings | None
    tensors: tuple[TensorPlan, ...]

    @property
    def path(self) -> str:
        return self.layer.path

    @property
    def rank_after(self) -> int | None:
        return self.settings.rank if self.settings else None


class Grafting(Protocol):
    """A swap that was decided by a comparison with what PEFT has loaded beside the model."""

    #: what differs beyond the values of tensors, in words
    differences: Sequence[str]
    writes_values_only: bool
    nbytes: int
    #: what PEFT said when it could not load the adapter
    cause: Exception | None

    def change_for(self, plan: Plan) -> Change:
        """All that is to be written."""
        ...


@dataclass(frozen=True, eq=False)
class Plan:
    """A swap that was decided but not done: the dry run.

    Parameters
    ----------
    slot, adapter:
        What is swapped out, and what is swapped in.
    layers:
        What happens to each layer.
    config:
        The config that the model has after the swap.
    refusals:
        Why the swap can't be done; empty if it can.
    notes:
        What a reader should know although it doesn't prevent the swap.

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
    layers: tuple[LayerPlan, ...]
    config: Config
    #: decides the same swap once more, for the model as it is then
    again: Callable[[], Plan] = field(repr=False)
    #: makes what is to be written; called where nothing speaks against it
    make_change: Callable[[Plan], Change] = field(repr=False)
    refusals: tuple[Refusal, ...] = ()
    notes: tuple[str, ...] = ()
    #: whether the model, or something inside it, is compiled
    is_compiled: bool = False
    #: how the new adapter differs from the live one, where PEFT loaded it beside the model
    grafting: Grafting | None = None
    #: the :attr:`answer` as it was when the plan was made, where it is kept for later
    told: tuple[object, ...] | None = field(default=None, repr=False)

    def kept(self) -> Plan:
        """The plan, to be committed later: what it says now is what it is held to then."""
        return replace(self, told=self.answer)

    def change(self) -> Change:
        """All that is to be written, allocated beside the model."""
        with self.slot.write_mode(), torch.no_grad():
            return self.make_change(self)

    @property
    def answer(self) -> tuple[object, ...]:
        """All that a reader was told, as something that can be compared."""
        layers = [(each.path, each.action, each.rank_before, each.settings) for each in self.layers]
        differences = self.grafting.differences if self.grafting else None
        return layers, self.nbytes, self.refusals, self.notes, self.config.to_dict(), differences

    @property
    def ok(self) -> bool:
        """Whether the swap can be done."""
        return not self.refusals

    @property
    def counts(self) -> dict[str, int]:
        """How many layers are copied, padded, resized, turned off and added."""
        counter = Counter(layer.action for layer in self.layers)
        return {str(action): counter[action] for action in Action}

    @cached_property
    def will_recompile(self) -> bool:
        """Whether a compiled model must be compiled anew after this swap."""
        return self.is_compiled and not self.writes_values_only

    @cached_property
    def writes_values_only(self) -> bool:
        """Whether only values of tensors change, so that a compiled graph stays valid."""
        if self.grafting is not None:
            return self.grafting.writes_values_only
        if self.slot.room is not None:
            return Action.ADD not in [layer.action for layer in self.layers]
        method, name = self.slot.method, self.slot.adapter_name
        return all(
            layer.action is not Action.ADD
            and all(tensor.keeps_address for tensor in layer.tensors)
            and (layer.settings is None or not method.changes_constants(layer.layer.module, name, layer.settings))
            for layer in self.layers
        )

    @property
    def nbytes(self) -> int:
        """The bytes that the swap writes to the model's tensors."""
        if self.grafting is not None:
            return self.grafting.nbytes
        return sum(tensor.nbytes for layer in self.layers for tensor in layer.tensors)

    def raise_if_refused(self) -> None:
        """Raises a :class:`HotswapError` with all refusals, if there are any."""
        if self.refusals:
            raise HotswapError(*self.refusals) from (self.grafting.cause if self.grafting else None)

    @cached_property
    def rows(self) -> list[tuple[str, int, str, str]]:
        """The report: action, number of layers, rank, scaling; layers that are alike share a row."""
        groups: Counter = Counter()
        for layer in self.layers:
            if layer.settings is None:
                rank, scaling = "off" if layer.rank_before is None else f"{layer.rank_before} -> off", "-"
            else:
                before, after = layer.rank_before, layer.settings.rank
                rank = _text(after) if before == after else f"{_text(before)} -> {_text(after)}"
                scaling = "-" if layer.settings.scaling is None else f"{layer.settings.scaling:.4g}"
            groups[(layer.action, rank, scaling)] += 1
        order = list(Action)
        return [
            (str(action), count, rank, scaling)
            for (action, rank, scaling), count in sorted(
                groups.items(), key=lambda item: (order.index(item[0][0]), item[0][1:])
            )
        ]

    @property
    def title(self) -> str:
        """What is swapped, in a few words."""
        return f"Swap {self.adapter.label} into {self.slot.adapter_name!r}"

    @property
    def verdict(self) -> str:
        """Whether the swap is possible, in a few words."""
        if self.refusals:
            return f"refused, {len(self.refusals)} reason{'s' if len(self.refusals) > 1 else ''}; nothing is written"
        return f"possible, {self.nbytes:,} bytes to write"

    def __str__(self) -> str:
        lines = [f"{self.title}: {self.verdict}"]
        if self.rows:
            table = [("action", "layers", "rank", "scaling"), *self.rows]
            lines += [
                f"  {action:8}{layers!s:>6}  {rank:14}{scaling}".rstrip() for action, layers, rank, scaling in table
            ]
        lines += [f"  note: {note}" for note in self.notes]
        lines += [str(refusal) for refusal in self.refusals]
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table(
            self.title,
            ["action", "layers", "rank", "scaling"],
            self.rows,
            caption=self.verdict,
            notes=[*self.notes, *map(str, self.refusals)],
        )


def _text(rank: int | None) -> str:
    return "none" if rank is None else str(rank)
