"""The results of the benchmark, as text, as JSON and as a picture."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..core.report import readable_bytes
from ..figures import Figure, counts
from .settings import Settings
from .timing import Timing

#: the two ways that the others are compared with
PEFT_STATE_DICT = "PEFT hotswap, state dict"
MEMCPY = "memcpy of the same bytes"


@dataclass(frozen=True)
class Row:
    """The result for one way of swapping adapters of one rank.

    Parameters
    ----------
    rank, way:
        The rank of the adapters, and the name of the way.
    state:
        ``"right"``, ``"wrong"`` (no error, but other outputs than a fresh load) or ``"refused"`` (not timed).
    timing:
        Seconds of one call.
    note:
        The error, if it was refused.
    """

    rank: int
    way: str
    state: str
    timing: Timing | None = None
    note: str = ""

    @property
    def label(self) -> str:
        """The way, and how it did if it did badly."""
        return self.way if self.state == "right" else f"{self.way} ({self.state})"

    def __str__(self) -> str:
        return "refused" if self.timing is None else f"{self.timing}{'' if self.state == 'right' else ' wrong'}"


@dataclass(frozen=True)
class Size:
    """The size of an adapter of one rank: in its file, and packed by a pool."""

    rank: int
    tensors: int
    nbytes: int
    packed_nbytes: int

    def __str__(self) -> str:
        own, packed = map(readable_bytes, (self.nbytes, self.packed_nbytes))
        return f"rank {self.rank}: {self.tensors} tensors, {own} per adapter, {packed} packed"


@dataclass(frozen=True)
class Extra:
    """A further measurement: a line to read, and its numbers (times in seconds)."""

    name: str
    rank: int
    text: str
    values: Mapping[str, object]


@dataclass(frozen=True)
class Start:
    """The result for one way of starting a process.

    Parameters
    ----------
    way:
        The name of the way.
    state:
        ``"right"``, ``"wrong"`` (an answer was not that of a fresh load) or ``"refused"`` (a process failed).
    first, last, importing:
        Seconds from the start of the process to its first answer, to its hundredth, and to the end of its imports.
    recompiles:
        The most recompiles of one process.
    made:
        Seconds that an earlier process took to make the file for this way; None if the way needs no file.
    note:
        The error, if it was refused.
    """

    way: str
    state: str
    first: Timing | None = None
    last: Timing | None = None
    importing: Timing | None = None
    recompiles: int = 0
    made: float | None = None
    note: str = ""

    @property
    def label(self) -> str:
        """The way, and how it did if it did badly."""
        return self.way if self.state == "right" else f"{self.way} ({self.state})"


@dataclass(frozen=True)
class Report:
    """The results of :func:`run`. Prints as a table.

    Parameters
    ----------
    machine:
        Hardware, threads and the most important versions, in one line.
    settings:
        The settings of the run.
    sizes, rows, extras:
        The adapters, the lines of the table, and the further measurements.
    starts:
        The cold starts, if they were measured instead.
    """

    machine: str
    settings: Settings
    sizes: tuple[Size, ...]
    rows: tuple[Row, ...]
    extras: tuple[Extra, ...] = ()
    starts: tuple[Start, ...] = ()

    def __str__(self) -> str:
        if self.starts:
            what = "the embedded model, another of its eight adapters for each answer; times since the process started"
            return "\n".join([self.machine, what, "", *_start_table(self.starts)])
        lines = [self.machine, self._shape()]
        for size in self.sizes:
            lines += ["", str(size), *_table([row for row in self.rows if row.rank == size.rank])]
            extras = [extra.text for extra in self.extras if extra.rank == size.rank]
            lines += ["", *extras] if extras else []
        return "\n".join(lines)

    __repr__ = __str__

    def _shape(self) -> str:
        settings, device = self.settings, self.settings.device
        layers = f", {settings.layers} layers" if settings.layers else ""
        on = f"{device} ({torch.cuda.get_device_name(device)})" if device.startswith("cuda") else device
        room = f"room for rank {settings.target_rank}" if settings.target_rank else "room for the adapters' own rank"
        return f"shape {settings.model}{layers}, {settings.dtype}, {on}, {room}"

    def timing(self, way: str, rank: int) -> Timing | None:
        """The time of one way; None if it was refused or not measured."""
        return next((row.timing for row in self.rows if (row.way, row.rank) == (way, rank)), None)

    @property
    def ok(self) -> bool:
        """Whether all ways except PEFT's gave the outputs of a fresh load."""
        measured = [(row.way, row.state) for row in self.rows]
        measured += [(extra.values["way"], extra.values["state"]) for extra in self.extras if "way" in extra.values]
        measured += [(start.way, start.state) for start in self.starts]
        return all(state == "right" for way, state in measured if not way.startswith("PEFT"))

    def to_json(self) -> str:
        """The report as JSON, with times in seconds."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    def figure(self) -> Figure:
        """The first rank's finished swaps in the time of the first way, counted by medians."""
        size = self.sizes[0]
        medians = {row.label: row.timing.median for row in self.rows if row.rank == size.rank and row.timing}
        return counts(f"Finished swaps, rank {size.rank}", medians, base={MEMCPY}, note=self.machine)


def _table(rows: Sequence[Row]) -> list[str]:
    width = max((len(row.label) for row in rows), default=0)
    medians = {row.way: row.timing.median for row in rows if row.timing}
    theirs, floor = medians.get(PEFT_STATE_DICT), medians.get(MEMCPY)
    lines = [f"{'way':{width}}  median ms      min ms    n  times as fast as PEFT's state dict   x memcpy"]
    for row in rows:
        if row.timing is None:
            lines.append(f"{row.way} refused: {row.note}")
            continue
        as_fast = f"{theirs / row.timing.median:,.2f}" if theirs else ""
        times_memcpy = f"{row.timing.median / floor:,.2f}" if floor else ""
        lines.append(
            f"{row.label:{width}}  {row.timing.median * 1000:9.3f}  {row.timing.minimum * 1000:10.3f}  "
            f"{row.timing.n:3}  {as_fast:>34}  {times_memcpy:>9}".rstrip()
        )
    return lines


def _start_table(starts: Sequence[Start]) -> list[str]:
    width = max(len(start.label) for start in starts)
    lines = [
        f"{'way':{width}}  first answer s   min s  hundredth s   min s  imports s    n  recompiles  file made in s"
    ]
    for start in starts:
        if not (start.first and start.last and start.importing):
            lines.append(f"{start.way} refused: {start.note}")
            continue
        made = "" if start.made is None else f"{start.made:.2f}"
        lines.append(
            f"{start.label:{width}}  {start.first.median:14.2f}  {start.first.minimum:6.2f}  "
            f"{start.last.median:11.2f}  {start.last.minimum:6.2f}  {start.importing.median:9.2f}  "
            f"{start.first.n:3}  {start.recompiles:10}  {made:>14}".rstrip()
        )
    return lines
