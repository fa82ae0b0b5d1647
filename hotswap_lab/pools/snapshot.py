"""The adapters in a model before a swap, and how they are put back, with the weights that they have by then."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from ..core.change import Change
from ..core.errors import HotswapError
from ..core.host import Config
from ..core.room import Packed, Room, new_band, strengths_of
from .copies import Copies
from .members import Member, Members
from .mixes import Mix, mixed
from .rows import Row, RowRoom


@dataclass(frozen=True, eq=False)
class PackedRows(Packed):
    """The adapters in a room with rows; the fields of :class:`Packed` are those of row 0."""

    rows: tuple[Packed | None, ...]
    copies: Copies


def owner_in(room: Room, members: Members) -> Member | Mix | None:
    """The adapter, or the mix, whose weights are in the room, if it is, or has, one of these members."""
    owner = None if room.is_touched else room.state.owner
    shares = owner.shares if isinstance(owner, Mix) else [(owner, 1.0)]
    return owner if any(isinstance(each, Member) and members.get(each.name) is each for each, _ in shares) else None


def is_used(room: Room, member: Member) -> bool:
    """Whether the model computes with a member, in any row."""
    owners = [each.state.owner for each in (room.assigned or (room,)) if each is not None]
    return member in owners or member in [each for mix in owners if isinstance(mix, Mix) for each, _ in mix.shares]


def row_of(packed: Packed | None, strength: float) -> Row:
    """What a row computes with, where all rows have this strength besides their own."""
    if packed is None:
        return Row(None, None, 0.0)
    owner = packed.state.owner
    strength = round(float(strengths_of(packed).median()) * strength, 6)
    if isinstance(owner, Mix):
        return Row(owner.weights, {member.name: member.version for member, _ in owner.shares}, strength)
    return Row(owner.name, owner.version, strength)


def snapshot(room: Room, members: Members) -> Packed:
    """The present adapters of a room, with their strengths."""
    state, scalings = room.state, room.scalings[0].detach().clone()
    if room.assigned:
        return PackedRows(state, (), scalings, room.assigned, cast(RowRoom, room).batch.copies)
    owner = owner_in(room, members)
    packed = owner.packed if isinstance(owner, Member) else None
    if packed and _are_in(room, packed.bands):
        return Packed(state, packed.bands, scalings)
    # an adapter of the pool may have been trained, or written to, since
    state = replace(state, owner=None if packed else owner)
    with torch.inference_mode(False), torch.no_grad():
        bands = tuple([new_band(band.memory, len(band.memory)).copy_(band.memory) for band in room.bands])
    return Packed(state, bands, scalings)


def change_to_snapshot(room: Room, packed: Packed) -> Change:
    """The change that puts adapters in, one or one for each row."""
    if isinstance(packed, PackedRows):
        return cast(RowRoom, room).change_rows(packed.rows, packed.copies, strengths_of(packed))
    return room.change_to_packed(packed)


def with_current_weights(
    room: Room, members: Members, previous: Packed, updated: Mapping[Member, Packed] = {}
) -> Packed:
    """``previous`` with the present weights of its adapters; where these can't be had, with the previous ones."""
    each_row = previous.rows if isinstance(previous, PackedRows) else (previous,)
    # rows that have the same weights go on having the same
    now = {id(row.bands): _present(room, members, row, updated) for row in each_row if row}
    rows: list[Any] = list(each_row)
    for number, row in enumerate(each_row):
        if row and (packed := now[id(row.bands)]).bands is not row.bands:
            rows[number] = replace(packed, scalings=room.scalings_of(packed.state, strengths_of(row)))
    return replace(previous, rows=tuple(rows)) if isinstance(previous, PackedRows) else rows[0]


def _present(room: Room, members: Members, previous: Packed, updated: Mapping[Member, Packed]) -> Packed:
    owner = previous.state.owner
    is_dropped = isinstance(owner, Member) and owner not in updated and owner.packed is None
    if owner is None or is_dropped:  # `previous` has its weights
        return previous
    try:
        return weights_of(room, members, owner, updated)
    except HotswapError:  # a share of a mix that can't be had any more, or has no room
        if updated:
            raise
        return previous


def weights_of(room: Room, members: Members, owner: Any, updated: Mapping[Member, Packed] = {}) -> Packed:
    """The weights of a member or a mix."""
    if not isinstance(owner, Mix):
        return updated.get(owner) or members.packed(owner)
    for each in room.assigned if not updated else ():
        if each and each.state.owner == owner:
            return replace(each, scalings=room.scalings_of(each.state))
    return mixed(room, owner, [weights_of(room, members, member, updated) for member, _ in owner.shares])


def is_in(room: Room, packed: Packed) -> bool:
    """Whether a room has just this adapter, at its trained strength."""
    state = room.state
    configs = [_with_sets(each.config) for each in (packed.state, state)]
    if packed.state.settings != state.settings or configs[0] != configs[1]:
        return False
    # the scaling of a layer that is off doesn't matter
    pairs = [(scalings[state.on], packed.scalings[state.on]) for scalings in room.scalings]
    return _are_in(room, packed.bands) and all(torch.equal(one, other.to(one.device)) for one, other in pairs)


def _are_in(room: Room, bands: Sequence[torch.Tensor]) -> bool:
    """Whether a room has these weights, from a look at all of them."""
    pairs = [(band.memory[: len(part)], part) for band, part in zip(room.bands, bands, strict=True)]
    return all(torch.equal(one, other.to(one.device)) for one, other in pairs)


def _with_sets(config: Config) -> dict[str, object]:
    """A config's fields, with lists as sets: PEFT makes sets of some lists of names, also of empty ones."""
    return {name: {*each} if isinstance(each, (list, tuple, set)) else each for name, each in config.to_dict().items()}
