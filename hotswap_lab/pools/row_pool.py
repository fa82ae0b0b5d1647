"""A pool whose adapters share a batch: another one in each row, or mixed; after a block, what was there comes back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from ..core.change import Change
from ..core.errors import HotswapError, refuse
from ..core.room import Packed, Room, new_part
from ..core.strength import check_strength
from .mixes import Mix, mixed
from .pool import Member, Pool
from .rows import RowRoom

#: a name, no adapter, or how much of which
Wanted = str | Mapping[str, float] | None


@dataclass(frozen=True)
class Row:
    """What one row of a batch has.

    ``adapter`` is a name, the weights of a mix, or None; ``version`` counts the updates of each; ``strength`` is that
    of the row times that of the pool.
    """

    adapter: str | dict[str, float] | None
    version: int | dict[str, int] | None
    strength: float


@dataclass(frozen=True, eq=False)
class PackedRows(Packed):
    """All that was in a room with rows, to be put back later; the fields of :class:`Packed` are those of row 0."""

    rows: tuple[Packed | None, ...]
    copies: int


class RowPool(Pool):
    """See :class:`hotswap_lab.AdapterPool`."""

    def assign(self, adapters: Sequence[Wanted], strengths: Sequence[float] | None = None, *, copies: int = 1) -> None:
        """Gives each row of the next batches its own adapter. Only rows that change are written.

        The first batch of each kind of inputs (their names, dtypes and numbers of axes) whose rows differ is preceded
        by a proof: ``2 + log2(rows)`` forwards, with a random adapter in some of the rows, show that the model keeps
        its rows apart. A layer that does not is refused by its name, by the forward. Where something else than tokens
        feeds a layer with an adapter, as images do, each batch is proven. The proof changes nothing, but hooks of the
        user's own are called by its forwards.

        Parameters
        ----------
        adapters:
            For each row a name; None for the base model; or a mix such as ``{"pirate": 0.7, "haiku": 0.3}``: the sum of
            these adapters, each times its weight, as PEFT computes it with all of them active.
        strengths:
            Of each row; 1 is as trained.
        copies:
            How often a batch has each row. Only a compiled model has to be told: beams and ``num_return_sequences`` of
            transformers, or the two halves of diffusers' classifier-free guidance, are found out otherwise. With
            diffusers' ``num_images_per_prompt``, assign one row for each picture.

        Raises
        ------
        HotswapError
            If the pool was made for fewer rows, there is no such adapter, or a mix needs more rank than there is room.
            Nothing is changed then.

        Examples
        --------
        >>> from hotswap_lab import AdapterPool, demo
        >>> model, tokenizer = demo.load("reverse")
        >>> family = {name: demo.adapter_path(name) for name in ("shout", "sort")}
        >>> pool = AdapterPool(model, adapters=family, rows=3, progress=False)
        >>> pool.assign(["shout", "sort", None])
        >>> demo.ask_all(model, tokenizer, ["hotswap"] * 3)
        ['HOTSWAP!', 'ahopstw', 'hotswap']
        """
        if isinstance(adapters, (str, Mapping)):
            raise TypeError(f"assign() takes a list, an adapter or a mix for each row: got {adapters!r}")
        strengths = [1.0] * len(adapters) if strengths is None else strengths
        room, count = self._room, len(adapters)
        if not isinstance(room, RowRoom) or not 0 < count <= room.rows:
            raise refuse("no_room_for_rows", count=count, rows=getattr(room, "rows", 1), wanted=max(count, 2))
        if not isinstance(copies, int) or copies < 1:
            raise refuse("copies_is_no_number", copies=copies)
        if len(strengths) != count:
            raise refuse("strengths_of_others", strengths=len(strengths), rows=count)
        with self._turn():
            self._all_packed(adapters)  # which may take long
            with self._writing():
                for strength in strengths:
                    check_strength(strength, room.slot)
                packed = self._all_packed(adapters)
                rows = [each and room.at_strength(each, by) for each, by in zip(packed, strengths, strict=True)]
                self._apply(room.change_rows(rows, copies))

    @property
    def rows(self) -> list[Row]:
        """What each row of a batch has, for labels on answers; empty where all have the same."""
        return [self._row(each) for each in self._assigned]

    def _row(self, packed: Packed | None) -> Row:
        owner = packed.content.owner if packed else None
        if packed is None or owner is None:
            return Row(None, None, 0.0)
        strength = round(float(strengths_of(packed).median()) * self.strength, 6)
        if isinstance(owner, Mix):
            return Row(owner.weights, {member.name: member.version for member, _ in owner.shares}, strength)
        return Row(owner.name, owner.version, strength)

    # ---- what is wanted, packed

    def _all_packed(self, adapters: Sequence[Wanted]) -> list[Packed | None]:
        return [None if each is None else self._wanted(each) for each in adapters]

    def _wanted(self, name: str | Mapping[str, float]) -> Packed:
        if not isinstance(name, Mapping):
            return super()._wanted(name)
        if not name:
            raise refuse("mix_of_nothing")
        self._check_room()
        for weight in name.values():
            check_strength(weight, self._room.slot)
        return self._of(Mix(tuple([(self._member(each), float(weight)) for each, weight in name.items()])), {})

    def _of(self, owner: Any, updated: Mapping[Member, Packed]) -> Packed:
        """What belongs to whoever a content says it is of."""
        if not isinstance(owner, Mix):
            return updated.get(owner) or self._packed(owner)
        for each in self._assigned if not updated else ():
            if each and each.content.owner == owner:
                return replace(each, scalings=self._room.scalings_of(each.content))
        return mixed(self._room, owner, [self._of(member, updated) for member, _ in owner.shares])

    # ---- what was there, and what is in use

    @property
    def active(self) -> str | None:
        """The name of the adapter that all rows have; None if there is none, or it is off."""
        return None if self._assigned else super().active

    def _uses(self, member: Member) -> bool:
        rows = self._assigned or (self._room,)
        owners = [each.content.owner for each in rows if each is not None]
        return member in owners or member in [each for mix in owners if isinstance(mix, Mix) for each, _ in mix.shares]

    @property
    def _assigned(self) -> tuple[Packed | None, ...]:
        return self._room.assigned if isinstance(self._room, RowRoom) else ()

    def _former(self) -> Packed:
        """What is in the model now, to be put back later."""
        room, content, member = self._room, self._room.content, self._loaded
        if isinstance(room, RowRoom) and room.assigned:
            scalings = room.scalings[0].detach().clone()
            return PackedRows(replace(content, owner=self), (), scalings, room.assigned, room.batch.copies)
        former = _taken(room, member.packed.parts if member and member.packed else ())
        if member or (isinstance(content.owner, Mix) and not room.is_touched):
            return former
        return replace(former, content=replace(content, owner=None))  # it may be one of the pool's, trained since

    def _change_to(self, packed: Packed) -> Change:
        if isinstance(packed, PackedRows):
            return cast(RowRoom, self._room).change_rows(packed.rows, packed.copies, strengths_of(packed))
        return self._room.change_to(packed)

    def _as_now(self, former: Packed, updated: Mapping[Member, Packed] = {}) -> Packed:
        """An adapter of the pool that was updated since comes back as it is now; one that can't be had, as it was."""
        if isinstance(former, PackedRows):
            return replace(former, rows=tuple([each and self._as_now(each, updated) for each in former.rows]))
        owner = former.content.owner
        is_dropped = isinstance(owner, Member) and owner not in updated and owner.packed is None
        if owner is None or (is_dropped and former.parts):  # dropped since, but not by who holds it
            return former
        try:
            packed = self._of(owner, updated)
        except HotswapError:  # a mix, one of whose shares can't be had any more, or has no room in it
            if updated or not former.parts:
                raise
            return former
        return replace(packed, scalings=self._room.scalings_of(packed.content, strengths_of(former)))

    def _change_to_updated(self, member: Member, packed: Packed) -> Change:
        return self._change_to(self._as_now(self._former(), {member: packed}))


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
