"""Some, not all: from a full case those that match in part, because half of a match is where mistakes hide."""

from __future__ import annotations

from collections.abc import Sequence


def some_of(full: Sequence) -> list[tuple]:
    """All entries, forwards and backwards; all but one; and one alone; each arrangement once."""
    full = tuple(full)
    found = [full, full[::-1]]
    for number, entry in enumerate(full):
        found += [full[:number] + full[number + 1 :], (entry,)]
    return [each for each in dict.fromkeys(found) if each]
