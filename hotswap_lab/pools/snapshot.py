"""The adapters in a model before a swap, and the change that restores them with their present weights.

Tests: ``tests/pools/test_adapter_pool.py`` and ``tests/pools/test_row_pool.py``.
"""

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
    """The adapter or the mix that the room was last given, if it is one of these members or has one as a share."""
    owner = room.state.owner
    shares = owner.shares if isinstance(owner, Mix) else [(owner, 1.0)]
    is_own = any(isinstance(member, Member) and members.get(member.name) is member for member, _ in shares)
    return owner if is_own else None


def has_weights_of(room: Room, owner: Member | Mix) -> bool:
    """Whether a room has the weights of an owner, and nothing beyond their rank.

    Compares all of them. A member that was dropped from memory has none to compare: then the version counters decide.
    """
    if owner.bands is None:
        return not room.is_touched
    is_padded = all(not band.memory[len(own) :].any() for band, own in zip(room.bands, owner.bands, strict=True))
    return is_padded and _are_in(room, owner.bands)


def is_used(room: Room, member: Member) -> bool:
    """Whether the model computes with a member, in any row."""
    for row in room.assigned or (room,):
        owner = row and row.state.owner
        shares = owner.shares if isinstance(owner, Mix) else [(owner, 1.0)]
        if member in [own for own, _ in shares]:
            return True
    return False


def row_of(packed: Packed | None, strength: float) -> Row:
    """The description of a row, where all rows have this strength besides their own."""
    if packed is None:
        return Row(None, None, 0.0)
    owner = packed.state.owner
    strength = round(float(strengths_of(packed).median()) * strength, 6)
    if isinstance(owner, Mix):
        return Row(owner.weights, {member.name: member.version for member, _ in owner.shares}, strength)
    return Row(owner.name, owner.version, strength)


def take(room: Room, members: Members) -> Packed:
    """Take a snapshot: the present adapters of a room, with their strengths."""
    state, scalings = room.state, room.scalings[0].detach().clone()
    if room.assigned:
        return PackedRows(state, (), scalings, room.assigned, cast(RowRoom, room).batch.copies)
    owner = owner_in(room, members)
    if owner and owner.bands and _are_in(room, owner.bands):
        return Packed(state, owner.bands, scalings)
    # an adapter of the pool may have been trained, or written to, since
    state = replace(state, owner=owner if owner and has_weights_of(room, owner) else None)
    with torch.inference_mode(False), torch.no_grad():
        bands = tuple([new_band(band.memory, len(band.memory)).copy_(band.memory) for band in room.bands])
    return Packed(state, bands, scalings)


def change_to(room: Room, packed: Packed) -> Change:
    """The change that puts adapters in, one or one for each row."""
    if isinstance(packed, PackedRows):
        return cast(RowRoom, room).change_rows(packed.rows, packed.copies, strengths_of(packed))
    return room.change_to_packed(packed)


def with_current_weights(
    room: Room, members: Members, previous: Packed, updated: Mapping[Member, Packed] = {}
) -> Packed:
    """``previous`` with the present weights of its adapters; where these are not available, with the previous ones."""
    rows: list[Any] = list(previous.rows) if isinstance(previous, PackedRows) else [previous]
    # rows that have the same weights go on having the same
    current = {id(row.bands): _current(room, members, row, updated) for row in rows if row}
    for number, row in enumerate(rows):
        if row and (packed := current[id(row.bands)]).bands is not row.bands:
            rows[number] = replace(packed, scalings=room.scalings_of(packed.state, strengths_of(row)))
    return replace(previous, rows=tuple(rows)) if isinstance(previous, PackedRows) else rows[0]


def _current(room: Room, members: Members, previous: Packed, updated: Mapping[Member, Packed]) -> Packed:
    owner = previous.state.owner
    is_unchanged = isinstance(owner, Member) and owner not in updated and owner.is_in_files
    if owner is None or is_unchanged:  # `previous` has its weights, also if it was dropped from memory since
        return previous
    try:
        return weights_of(room, members, owner, updated)
    except HotswapError:  # a share of a mix can't be read any more, or has no room
        if updated:
            raise
        return previous


def weights_of(room: Room, members: Members, owner: Any, updated: Mapping[Member, Packed] = {}) -> Packed:
    """The weights of a member or a mix."""
    if not isinstance(owner, Mix):
        return updated.get(owner) or members.packed(owner)
    for row in room.assigned if not updated else ():
        if row and row.state.owner == owner:
            return replace(row, scalings=room.scalings_of(row.state))
    return mixed(room, owner, [weights_of(room, members, member, updated) for member, _ in owner.shares])


def is_in(room: Room, packed: Packed) -> bool:
    """Whether a room has exactly this adapter, at its trained strength."""
    state = room.state
    is_same_config = _with_sets(packed.state.config) == _with_sets(state.config)
    if packed.state.settings != state.settings or not is_same_config:
        return False
    # the scaling of a layer that is off doesn't matter
    pairs = [(scalings[state.on], packed.scalings[state.on]) for scalings in room.scalings]
    return _are_in(room, packed.bands) and all(torch.equal(one, other.to(one.device)) for one, other in pairs)


def _are_in(room: Room, bands: Sequence[torch.Tensor]) -> bool:
    """Whether a room has these weights. Compares all of them."""
    pairs = [(band.memory[: len(part)], part) for band, part in zip(room.bands, bands, strict=True)]
    return all(torch.equal(one, other.to(one.device)) for one, other in pairs)


def _with_sets(config: Config) -> dict[str, object]:
    """A config's fields, with lists as sets: PEFT makes sets of some lists of names, also of empty ones."""
    return {
        field: {*value} if isinstance(value, (list, tuple, set)) else value for field, value in config.to_dict().items()
    }
