"""Room: a prepared slot. Its memory, and the settings of whatever adapter is in it, for all layers at once.

A swap in a room is one copy (see :mod:`hotswap_lab.arena`) and a handful of attributes, however many layers there
are: what PEFT keeps in a table on each layer (``r``, ``lora_alpha``, ``use_rslora``) is looked up here when somebody
asks a layer for it.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import TypeVar

import torch
from peft import PeftConfig

from .arena import Arena, Place
from .base_values import follow_config
from .compiled import COMPILED, unwrap_compiled
from .host import find_host, is_embedding
from .journal import Journal
from .parts import LayerSettings, SlotTensor
from .prepared_layer import SEATS, leave_seat, take_seat
from .slot import Slot, SlotLayer, slot_in
from .state_view import set_trained
from .turns import writing
from .uncopied import Uncopied

T = TypeVar("T")

#: on a base model: its rooms by adapter name
ROOMS = "hotswap_rooms"

#: above this many tensors, a swap looks at the memory's use count before it looks at every tensor
MANY_TENSORS = 1000
#: how much a room remembers of configs: two things of each
MAX_EXPECTED = 128
#: elements between two scalings: a GPU kernel wants each of its inputs aligned to 16 bytes
SCALING_STEP = 4


@dataclass(frozen=True, eq=False)
class Content:
    """What is in a room beside the weights: the settings of each layer (None: off), dropout and config."""

    settings: tuple[LayerSettings | None, ...]
    dropout: float
    config: PeftConfig
    #: what the pool that it came from knows it by; None if it didn't come from a pool
    label: object = None


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


@dataclass(frozen=True, eq=False)
class Expected:
    """What an adapter's config says of one layer."""

    settings: LayerSettings
    targeted: bool
    #: of its tensors
    shapes: list[torch.Size | None]
    #: whether its rank is all that there is room for
    fills_up: bool


@dataclass(frozen=True, eq=False)
class Seat:
    """One layer's place in a room: where the layer's tables look their values up."""

    room: Room
    index: int

    @property
    def settings(self) -> LayerSettings | None:
        return self.room.content.settings[self.index]

    @property
    def dropout(self) -> float:
        return self.room.content.dropout


class Rooms(Uncopied):
    """The rooms of a model. A copy of it has its own memory."""


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
        self.slot = slot
        self.arenas = tuple(arenas)
        self.scalings = tuple(scalings)
        self.content = content
        #: set by a layer when something may have happened to it that a swap must look into
        self.dirty = False
        #: set by a layer that was merged or unmerged
        self.may_be_merged = True
        #: the packed adapter and strength that were written last, for whoever wants to come back to it
        self.in_use: tuple[Packed, float | torch.Tensor] | None = None
        #: set where somebody else wrote to the weights and no version counter tells
        self.was_touched = False
        self._versions: list[int] = []
        self._weight_versions: list[int] = []
        #: whether a write to the memory is noticed by autograd without being told
        self.shares_versions = True
        self.places: dict[SlotTensor, tuple[torch.Tensor, Place]] = {}
        for arena in self.arenas:
            for band in arena.bands:
                self.places |= {place.tensor: (band.memory, place) for place in band.places}
            self.places |= {place.tensor: (arena.tail, place) for place in arena.tail_places}
        self._tensors = tuple(self.places)
        self._second = [tensor for tensor in self._tensors if tensor.rank_axis == 1] or list(self._tensors)
        self._memories = [memory for arena in self.arenas for memory in (*(b.memory for b in arena.bands), arena.tail)]
        #: rows of each memory that may hold something else than zeros; a tail is written whole
        self.used = [memory.shape[0] for memory in self._memories]
        self._expected: dict[object, object] = {}
        #: the names under which files may have each tensor of each layer
        self.keys: list[list[list[str]]] = []
        #: which tensors each layer has beside A and B
        self.forms: list[tuple[bool, bool]] = []
        self._own_views: dict[tuple[SlotTensor, int], torch.Tensor] = {}
        self._zeros = [memory.new_zeros(()) for memory in self._memories]

    # ---- is everything where it was?

    def settle(self) -> None:
        """Notes where everything is; to be called when the model's parameters have been moved in."""
        self.keys = [[_keys(layer, tensor) for tensor in layer.tensors] for layer in self.slot.layers]
        self.forms = [self.slot.method.form_of(layer.module, self.slot.adapter_name) for layer in self.slot.layers]
        self._parameters = [tensor.parameter for tensor in self._tensors]
        self._second_parameters = [tensor.parameter for tensor in self._second]
        self._addresses = [self.view(tensor).data_ptr() for tensor in self._tensors]
        name = self.slot.adapter_name
        caches = [self.slot.method.cache_of(layer.module, name) for layer in self.slot.layers]
        #: by their numbers, the tensors of layers that have more than A and B
        self.with_more = [
            (index, layer.tensors)
            for index, layer in enumerate(self.slot.layers)
            if any(tensor.rank_axis is None for tensor in layer.tensors)
        ]
        #: whether any of the layers is one whose weights PEFT saves, too
        self.has_embeddings = any(is_embedding(self.slot.host.base, layer.module) for layer in self.slot.layers)
        #: whether turning a layer off takes a look at its base weight, as with DoRA
        self.reads_base = any(tensor.off for tensor in self._tensors)
        #: of DoRA; where there are none, nothing is to be cleared at a swap
        self._caches = caches if self.reads_base else []
        self._inference = any(parameter.is_inference() for parameter in self._parameters)
        self._use_counts = self._count_uses()
        self._weight_versions = self._versions_of_weights()
        links = dict.fromkeys(link for layer in self.slot.layers for link in _links(self.slot, layer))
        self._holders = [holder._modules for holder, _, _ in links] + [t.owner._parameters for t in self._tensors]
        self._held_as = [name for _, name, _ in links] + [tensor.name for tensor in self._tensors]
        self._held = [held for _, _, held in links] + self._parameters

    def _versions_of_weights(self) -> list[int]:
        if self._inference:
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

    def _count_uses(self) -> list[int] | None:
        if _use_count is None:
            return None
        return [_use_count(memory.untyped_storage()._cdata) for memory in self._memories]

    def is_intact(self) -> bool:
        """Whether the model's parameters are still views of this memory, on layers that are still in the model."""
        if self.dirty:
            return self._is_intact_in_depth()
        if self.slot.adapter_name not in self.slot.host.configs:
            return False
        many = len(self._parameters) > MANY_TENSORS and self._use_counts is not None
        if many and self._count_uses() == self._use_counts:
            # a parameter that was given other memory has let go of this one; whole models that were are seen below
            some = range(0, len(self._parameters), len(self._parameters) // 16)
            addresses = all(self._parameters[number].data_ptr() == self._addresses[number] for number in some)
            step = max(len(self._held) // 64, 1)
            return addresses and self._holds(slice(None, None, step)) and self._holds(slice(-1, None))
        return self._is_all_in_place()

    def _holds(self, some: slice) -> bool:
        """Whether the parameters, and the modules on the way to them, are still those of the model."""
        found = map(dict.get, self._holders[some], self._held_as[some])
        if all(map(operator.is_, found, self._held[some])):
            return True
        for holder, name, held in zip(self._holders[some], self._held_as[some], self._held[some], strict=True):
            present = holder.get(name)
            # a part may have been compiled since, and have a wrapper around it
            if isinstance(present, torch.nn.Module):
                present = unwrap_compiled(present)
            if present is not held:
                return False
        return True

    def _is_intact_in_depth(self) -> bool:
        name = self.slot.adapter_name
        if self.slot.host.base.__dict__.get(ROOMS, {}).get(name) is not self or name not in self.slot.host.configs:
            return False
        for index, layer in enumerate(self.slot.layers):
            seat = layer.module.__dict__.get(SEATS, {}).get(name)
            scaling = layer.module.scaling.get(name)
            if seat is None or seat.room is not self or not isinstance(scaling, torch.Tensor):
                return False
            if scaling.data_ptr() not in [vector[index, 0].data_ptr() for vector in self.scalings]:
                return False
        if not self._is_all_in_place():
            return False
        self.dirty = False
        return True

    def _is_all_in_place(self) -> bool:
        return list(map(torch.Tensor.data_ptr, self._parameters)) == self._addresses and self._holds(slice(None))

    def settle_in(self, journal: Journal) -> None:
        """Lets the layers look their values up here, undoably."""
        base, name = self.slot.host.base, self.slot.adapter_name
        if ROOMS not in base.__dict__:
            journal.set_item(base.__dict__, ROOMS, Rooms())
        journal.set_item(base.__dict__[ROOMS], name, self)
        for index, layer in enumerate(self.slot.layers):
            take_seat(layer.module, name, Seat(self, index), journal)

    def leave(self) -> None:
        """Gives the room up; the layers keep the values they have. :meth:`settle_in` takes it back."""
        self.dirty = True
        base, name = self.slot.host.base, self.slot.adapter_name
        for layer in self.slot.layers:
            seat = layer.module.__dict__.get(SEATS, {}).get(name)
            if seat is not None and seat.room is self:
                leave_seat(layer.module, name)
        rooms = base.__dict__.get(ROOMS, {})
        if rooms.get(name) is self:
            del rooms[name]

    @property
    def is_merged(self) -> bool:
        """Whether the adapter is merged into the base weights, on any layer."""
        if self.may_be_merged:
            name = self.slot.adapter_name
            self.may_be_merged = any(name in layer.module.merged_adapters for layer in self.slot.layers)
        return self.may_be_merged

    # ---- what to expect of an adapter

    def expect(self, config: PeftConfig) -> list[Expected]:
        """What an adapter with this config has for each layer; worked out once for each config."""
        return self.once_for(config, "layers", lambda: [self._expect(config, layer) for layer in self.slot.layers])

    def once_for(self, config: PeftConfig, what: str, work_out: Callable[[], T]) -> T:
        """What is worked out once for each config, and remembered for some of them."""
        key = what, self.slot.method.fingerprint(config)
        if key not in self._expected:
            if len(self._expected) >= MAX_EXPECTED:
                self._expected.clear()
            self._expected[key] = work_out()
        return self._expected[key]

    def _expect(self, config: PeftConfig, layer: SlotLayer) -> Expected:
        method, capacity = self.slot.method, layer.tensors[0].capacity
        settings = method.settings_for(config, layer.path)
        fits = settings.rank <= capacity and settings.rank % method.rank_step(layer.module) == 0
        return Expected(
            settings,
            targeted=any(method.targets(config, path) for path in layer.paths),
            # no tensor has the shape None: what doesn't fit is refused elsewhere
            shapes=[torch.Size(tensor.shape_for(settings.rank)) if fits else None for tensor in layer.tensors],
            fills_up=settings.rank == capacity,
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
        of_tensor = {
            tensor: rank for layer, rank in zip(self.slot.layers, ranks, strict=True) for tensor in layer.tensors
        }
        rows = []
        for arena in self.arenas:
            for band in arena.bands:
                rows.append(max((of_tensor[place.tensor] for place in band.places), default=0))
            rows.append(len(arena.tail))
        return rows

    def _rows_in_use(self) -> list[int]:
        """How many rows of each memory may hold something else than zeros; who else writes to it may write to any."""
        return [len(memory) for memory in self._memories] if self.is_touched else self.used

    def to_clear(self, ranks: Sequence[int]) -> Iterator[torch.Tensor]:
        """The parts of the memory to fill with zeros before the tensors of such an adapter are written one by one."""
        used = self._rows_in_use()
        rank_of = {
            tensor: rank for layer, rank in zip(self.slot.layers, ranks, strict=True) for tensor in layer.tensors
        }
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

    def own_view(self, tensor: SlotTensor, rank: int) -> torch.Tensor:
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
        ranks = [settings.rank if settings else 0 for settings in content.settings]
        parts = [
            self._new_part(memory, rows) for memory, rows in zip(self._memories, self.rows_for(ranks), strict=True)
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
                torch._foreach_copy_(targets, tensors)
        return Packed(content, tuple(parts), self.scalings_of(content))

    def take(self) -> Packed:
        """Packs what is in the room now, with the scalings that the layers have now."""
        ranks = [settings.rank if settings else 0 for settings in self.content.settings]
        parts = []
        for memory, rows in zip(self._memories, self.rows_for(ranks), strict=True):
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

    def write(self, packed: Packed, strength: float = 1.0, also: Callable[[Journal], None] | None = None) -> None:
        """Puts a packed adapter in. The room must be intact.

        ``also`` does what must be done together with it, or not at all.
        """
        targets, sources, used = [], [], []
        in_use = self._rows_in_use()
        for memory, part, before, zero in zip(self._memories, packed.parts, in_use, self._zeros, strict=True):
            rows = part.shape[0]
            used.append(rows)
            if rows:
                targets.append(memory if rows == memory.shape[0] else memory[:rows])
                sources.append(part)
            if before > rows:
                rest = memory[rows:before]
                targets.append(rest)
                sources.append(zero.expand(rest.shape))
        even = not isinstance(strength, torch.Tensor)
        scalings = packed.scalings if even and strength == 1 else packed.scalings * strength
        for vector in self.scalings:
            targets.append(vector)
            sources.append(scalings)
        with writing(self.slot.host.base), torch.inference_mode(self._inference), torch.no_grad():
            journal = Journal()
            try:
                self.enter(packed.content, used, journal)
                journal.set_attribute(self, "in_use", (packed, strength))
                if also is not None:
                    also(journal)
                torch._foreach_copy_(targets, sources, non_blocking=True)
            except BaseException:
                journal.roll_back()
                raise
            self.note_written()
            self._versions = self._scaling_versions()

    def set_strength(self, strength: float, also: Callable[[Journal], None] | None = None) -> None:
        """Sets the scalings of all layers to their trained values times ``strength``; ``also`` as in :meth:`write`."""
        scalings = self.scalings_of(self.content, strength)
        with writing(self.slot.host.base), torch.inference_mode(False), torch.no_grad():
            journal = Journal()
            try:
                if self.in_use is not None:
                    journal.set_attribute(self, "in_use", (self.in_use[0], strength))
                if also is not None:
                    also(journal)
                known = self.is_as_written
                torch._foreach_copy_(list(self.scalings), [scalings] * len(self.scalings))
            except BaseException:
                journal.roll_back()
                raise
            if known:
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

    def enter(self, content: Content, used: list[int], journal: Journal) -> None:
        """Everything of a swap but the weights and scalings, undoable."""
        if True in map(_requires_grad, self._second_parameters):
            for parameter in self._parameters:
                clear_gradient(parameter, journal)
            for index, tensors in self.with_more:
                if content.settings[index] is None or self.content.settings[index] is None:
                    set_trained(tensors, content.settings[index] is not None, journal)
        if not self.shares_versions and not self._inference:
            torch.autograd.graph.increment_version(self._parameters)
        for cache in self._caches:
            journal.clear(cache)
        journal.set_attribute(self, "content", content)
        # until the copy is done, what was used before may still be there
        journal.record(lambda before=self.used: setattr(self, "used", before))
        self.used = used
        follow_config(self.slot.host, self.slot.adapter_name, content.config, journal)
        journal.set_item(self.slot.host.configs, self.slot.adapter_name, content.config)


_requires_grad = attrgetter("requires_grad")
#: how many tensors share a storage, in C; not public, so it may be gone one day
_use_count = getattr(torch._C, "_storage_Use_Count", None)


def clear_gradient(parameter: torch.nn.Parameter, journal: Journal) -> None:
    """The gradient of the old adapter's weight says nothing about the new one's."""
    gradient = parameter.grad
    if gradient is None:
        return

    def undo() -> None:
        parameter.grad = gradient

    journal.record(undo)
    parameter.grad = None


def _keys(layer: SlotLayer, tensor: SlotTensor) -> list[str]:
    return [f"{path}.{key}" for path in layer.paths for key in (tensor.key, tensor.named_key)]


def _links(slot: Slot, layer: SlotLayer) -> Iterator[tuple[torch.nn.Module, str, torch.nn.Module]]:
    """Every step from the base model to the layer's tensors: a module, a name, and the module under that name."""
    module = slot.host.base
    names = layer.path.split(".")
    while module is not layer.module:
        name = COMPILED if COMPILED in module._modules else names.pop(0) if names else "base_layer"
        yield module, name, module._modules[name]
        module = module._modules[name]
    for tensor in layer.tensors:
        table = getattr(layer.module, tensor.named_key.partition(".")[0])
        if tensor.owner is not table:
            yield table, slot.adapter_name, tensor.owner
        yield layer.module, tensor.named_key.partition(".")[0], table


def room_of(base: torch.nn.Module, adapter_name: str) -> Room | None:
    """The room of an adapter, if it was prepared and everything is still in place.

    A room whose model was moved, converted or rebuilt is given up: its layers keep what they have, and swaps go to
    each tensor by itself.
    """
    rooms = base.__dict__.get(ROOMS)
    room = rooms.get(adapter_name) if rooms else None
    if room is None or room.is_intact():
        return room
    room.leave()
    return None


def slot_for(model: torch.nn.Module, adapter_name: str) -> Slot:
    """:func:`hotswap_lab.resolve_slot`, without a walk where the model is prepared.

    The slot has the room's view of the model; ``model`` may be a wrapper around it.
    """
    host = find_host(model, adapter_name)
    room = room_of(host.base, adapter_name)
    if room is None:
        return slot_in(host, adapter_name)
    if room.slot.host.root is not host.root or room.slot.host.configs is not host.configs:
        room.slot = dataclasses.replace(room.slot, host=host)
    return room.slot
