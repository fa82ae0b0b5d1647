"""Numbers as people write them: Python also reads ``1_0`` as 10, the digits of all scripts, and ``nan``."""

import math
import re
from argparse import ArgumentTypeError
from collections.abc import Callable

DECIMAL: re.Pattern[str] = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
#: of all integers: more digits than 18 are a mistake, and Python refuses to read thousands
HIGHEST = 10**18 - 1
#: that torch can be told to use: it starts all of them at once
MOST_THREADS = 1024


def integer(text: str) -> int | None:
    """The integer that a text is, from 0 to :data:`HIGHEST`; None if it is anything else.

    >>> integer("10"), integer("1_0"), integer("-1")
    (10, None, None)
    """
    return int(text) if re.fullmatch("[0-9]{1,18}", text) else None


def decimal(text: str) -> float | None:
    """The finite number that a text is; None if it is anything else.

    >>> decimal("-.5"), decimal("1_0"), decimal("1e999")
    (-0.5, None, None)
    """
    number = float(text) if DECIMAL.fullmatch(text) else math.nan
    return number if math.isfinite(number) else None


def integer_from(least: int, most: int = HIGHEST) -> Callable[[str], int]:
    """Make the ``type`` of an argument of argparse that is an integer between two bounds."""

    def read(text: str) -> int:
        number = integer(text)
        if number is None or not least <= number <= most:
            expected = f">= {least}" if most == HIGHEST else f"from {least} to {most}"
            raise ArgumentTypeError(f"{text} is not an integer {expected}")
        return number

    return read
