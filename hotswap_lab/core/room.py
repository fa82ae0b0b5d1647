"""Room: a prepared slot. Its memory, and the settings of the adapter in it, for all layers at once.

A swap in a room is one copy (see :mod:`hotswap_lab.core.arena`), and a few numbers in the tables that PEFT keeps on
each layer.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from .adapter import WHEN
from .arena import Band, Span, build_arena
from .change import Change, clear_gradients, copy_all
from .errors import listing, refused
from .host import Config
from .journal import Journal
from .prepared import is_marked_off, is_off, new_scalings, own_rank
from .settings import LayerSettings, OfLayers, settings_of
from .slot import SLOTS, Slot, SlotLayer, begin_change, copy_of, follow
from .tensors import SlotTensor, shared_as
from .writing import write_packed_scalings, write_settings

#: elements from one scaling to the next: a GPU kernel wants each of its inputs aligned to 16 bytes
SCALING_STEP = 4


@dataclass(frozen=True, eq=False)
class State:
    """The state of a room besides the weights: the settings of each layer (None: off), and the config."""

    settings: tuple[LayerSettings | None, ...]
    config: Config
    #: the pool's member whose weights these are, or another object that identifies their owner
    owner: Any = None

    @cached_property
    def scalings(self) -> torch.Tensor:
        """The scaling of each layer as trained; 0 where it is off."""
        with torch.inference_mode(False):
            values = [own.scaling if own else 0.0 for own in self.settings]
            return torch.tensor(values, dtype=torch.float64, device="cpu")

    @cached_property
    def acts(self) -> torch.Tensor:
        """Whether the adapter does something on each layer, as a column: ``[layers, 1]``."""
        return self.scalings[:, None] != 0

    @cached_property
    def ranks(self) -> list[int | None]:
        """The rank on each layer; None where it is off."""
        return [own and own.rank for own in self.settings]

    @cached_property
    def on(self) -> list[bool]:
        """Whether the adapter is on each layer."""
        return [own is not None for own in self.settings]

    @cached_property
    def columns(self) -> dict[str, list[Any]]:
        """The settings of all layers that are on, by the name of the setting."""
        fields, on = dataclasses.fields(LayerSettings), [own for own in self.settings if own is not None]
        return {field.name: [getattr(own, field.name) for own in on] for field in fields}


@dataclass(frozen=True, eq=False)
class Packed:
    """An adapter in the layout of its room, so that one copy puts it in.

    ``bands`` holds its own components of each band; ``scalings`` has a line for each layer, in the room's layout.
    """

    state: State
    bands: tuple[torch.Tensor, ...]
    scalings: torch.Tensor

    @property
    def nbytes(self) -> int:
        return sum(band.nbytes for band in self.bands) + self.scalings.nbytes


def strengths_of(packed: Packed) -> torch.Tensor:
    """The strength of each layer, relative to its training; where it is off, the median of the others."""
    now, trained = packed.scalings[:, 0].cpu().double(), packed.state.scalings
    on = trained != 0
    return torch.where(on, now / trained, (now / trained)[on].median() if on.any() else 1.0)


class Room:
    """The prepared place of one adapter name in one model.

    Parameters
    ----------
    slot:
        Every layer and tensor of the adapter, reserved ones included.
    bands:
        Their memory.
    scalings:
        One matrix for each device, all with a line for each layer.
    state:
        The state of the adapter in it.
    """

    #: for subclasses: the adapter of each row of a batch, None for no adapter; empty after a swap
    assigned: tuple[Packed | None, ...] = ()
    #: the function that lays out its memory
    new_bands: Callable[..., list[Band]] = staticmethod(build_arena)

    @staticmethod
    def new_scalings(layers: int, device: torch.device) -> torch.Tensor:
        """Zeros for the scalings of this many layers."""
        return new_scalings((layers, SCALING_STEP), device)

    def __init__(self, slot: Slot, bands: Sequence[Band], scalings: Sequence[torch.Tensor], state: State):
        self.slot: Slot = slot
        self.bands: tuple[Band, ...] = tuple(bands)
        self._memories: list[torch.Tensor] = [band.memory for band in self.bands]
        self.scalings: tuple[torch.Tensor, ...] = tuple(scalings)
        self.state = state
        self.spans: dict[SlotTensor, tuple[Band, Span]] = {
            span.tensor: (band, span) for band in self.bands for span in band.spans
        }
        #: the views of a layer's tensors that an adapter of a rank fills
        self._own_views: dict[tuple[SlotLayer, int | None], list[torch.Tensor]] = {}

    # ---- is everything where it was?

    def record_links(self, slot: Slot) -> None:
        """Note where everything is. Call this when the model's parameters have been moved in."""
        self.slot = dataclasses.replace(slot, room=self)
        tensors, own = list(self.spans), set(slot.tensors)
        self._parameters = [tensor.parameter for tensor in tensors]
        self._views = [self.view(tensor) for tensor in tensors]
        #: of modules that are saved with the adapter: moving a buffer puts another one in its place
        self._extra = [tensor for tensor in tensors if tensor not in own]
        self._of_extra = [tensor.parameter for tensor in self._extra]
        self._addresses, self._bases = [], []
        self.slot.record_links()
        self._versions = self._versions_now()

    def patch_layers(self, slot: Slot, journal: Journal) -> None:
        """Change the layers further, once the parameters have been moved in; for subclasses."""

    def unpatch_layers(self, journal: Journal, is_lost: bool = False) -> None:
        """Undo :meth:`patch_layers`, when the slot gets another room, or layers that have no place in this one.

        ``is_lost`` says that the parameters were moved out of the room before, by ``model.to(...)``.
        """

    def is_intact(self) -> bool:
        """Whether the model's parameters are still views of this memory, on layers that are still in the model."""
        slot, name = self.slot, self.slot.adapter_name
        kept = slot.host.base.__dict__.get(SLOTS, {}).get(name)
        if kept is None or kept.room is not self or name not in slot.host.configs or not slot.is_in_place():
            return False
        if any(tensor.parameter is not known for tensor, known in zip(self._extra, self._of_extra, strict=True)):
            return False
        return [parameter.data_ptr() for parameter in self._parameters] == self._addresses_now()

    def _addresses_now(self) -> list[int]:
        """The addresses that the parameters must have: ``share_memory`` moves the memory, with all views of it."""
        bases = list(map(torch.Tensor.data_ptr, self._memories))
        if bases != self._bases:
            self._bases, self._addresses = bases, [view.data_ptr() for view in self._views]
        return self._addresses

    @property
    def is_touched(self) -> bool:
        """Whether a version counter shows that other code has written to the weights since the room did.

        Writes of an optimizer and of ``load_state_dict`` are counted. Writes through ``.data`` are not, nor any in
        inference mode, so no weights depend on this.
        """
        return self._versions_now() != self._versions

    def _versions_now(self) -> int:
        """The sum of all version counters. It shows any write, because no counter ever decreases."""
        return 0 if self.slot.is_inference else sum([parameter._version for parameter in self._parameters])

    def _note_write(self, journal: Journal) -> None:
        """Note the version counters, so that they show when other code writes from now on."""
        journal.record(lambda: setattr(self, "_versions", self._versions_now()))
        if not self.slot.is_inference:  # autograd doesn't notice writes to the memory that a parameter is a view of
            torch.autograd.graph.increment_version(self._parameters)
        self._versions = self._versions_now()

    def note_swap(self, config: Config, journal: Journal) -> None:
        """Note a swap that writes to the parameters one by one, as that of an adapter with saved modules."""
        name, layers = self.slot.adapter_name, [layer.module for layer in self.slot.layers]
        settings = [None if is_marked_off(layer, name) else settings_of(layer, name) for layer in layers]
        journal.set_attribute(self, "state", State(tuple(settings), config))

    # ---- locations

    def view(self, tensor: SlotTensor) -> torch.Tensor:
        """The whole tensor, padding included."""
        band, span = self.spans[tensor]
        return span.view(band.memory)

    def view_in(self, bands: Sequence[torch.Tensor], tensor: SlotTensor, rank: int | None) -> torch.Tensor:
        """The tensor of an adapter of this rank in ``bands``, which are those of a :class:`Packed`."""
        band, span = self.spans[tensor]
        return tensor.own(span.view(bands[self.bands.index(band)]), rank)

    def scaling(self, index: int, device: torch.device) -> torch.Tensor:
        """The scaling of a layer on a device, of shape (1, 1)."""
        return next(scalings[index : index + 1, :1] for scalings in self.scalings if scalings.device == device)

    def components_for(self, state: State) -> tuple[list[int], list[int]]:
        """For each band, the number of components that an adapter fills in all tensors, and in any of them."""
        layers = zip(self.slot.layers, state.settings, strict=True)
        rank_of = {tensor: own.rank if own else 0 for layer, own in layers for tensor in layer.tensors}
        filled, taken = [], []
        for band in self.bands:
            ranks, is_tail = [rank_of.get(span.tensor, 0) for span in band.spans], band.memory.dim() == 1
            filled.append(0 if is_tail else min(ranks))
            taken.append(len(band.memory) if is_tail else max(ranks))
        return filled, taken

    @property
    def nbytes(self) -> int:
        return sum(band.memory.nbytes for band in self.bands)

    # ---- adapters in and out

    def pack(self, state: State, sources: Sequence[tuple[SlotTensor, torch.Tensor]]) -> Packed:
        """Lay out an adapter like the room; ``sources`` are its tensors as in its file."""
        _, taken = self.components_for(state)
        own = tuple([new_band(band.memory, number) for band, number in zip(self.bands, taken, strict=True)])
        targets = [self.view_in(own, tensor, tensor.rank_of(source.shape)) for tensor, source in sources]
        values = [tensor.split(source.detach()) for tensor, source in sources]
        with torch.inference_mode(False), torch.no_grad():
            copy_all(list(zip(targets, values, strict=True)))
        return Packed(state, own, self.scalings_of(state))

    def scalings_of(self, state: State, strength: float | torch.Tensor = 1.0) -> torch.Tensor:
        """The scalings of all layers in the room's layout; ``strength`` is one number, or one for each layer."""
        with torch.inference_mode(False):
            scalings = torch.zeros((len(state.settings), SCALING_STEP), dtype=torch.float64, device="cpu")
            scalings[:, 0] = state.scalings * strength
        return scalings

    def change_to_packed(self, packed: Packed, strength: float = 1.0) -> Change:
        """The change that puts a packed adapter in. The room must be intact."""
        change = self._change(packed.state, None, list(map(len, packed.bands)))
        for memory, own in zip(self._memories, packed.bands, strict=True):
            if len(own):
                change.copies.append((memory[: len(own)], own))
        scalings = packed.scalings if strength == 1 else self.scalings_of(packed.state, strength)
        write_packed_scalings(change, self.scalings, scalings)
        return change

    def change_without_weights(self, settings: OfLayers, config: Config) -> Change:
        """The change for a swap without the weights, which :meth:`write` then adds layer by layer."""
        state = State(tuple(settings), config)
        change = self._change(state, config, self.components_for(state)[0])
        write_packed_scalings(change, self.scalings, self.scalings_of(state))
        return change

    def write(self, layer: SlotLayer, rank: int | None, sources: Sequence[torch.Tensor | None], change: Change) -> None:
        """Have ``change`` write an adapter of this rank (None: turned off) to a layer that is zero beyond its rank.

        ``sources`` are the values for its tensors, as in an adapter's file.
        """
        if (layer, rank) not in self._own_views:
            self._own_views[layer, rank] = [tensor.own(self.view(tensor), rank or 0) for tensor in layer.tensors]
        for tensor, target, source in zip(layer.tensors, self._own_views[layer, rank], sources, strict=True):
            if source is not None:
                change.copy(target, tensor.split(source))

    def change_strength(self, strength: float) -> Change:
        """The change that sets the scalings of all layers to their trained values times ``strength``."""
        change = begin_change(self.slot)
        write_packed_scalings(change, self.scalings, self.scalings_of(self.state, strength))
        return change

    def _change(self, state: State, config: Config | None, filled: list[int]) -> Change:
        """The change for a swap without the weights. It zeroes all components that the new weights don't fill.

        Nothing is remembered about them: any code may have written there through ``.data``, which leaves no trace, and
        to look at all of them takes as long as to write them. ``config`` is that of the model afterwards; None: a copy
        of that of ``state``.
        """
        slot = self.slot
        if config is None:
            config = copy_of(state.config)
            vars(config)[WHEN] = time.time()
        change = Change(slot.is_inference)
        follow(change, slot, config, is_kept=True)
        for memory, start in zip(self._memories, filled, strict=True):
            if len(rest := memory[start:]):
                change.copies.append((rest, rest.new_zeros(()).expand_as(rest)))
        change.steps.append(functools.partial(self._write_state, state, config))
        return change

    def _write_state(self, state: State, config: Config, journal: Journal) -> None:
        slot, before = self.slot, self.state
        self._note_write(journal)
        if is_trained := True in [parameter.requires_grad for parameter in self._parameters]:
            clear_gradients(self._parameters, journal)
        journal.set_item(slot.host.configs, slot.adapter_name, config)
        journal.set_item(self.__dict__, "state", state)
        fields = [field for field, values in state.columns.items() if values != before.columns[field]]
        # what is off must not be trained, even if the user has set `requires_grad` since
        keeps_on = state.on == before.on and not (is_trained and False in state.on)
        may_differ = fields if keeps_on and "dropout" not in fields else None
        write_settings(slot, slot.layers, state.settings, journal, may_differ)


def new_band(memory: torch.Tensor, components: int) -> torch.Tensor:
    # from pinned memory, a GPU fetches an adapter while the CPU goes on
    place: dict[str, Any] = dict(pin_memory=True) if memory.is_cuda else dict(device=memory.device)
    with torch.inference_mode(False):
        return torch.zeros((components, *memory.shape[1:]), dtype=memory.dtype, **place)


def build_room(
    slot: Slot, capacity: Mapping[SlotLayer, int], reserved: list[SlotLayer], kind: type[Room], extra: list[SlotTensor]
) -> Room:
    """A room with space for these ranks, and with the slot's adapter in it; ``reserved`` layers are off.

    ``extra`` tensors have no rank: they belong to modules that are saved with the adapter. The model is only read.
    """
    name = slot.adapter_name
    if sharded := [layer.path for layer in capacity for tensor in layer.tensors if tensor.is_shard]:
        raise refused("sharded_not_preparable", paths=listing(dict.fromkeys(sharded), 3))
    groups: dict[tuple, list[tuple[SlotTensor, tuple[int, ...]]]] = {}
    ranks = {tensor: rank for layer, rank in capacity.items() for tensor in layer.tensors}
    for tensor in (*ranks, *extra):
        key = tensor.parameter.dtype, tensor.parameter.device
        groups.setdefault(key, []).append((tensor, tensor.shape_for(ranks.get(tensor))))
    bands = [band for group in groups.values() for band in kind.new_bands(group, like=group[0][0].parameter.detach())]
    on = {layer for layer in capacity if layer not in reserved and not is_off(layer.module, name, layer.tensors)}
    settings = [settings_of(layer.module, name) if layer in on else None for layer in capacity]
    with torch.inference_mode(False):
        devices = dict.fromkeys(device for _, device in groups)
        scalings = [kind.new_scalings(len(capacity), device) for device in devices]
        for memory in (*scalings, *[band.memory for band in bands]):
            shared_as([tensor.parameter for tensor in ranks], memory)
    room = kind(slot, bands, scalings, State(tuple(settings), slot.config))
    for index, layer in enumerate(capacity):
        for tensor in layer.tensors if layer not in reserved else ():
            own = own_rank(layer.module, name, tensor)
            tensor.own(room.view(tensor), own).copy_(tensor.own(tensor.parameter.detach(), own))
        # the live value, which the user may have set, and not the trained one
        room.scaling(index, layer.tensors[0].parameter.device).fill_(float(layer.module.scaling[name]))
    for tensor in extra:
        room.view(tensor).copy_(tensor.parameter)
    return room
