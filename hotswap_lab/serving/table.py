"""The table of adapters and their versions, the register that changes it, and the meaning of a request's ``model``.

Tests: ``tests/serving/test_replica.py`` and ``tests/serving/test_api.py``.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..core.errors import HotswapError, listing, refusal, refused
from ..core.numerals import decimal
from ..files.reading import Adapter, digest_of

#: the most characters of a request's ``model``, adapters in it, and weight of one; characters of an adapter's name
MOST_CHARACTERS, MOST_ADAPTERS, MOST_WEIGHT, LONGEST_NAME = 1000, 8, 100, 200
#: removed adapters whose numbers are remembered: a policy may have a new name at each of its steps
MOST_REMEMBERED = 1000


class UnknownAdapterError(HotswapError):
    """A request names an adapter that is not served, or a mix that can't be read."""


@dataclass(frozen=True)
class Version:
    """One adapter's weights. ``number`` counts those of its name; ``digest`` is a hash of all of its files."""

    name: str
    path: str
    digest: str
    number: int = 1

    @classmethod
    def of(cls, name: str, path: str, base: str = "") -> "Version":
        """Make the first version of an adapter in a folder or on the Hub. It can't have the name of the base model."""
        if name in ("", base) or len(name) > LONGEST_NAME or not name.isprintable() or set(name) & set("+:"):
            raise refused("no_name_for_mixes", name=name)
        return cls(name, path, digest_of(Adapter.load(path)))

    def load(self) -> Adapter:
        """Read the adapter. Refuse files that have changed since the version was made."""
        adapter = Adapter.load(self.path)
        if digest_of(adapter) != self.digest:
            raise refused("other_weights", version=self, path=self.path)
        return adapter

    @property
    def key(self) -> str:
        """The name in a pool, which may hold several versions of one adapter."""
        return f"{self.name}@{self.digest}"

    def __str__(self) -> str:
        return f"{self.name}@{self.number}"


def highest_rank(config: Any) -> int:
    """Return the highest rank of an adapter in any layer; 0 if its method has no rank."""
    return max([getattr(config, "r", 0), *getattr(config, "rank_pattern", {}).values()])


def check_rank(name: str, config: Any, target_rank: int) -> None:
    """Refuse an adapter whose rank is above the rank that the server has reserved."""
    if (rank := highest_rank(config)) > target_rank:
        raise refused("rank_above_target", name=name, rank=rank, target_rank=target_rank)


@dataclass(frozen=True)
class Table:
    """The live version of each adapter; ``number`` counts the tables.

    ``highest`` is the highest number of each name so far, of removed adapters too, so that no number comes twice. The
    names that were removed first are forgotten: ``forgotten`` is the highest number of theirs, and new names begin
    after it.
    """

    versions: Mapping[str, Version] = field(default_factory=dict)
    number: int = 0
    highest: Mapping[str, int] = field(default_factory=dict)
    forgotten: int = 0

    def or_later(self, table: "Table") -> "Table":
        """Return the later one of two tables."""
        return table if table.number > self.number else self

    def shares(self, model: str, base: str) -> dict[Version, float]:
        """Read a request's ``model``: an adapter, a mix such as ``pirate:0.7+haiku:0.3``, or the base.

        >>> table = Table({"sort": Version("sort", "folder", "1f")})
        >>> {str(version): weight for version, weight in table.shares("sort:0.5", base="demo").items()}
        {'sort@1': 0.5}
        """
        shares: dict[Version, float] = {}
        parts = [] if model == base else model.split("+")
        if len(model) > MOST_CHARACTERS or len(parts) > MOST_ADAPTERS:
            raise self.unknown(model, base)
        for part in parts:
            name, _, text = part.partition(":")
            weight = decimal(text or "1")
            if name not in self.versions or weight is None or text.startswith("-"):
                raise self.unknown(part, base)
            version = self.versions[name]
            shares[version] = shares.get(version, 0.0) + weight
            if shares[version] > MOST_WEIGHT:
                raise self.unknown(part, base)
        return shares

    def unknown(self, part: str, base: str) -> UnknownAdapterError:
        """Make the refusal of a name, or of a part of a mix."""
        names = listing([base, *self.versions], limit=50)
        return UnknownAdapterError(refusal("unknown_adapter", part=part, names=names))


class Register:
    """Holds the live table and changes it. ``base`` is the name of the model without an adapter."""

    def __init__(self, base: str = "") -> None:
        self.base: str = base
        self.table: Table = Table()
        self._changing = asyncio.Lock()

    async def load(self, versions: Sequence[Version]) -> None:
        """Load these versions in all replicas; raise if one can't. Override this: here, there are no replicas."""

    async def change(self, paths: Mapping[str, str | None], is_all: bool = False) -> Table:
        """Give adapters new weights, add some, or remove them (None): all of them or, on any error, none.

        Later requests get the new ones. An answer that has begun continues with its version.

        Parameters
        ----------
        paths:
            For each name a folder or a Hub id. One whose files are the same as before keeps its version.
        is_all:
            Whether to remove adapters that are not named.

        Raises
        ------
        UnknownAdapterError
            If an adapter to remove doesn't exist.
        HotswapError
            If a name is not allowed, an adapter can't be read, or a replica can't load it.
        """
        async with self._changing:
            while True:
                before = self.table
                versions = {} if is_all else dict(before.versions)
                highest = dict(before.highest)
                for name, path in paths.items():
                    previous = versions.pop(name, before.versions.get(name))
                    # at the end, because it was changed last
                    highest[name] = max(highest.pop(name, before.forgotten), previous.number if previous else 0)
                    if path is not None:
                        version = await asyncio.to_thread(Version.of, name, path, self.base)
                        if not previous or version.digest != previous.digest:
                            previous = replace(version, number=highest[name] + 1)
                        versions[name] = replace(version, number=previous.number)
                        highest[name] = max(highest[name], previous.number)
                    elif previous is None:
                        raise before.unknown(name, self.base)
                removed = [name for name in highest if name not in versions][:-MOST_REMEMBERED]
                forgotten = max([before.forgotten, *map(highest.pop, removed)])
                await self.load([new for name, new in versions.items() if new != before.versions.get(name)])
                if self.table is before:  # otherwise adopt() has brought a later table, which is changed instead
                    self.table = Table(versions, before.number + 1, highest, forgotten)
                    return self.table

    async def adopt(self, table: Table = Table()) -> Table:
        """Return the live table. It is the caller's if that is later, because this register may have restarted."""
        self.table = self.table.or_later(table)
        return self.table

    async def number(self) -> int:
        """Return the number of the live table, for callers that ask often: the table itself may be long."""
        return self.table.number
