"""The one exception of the package."""

from __future__ import annotations

from dataclasses import dataclass

PARTS = ("found:", "expected:", "next:")
#: characters of one part of a text; the attributes have all of it
LONGEST = 600


@dataclass(frozen=True)
class Refusal:
    """Why a swap can't be right: one line that sums it up, then what was found, expected, and to be done next."""

    summary: str
    found: str
    expected: str
    next_step: str

    def __str__(self) -> str:
        summary, *rest = map(_readable, (self.summary, self.found, self.expected, self.next_step))
        return "\n".join([summary, *(f"  {part:9} {text}" for part, text in zip(PARTS, rest, strict=True))])


def _readable(text: str) -> str:
    """Names come from files, and may be of any length and of any characters, such as would upset a terminal."""
    text = str(text)
    if len(text) > LONGEST:
        text = f"{text[: LONGEST * 3 // 4]} [... {len(text) - LONGEST:,} characters ...] {text[-LONGEST // 4 :]}"
    return text if text.isprintable() else "".join(_escaped(each) for each in text)


def _escaped(character: str) -> str:
    return character if character.isprintable() else repr(character)[1:-1]


class HotswapError(ValueError, RuntimeError):
    """A hotswap was refused or could not be done. The model is exactly as it was before the call.

    PEFT raises ``ValueError`` for some of these cases and ``RuntimeError`` for others; this is both, so code
    that catches PEFT's errors goes on working. The text starts with PEFT's own wording where PEFT has one.

    Parameters
    ----------
    *refusals:
        Everything that was found wrong, the most important first.

    Examples
    --------
    >>> from hotswap_lab.errors import HotswapError, Refusal
    >>> error = HotswapError(Refusal("No swap today.", "rain", "sunshine", "wait"))
    >>> print(error)
    No swap today.
      found:    rain
      expected: sunshine
      next:     wait
    >>> isinstance(error, ValueError) and isinstance(error, RuntimeError)
    True
    """

    #: how many refusals the text shows in full
    SHOWN = 3

    def __init__(self, *refusals: Refusal):
        self.refusals = refusals
        lines = [str(refusal) for refusal in refusals[: self.SHOWN]]
        if len(refusals) > self.SHOWN:
            lines.append(f"... and {len(refusals) - self.SHOWN} more, all in the `refusals` of this error")
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple:
        return (type(self), self.refusals)


def refuse(summary: str, found: str, expected: str, next_step: str) -> HotswapError:
    """An error with a single refusal, ready to raise."""
    return HotswapError(Refusal(summary, found, expected, next_step))


def listing(names, limit: int = 5) -> str:
    """The first few of many names, and how many more there are.

    >>> listing(["a", "b", "c"], limit=2)
    'a, b and 1 more'
    """
    names = list(names)
    shown = ", ".join(map(str, names[:limit]))
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
