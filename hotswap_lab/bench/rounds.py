"""Ways that take turns: checked first, then timed a few calls at a time."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from .timing import Timing, measure

#: calls of one way before it is another one's turn
PER_ROUND = 5


def in_rounds(runs: Mapping[str, Callable[[], object]], n: int) -> dict[str, Timing]:
    """Times several functions that take turns, a few calls each, until each was timed ``n`` times.

    An uncounted call of the same function goes ahead of each timed one, so the caches are in the state that the
    function itself leaves them in.

    >>> timings = in_rounds({"short": lambda: sum(range(10)), "long": lambda: sum(range(10000))}, n=7)
    >>> {name: timing.n for name, timing in timings.items()}
    {'short': 7, 'long': 7}
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for start in range(0, n, PER_ROUND):
        for name, run in runs.items():
            for _ in range(min(PER_ROUND, n - start)):
                # one at a time: of more, only their median would be left, and medians can't be merged
                seconds[name].append(measure(run, n=1).median)
    return {name: Timing(statistics.median(each), min(each), n) for name, each in seconds.items()}


@dataclass(frozen=True)
class Way:
    """One way of getting from one adapter to another.

    Parameters
    ----------
    name:
        As the table shows it.
    swap:
        Puts one of the two adapters in, by its number, 0 or 1.
    is_right:
        Whether what is there now is what a fresh load of that adapter gives.
    """

    name: str
    swap: Callable[[int], object]
    is_right: Callable[[int], bool]

    def check(self) -> tuple[str, str]:
        """Swaps to each adapter once. Returns the state, and a note on why it was refused."""
        try:
            states = []
            for number in (1, 0):
                self.swap(number)
                states.append(self.is_right(number))
        except Exception as error:
            # whatever it raises, that is how this way does here; the others are measured all the same
            return "refused", (str(error).strip() or type(error).__name__).splitlines()[0]
        return ("right" if all(states) else "wrong"), ""

    def alternating(self, device: str) -> Callable[[], None]:
        """A function that swaps to the adapter that is not in, and waits until it is there."""
        numbers = itertools.cycle((1, 0))  # the check has left number 0 in
        if torch.device(device).type == "cpu":
            return lambda: self.swap(next(numbers))

        def swap_and_wait() -> None:
            self.swap(next(numbers))
            torch.accelerator.synchronize()

        return swap_and_wait
