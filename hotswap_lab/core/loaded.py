"""Loaded: what is in a model now, and the log of what was done to it."""

import contextlib
import dataclasses
import hashlib
import logging
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from .adapter import BASE, ORIGIN, WHEN
from .change import LOG
from .errors import HotswapError
from .host import Config, kind_of
from .prepared import ranks_before
from .report import escaped, html_table
from .room import Packed, strengths_of
from .slot import Slot, has_been_swapped, slot_for
from .strength import strength_of

#: the origin of an adapter that PEFT loaded
UNKNOWN = "unknown", None, None
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
        The folder or Hub id that it was read from, and the commit on the Hub; ``"a state dict"`` for tensors from
        memory, and ``"unknown"`` for an adapter that PEFT loaded. Training since then doesn't change them.
    when:
        When a swap put it in, or the rows were assigned; None if PEFT loaded it.
    file:
        The path of its weights, and the file's inode, size and time when it was read.
    note:
        That it was made for another base model, if its config says so.
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
    file: tuple[str, int, int, int] | None
    note: str | None

    @property
    def sha256(self) -> str | None:
        """The hash of the adapter's file, which is read now; None if it was changed since, or there is none."""
        path, *stamp = self.file or [""]
        with contextlib.suppress(OSError), open(path, "rb") as file:
            found = os.fstat(file.fileno())
            if stamp == [found.st_ino, found.st_size, found.st_mtime_ns]:
                return hashlib.sha256(file.read()).hexdigest()
        return None

    def as_dict(self) -> dict[str, Any]:
        """All of it, for JSON; with the hash."""
        when = self.when and self.when.isoformat(timespec="seconds")
        now = dataclasses.asdict(self) | {"when": when, "file": self.file and self.file[0], "sha256": self.sha256}
        return now | {"rows": [each.as_dict() for each in self.rows]}

    @property
    def row(self) -> tuple[str, ...]:
        """The columns of a table."""
        ranks = " ".join(map(str, self.ranks)) or "-"
        strength = "-" if self.strength is None else f"{self.strength:g}"
        source = f"{self.source} @ {self.revision[:8]}" if self.revision else self.source
        when = f"{self.when:%Y-%m-%d %H:%M:%S}" if self.when else "-"
        now = " | ".join([_shown(each.mix or each.member) for each in self.rows or [self]])
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
        several = len({each.model for each in self}) > 1
        return "\n".join(f"{each.model}, {each}" if several else str(each) for each in self) or "no adapters"

    def _repr_html_(self) -> str:
        notes = [f"{each.adapter_name}: {each.note}" for each in self if each.note]
        title = " and ".join({each.model: 0 for each in self})
        return html_table(title, HEADER, [each.row for each in self], notes=notes)


def _shown(owner: object) -> str:
    """A pool's name for weights, as text.

    >>> _shown({"shout": 0.7, "sort": 0.3}), _shown(None)
    ('0.7 shout + 0.3 sort', '-')
    """
    weights = [f"{weight:g} {name}" for name, weight in owner.items()] if isinstance(owner, dict) else [owner or "-"]
    return " + ".join(map(str, weights))


def loaded_of(slot: Slot) -> Loaded:
    """The :class:`Loaded` of a slot that was just found."""
    noted = vars(slot.config) if has_been_swapped(slot.host.base, slot.adapter_name) else {}
    room, owner, strength, ranks = slot.room, None, None, ranks_before(slot)
    assigned = room.assigned if room is not None else ()
    origin, when = noted.get(ORIGIN, UNKNOWN), noted.get(WHEN)
    when = when and datetime.fromtimestamp(when).astimezone()
    with contextlib.suppress(HotswapError):  # it is of another method, or has different ones
        strength = strength_of(slot)
    if room is not None and not assigned:
        owner = None if room.is_touched else room.state.owner
        # of a pool's adapter that PEFT loaded, only the pool knows the source
        origin = noted.get(ORIGIN, vars(room.state.config).get(ORIGIN, origin))
    if slot.method.is_lora and not any(ranks):
        strength = 0.0
    kind, state = kind_of(slot.config), state_of(slot)

    def one(name: str, owner: Any, ranks: Iterable, strength: float | None, origin: Any, config: Config) -> Loaded:
        own, (source, revision, file) = tuple(sorted({rank for rank in ranks if rank})), origin
        # a member of a pool has a name, and a mix has weights
        member, mix = getattr(owner, "name", None), getattr(owner, "weights", None)
        note, base = ((config and other_base(slot, config)) or [None])[0], type(slot.host.base).__name__
        return Loaded(base, name, kind, state, own, strength, member, mix, (), source, revision, when, file, note)

    def of_row(name: str, packed: Packed | None) -> Loaded:
        if packed is None:
            return one(name, None, (), 0.0, ("the base model", None, None), None)
        now, own = packed.state, strength and round(strength * float(strengths_of(packed).median()), 6)
        return one(name, now.owner, now.ranks, own, vars(now.config).get(ORIGIN, UNKNOWN), now.config)

    if not assigned:
        return one(slot.adapter_name, owner, ranks, strength, origin, slot.config)
    rows = tuple([of_row(f"{slot.adapter_name}, row {number}", each) for number, each in enumerate(assigned)])
    ranks = [rank for each in rows for rank in each.ranks]
    now = one(slot.adapter_name, None, ranks, strength, ("the rows of a pool", None, None), None)
    note = "; ".join(dict.fromkeys(each.note for each in rows if each.note)) or None
    return dataclasses.replace(now, rows=rows, note=note)


def state_of(slot: Slot) -> str:
    """What a forward does with the adapter, as in :class:`Loaded`."""
    part: Any = slot.layers[0].module if slot.layers else slot.host.carrier
    if getattr(part, "disable_adapters" if slot.layers else "_adapters_disabled", False):
        return "disabled"
    return "merged" if slot.is_merged else "active" if slot.adapter_name in part.active_adapters else "inactive"


def other_base(slot: Slot, config: Config) -> tuple[str, bool] | None:
    """A note that a config names another base model than the live one, and whether both names are ids on the Hub."""
    made_for, name = config.base_model_name_or_path, getattr(slot.host.base, "name_or_path", None)
    if not _is_hub_id(name):
        name = vars(slot.config).get(BASE, slot.config.base_model_name_or_path) or name
    if not (isinstance(made_for, str) and isinstance(name, str) and made_for and name):
        return None
    on_hub = _is_hub_id(made_for) and _is_hub_id(name)
    # a folder may be a copy of any repository
    if made_for == name or (not on_hub and os.path.basename(made_for) == os.path.basename(name)):
        return None
    both = escaped(f"the adapter was made for {made_for}, and the model is {name}")
    return f"{both}; that the shapes fit does not make it right", on_hub


def _is_hub_id(name: object) -> bool:
    return isinstance(name, str) and bool(re.fullmatch(r"\w[\w.-]*/[\w.-]+", name)) and not os.path.isdir(name)


def tell(event: str, slots: Iterable[Slot | None], error: HotswapError | None = None, wanted: object = None) -> None:
    """Log an event in each slot: the attributes of the record are the fields of :class:`Loaded` after it.

    Of a refusal, these are what stays; ``wanted`` is what was to come: a source, or a pool's name.
    """
    level = logging.WARNING if error else logging.INFO
    # without handlers, Python would print a warning
    for slot in slots if LOG.hasHandlers() and LOG.isEnabledFor(level) else ():
        now = None
        with contextlib.suppress(Exception):
            now = slot and loaded_of(slot_for(slot.methods, slot.host, slot.adapter_name))
        fields = {each.name: getattr(now, each.name, None) for each in dataclasses.fields(Loaded)}
        with contextlib.suppress(Exception):  # a handler must not fail a swap that is done, nor hide a refusal
            # one line for each record, so that a log can be read line by line
            sources = [getattr(each, "source", each) for each in (wanted if isinstance(wanted, list) else [wanted])]
            told = None if wanted is None else escaped(", ".join(map(_shown, sources)))
            text = " | ".join(" ".join(line.split()) for line in str(error or now).splitlines())
            text = f"{told}: {text}" if told else text
            LOG.log(level, "%s: %s", event, text, extra=fields | {"event": event, "error": error, "wanted": told})
