"""HotswapError, the exception for refused swaps, and access to its texts.

Each reason to refuse a swap has a name in the code. Its text is in the ``refusals.ini`` of that folder.
"""

import configparser
import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from .report import escaped

PARTS = ("found:", "expected:", "next:")
#: the most characters to show of one part of a text; the attributes hold all of it
LONGEST = 600


@dataclass(frozen=True)
class Refusal:
    """A reason to refuse a swap: a one-line summary, the facts found, the facts expected, and the next step."""

    summary: str
    found: str
    expected: str
    next_step: str

    def __str__(self) -> str:
        summary, *rest = map(_readable, (self.summary, self.found, self.expected, self.next_step))
        return "\n".join([summary, *(f"  {part:9} {text}" for part, text in zip(PARTS, rest, strict=True))])


def _readable(text: str) -> str:
    """Shorten a text and escape its unprintable characters."""
    text = str(text)
    if len(text) > LONGEST:
        text = f"{text[: LONGEST * 3 // 4]} [... {len(text) - LONGEST:,} characters ...] {text[-LONGEST // 4 :]}"
    return escaped(text)


class HotswapError(ValueError, RuntimeError):
    """A hotswap was refused or could not be done. The model is exactly as it was before the call.

    PEFT raises ``ValueError`` for some of these cases and ``RuntimeError`` for others. This class is both, so code
    that catches PEFT's errors keeps working. The text starts with PEFT's own wording where PEFT has one.

    Parameters
    ----------
    *refusals:
        All reasons for the refusal, the most important first.

    Examples
    --------
    >>> from hotswap_lab.core.errors import HotswapError, Refusal
    >>> error = HotswapError(Refusal("No swap today.", "rain", "sunshine", "wait"))
    >>> print(error)
    No swap today.
      found:    rain
      expected: sunshine
      next:     wait
    >>> isinstance(error, ValueError) and isinstance(error, RuntimeError)
    True
    """

    #: how many refusals the text shows in full; if there are more, one for each next step
    SHOWN = 3

    def __init__(self, *refusals: Refusal):
        self.refusals = refusals
        lines = list(map(str, refusals))
        if len(refusals) > self.SHOWN:
            by_next_step: dict[str, Refusal] = {}
            for reason in refusals:
                by_next_step.setdefault(reason.next_step, reason)
            lines = [str(reason) for reason in [*by_next_step.values()][: self.SHOWN]]
            lines.append(f"... and {len(refusals) - len(lines)} more, all in the `refusals` of this error")
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[type, tuple[Refusal, ...]]:
        return (type(self), self.refusals)


@functools.cache
def _texts() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, delimiters=("=",))
    parser.read(sorted(Path(__file__).parents[1].glob("*/refusals.ini")), encoding="utf-8")
    return parser


def refusal(which: str, /, **values: object) -> Refusal:
    """The refusal of this name, with these values in its text. An error among the values is shown by its first line.

    >>> print(refusal("merged", adapter_name="default"))
    Cannot hot-swap adapter 'default' because it is currently merged into the base weights.
      found:    base weights that contain the old adapter
      expected: an unmerged adapter: unmerging after a swap would subtract the wrong weights
      next:     call model.unmerge_adapter() (diffusers: unfuse_lora()) first
    """
    text = _texts()[which]
    values = {key: first_line(value) if isinstance(value, BaseException) else value for key, value in values.items()}
    parts = (text[part].replace("\n", " ").format_map(values) for part in ("summary", "found", "expected", "next"))
    return Refusal(*parts)


def first_line(error: BaseException) -> str:
    """The class of an error, and the first line of its message."""
    return escaped(f"{type(error).__name__}: {(str(error).strip() or type(error).__name__).splitlines()[0]}")


def refused(which: str, /, **values: object) -> HotswapError:
    """An error with this single :func:`refusal`, ready to raise."""
    return HotswapError(refusal(which, **values))


def advise(error: HotswapError, texts: Mapping[str, str]) -> HotswapError:
    """Return the same error with other words in its advice: each key of ``texts`` is replaced by its value."""

    def replaced(text: str) -> str:
        return functools.reduce(lambda text, old: text.replace(old, texts[old]), texts, text)

    return HotswapError(*(replace(reason, next_step=replaced(reason.next_step)) for reason in error.refusals))


def listing(names: Iterable[object], limit: int = 5) -> str:
    """The first few of many names, and how many more there are.

    >>> listing(["a", "b", "c"], limit=2), listing(["a", "b"], limit=2)
    ('a, b and 1 more', 'a, b')
    """
    names = list(names)
    shown = ", ".join(map(str, names[:limit]))
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
