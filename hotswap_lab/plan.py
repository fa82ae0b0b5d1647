"""Plan: what a swap will write, decided without writing anything.

A plan says for every layer whether its tensors are copied, padded, resized, turned off or added, and which scalars
and config go with them; or it says why the swap can't be right. It is what the user sees as the
compatibility report, and the only thing that :func:`hotswap_lab.commit.commit` executes.
"""

from __future__ import annotations

import enum
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

import torch
from peft import PeftConfig

from .adapter import Adapter
from .compiled import unwrap_compiled
from .errors import HotswapError, Refusal
from .grafting import Grafting, Structure
from .parts import LayerSettings, SlotTensor, WholeSettings
from .prepared_layer import has_fixed_size
from .report import html_table
from .room import ROOMS, Content, Room
from .slot import Slot, SlotLayer
from .state_view import is_padded


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
    settings: LayerSettings | WholeSettings | None
    tensors: tuple[TensorPlan, ...]

    @property
    def path(self) -> str:
        return self.layer.path

    @property
    def rank_after(self) -> int | None:
        return self.settings.rank if self.settings else None


@dataclass(frozen=True)
class Preparation:
    """What a slot was prepared as; of the layers, the first one tells."""

    room: Room | None
    padded: bool
    fixed_size: bool

    @classmethod
    def of(cls, slot: Slot) -> Preparation:
        name = slot.adapter_name
        room = slot.host.base.__dict__.get(ROOMS, {}).get(name)
        if not slot.layers:
            return cls(room, False, False)
        layer = slot.layers[0].module
        return cls(room, is_padded(layer, name), has_fixed_size(layer, name))


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
    config: PeftConfig
    refusals: tuple[Refusal, ...] = ()
    notes: tuple[str, ...] = ()
    #: whether the model, or something inside it, is compiled
    is_compiled: bool = False
    #: the slot's room, if it was prepared and nothing is added to it
    room: Room | None = None
    #: what is written instead of ``LayerPlan.tensors`` where PEFT loaded the adapter beside the model
    grafting: Grafting | None = None
    #: the config of the adapter that was in the model when the plan was made
    replaces: PeftConfig | None = None
    #: what the slot was prepared as when the plan was made
    preparation: Preparation | None = None
    #: all adapters and wrappers that were there then, if the swap changes more than values and shapes
    structure: Structure | None = None

    def is_stale(self) -> bool:
        """Whether the adapter was swapped, merged, trained, prepared or unloaded since the plan was made.

        Or, where the swap changes wrappers and tables, whether another adapter has come or gone.
        """
        slot = self.slot
        if slot.host.configs.get(slot.adapter_name) is not self.replaces:
            return True
        if self.room is not None:
            return not self.room.is_intact()
        if Preparation.of(slot) != self.preparation or not _is_in_place(slot):
            return True
        if self.structure is not None and not self.structure.is_that_of(slot.host):
            return True
        if any(slot.adapter_name in layer.module.merged_adapters for layer in slot.layers):
            return True
        return self.grafting is not None and self.grafting.graft.is_stale()

    @property
    def content(self) -> Content:
        """What will be in the room."""
        by_layer = {layer.layer: layer.settings for layer in self.layers}
        settings = tuple(by_layer[layer] for layer in self.slot.layers)
        dropouts = {each.dropout for each in settings if each is not None}
        return Content(settings, max(dropouts, default=0.0), self.config)

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
        if self.room is not None:
            return True
        if self.grafting is not None:
            return self.grafting.writes_values_only
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


def _is_in_place(slot: Slot) -> bool:
    """Whether the slot's layers are still in the model; the first one tells, since PEFT unloads all of them."""
    if not slot.layers:
        return True
    module, layer = slot.host.base, slot.layers[0]
    for name in layer.path.split("."):
        module = unwrap_compiled(module)._modules.get(name)
        if module is None:
            return False
    while (module := unwrap_compiled(module)) is not layer.module:
        module = module._modules.get("base_layer")  # in a mixed model, layers are around one another
        if module is None:
            return False
    return True


def _text(rank: int | None) -> str:
    return "none" if rank is None else str(rank)
