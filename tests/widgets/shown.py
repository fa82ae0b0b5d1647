"""What several tests of widgets need."""

from __future__ import annotations

from hotswap_lab import demo
from hotswap_lab.widgets import SwapPanel, View

WORD = "hotswap"


def folders(*names: str) -> dict[str, str]:
    return {name: demo.adapter_path(name) for name in names}


def panel_with(generate, *names: str, prompt: str = WORD, **options) -> SwapPanel:
    """A panel of a model with ``reverse`` in it."""
    return SwapPanel(demo.load("reverse")[0], generate, adapters=folders(*names), prompt=prompt, **options)


def live(widget: View) -> View:
    """The widget, with its controls as a page shows them."""
    widget._refresh_box()
    return widget


def click(panel: SwapPanel, name: str) -> None:
    live(panel)._radios.value = name
    assert panel.wait(60)
