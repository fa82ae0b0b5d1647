"""What was in the model before comes back, after a block that puts something else in for a while."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ..core.change import Change
from ..core.guard import put_back
from ..core.pool import Member, Pool
from ..core.room import Packed, Room, new_part


class ReturningPool(Pool):
    """See :class:`hotswap_lab.AdapterPool`."""

    #: how often the pool has written to the model
    _writes: int = 0

    @contextlib.contextmanager
    def using(self, name: str, strength: float = 1.0) -> Iterator[Pool]:
        """Puts an adapter in for the length of a ``with`` block; then the former one is back, after errors too.

        Swaps from other threads wait for the end of the block.
        """
        with self._for_a_while(f"leaves {name!r} in the model"):
            self.swap(name, strength)
            yield self

    @contextlib.contextmanager
    def _for_a_while(self, what: str) -> Iterator[None]:
        """Puts back what was in the model before the block."""
        with self._turn():
            self._check_room()
            former, writes = self._former(), self._writes
            try:
                yield
            finally:
                # the block is left for good: its adapter must not stay
                if self._writes != writes:
                    put_back(lambda: self._put_back(former, writes), what)

    def _former(self) -> Packed:
        """What is in the model now, to be put back later."""
        member = self._loaded
        former = _taken(self._room, member.packed.parts if member and member.packed else ())
        if member is None:  # it may be one of the pool's, trained since
            former = dataclasses.replace(former, content=dataclasses.replace(former.content, owner=None))
        return former

    def _put_back(self, former: Packed, writes: int) -> None:
        """Takes all writes but the first so many back, by what was in the model then."""
        packed = self._as_now(former)
        with self._writing():
            self._apply(self._change_to(packed), writes)

    def _change_to(self, packed: Packed) -> Change:
        return self._room.change_to(packed)

    def _as_now(self, former: Packed, updated: Mapping[Member, Packed] = {}) -> Packed:
        """An adapter of the pool that was updated since comes back as it is now; one that was removed, as it was."""
        if (owner := former.content.owner) is None:
            return former
        packed = self._of(owner, updated)
        return dataclasses.replace(packed, scalings=self._scaled_as(former, packed))

    def _of(self, owner: Any, updated: Mapping[Member, Packed]) -> Packed:
        """What belongs to whoever a content says it is of."""
        return updated.get(owner) or self._packed(owner)

    def _scaled_as(self, former: Packed, packed: Packed) -> torch.Tensor:
        return self._room.scalings_of(packed.content, strengths_of(former))

    def _change_to_updated(self, member: Member, packed: Packed) -> Change:
        return self._change_to(self._as_now(self._former(), {member: packed}))

    def _apply(self, change: Change, back_to: int | None = None) -> None:
        change.steps.append(lambda journal: journal.set_attribute(self, "_writes", self._writes + 1))
        super()._apply(change)


def strengths_of(packed: Packed) -> torch.Tensor:
    """Of each layer, how many times as strong as trained it is; where it is off, as most of the others."""
    now, trained = packed.scalings[:, 0].cpu().double(), packed.content.scalings
    on = trained != 0
    return torch.where(on, now / trained, (now / trained)[on].median() if on.any() else 1.0)


def _taken(room: Room, parts: tuple[torch.Tensor, ...]) -> Packed:
    """What is in a room now, with the scalings that the layers have now; ``parts`` where somebody has them."""
    with torch.inference_mode(False), torch.no_grad():
        if not parts:
            rows = zip(room.bands, room.rows_for(room.content)[1], strict=True)
            parts = tuple([new_part(band.memory, taken).copy_(band.memory[:taken]) for band, taken in rows])
        return Packed(room.content, parts, room.scalings[0].detach().clone())
