"""How far a test goes: README's test command takes the short form of everything, ``pytest -m long`` the long one."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from typing import Any

import pytest

#: ``TIMES=20 pytest -m long tests/robustness`` runs 20 times as many cases of the tests that try to break a promise
TIMES = int(os.environ.get("TIMES", "1"))


def long(*values: object) -> object:
    """A value of ``parametrize`` that only the long command tries."""
    return pytest.param(*values, marks=pytest.mark.long)


def few_of(values: Iterable, few: Iterable) -> list:
    """All ``values`` for the long command; of them, only ``few`` for the short one."""
    few = list(few)
    return [value if value in few else long(value) for value in values]


def eventually(is_so: Callable[[], Any], seconds: float = 120) -> Any:
    """What ``is_so`` gives as soon as that is true; asked once more at the end."""
    deadline = time.monotonic() + seconds
    while not (found := is_so()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return found
