"""Learners: models that are being trained, whose adapter a pool gets at every step.

The first update from a learner is planned like an adapter that is read from a file, and leaves a note of where each
tensor went. As long as the learner keeps its layers, shapes and config, the next updates are copies.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from ..beyond.passes import METHODS
from ..core.change import copy_all
from ..core.host import carriers, find_host, name_in
from ..core.journal import Journal
from ..core.lora import fingerprint
from ..core.room import Packed, Room, new_band
from ..core.slot import Slot, keep_slot, slot_for
from ..core.tensors import is_finite


def slot_of(learner: torch.nn.Module, name: str) -> Slot:
    """The slot of the adapter that a learner trains: the one called ``name``, or else its only one."""
    is_there = any(name in host.configs for host in carriers(learner))
    slot = slot_for(METHODS, find_host(learner, own := name if is_there else name_in(learner, None)), own)
    if not slot._links:  # the learner keeps it, so that the next update needs no search
        keep_slot(slot, slot, Journal())
    return slot


class Side(NamedTuple):
    """Memory for a packed adapter, and the view of each tensor in it."""

    bands: tuple[torch.Tensor, ...]
    targets: list[torch.Tensor]


@dataclass(frozen=True, eq=False)
class Learned:
    """How a learner's adapter was packed. The learner may be deleted meanwhile, so it is not held."""

    slot: weakref.ref[Slot]
    fingerprint: bytes | None
    shapes: list[torch.Size]
    #: the memory that the pool uses, and the memory for the next update; they take turns
    sides: tuple[Side, Side]
    is_read_by_cuda: bool

    @classmethod
    def of(cls, slot: Slot, room: Room, packed: Packed) -> Learned | None:
        """A note of how a learner was packed; None if copies of its parameters would not come to the same."""
        places = {key: each for layer in room.slot.layers for key, each in zip(layer.keys, layer.tensors, strict=True)}
        keys = [key for layer in slot.layers for key in layer.keys]
        if not places.keys() >= {*keys}:
            return None

        def side(bands: Sequence[torch.Tensor]) -> Side:
            own, targets = dict(zip(room.bands, bands, strict=True)), []
            for key, parameter in zip(keys, slot.parameters, strict=True):
                band, span = room.spans[place := places[key]]
                targets.append(place.own(span.view(own[band]), place.rank_of(parameter.shape)))
            return Side(tuple(bands), targets)

        shapes, spare = (
            [each.shape for each in slot.parameters],
            [new_band(band.memory, len(each)) for band, each in zip(room.bands, packed.bands, strict=True)],
        )
        is_cuda = any(band.memory.is_cuda for band in room.bands)
        learned = cls(weakref.ref(slot), fingerprint(slot.config), shapes, (side(packed.bands), side(spare)), is_cuda)
        if shapes != [each.shape for each in learned.sides[0].targets]:  # split by groups
            return None
        again = learned.packed_again(slot, packed)
        return learned if again and all(map(torch.equal, again.bands, packed.bands)) else None

    def packed_again(self, slot: Slot, packed: Packed) -> Packed | None:
        """``packed`` with the learner's present weights; None if it has to be planned again."""
        parameters, (one, other) = slot.parameters, self.sides
        bands, spare = (one, other) if packed.bands[0] is one.bands[0] else (other, one)
        is_same = slot is self.slot() and packed.bands[0] is bands.bands[0]
        if not is_same or [each.shape for each in parameters] != self.shapes:
            return None
        if self.fingerprint is None or fingerprint(slot.config) != self.fingerprint:
            return None
        # a GPU may still read the spare memory for an earlier update, and has to have written it before it is checked
        is_cuda = self.is_read_by_cuda or True in [each.is_cuda for each in parameters]
        with torch.inference_mode(False), torch.no_grad():
            if is_cuda:
                torch.cuda.synchronize()
            copy_all(list(zip(spare.targets, [each.detach() for each in parameters], strict=True)))
            if is_cuda:
                torch.cuda.synchronize()
        # a tuple of its own: rows with the same one are not written again
        return replace(packed, bands=(*spare.bands,)) if all(map(is_finite, spare.bands)) else None
