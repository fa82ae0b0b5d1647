"""Compares the pictures of cells whose output may differ: their numbers may, their shapes and colors may not."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import inductor_cache
import pytest

# cells compile in other processes, which inherit it
inductor_cache.choose()

SVG, HTML = "image/svg+xml", "text/html"
#: an element with its attributes, those that don't depend on what was measured, and the contents of an image
ELEMENT = re.compile(r"<(\w+)([^<>]*)>")
LOOKS = re.compile(r"""\b(class|fill|stroke|stroke-dasharray|style|src)=(["'])(.*?)\2""")
IMAGE = re.compile(r"(?<=src=\"data:image/)(\w+)[^\"]*")


def structure(outputs: Iterable[Mapping[str, Any]]) -> list[str]:
    """The shapes of each picture and table in a cell's outputs, with their colors. What repeats is noted once.

    >>> bar = "<text x='{}'>{}</text><rect width='{}' fill='#aaa'/>"
    >>> svgs = ("".join(bar.format(*numbers) for numbers in bars) for bars in ([(1, 2, 3)], [(4, 5, 6), (7, 8, 9)]))
    >>> one, other = ([{"data": {SVG: svg}}] for svg in svgs)
    >>> structure(one) == structure(other)
    True
    >>> structure(one)
    ['text rect:fill=#aaa']
    """
    data = [output["data"] for output in outputs if "data" in output]
    return [_shapes(each[mime]) for each in data for mime in (SVG, HTML) if mime in each]


def _shapes(markup: str | list[str]) -> str:
    names = []
    for name, attributes in ELEMENT.findall(IMAGE.sub(r"\1", "".join(markup))):
        looks = (f"{attribute}={value}" for attribute, _, value in LOOKS.findall(attributes))
        names.append(":".join([name, *looks]).replace(" ", "_"))
    text, shorter = "", " ".join(names) + " "
    while text != shorter:
        text, shorter = shorter, re.sub(r"(?<!\S)((?:\S+ ){1,8}?)\1+", r"\1", shorter)
    return text.strip()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Any:
    """Compare what nbval doesn't: the structure of an ignored cell's stored outputs with that of its new ones."""
    result = yield
    if hasattr(item, "cell") and "nbval-ignore-output" in item.cell.metadata.get("tags", []):
        stored, now = structure(item.cell.outputs), structure(item.test_outputs)
        if "any-order" in item.cell.metadata["tags"]:  # drawn as requests happened to arrive
            stored, now = ([sorted({*each.split()}) for each in pictures] for pictures in (stored, now))
        assert stored == now, f"stored: {stored}\nnow:    {now}\npython notebooks/refresh.py stores the new ones"
    return result
