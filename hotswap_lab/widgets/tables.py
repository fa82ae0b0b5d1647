"""Tables and chips of adapters as HTML with inline styles, which can be read without the styles, too."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..figures.palette import INK, light
from .view import escape

CELL = "padding:4px 6px;font-size:12px;text-align:left;border:1px solid rgba(128,128,128,.4)"


def chip(name: str | None, label: str | None = None) -> str:
    """An adapter or one of its versions on its color, with another ``label`` if there is one. None: the base model.

    >>> light("reverse") in chip("reverse@2"), chip(None).endswith(">base</span>")
    (True, True)
    """
    # dark text on a light color can be read in a light and in a dark theme
    style = f"display:inline-block;margin:1px;padding:0 8px;border-radius:4px;color:{INK};background:{light(name)}"
    return f'<span style="{style}">{escape(label or name or "base")}</span>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are HTML. On a narrow page, it scrolls.

    >>> "<td" in table(["name"], [[chip("reverse")]])
    True
    """
    lines = [("th scope=col", head), *(("td", row) for row in rows)]
    inside = [[f'<{tag} style="{CELL}">{cell}</{tag[:2]}>' for cell in row] for tag, row in lines]
    body = "".join(f"<tr>{''.join(cells)}</tr>" for cells in inside)
    return f'<div class="hotswap-scroll"><table style="border-collapse:collapse">{body}</table></div>'
