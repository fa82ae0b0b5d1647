"""A measured time, as a person reads it and as numbers."""

from __future__ import annotations

import dataclasses

from .timing import Timing


def readable(seconds: float) -> str:
    """In the unit that fits.

    >>> readable(2.0), readable(0.0123), readable(0.0000456)
    ('2 s', '12.3 ms', '45.6 µs')
    """
    for unit, factor in (("s", 1), ("ms", 1e3), ("µs", 1e6)):
        if seconds * factor >= 0.9995:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def described(timing: Timing) -> str:
    """Median, minimum and how many, as text."""
    return f"{readable(timing.median)} (min {readable(timing.minimum)}, n {timing.n})"


def values_of(timing: Timing | None) -> dict[str, object]:
    """The same in seconds, for :attr:`Extra.values`; nothing, if there was nothing to time."""
    return {} if timing is None else dataclasses.asdict(timing)
