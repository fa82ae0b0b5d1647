"""Room: a prepared slot. Its memory, and the settings of whatever adapter is in it, for all layers at once.

A swap in a room is one copy (see :mod:`hotswap_lab.arena`), and a few numbers in tables that PEFT keeps on each layer.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter

import torch

from .arena import Arena, Place, build_arena
from .change import Change, Step, clear_gradient
from .errors import listing, refuse
from .host import Config
from .journal import Journal
from .parts import LayerSettings, SlotTensor
from .plan import Plan
from .slot import SLOTS, Slot, SlotLayer
from .state_view import is_off, own_tensor, write_settings

#: elements between two scalings: a GPU kernel wants each of its inputs aligned to 16 bytes
SCALING_STEP = 4
_requires_grad = attrgetter("requires_grad")


@dataclass(frozen=True, eq=False)
class Content:
    """What is in a room beside the weights: the settings of each layer (None: off), and the config."""

    settings: tuple[LayerSettings | None, ...]
    config: Config
    #: the pool that it came from, and its name there; None if it didn't come from a pool
    label: tuple[object, str] | None = None

    @property
    def ranks(self) -> list[int]:
        """Of each layer; 0 where it is off."""
        return [0 if each is None else each.rank for each in self.settings]


@dataclass(frozen=True, eq=False)
class Packed:
    """An adapter laid out as its room is, so that it goes in with one copy.

    ``parts`` are the own rows of each band and the tail, of each arena in turn.
    """

    content: Content
    parts: tuple[torch.Tensor, ...]
    scalings: torch.Tensor

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts) + self.scalings.nbytes


class Room:
    """The prepared place of one adapter name in one model.

    Parameters
    ----------
    slot:
        Every layer and tensor of the adapter, reserved ones included.
    arenas:
        Their memory, one for each dtype and device.
    scalings:
        One vector for each device, all with one entry per layer.
    content:
        What is in it now.
    """

    def __init__(self, slot: Slot, arenas: Sequence[Arena], scalings: Sequence[torch.Tensor], content: Content):
        self.slot: Slot = slot
        self.arenas: tuple[Arena, ...] = tuple(arenas)
        self.scalings: tuple[torch.Tensor, ...] = tuple(scalings)
        self.content = content
        #: the packed adapter and strength that were written last, for whoever wants to come back to it
        self.in_use: tuple[Packed, float | torch.Tensor] | None = None
        #: set where somebody else wrote to the weights and no version counter tells
        self.was_touched: bool = False
        self._versions: list[int] = []
        self._weight_versions: list[int] = []
        #: whether a write to the memory is noticed by autograd without being told
        self.shares_versions = True
        self.places: dict[SlotTensor, tuple[torch.Tensor, Place]] = {}
        for arena in self.arenas:
            for band in arena.bands:
                self.places |= {place.tensor: (band.memory, place) for place in band.places}
            self.places |= {place.tensor: (arena.tail, place) for place in arena.tail_places}
        self._memories = [memory for arena in self.arenas for memory in (*(b.memory for b in arena.bands), arena.tail)]
        #: rows of each memory that may hold something else than zeros; a tail is written whole
        self.used: list[int] = [memory.shape[0] for memory in self._memories]
        self._own_views: dict[tuple[SlotTensor, int | None], torch.Tensor] = {}

    # ---- is everything where it was?

    def settle(self, slot: Slot) -> None:
        """Notes where everything is; to be called when the model's parameters have been moved in."""
        self.slot = dataclasses.replace(slot, room=self)
        self.slot.settle()
        name, layers = slot.adapter_name, [layer.module for layer in slot.layers]
        self._parameters = [tensor.parameter for tensor in self.places]
        second = [tensor.parameter for tensor in self.places if tensor.rank_axis == 1]
        self._second_parameters = second or self._parameters
        self._addresses = [self.view(tensor).data_ptr() for tensor in self.places]
        self._scaling_tables = [layer.scaling for layer in layers]
        self._scaling_tensors = [table[name] for table in self._scaling_tables]
        self._names = [name] * len(layers)
        fields = [each for each in slot.method.SCALAR_TABLES.items() if each[0] != "scaling"]
        self._scalar_tables = [([getattr(layer, table) for layer in layers], field) for table, field in fields]
        #: of DoRA; where there are none, nothing is to be cleared at a swap
        self._caches = [slot.method.cache_of(layer, name) for layer in layers] if slot.reads_base else []
        self._weight_versions = self._versions_of_weights()

    def _versions_of_weights(self) -> list[int]:
        if self.slot.is_inference:
            return []
        # where autograd has to be told of the room's writes, the memory does not learn of those to a parameter either
        own = [] if self.shares_versions else [parameter._version for parameter in self._parameters]
        return [memory._version for memory in self._memories] + own

    @property
    def is_touched(self) -> bool:
        """Whether somebody else has written to the weights since the room did: an optimizer, ``load_state_dict``."""
        return self.was_touched or self._versions_of_weights() != self._weight_versions

    def note_written(self) -> None:
        """To be called right after the room's own writes."""
        self.was_touched = False
        self._weight_versions = self._versions_of_weights()

    def is_intact(self) -> bool:
        """Whether the model's parameters are still views of this memory, on layers that are still in the model."""
        slot, name = self.slot, self.slot.adapter_name
        kept = slot.host.base.__dict__.get(SLOTS, {}).get(name)
        return (
            kept is not None
            and kept[0].room is self
            and name in slot.host.configs
            and list(map(torch.Tensor.data_ptr, self._parameters)) == self._addresses
            and all(map(operator.is_, map(dict.get, self._scaling_tables, self._names), self._scaling_tensors))
            and slot.is_in_place()
        )

    # ---- what is where

    def view(self, tensor: SlotTensor) -> torch.Tensor:
        """The whole tensor, padding included."""
        memory, place = self.places[tensor]
        return place.view(memory)

    def scaling(self, index: int, device: torch.device) -> torch.Tensor:
        """The scaling of a layer on a device, as a tensor without axes."""
        return next(vector[index, 0] for vector in self.scalings if vector.device == device)

    def rows_for(self, ranks: Sequence[int]) -> list[int]:
        """How many rows of each memory an adapter with these ranks takes (0: off), one rank for each layer."""
        rank_of = self._by_tensor(ranks)
        rows = []
        for arena in self.arenas:
            for band in arena.bands:
                rows.append(max((rank_of[place.tensor] for place in band.places), default=0))
            rows.append(len(arena.tail))
        return rows

    def _by_tensor(self, ranks: Sequence[int]) -> dict[SlotTensor, int]:
        return {tensor: rank for layer, rank in zip(self.slot.layers, ranks, strict=True) for tensor in layer.tensors}

    def _rows_in_use(self) -> list[int]:
        """How many rows of each memory may hold something else than zeros; who else writes to it may write to any."""
        return [len(memory) for memory in self._memories] if self.is_touched else self.used

    def _to_clear(self, ranks: Sequence[int]) -> Iterator[torch.Tensor]:
        """The parts of the memory to fill with zeros before the tensors of such an adapter are written one by one."""
        used, rank_of = self._rows_in_use(), self._by_tensor(ranks)
        number = 0
        for arena in self.arenas:
            for band in arena.bands:
                fills = {rank_of[place.tensor] for place in band.places}
                start = fills.pop() if len(fills) == 1 else 0
                if start < used[number]:
                    yield band.memory[start : used[number]]
                number += 1
            if any(rank_of[place.tensor] != place.tensor.rank_of(place.shape) for place in arena.tail_places):
                yield arena.tail
            number += 1

    def _own_view(self, tensor: SlotTensor, rank: int | None) -> torch.Tensor:
        """The part of a tensor that an adapter of this rank fills, made once for each rank."""
        key = tensor, rank
        if (view := self._own_views.get(key)) is None:
            view = self._own_views[key] = tensor.own(self.view(tensor), rank)
        return view

    @property
    def nbytes(self) -> int:
        return sum(arena.nbytes for arena in self.arenas)

    # ---- adapters in and out

    def pack(self, content: Content, sources: Sequence[tuple[SlotTensor, torch.Tensor]]) -> Packed:
        """Lays an adapter out as the room is; ``sources`` are its tensors as in its file."""
        parts = [
            self._new_part(memory, rows)
            for memory, rows in zip(self._memories, self.rows_for(content.ranks), strict=True)
        ]
        part_of = {id(memory): part for memory, part in zip(self._memories, parts, strict=True)}
        targets, tensors = [], []
        for tensor, source in sources:
            memory, place = self.places[tensor]
            view = place.view(part_of[id(memory)])
            targets.append(tensor.own(view, tensor.rank_of(source.shape)))
            tensors.append(tensor.split(source.detach()))
        with torch.inference_mode(False), torch.no_grad():
            if targets:
                torch._foreach_copy_(targets, tensors)  # pyright: ignore[reportPrivateImportUsage]
        return Packed(content, tuple(parts), self.scalings_of(content))

    def take(self) -> Packed:
        """Packs what is in the room now, with the scalings that the layers have now."""
        parts = []
        for memory, rows in zip(self._memories, self.rows_for(self.content.ranks), strict=True):
            part = self._new_part(memory, rows)
            with torch.inference_mode(False), torch.no_grad():
                part.copy_(memory[:rows])
            parts.append(part)
        with torch.inference_mode(False):
            scalings = self.scalings[0].detach().cpu().clone()
        return Packed(self.content, tuple(parts), scalings)

    def holds(self, packed: Packed) -> bool:
        """Whether just this adapter is in the room now, at its trained strength."""
        if packed.content.settings != self.content.settings or packed.content.config != self.content.config:
            return False
        pairs = [(memory[: len(part)], part) for memory, part in zip(self._memories, packed.parts, strict=True)]
        # layers that are off have some scaling or other
        on = [index for index, settings in enumerate(self.content.settings) if settings is not None]
        pairs += [(vector[on], packed.scalings[on]) for vector in self.scalings]
        return all(torch.equal(one.detach(), other.to(one.device)) for one, other in pairs)

    def _new_part(self, memory: torch.Tensor, rows: int) -> torch.Tensor:
        shape = (rows, *memory.shape[1:])
        with torch.inference_mode(False):
            # from pinned memory, a GPU fetches an adapter while the CPU goes on
            if memory.device.type == "cuda":
                return torch.zeros(shape, dtype=memory.dtype, pin_memory=True)
            return torch.zeros(shape, dtype=memory.dtype, device=memory.device)

    def scalings_of(self, content: Content, strength: float = 1.0) -> torch.Tensor:
        """The scalings of all layers, laid out as ``self.scalings`` are. Those of layers that are off don't matter."""
        values = [strength * settings.scaling if settings else 0.0 for settings in content.settings]
        with torch.inference_mode(False):
            scalings = torch.zeros((len(values), SCALING_STEP))
            scalings[:, 0] = torch.tensor(values, dtype=torch.float64)
        return scalings

    def change_to(self, packed: Packed, strength: float | torch.Tensor = 1.0, *also: Step) -> Change:
        """Puts a packed adapter in. The room must be intact.

        ``also`` is done together with it, or not at all.
        """
        used = [len(part) for part in packed.parts]
        change = self._change(packed.content, used)
        for memory, part, before in zip(self._memories, packed.parts, self._rows_in_use(), strict=True):
            rows = len(part)
            if rows:
                change.copies.append((memory if rows == len(memory) else memory[:rows], part))
            if before > rows:
                change.zero(memory[rows:before])
        even = not isinstance(strength, torch.Tensor)
        scalings = packed.scalings if even and strength == 1 else packed.scalings * strength
        change.copies += [(vector, scalings) for vector in self.scalings]
        change.steps += [lambda journal: journal.set_attribute(self, "in_use", (packed, strength)), *also]
        change.after.append(self._note_scalings)
        return change

    def change_for(self, plan: Plan) -> Change:
        """Puts a planned adapter in, tensor by tensor: first zeros wherever something else might be left."""
        content = self.content_of(plan)
        change = self._change(content, self.rows_for(content.ranks))
        for memory in self._to_clear(content.ranks):
            change.zero(memory)
        for layer in plan.layers:
            for write in layer.tensors:
                if write.source is not None:
                    own = self._own_view(write.target, write.target.rank_of(write.source.shape))
                    change.copy(own, write.target.split(write.source))
                elif write.target.off is not None:
                    change.copy(self.view(write.target), write.target.off())
        scalings = self.scalings_of(content)
        change.copies += [(vector, scalings) for vector in self.scalings]
        return change

    def content_of(self, plan: Plan) -> Content:
        """What will be in the room."""
        by_layer = {layer.layer: layer.settings for layer in plan.layers}
        return Content(tuple([by_layer[layer] for layer in self.slot.layers]), plan.config)

    def _change(self, content: Content, used: list[int]) -> Change:
        """Everything of a swap but the weights and scalings."""
        enter = functools.partial(self._enter, content, used)
        return Change(self.slot, content.config, steps=[enter], after=[self.note_written], slot_after=self.slot)

    def change_strength(self, strength: float, *also: Step) -> Change:
        """Sets the scalings of all layers to their trained values times ``strength``; ``also`` as above."""
        scalings = self.scalings_of(self.content, strength)
        change = Change(self.slot, copies=[(vector, scalings) for vector in self.scalings], steps=[*also])
        if self.in_use is not None:
            packed, known = self.in_use[0], self.is_as_written
            change.steps.append(lambda journal: journal.set_attribute(self, "in_use", (packed, strength)))
            change.after += [self._note_scalings] * known
        return change

    def _note_scalings(self) -> None:
        self._versions = self._scaling_versions()

    def _scaling_versions(self) -> list[int]:
        return [vector._version for vector in self.scalings]

    @property
    def is_as_written(self) -> bool:
        """Whether the packed adapter in ``in_use`` is still in, at that strength. Asks no device."""
        in_use = self.in_use
        return (
            in_use is not None
            and in_use[0].content is self.content
            and self._versions == self._scaling_versions()
            and not self.is_touched
        )

    def strengths(self) -> float | torch.Tensor:
        """The strength of the adapter as it is now; of each layer, as a column, where they differ."""
        trained = self.scalings_of(self.content)[:, :1].double()
        now = self.scalings[0][:, :1].detach().cpu().double()
        on = trained != 0
        strengths = torch.where(on, now / torch.where(on, trained, 1.0), 1.0)
        rounded = {round(float(strength), 6) for strength in strengths[on]}
        return rounded.pop() if len(rounded) == 1 else strengths.float()

    def _enter(self, content: Content, used: list[int], journal: Journal) -> None:
        slot, before = self.slot, self.content
        if is_trained := True in map(_requires_grad, self._second_parameters):
            for parameter in self._parameters:
                clear_gradient(parameter, journal)
        if not self.shares_versions and not slot.is_inference:
            torch.autograd.graph.increment_version(self._parameters)
        for cache in self._caches:
            journal.clear(cache)
        journal.set_attribute(self, "content", content)
        # until the copy is done, what was used before may still be there
        journal.record(lambda before=self.used: setattr(self, "used", before))
        self.used = used
        if is_trained or _beside_scalars(content) != _beside_scalars(before):
            # what is off must not be trained, whatever somebody has set since
            write_settings(slot, slot.layers, content.settings, journal)
        elif content.settings != before.settings:
            self._write_scalars(content, journal)

    def _write_scalars(self, content: Content, journal: Journal) -> None:
        """:func:`write_settings` where the same layers are on, with the same dropout."""
        on = [each for each in content.settings if each is not None]
        for tables, field in self._scalar_tables:
            if len(on) < len(tables):
                tables = [table for table, each in zip(tables, content.settings, strict=True) if each is not None]
            journal.set_items(tables, self.slot.adapter_name, list(map(attrgetter(field), on)))


def _beside_scalars(content: Content) -> list[float | None]:
    """Of each layer, its dropout; None where it is off."""
    return [None if each is None else each.dropout for each in content.settings]


def build_room(slot: Slot, capacity: Mapping[SlotLayer, int], reserved: Collection[SlotLayer]) -> Room:
    """A room with space for these ranks, and with the slot's adapter in it; ``reserved`` layers are off.

    The model is only read.
    """
    name = slot.adapter_name
    sharded = [layer.path for layer in capacity for tensor in layer.tensors if tensor.is_shard]
    if sharded:
        raise refuse("sharded_not_preparable", paths=listing(dict.fromkeys(sharded), 3))
    groups: dict[tuple, list[tuple[SlotTensor, tuple[int, ...]]]] = {}
    for layer, rank in capacity.items():
        for tensor in layer.tensors:
            key = tensor.parameter.dtype, tensor.parameter.device
            groups.setdefault(key, []).append((tensor, tensor.shape_for(rank)))
    arenas = [build_arena(tensors, like=tensors[0][0].parameter.detach()) for tensors in groups.values()]
    content = Content(
        tuple(
            None if layer in reserved or is_off(layer.module, name) else slot.method.settings_of(layer.module, name)
            for layer in capacity
        ),
        slot.config,
    )
    scalings = []
    for device in dict.fromkeys(device for _, device in groups):
        with torch.inference_mode(False):
            scalings.append(torch.zeros((len(capacity), SCALING_STEP), device=device))
    room = Room(slot, arenas, scalings, content)
    for layer in capacity:
        for tensor in layer.tensors:
            if layer not in reserved:
                own = own_tensor(layer.module, name, tensor).detach()
                tensor.own(room.view(tensor), tensor.rank_of(own.shape)).copy_(tensor.split(own))
            elif tensor.off is not None:
                room.view(tensor).copy_(tensor.off())
    for index, layer in enumerate(capacity):
        # what the user set it to by now, not what the adapter was trained with
        room.scaling(index, layer.tensors[0].parameter.device).fill_(float(layer.module.scaling[name]))
    return room
