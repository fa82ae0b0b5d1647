"""Tables as text, and as static HTML: readable in a saved notebook, in light and dark themes, without a kernel."""

import html
import re
import shutil
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any


def readable_bytes(count: int) -> str:
    """A size in the unit that fits.

    >>> readable_bytes(144), readable_bytes(18_432), readable_bytes(999_999)
    ('144 bytes', '18.4 kB', '1 MB')
    """
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= 0.9995 * size:
            return f"{count / size:.3g} {unit}"
    return f"{count} bytes"


def escaped(text: str) -> str:
    """A text with its unprintable characters escaped, because names from files could upset a terminal.

    >>> escaped("red\\x1b[31m")
    'red\\\\x1b[31m'
    """
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def wrapped(text: object, width: int | None = None) -> str:
    """A report as wide as the terminal, and escaped. A long line goes on below where its own text begins.

    >>> print(wrapped("  next:     load the adapter that targets the most layers", width=40))
      next:     load the adapter that
                targets the most layers
    """
    how: dict[str, Any] = dict(break_long_words=False, break_on_hyphens=False)
    width = width or shutil.get_terminal_size().columns
    starts = [
        (line, len(line) - len(re.sub("^ *([a-z]+: +)?", "", line))) for line in map(escaped, str(text).splitlines())
    ]
    return "\n".join([textwrap.fill(line, width, subsequent_indent=" " * at, **how) for line, at in starts])


def html_table(
    title: str,
    header: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    caption: str = "",
    above: Iterable[str] = (),
    notes: Iterable[str] = (),
) -> str:
    """A titled table, with errors ``above``; everything is escaped, so names and paths can't inject markup.

    >>> "&lt;b&gt;" in html_table("t", ["name"], [["<b>"]])
    True
    """
    cell = "padding:2px 10px;text-align:left;border-bottom:1px solid rgba(128,128,128,.4)"
    head = "".join(f'<th scope="col" style="{cell}">{html.escape(str(name))}</th>' for name in header)
    lines = ["".join(f'<td style="{cell}">{html.escape(str(value))}</td>' for value in row) for row in rows]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    # in the color of the text, which any theme makes readable
    top, foot = (
        "".join(f'<pre style="margin:4px 0;white-space:pre-wrap{style}">{html.escape(note)}</pre>' for note in texts)
        for texts, style in ((above, ";padding-left:8px;border-left:4px solid currentColor"), (notes, ""))
    )
    return (
        f"<div><strong>{html.escape(title)}</strong>: {html.escape(caption)}{top}"
        f'<table style="border-collapse:collapse;margin:4px 0"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table>{foot}</div>"
    )


def text_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table as text, one line for each row, whatever its cells have in them.

    >>> text_table(["name", "rank"], [["reverse", "8"]])
    ['name     rank', 'reverse  8']
    """
    table = [[escaped(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in table]
