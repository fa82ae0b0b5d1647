"""What comes out, piece by piece: the rows of the table, the sizes above it, the lines below it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .timing import Timing

#: the two ways that the others are compared with
PEFT_STATE_DICT = "PEFT hotswap, state dict"
MEMCPY = "memcpy of the same bytes"


@dataclass(frozen=True)
class Row:
    """One way of swapping adapters of one rank.

    Parameters
    ----------
    rank, way:
        What was timed.
    state:
        ``"right"``, ``"wrong"`` (no error, but other outputs than a fresh load) or ``"refused"`` (not timed).
    timing:
        Seconds of one call.
    as_fast:
        How many times as fast as PEFT's hotswap from a state dict.
    times_memcpy:
        How many times as long as copying the same bytes.
    note:
        The error, if it was refused.
    """

    rank: int
    way: str
    state: str
    timing: Timing | None = None
    as_fast: float | None = None
    times_memcpy: float | None = None
    note: str = ""

    @property
    def cells(self) -> tuple[str, ...]:
        """The row as the table shows it."""
        if self.timing is None:
            return self.way, self.state, "", "", "", ""
        return (
            self.way if self.state == "right" else f"{self.way} ({self.state})",
            f"{self.timing.median * 1000:.3f}",
            f"{self.timing.minimum * 1000:.3f}",
            str(self.timing.n),
            _factor(self.as_fast),
            _factor(self.times_memcpy),
        )


def _factor(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}" if value < 1 else f"{value:.3g}"


@dataclass(frozen=True)
class Size:
    """How large an adapter of one rank is: in its file, and packed by a pool."""

    rank: int
    tensors: int
    nbytes: int
    packed_nbytes: int

    def __str__(self) -> str:
        own, packed = self.nbytes / 1e6, self.packed_nbytes / 1e6
        return f"rank {self.rank}: {self.tensors} tensors, {own:.3g} MB per adapter, {packed:.3g} MB packed"


@dataclass(frozen=True)
class Extra:
    """A further measurement: a line to read, and its numbers (times in seconds)."""

    name: str
    rank: int
    text: str
    values: Mapping[str, object]
