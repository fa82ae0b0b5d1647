"""How far a test goes: README's test command takes the short form of everything, ``pytest -m long`` the long one."""

from __future__ import annotations

import os
from collections.abc import Iterable

import pytest

#: how many times as much those tests do that try to break a promise: ``TIMES=20 pytest -m long tests/robustness``
TIMES = int(os.environ.get("TIMES", "1"))


def long(*values: object) -> object:
    """A value of ``parametrize`` that only the long command tries."""
    return pytest.param(*values, marks=pytest.mark.long)


def few_of(values: Iterable, few: Iterable) -> list:
    """All ``values`` for the long command; of them, only ``few`` for the short one."""
    few = list(few)
    return [value if value in few else long(value) for value in values]
