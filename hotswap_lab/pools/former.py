"""What was in a model before a swap, so that it can be put back."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..core.room import Packed, Room, new_band
from .members import Member
from .mixes import Mix


@dataclass(frozen=True, eq=False)
class PackedRows(Packed):
    """All that was in a room with rows; the fields of :class:`Packed` are those of row 0."""

    rows: tuple[Packed | None, ...]
    copies: int


def packed_now(room: Room, bands: tuple[torch.Tensor, ...]) -> Packed:
    """What is in a room, with the scalings that the layers have now. ``bands`` are its weights, if they are known."""
    with torch.inference_mode(False), torch.no_grad():
        if not bands:
            taken = zip(room.bands, room.components_for(room.state)[1], strict=True)
            bands = tuple([new_band(band.memory, number).copy_(band.memory[:number]) for band, number in taken])
        return Packed(room.state, bands, room.scalings[0].detach().clone())


def strengths_of(packed: Packed) -> torch.Tensor:
    """Of each layer, how many times as strong as trained it is; where it is off, as most of the others."""
    now, trained = packed.scalings[:, 0].cpu().double(), packed.state.scalings
    on = trained != 0
    return torch.where(on, now / trained, (now / trained)[on].median() if on.any() else 1.0)


def without_weights(former: Packed) -> Packed:
    """What was there, without the weights that a pool has, or that can be read or mixed again."""
    if isinstance(former, PackedRows):
        return replace(former, rows=tuple([each and without_weights(each) for each in former.rows]))
    return replace(former, bands=()) if isinstance(former.state.owner, (Mix, Member)) else former
