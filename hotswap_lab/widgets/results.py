"""The result of a run (text, an image, or another object that Jupyter shows) as text and HTML.

Tests: ``tests/widgets/test_swap_panel.py``.
"""

from dataclasses import dataclass, field

from ..figures.palette import INK, light
from ..figures.png import address
from .view import escape


@dataclass
class Run:
    """One answer to one prompt.

    Parameters
    ----------
    prompt, where, strength:
        The prompt, the adapter (``"off"`` for none), and its strength (None if it has none).
    result:
        The result of ``generate``, or its text so far.
    done:
        Whether the answer is complete: False while it grows, and after a stop or an error.
    state:
        Other state that the answer depends on. Runs that differ only in their results are equal.
    """

    prompt: str
    where: str
    strength: float | None = 1.0
    result: object = field(default="", compare=False)
    done: bool = field(default=False, compare=False)
    state: object = None

    @property
    def label(self) -> str:
        """The adapter, with its strength if that is not 1.

        >>> Run("hi", "shout", strength=0.5).label
        'shout at strength 0.5'
        """
        at = "" if self.strength in (None, 1) or self.where == "off" else f" at strength {self.strength:g}"
        return f"{'no adapter' if self.where == 'off' else self.where}{at}"

    @property
    def chip(self) -> str:
        """The label on the adapter's color, as HTML."""
        # dark text on a light color can be read in a light and in a dark theme
        color = f"color:{INK};background:{light(None if self.where == 'off' else self.where)}"
        style = f"display:inline-block;margin:1px;padding:0 8px;border-radius:4px;{color}"
        return f'<span style="{style}">{escape(self.label)}</span>'

    @property
    def text(self) -> str:
        """The result as text. An incomplete one ends with an ellipsis.

        >>> Run("hi", "shout", result="HI!").text
        'HI! ...'
        """
        kind = None if isinstance(self.result, str) else type(self.result).__name__
        text = f"an image ({kind})" if self.png else kind if self._html else str(self.result)
        return text if self.done else f"{text} ..."

    @property
    def shown(self) -> str:
        """The result alone, as HTML."""
        if self.png:
            return f'<img alt="{escape(f"the image for “{self.prompt}” with {self.label}")}" src="{address(self.png)}">'
        return self._html or f'<div class="hotswap-text" style="white-space:pre-wrap">{escape(self.result)}</div>'

    @property
    def png(self) -> bytes | None:
        """The result as PNG, if Jupyter shows it, or the first of a pipeline's images, as PNG."""
        images = getattr(self.result, "images", self.result)
        first = images[:1] if isinstance(images, list) else []
        for image in (self.result, *first):
            if hasattr(image, "_repr_png_"):
                return image._repr_png_()
        return None

    @property
    def _html(self) -> str | None:
        return self.result._repr_html_() if hasattr(self.result, "_repr_html_") else None
