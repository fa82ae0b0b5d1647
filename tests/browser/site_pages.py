"""Parts of the site that are alive without a kernel, in Chromium: by themselves, and on the pages that have them.

``SITE`` names the folder of the built site: ``SITE=docs/_build/html pytest tests/browser/test_alive.py``.
"""

from __future__ import annotations

import os
import runpy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from front_ends import ROOT

SITE = Path(os.environ.get("SITE") or ROOT).resolve()
SIZES = {
    "phone": {"width": 390, "height": 844},
    "tablet": {"width": 900, "height": 900},
    "wide": {"width": 1280, "height": 900},
}
HEAD = '<!doctype html><meta charset="utf-8"><meta name="viewport" content="width=device-width"><body>'
#: whether the page, or a part of it, is wider than the window
TOO_WIDE = "() => document.documentElement.scrollWidth > document.documentElement.clientWidth"
#: the color of a text, and of the card behind it
COLORS = """text => [text, text.closest('.part')].map((each, at) => {
    const brush = document.createElement('canvas').getContext('2d')
    brush.fillStyle = getComputedStyle(each)[at ? 'backgroundColor' : 'color']
    brush.fillRect(0, 0, 1, 1)
    const parts = [...brush.getImageData(0, 0, 1, 1).data].slice(0, 3)
    return '#' + parts.map(each => each.toString(16).padStart(2, '0')).join('')
})"""


def pages(*names: str) -> list[str]:
    """The pages to test: the empty name for the part by itself, and those of the site, if it is built."""
    return ["", *(names if SITE != ROOT else [])]


@contextmanager
def opening(browser, folder: Path, part: str, page: str) -> Iterator[Callable]:
    """A function that opens a page and returns it, with the part. No page may have an error."""
    file = SITE / page
    if not page:
        file = folder / f"{part}.html"
        fragment = runpy.run_path(str(ROOT / "docs" / part / "make.py"))["fragment"]()
        file.write_text(HEAD + fragment, encoding="utf-8")
    errors = []

    def opened(size="wide", scheme="light", **options):
        page = browser.new_page(viewport=SIZES[size], color_scheme=scheme, **options)
        page.on("pageerror", lambda error: errors.append(error))
        page.goto(file.as_uri())
        return page, page.locator(f".{part}")

    yield opened
    for context in browser.contexts:
        context.close()
    assert not errors
