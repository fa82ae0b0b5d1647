"""Which adapters there are, in which version, and what a request's ``model`` means by them."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from safetensors.torch import save

from ..core.errors import HotswapError, listing, refusal, refuse
from ..files.reading import Adapter


class UnknownAdapterError(HotswapError):
    """A request names an adapter that there is not."""


@dataclass(frozen=True)
class Version:
    """One adapter's weights. ``number`` counts those of its name; ``digest`` is of all that is in its files."""

    name: str
    path: str
    digest: str
    number: int = 1

    @classmethod
    def of(cls, name: str, path: str) -> Version:
        """The first version of an adapter, in a folder or on the Hub."""
        if not name or set(name) & set("+:"):
            raise refuse("no_name_for_mixes", name=name)
        return cls(name, path, digest_of(Adapter.load(path)))

    def load(self) -> Adapter:
        """The adapter, if it is still what it was."""
        adapter = Adapter.load(self.path)
        if digest_of(adapter) != self.digest:
            raise refuse("other_weights", version=self, path=self.path)
        return adapter

    @property
    def key(self) -> str:
        """What it is called in a pool, where several versions of one name may be."""
        return f"{self.name}@{self.digest}"

    def __str__(self) -> str:
        return f"{self.name}@{self.number}"


def digest_of(adapter: Adapter) -> str:
    """Another one if anything in the config or the weights is."""
    config = json.dumps(adapter.config.to_dict(), sort_keys=True, default=sorted)
    tensors = save({key: tensor.clone() for key, tensor in adapter.tensors.items()})
    return hashlib.sha256(config.encode() + tensors).hexdigest()


@dataclass(frozen=True)
class Table:
    """The version of each adapter that is in force; ``number`` counts the tables."""

    versions: Mapping[str, Version] = field(default_factory=dict)
    number: int = 0

    def or_later(self, table: Table) -> Table:
        """The later one of both."""
        return max(self, table, key=lambda each: each.number)

    def shares(self, model: str, base: str) -> dict[Version, float]:
        """What a request's ``model`` means: an adapter's name, a mix such as ``pirate:0.7+haiku:0.3``, or the base.

        >>> table = Table({"sort": Version("sort", "folder", "1f")})
        >>> {str(version): weight for version, weight in table.shares("sort:0.5", base="demo").items()}
        {'sort@1': 0.5}
        """
        shares: dict[Version, float] = {}
        for part in [] if model == base else model.split("+"):
            name, weight = re.fullmatch(r"([^:]*):?(\d*\.?\d+)?|.*", part, re.DOTALL).groups()
            if name not in self.versions:
                names = listing([base, *self.versions], limit=50)
                raise UnknownAdapterError(refusal("unknown_adapter", part=part, names=names))
            version = self.versions[name]
            shares[version] = shares.get(version, 0.0) + float(weight or 1)
        return shares


class Register:
    """The table in force, and the only one who changes it."""

    def __init__(self) -> None:
        self.table: Table = Table()
        self._changing = asyncio.Lock()

    async def load(self, versions: Sequence[Version]) -> None:
        """Has all replicas load versions next to what they have; raises if one of them can't. Here, there are none."""

    async def change(self, paths: Mapping[str, str | None], is_all: bool = False) -> Table:
        """Gives adapters new weights, adds some, or removes them (None): all of them or, on any error, none.

        Who asks from then on gets the new ones. An answer that has begun goes on with the version it has.

        Parameters
        ----------
        paths:
            For each name a folder or a Hub id. One whose files are the same as before keeps its version.
        is_all:
            Whether adapters that are not named are removed.
        """
        async with self._changing:
            while True:
                before = self.table
                versions = {} if is_all else dict(before.versions)
                for name, path in paths.items():
                    versions.pop(name, None)
                    if path is not None:
                        version = await asyncio.to_thread(Version.of, name, path)
                        if former := before.versions.get(name):
                            version = replace(version, number=former.number + (version.digest != former.digest))
                        versions[name] = version
                await self.load([each for name, each in versions.items() if each != before.versions.get(name)])
                if self.table is before:  # or it has been told meanwhile what is in force, and changes that
                    self.table = Table(versions, before.number + 1)
                    return self.table

    async def adopt(self, table: Table = Table()) -> Table:
        """The table in force. It is the caller's, if that is a later one: a register may have been started anew."""
        self.table = self.table.or_later(table)
        return self.table

    async def number(self) -> int:
        """Of the table in force: to ask often, where the table itself may be long."""
        return self.table.number
