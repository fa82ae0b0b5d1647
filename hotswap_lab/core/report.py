"""Tables as static HTML: readable in a saved notebook, in light and dark themes, with no kernel."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence


def html_table(
    title: str,
    header: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    caption: str = "",
    notes: Iterable[str] = (),
) -> str:
    """A titled table; everything is escaped, so adapter names and paths can't inject markup.

    >>> "&lt;b&gt;" in html_table("t", ["name"], [["<b>"]])
    True
    """
    cell = "padding:2px 10px;text-align:left;border-bottom:1px solid rgba(128,128,128,.4)"
    head = "".join(f'<th scope="col" style="{cell}">{html.escape(str(name))}</th>' for name in header)
    body = "".join(
        "<tr>" + "".join(f'<td style="{cell}">{html.escape(str(value))}</td>' for value in row) + "</tr>"
        for row in rows
    )
    foot = "".join(f'<pre style="margin:4px 0;white-space:pre-wrap">{html.escape(note)}</pre>' for note in notes)
    return (
        f"<div><strong>{html.escape(title)}</strong>: {html.escape(caption)}"
        f'<table style="border-collapse:collapse;margin:4px 0"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table>{foot}</div>"
    )
