"""The frame of every exercise: what is asked, a look at what yours does, and a check against the truth."""

from __future__ import annotations

import linecache
import traceback
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Result:
    """One thing that was checked: what it is, what came out, what should have."""

    what: str
    yours: object
    expected: object

    @property
    def right(self) -> bool:
        return bool(self.yours == self.expected)


@dataclass(frozen=True)
class Exercise:
    """An exercise. ``spec`` says what to write; ``run`` does it with the reader's function.

    >>> double = Exercise("Return twice the number.", lambda f: [Result("double of 3", f(3), 6)])
    >>> double.check(lambda number: number + 1)
    Not yet.
      double of 3
        yours:    4
        expected: 6
    >>> double.check(lambda number: 2 * number)
    Correct: double of 3.
    """

    spec: str
    run: Callable[[Callable], list[Result]]

    def show(self, solution: Callable) -> None:
        """Prints what the reader's function does, without judging it."""
        for result in self._results(solution):
            print(f"{result.what}: {result.yours!r}")

    def check(self, solution: Callable) -> None:
        """Says whether it is right; if not, prints yours and expected."""
        results = self._results(solution)
        wrong = [result for result in results if not result.right]
        if not wrong:
            print(f"Correct: {', '.join(result.what for result in results)}.")
            return
        print("Not yet.")
        for result in wrong:
            print(f"  {result.what}\n    yours:    {result.yours}\n    expected: {result.expected}")

    def _results(self, solution: Callable) -> list[Result]:
        try:
            return self.run(solution)
        except Exception as error:
            # the reader's own mistake: the line of it helps more than a traceback through this module
            said = (str(error).splitlines() or [""])[0]
            return [Result("your code runs", f"{type(error).__name__}: {said}{_where(error, solution)}", "no error")]


def _where(error: Exception, solution: Callable) -> str:
    """The line of the reader's function that the error came from, if it came from there."""
    code = getattr(solution, "__code__", None)
    frames = [(frame, number) for frame, number in traceback.walk_tb(error.__traceback__) if frame.f_code is code]
    if not frames:
        return ""
    number = frames[-1][1]
    text = linecache.getline(code.co_filename, number).strip()
    return f" (line {number - code.co_firstlineno + 1} of {code.co_name}{': ' + text if text else ''})"
