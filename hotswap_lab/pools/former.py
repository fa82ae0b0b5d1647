"""Snapshots of the adapters in a model before a swap, so that they can be put back."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..core.room import Packed, Room, new_band


@dataclass(frozen=True, eq=False)
class PackedRows(Packed):
    """The adapters in a room with rows; the fields of :class:`Packed` are those of row 0."""

    rows: tuple[Packed | None, ...]
    copies: int


def packed_now(room: Room, bands: tuple[torch.Tensor, ...]) -> Packed:
    """The adapter in a room, with the scalings that its layers have now. ``bands`` are its weights, if known."""
    with torch.inference_mode(False), torch.no_grad():
        if not bands:
            taken = zip(room.bands, room.components_for(room.state)[1], strict=True)
            bands = tuple([new_band(band.memory, number).copy_(band.memory[:number]) for band, number in taken])
        return Packed(room.state, bands, room.scalings[0].detach().clone())


def strengths_of(packed: Packed) -> torch.Tensor:
    """The strength of each layer, relative to its training; where it is off, the median of the others."""
    now, trained = packed.scalings[:, 0].cpu().double(), packed.state.scalings
    on = trained != 0
    return torch.where(on, now / trained, (now / trained)[on].median() if on.any() else 1.0)
