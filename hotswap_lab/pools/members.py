"""The adapters of a pool: packed in memory, dropped if memory is limited, and read again when they are needed.

Tests: ``tests/pools/test_adapter_pool.py``.
"""

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch

from ..core.adapter import Adapter
from ..core.change import Change, apply
from ..core.errors import listing, refused
from ..core.journal import Journal
from ..core.room import Packed
from ..files.reading import digest_of, read
from .learners import Learned

#: how many adapters a pool prints
SHOWN = 20


@dataclass(eq=False)
class Member:
    """One adapter of a pool."""

    name: str
    #: None while it is only in its files
    packed: Packed | None = None
    version: int = 1
    #: the notes of its plan, for the reader
    notes: Sequence[str] = ()
    #: the path or Hub id to read it from again; None if it came from memory
    source: str | None = None
    #: the hash of what was read, if it may be dropped and read again
    digest: str | None = None
    #: the commit, if it was read from the Hub, where another one may be pushed
    revision: str | None = None
    #: the bytes that it takes when it is packed
    nbytes: int = 0
    #: how the last update was packed, if it came from a learner
    learned: Learned | None = None
    #: counts up with each use; the lowest is dropped first
    used: int = 0

    @property
    def bands(self) -> tuple[torch.Tensor, ...] | None:
        """Its weights; None while it is only in its files."""
        return self.packed and self.packed.bands

    @property
    def is_in_files(self) -> bool:
        """Whether its files have its weights."""
        return self.source is not None and self.version == 1

    @property
    def row(self) -> tuple[str, str, str, str, str]:
        """Name, rank, alpha, layers and bytes."""
        if self.packed is None:
            return self.name, "", "", "", "in its files"
        columns = self.packed.state.columns
        ranks, alphas = columns["rank"], columns["alpha"]
        return self.name, _span(ranks), _span(alphas), str(len(ranks)), f"{self.packed.nbytes:,}"


class Members(dict[str, Member]):
    """The table of a pool's adapters.

    Parameters
    ----------
    hub:
        The arguments for reading adapters from the Hub.
    pack:
        Packs an adapter for a member; its last argument says whether the config must name the adapter's layers.
    max_bytes:
        How much memory all of them may take together; None: no limit.
    """

    def __init__(self, hub: Mapping[str, Any], pack: Callable[[Member, Adapter, bool], Packed], max_bytes: int | None):
        super().__init__()
        self.hub: Mapping[str, Any] = hub
        self.pack: Callable[[Member, Adapter, bool], Packed] = pack
        self.max_bytes: int | None = max_bytes
        #: guards the table. It is taken after a turn at the model: a thread that holds it never waits for a turn
        self.lock: threading.RLock = threading.RLock()
        self._uses = 0

    def __missing__(self, name: str) -> Member:
        near = get_close_matches(str(name), self)
        names = map(repr, [*near, *(other for other in self if other not in near)])
        raise refused("not_in_pool", name=name, found=f"the names {listing(names) or '(none)'}")

    def add(self, name: str, source: object) -> None:
        """Read and pack an adapter; refuse a name that is taken."""
        self._check_free(name)
        member = Member(name)
        packed = self._read(member, source)  # without the lock: this may take long, and swaps must not wait for it

        def put(journal: Journal) -> None:
            drop(unneeded, journal)
            member.packed = packed
            journal.set_item(self, name, member)

        with self.lock:
            self._check_free(name)
            unneeded = self.without_room(member, packed)
            apply([Change(steps=[put])])

    def _check_free(self, name: str) -> None:
        if name in self:
            raise refused("already_in_pool", name=name)

    def _read(self, member: Member, source: object) -> Packed:
        path = os.fspath(source) if isinstance(source, (str, os.PathLike)) else None
        adapter = read(source, **({**self.hub, "revision": member.revision} if member.revision else self.hub))
        digest = None if path is None or self.max_bytes is None else digest_of(adapter)
        if member.digest not in (None, digest):
            raise refused("files_changed", name=member.name, source=source)
        packed = self.pack(member, adapter, not isinstance(source, tuple))
        member.source, member.digest, member.revision = path, digest, adapter.revision
        member.nbytes = packed.nbytes
        return packed

    def packed(self, member: Member) -> Packed:
        """A member's weights, read again if they were dropped."""
        packed = member.packed
        if packed is None:
            packed = self._read(member, member.source)
            with self.lock:
                drop(self.without_room(member, packed), Journal())
                member.packed = packed
        self._uses += 1
        member.used = self._uses
        return packed

    def without_room(self, member: Member, packed: Packed, updated: bool = False) -> list[Member]:
        """The members to drop, so that this one fits; refuses it if it never would. The caller must hold the lock."""
        if self.max_bytes is None:
            return []
        others = [other for other in self.values() if other is not member]
        stays = updated or not member.is_in_files
        fixed = packed.nbytes + sum(other.packed.nbytes for other in others if other.packed and not other.is_in_files)
        droppable = sorted((other for other in others if other.is_in_files), key=lambda other: other.used)
        # each adapter must fit next to those that can't be dropped
        needed = fixed + (max((other.nbytes for other in droppable), default=0) if stays else 0)
        if needed > self.max_bytes:
            raise refused("pool_is_full", name=member.name, needed=needed, max_bytes=self.max_bytes)
        in_memory = [other for other in droppable if other.packed is not None]
        total, dropped = fixed + sum(other.nbytes for other in in_memory), []
        while total > self.max_bytes:
            dropped.append(in_memory.pop(0))
            total -= dropped[-1].nbytes
        return dropped


def drop(members: Sequence[Member], journal: Journal) -> None:
    """Drop the weights of members, which are read again from their files when they are needed."""
    for member in members:
        journal.set_attribute(member, "packed", None)


def check_named(adapters: object) -> None:
    """Refuse adapters without names: a list of folders, or a single one.

    >>> check_named({"style": "folder"})
    """
    if adapters is not None and not isinstance(adapters, Mapping):
        raise refused("adapters_without_names", kind=type(adapters).__name__)


def lines_and_notes(table: list[tuple[str, ...]], members: Members) -> tuple[list[tuple[str, ...]], list[str]]:
    """The lines to print and the notes below them: of many adapters, those in use and the first ones."""
    notes = [f"{member.name}: {note}" for member in list(members.values()) for note in member.notes]
    if (more := len(table) - SHOWN) > 0:
        table = sorted(table, key=lambda line: not line[-1])[:SHOWN]
        notes = [f"and {more} more, see `table`", *notes[:SHOWN]]
    return table, notes


def _span(values: Sequence[float]) -> str:
    if not values:
        return "-"
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
