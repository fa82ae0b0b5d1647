"""The frame of every exercise: what is asked, a look at what yours does, and a check against the truth."""

from __future__ import annotations

import linecache
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch


class Exercise:
    """An exercise, made from a function that tries out the reader's.

    Parameters
    ----------
    run:
        Called with the reader's function. It yields what it checks: what it is, what came out, and what should have
        come out. The task itself is in the notebook.

    Examples
    --------
    >>> @Exercise
    ... def double(solution):
    ...     yield "double of 1", solution(1), 2
    ...     yield "double of 3", solution(3), 6
    ...     yield "double of 4", solution(4), 8
    >>> double.check(lambda number: number + 1)
    Not yet.
      double of 3
        yours:    4
        expected: 6
      and 1 more that differs
    >>> double.check(lambda number: 2 * number)
    Correct: double of 1, double of 3, double of 4.
    """

    def __init__(self, run: Callable[[Callable[..., Any]], Iterator[tuple[str, object, object]]]):
        self._run = run

    def show(self, solution: Callable[..., Any]) -> None:
        """Prints what the reader's function does, without judging it."""
        for what, yours, _ in self._results(solution):
            print(f"{what}: {yours!r}")

    def check(self, solution: Callable[..., Any]) -> None:
        """Says whether it is right; if not, prints yours and expected of the first that differs, and how many more do.

        One of them is enough to see what is wrong. All of them would be a table of the answers.
        """
        results = self._results(solution)
        wrong = [result for result in results if result[1] != result[2]]
        if not wrong:
            print(f"Correct: {', '.join(what for what, _, _ in results)}.")
            return
        what, yours, expected = wrong[0]
        print(f"Not yet.\n  {what}\n    yours:    {yours}\n    expected: {expected}")
        if more := len(wrong) - 1:
            print(f"  and {more} more that differ{'s' if more == 1 else ''}")

    def _results(self, solution: Callable) -> list[tuple[str, object, object]]:
        try:
            return list(self._run(solution))
        except Exception as error:
            # the reader's own mistake: the line of it helps more than a traceback through this module
            said = (str(error).splitlines() or [""])[0]
            return [("your code runs", f"{type(error).__name__}: {said}{_where(error, solution)}", "no error")]


def compare(shape: str, values: str, yours: object, expected: torch.Tensor) -> Iterator[tuple[str, object, object]]:
    """Check a tensor of the reader's: first its shape, or what it is instead; if that is right, its values.

    >>> list(compare("the shape", "the numbers", 5, torch.zeros(2)))
    [('the shape', 'int', (2,))]
    """
    found = tuple(yours.shape) if isinstance(yours, torch.Tensor) else type(yours).__name__
    yield shape, found, tuple(expected.shape)
    if found == tuple(expected.shape):
        yield values, yours.tolist(), expected.tolist()


def _where(error: Exception, solution: Callable) -> str:
    """The line of the reader's function that the error came from, if it came from there."""
    code = getattr(solution, "__code__", None)
    frames = [(frame, number) for frame, number in traceback.walk_tb(error.__traceback__) if frame.f_code is code]
    if not frames:
        return ""
    number = frames[-1][1]
    text = linecache.getline(code.co_filename, number).strip()
    return f" (line {number - code.co_firstlineno + 1} of {code.co_name}{': ' + text if text else ''})"
