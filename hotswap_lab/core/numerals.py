"""Numbers as people write them: Python also reads ``1_0`` as 10, the digits of all scripts, and ``nan``."""

import math
import re
from argparse import ArgumentTypeError
from collections.abc import Callable

DECIMAL: re.Pattern[str] = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
#: torch starts all of its threads at once, and Python reads no number of thousands of digits
MOST_THREADS, MOST_TIMES, MOST_RANK = 1024, 10**6, 10**6


def integer(text: str) -> int | None:
    """Read an integer from 0 to 10**18 - 1; return None for any other text.

    >>> integer("10"), integer("1_0"), integer("-1")
    (10, None, None)
    """
    return int(text) if re.fullmatch("[0-9]{1,18}", text) else None


def decimal(text: str) -> float | None:
    """Read a finite number; return None for any other text.

    >>> decimal("-.5"), decimal("1_0"), decimal("1e999")
    (-0.5, None, None)
    """
    number = float(text) if DECIMAL.fullmatch(text) else math.nan
    return number if math.isfinite(number) else None


def integer_from(least: int, most: int) -> Callable[[str], int]:
    """Make the ``type`` of an argument of argparse that is an integer between two bounds."""

    def read(text: str) -> int:
        number = integer(text)
        if number is None or not least <= number <= most:
            raise ArgumentTypeError(f"{text} is not an integer from {least} to {most}")
        return number

    return read
