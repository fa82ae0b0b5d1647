"""What several tests of the chapters need: tokens, logits, and what every picture must be."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import torch

from hotswap_lab.figures import DARK, Figure


def some_ids(count: int) -> torch.Tensor:
    """Tokens of the embedded model; others for each count."""
    return torch.randint(4, 30, (count,), generator=torch.Generator().manual_seed(count))


def logits_of(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """What the model itself gives for the last token."""
    with torch.no_grad():
        return model(input_ids=torch.as_tensor(ids)[None]).logits[0, -1]


def assert_is_svg_with_a_text_form(figure: Figure) -> ElementTree.Element:
    """Returns the picture's root, for what else is to be looked at."""
    shown = figure._repr_mimebundle_()
    assert shown == {"image/svg+xml": shown["image/svg+xml"], "text/plain": figure.text}
    assert shown["image/svg+xml"].replace(DARK, "") == figure.svg != shown["image/svg+xml"]
    assert figure.text == repr(figure)
    return assert_is_svg(figure.svg, figure.text)


def assert_is_svg(svg: str, text: str) -> ElementTree.Element:
    """What every picture must be, those stored in notebooks, too."""
    root = ElementTree.fromstring(svg)
    assert root.attrib["role"] == "img"
    assert root[0].text == text
    size = {"x": float(root.attrib["width"]), "y": float(root.attrib["height"])}
    for each in root.iter():  # all of it is inside
        for axis, length in (("x", "width"), ("y", "height")):
            assert 0 <= float(each.get(axis, 0)) + float(each.get(length, 0)) <= size[axis]
    return root
