"""All that was measured, as text, as JSON and as a picture."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..lessons.figures import Figure
from .picture import bars
from .rows import Extra, Row, Size
from .settings import Settings
from .timing import Timing


@dataclass(frozen=True)
class Report:
    """What :func:`run` measured. Shows itself as text.

    Parameters
    ----------
    machine:
        Hardware, threads and the versions that matter most, in one line.
    versions:
        Of every package that takes part.
    settings:
        What was asked for.
    sizes, rows, extras:
        The adapters, the table, and what was measured beyond it.
    """

    machine: str
    versions: Mapping[str, str]
    settings: Settings
    sizes: tuple[Size, ...]
    rows: tuple[Row, ...]
    extras: tuple[Extra, ...] = ()

    COLUMNS = ("way", "median ms", "min ms", "n", "times as fast as PEFT's state dict", "x memcpy")

    def __str__(self) -> str:
        lines = [self.machine, self._shape()]
        for size in self.sizes:
            rows = [row for row in self.rows if row.rank == size.rank]
            lines += ["", str(size), *_aligned([self.COLUMNS, *(row.cells for row in rows)])]
            lines += [f"{row.way} refused: {row.note}" for row in rows if row.note]
            extras = [extra.text for extra in self.extras if extra.rank == size.rank]
            lines += ["", *extras] if extras else []
        return "\n".join(lines)

    def _shape(self) -> str:
        settings = self.settings
        layers = f", {settings.layers} layers" if settings.layers else ""
        room = f"room for rank {settings.target_rank}" if settings.target_rank else "room for the adapters' own rank"
        return f"shape {settings.model}{layers}, {settings.dtype}, {_device_name(settings.device)}, {room}"

    __repr__ = __str__

    def timing(self, way: str, rank: int) -> Timing | None:
        """The time of one way; None if it was refused, or not tried."""
        return next((row.timing for row in self.rows if (row.way, row.rank) == (way, rank)), None)

    @property
    def ok(self) -> bool:
        """Whether all ways but PEFT's gave the outputs of a fresh load."""
        measured = [(row.way, row.state) for row in self.rows]
        measured += [(extra.values["way"], extra.values["state"]) for extra in self.extras if "way" in extra.values]
        return all(state == "right" for way, state in measured if not way.startswith("PEFT"))

    def to_json(self) -> str:
        """Everything, as JSON; times are in seconds."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The report that :meth:`to_json` wrote.

        >>> from hotswap_lab.bench import MEMCPY
        >>> row = Row(8, MEMCPY, "right", Timing(median=2.0, minimum=1.0, n=3))
        >>> report = Report("a machine", {"torch": "2"}, Settings(), (), (row,))
        >>> Report.from_json(report.to_json()) == report
        True
        """
        found = json.loads(text)
        settings = Settings(**{**found["settings"], "ranks": tuple(found["settings"]["ranks"])})
        rows = [{**row, "timing": row["timing"] and Timing(**row["timing"])} for row in found["rows"]]
        return cls(
            found["machine"],
            found["versions"],
            settings,
            tuple(Size(**size) for size in found["sizes"]),
            tuple(Row(**row) for row in rows),
            tuple(Extra(**extra) for extra in found["extras"]),
        )

    def figure(self) -> Figure:
        """The medians as bars on a logarithmic scale, one panel for each rank."""
        return bars("One swap", self.machine, self.settings, self.sizes, self.rows)


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    lines = []
    for row in table:
        first, *numbers = (
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join([first, *numbers]).rstrip())
    return lines


def _device_name(device: str) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.startswith("cuda") else device
