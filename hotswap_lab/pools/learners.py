"""Learners: models that are being trained, whose adapter a pool gets at every step.

The first update from a learner is planned like an adapter that is read from a file, and leaves a note of where each
tensor went. As long as the learner keeps its layers, shapes and config, the next updates are copies.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..beyond.passes import METHODS
from ..core.adapter import Adapter
from ..core.change import copy_all
from ..core.errors import listing, refused
from ..core.host import Config, carriers, find_host
from ..core.journal import Journal
from ..core.lora import fingerprint
from ..core.room import Packed, Room, new_band
from ..core.slot import Slot, keep_slot, slot_for
from ..core.tensors import is_finite
from ..files.saving import check_saved, saved_tensors

#: packs an adapter for a member of a pool
Pack = Callable[[Any, Adapter, bool], Packed]


def slot_of(learner: torch.nn.Module, name: str) -> Slot:
    """Return the slot of the adapter that a learner trains: the one called ``name``, or its only one."""
    names = {adapter for host in carriers(learner) for adapter in host.configs}
    if len(names) > 1 and name not in names:
        raise refused("learner_has_others", name=name, names=listing(sorted(names)))
    own = names.pop() if len(names) == 1 else name
    return slot_for(METHODS, find_host(learner, own), own)


def of_learner(
    learner: torch.nn.Module, config: Config | None, member: Any, room: Room, pack: Pack
) -> tuple[Packed, Learned | None]:
    """Pack a learner's adapter for a member of a pool. Also returns a note for the next time; None if it has to be
    planned again then."""
    slot, known = slot_of(learner, member.name), member.learned
    if known and config is None and (packed := known.packed_again(slot, member.packed)):
        return packed, known
    tensors = saved_tensors(slot)
    check_saved(slot, tensors)
    packed = pack(member, Adapter.from_state_dict(tensors, config or slot.config), False)
    return packed, None if config else Learned.of(slot, tensors, room, packed)


def _state_of(slot: Slot) -> tuple[bytes | None, list[torch.Size]]:
    has_rows = slot.room is not None and slot.room.assigned  # its parameters are those of one row
    return None if has_rows else fingerprint(slot.config), [parameter.shape for parameter in slot.parameters]


@dataclass(frozen=True, eq=False)
class Learned:
    """How a learner's adapter was packed. The learner may be deleted meanwhile, so it is not held."""

    slot: weakref.ref[Slot]
    state: tuple[bytes | None, list[torch.Size]]
    #: the memory that the pool uses, and that for the next update, with the view of each tensor; they take turns
    sides: list[tuple[tuple[torch.Tensor, ...], list[torch.Tensor]]]

    @classmethod
    def of(cls, slot: Slot, tensors: Mapping[str, torch.Tensor], room: Room, packed: Packed) -> Learned | None:
        """A note of how a learner was packed; None if copies of its parameters would give a different result."""
        layers = room.slot.layers
        targets = {key: tensor for layer in layers for key, tensor in zip(layer.keys, layer.tensors, strict=True)}
        keys, (config_key, shapes) = [key for layer in slot.layers for key in layer.keys], _state_of(slot)
        is_whole = sorted(tensor.shape for tensor in tensors.values()) == sorted(shapes)  # no layer is off or padded
        if not is_whole or config_key is None or not targets.keys() >= {*keys}:
            return None

        def side(bands: Sequence[torch.Tensor]) -> tuple[tuple[torch.Tensor, ...], list[torch.Tensor]]:
            pairs = [(targets[key], shape) for key, shape in zip(keys, shapes, strict=True)]
            return tuple(bands), [room.view_in(bands, target, target.rank_of(shape)) for target, shape in pairs]

        spare = [new_band(band.memory, len(own)) for band, own in zip(room.bands, packed.bands, strict=True)]
        learned = cls(weakref.ref(slot), (config_key, shapes), [side(packed.bands), side(spare)])
        if shapes != [view.shape for view in learned.sides[0][1]]:  # split by groups
            return None
        again = learned.packed_again(slot, packed)
        if again is None or not all(map(torch.equal, again.bands, packed.bands)):
            return None
        if not slot._links:  # the learner keeps it, so that the next update needs no search
            keep_slot(slot, slot, Journal())
        return learned

    def packed_again(self, slot: Slot, packed: Packed) -> Packed | None:
        """Return ``packed`` with the learner's present weights; None if it has to be planned again."""
        if slot is not self.slot() or _state_of(slot) != self.state:
            return None
        bands, targets = next(side for side in self.sides if side[0][0] is not packed.bands[0])
        # a GPU may still read this memory for an earlier update, and must have written it before it is checked
        wait = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
        with torch.inference_mode(False), torch.no_grad():
            wait()
            copy_all(list(zip(targets, [parameter.detach() for parameter in slot.parameters], strict=True)))
            wait()
        return replace(packed, bands=bands) if all(map(is_finite, bands)) else None
