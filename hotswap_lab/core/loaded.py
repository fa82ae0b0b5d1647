"""Loaded: a record of each adapter that is in a model now."""

import contextlib
import dataclasses
import hashlib
import itertools
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import torch

from .adapter import BASE, ORIGIN, WHEN
from .errors import HotswapError, Refusal
from .host import Config, kind_of
from .prepared import ranks_before
from .report import escaped, html_table
from .room import Packed, strengths_of
from .slot import Slot, has_been_swapped
from .strength import strength_of
from .tensors import have_same_values

#: the origin of an adapter that PEFT loaded
UNKNOWN = "unknown", None, None
#: ends a note that an adapter was made for another base model, if its shapes fit
FITS = "; that the shapes fit does not make it right"
#: words of a refusal that an adapter of another base model may cause
ABOUT_BASE = re.compile("for the same base model|this base model")
#: the columns of a table
HEADER = ("adapter", "state", "now", "method", "rank", "strength", "source", "since")


@dataclass(frozen=True)
class Loaded:
    """One adapter in a model, as it was when this was made.

    Parameters
    ----------
    model:
        The class of the base model.
    adapter_name:
        The adapter's name in the model, such as ``"default"``.
    method:
        The PEFT type, such as ``"LORA"``.
    state:
        ``"active"``, ``"inactive"``, ``"disabled"`` with all others, or ``"merged"`` into the base weights.
    ranks:
        The ranks of all layers, in all rows, each once; empty for methods without ranks, and for an adapter that is on
        no layer.
    strength:
        1 as trained, 0 off; None for different ones in different layers, and for adapters that have no strength.
    member, mix:
        Of a pool: the adapter's name there; or the weights of a mix by name.
    rows:
        One of these for each row of a batch, with its own ranks, strength and source. Empty if all rows have the same
        adapter.
    source, revision:
        The folder or Hub id that it was read from, and the commit on the Hub: the weights in the model are compared
        with the file, or with the weights that a pool has packed. ``"a state dict"`` for tensors from memory, which
        can't be compared later. ``"unknown"`` for an adapter that PEFT loaded or that was trained after the swap, if
        the file is gone, has other weights now, or the model is spread over processes.
    when:
        When a swap put it in, or the rows were assigned; None if the source is unknown.
    file:
        The path of its weights, the file's inode, size and time when it was read, and the ``key_mapping``.
    note:
        That it was made for another base model, if its config names one; and the source of the last swap, if the
        source of the present weights is unknown.
    """

    model: str
    adapter_name: str
    method: str
    state: str
    ranks: tuple[int, ...]
    strength: float | None
    member: str | None
    mix: dict[str, float] | None
    rows: tuple["Loaded", ...]
    source: str
    revision: str | None
    when: datetime | None
    file: Any
    note: str | None

    @property
    def sha256(self) -> str | None:
        """The hash of the adapter's file, which is read now; None if it has changed after the swap, or is gone."""
        path, *stamp = (self.file or [""])[:4]
        with contextlib.suppress(OSError), open(path, "rb") as file:
            status = os.fstat(file.fileno())
            if stamp == [status.st_ino, status.st_size, status.st_mtime_ns]:
                return hashlib.sha256(file.read()).hexdigest()
        return None

    def as_dict(self) -> dict[str, Any]:
        """Return all fields and the hash, for JSON."""
        when = self.when and self.when.isoformat(timespec="seconds")
        now = dataclasses.asdict(self) | {"when": when, "file": self.file and self.file[0], "sha256": self.sha256}
        return now | {"rows": [row.as_dict() for row in self.rows]}

    @property
    def row(self) -> tuple[str, ...]:
        """The columns of a table."""
        ranks = " ".join(map(str, self.ranks)) or "-"
        strength = "-" if self.strength is None else f"{self.strength:g}"
        source = f"{self.source} @ {self.revision[:8]}" if self.revision else self.source
        when = f"{self.when:%Y-%m-%d %H:%M:%S}" if self.when else "-"
        now = " | ".join([names_of(row.mix or row.member) for row in self.rows or [self]])
        return self.adapter_name, self.state, now, self.method, ranks, strength, source, when

    def __str__(self) -> str:
        if self.rows:
            return "; ".join(map(str, self.rows))
        name, state, now, method, ranks, strength, source, when = self.row
        state, now = "" if state == "active" else f" ({state})", "" if now == "-" else f"{now}, "
        note = f"; note: {self.note}" if self.note else ""
        return f"{name}{state}: {now}{method} of rank {ranks}, strength {strength}, from {source}, since {when}{note}"

    __repr__ = __str__


class LoadedList(list[Loaded]):
    """A :class:`Loaded` for each adapter in a model, which prints as a line each, and as a table in a notebook."""

    def __repr__(self) -> str:
        several = len({adapter.model for adapter in self}) > 1
        lines = [f"{adapter.model}, {adapter}" if several else str(adapter) for adapter in self]
        return "\n".join(lines) or "no adapters"

    def _repr_html_(self) -> str:
        notes = [f"{adapter.adapter_name}: {adapter.note}" for adapter in self if adapter.note]
        title = " and ".join(dict.fromkeys(adapter.model for adapter in self))
        return html_table(title, HEADER, [adapter.row for adapter in self], notes=notes)


def names_of(owner: object) -> str:
    """Return a pool's name for weights, as text.

    >>> names_of({"shout": 0.7, "sort": 0.3}), names_of(None)
    ('0.7 shout + 0.3 sort', '-')
    """
    weights = [f"{weight:g} {name}" for name, weight in owner.items()] if isinstance(owner, dict) else [owner or "-"]
    return " + ".join(map(str, weights))


def loaded_of(slot: Slot, is_new: bool = False) -> Loaded:
    """Return the :class:`Loaded` of a slot that was just found; ``is_new`` if a swap has just written it."""
    noted = vars(slot.config) if has_been_swapped(slot.host.base, slot.adapter_name) else {}
    room, ranks = slot.room, ranks_before(slot)
    owner, strength = None, None
    assigned = room.assigned if room is not None else ()
    origin = noted.get(ORIGIN)
    when = datetime.fromtimestamp(noted[WHEN]).astimezone() if noted.get(WHEN) else None
    with contextlib.suppress(HotswapError):  # an adapter of another method, or layers with different strengths
        strength = strength_of(slot)
    if room is not None and not assigned:
        owner = room.state.owner
        # of a pool's adapter that PEFT loaded, only the pool knows the source
        origin = noted.get(ORIGIN, vars(room.state.config).get(ORIGIN))
    note = ""
    if origin and not assigned and not is_new and not _is_in_model(slot, origin, getattr(owner, "bands", None)):
        note, origin, owner = _note_on_last(origin), UNKNOWN, None
    if slot.method.is_lora and not any(ranks):
        strength = 0.0
    kind, state = kind_of(slot.config), state_of(slot)

    def describe(
        name: str, owner: Any, ranks: Iterable, strength: float | None, origin: Any, config: Config, note: str = ""
    ) -> Loaded:
        source, revision, file = origin or UNKNOWN
        bases = config and other_base(slot, config)
        return Loaded(
            model=type(slot.host.base).__name__,
            adapter_name=name,
            method=kind,
            state=state,
            ranks=tuple(sorted({rank for rank in ranks if rank})),
            strength=strength,
            member=getattr(owner, "name", None),  # a member of a pool has a name, and a mix has weights
            mix=getattr(owner, "weights", None),
            rows=(),
            source=source,
            revision=revision,
            when=None if origin is UNKNOWN else when,
            file=file,
            note="; ".join(filter(None, [bases and f"{bases[0]}{FITS}", note])) or None,
        )

    def describe_row(number: int, packed: Packed | None) -> Loaded:
        name = f"{slot.adapter_name}, row {number}"
        if packed is None:
            return describe(name, None, (), 0.0, ("the base model", None, None), None)
        now, own_strength = packed.state, strength and round(strength * float(strengths_of(packed).median()), 6)
        row_owner, row_origin, row_note = now.owner, vars(now.config).get(ORIGIN), ""
        # the parameters are views of row 0; other code doesn't reach the others
        if number == 0 and not is_new and not _is_in_model(slot, row_origin, packed.bands):
            row_owner, row_origin, row_note = None, UNKNOWN, _note_on_last(row_origin)
        return describe(name, row_owner, now.ranks, own_strength, row_origin, now.config, row_note)

    if not assigned:
        return describe(slot.adapter_name, owner, ranks, strength, origin, slot.config, note)
    rows = tuple(itertools.starmap(describe_row, enumerate(assigned)))
    ranks = [rank for row in rows for rank in row.ranks]
    now = describe(slot.adapter_name, None, ranks, strength, ("the rows of a pool", None, None), None)
    note = "; ".join(dict.fromkeys(row.note for row in rows if row.note)) or None
    return dataclasses.replace(now, rows=rows, note=note)


def _is_in_model(slot: Slot, origin: Any, bands: Sequence[torch.Tensor] | None) -> bool:
    """Whether the weights that a swap put in are those of the model now, as far as there is a copy to compare with."""
    room, file = slot.room, origin and origin[2]
    if bands is not None:
        pairs = [(band.memory, own, len(own)) for band, own in zip(room.bands, bands, strict=True)]
        return all(have_same_values(now[:end], own) and not now[end:].any() for now, own, end in pairs)
    return file.is_in(slot) if file else room is None or not room.is_touched


def _note_on_last(origin: Any) -> str:
    """The note on an adapter whose weights may have been replaced after the last swap."""
    return f"the last swap put in {escaped(origin[0])}; it can't be shown that its weights are in the model now"


def state_of(slot: Slot) -> str:
    """Return the adapter's state in a forward, as in :class:`Loaded`."""
    part: Any = slot.layers[0].module if slot.layers else slot.host.carrier
    if getattr(part, "disable_adapters" if slot.layers else "_adapters_disabled", False):
        return "disabled"
    return "merged" if slot.is_merged else "active" if slot.adapter_name in part.active_adapters else "inactive"


def other_base(slot: Slot, config: Config) -> tuple[str, bool] | None:
    """Return a note that a config names another base model than the live one, and whether both are names on the Hub."""
    made_for, name = config.base_model_name_or_path, getattr(slot.host.base, "name_or_path", None)
    if not _is_hub_id(name):
        name = vars(slot.config).get(BASE, slot.config.base_model_name_or_path) or name
    if not (isinstance(made_for, str) and isinstance(name, str) and made_for and name):
        return None
    on_hub = _is_hub_id(made_for) and _is_hub_id(name)
    # a folder may be a copy of any repository
    if made_for == name or (not on_hub and os.path.basename(made_for) == os.path.basename(name)):
        return None
    return escaped(f"the adapter was made for {made_for}, and the model is {name}"), on_hub


def with_bases(slot: Slot, config: Config, refusals: list[Refusal]) -> list[Refusal]:
    """Add the names of both base models, that of the adapter and the live one, to refusals that advise on the base."""
    if not (bases := slot.once_for(config, other_base)):
        return refusals
    completed = []
    for reason in refusals:
        is_about_base = ABOUT_BASE.search(f"{reason.expected} {reason.next_step}")
        found = f"{reason.found.rstrip('.')}; {bases[0]}"
        completed.append(dataclasses.replace(reason, found=found) if is_about_base else reason)
    return completed


def _is_hub_id(name: object) -> bool:
    return isinstance(name, str) and bool(re.fullmatch(r"\w[\w.-]*/[\w.-]+", name)) and not os.path.isdir(name)
