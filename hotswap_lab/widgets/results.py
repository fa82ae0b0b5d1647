"""What a run gave, and how it looks: text, or an image."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .view import escape, readable


@dataclass
class Run:
    """One answer to one prompt.

    Parameters
    ----------
    prompt, where, strength:
        What was asked, with which adapter (``"off"`` for none), at what strength (None where there is no such thing).
    result:
        What ``generate`` returned, or what there is so far.
    seconds:
        How long it took.
    state:
        ``"running"``, ``"done"`` or ``"stopped"``.
    """

    prompt: str
    where: str
    strength: float | None = 1.0
    result: object = ""
    seconds: float = 0.0
    state: str = "running"

    @property
    def label(self) -> str:
        """The adapter, and its strength where that is not the trained one.

        >>> Run("hi", "shout", strength=0.5).label
        'shout at strength 0.5'
        """
        at = "" if self.strength in (None, 1) or self.where == "off" else f" at strength {self.strength:g}"
        return f"{'no adapter' if self.where == 'off' else self.where}{at}"

    @property
    def text(self) -> str:
        """The result as text.

        >>> Run("hi", "shout", result="HI!", state="stopped").text
        'HI! (stopped)'
        """
        kind = type(self.result).__name__
        text = str(self.result) if _image(self.result) is None else f"an image ({kind})"
        return text if self.state == "done" else f"{text} ({self.state})"

    def to_html(self, title: str, times: bool = True) -> str:
        """A card: whose answer it is, the answer, and how long it took."""
        image = _image(self.result)
        if image is None:
            shown = f'<div class="hotswap-text" style="white-space:pre-wrap">{escape(self.result)}</div>'
        else:
            alt = escape(f"the image for “{self.prompt}” with {self.label}")
            shown = f'<img alt="{alt}" src="data:image/png;base64,{base64.b64encode(image).decode()}">'
        took = f", {readable(self.seconds)}" if times and self.state != "running" else ""
        return (
            f"<div><strong>{escape(title)}</strong>: {escape(self.label)}</div>{shown}"
            f'<div class="hotswap-muted">{escape(self.state)}{took}</div>'
        )


def _image(result: object) -> bytes | None:
    """The result as PNG, if it is an image: PIL's, anything else that Jupyter shows as one, or a pipeline's output."""
    images = getattr(result, "images", None)
    if isinstance(images, list) and images:
        result = images[0]
    if isinstance(result, list) and len(result) == 1:
        result = result[0]
    if hasattr(result, "_repr_png_"):
        return result._repr_png_()
    if hasattr(result, "save") and hasattr(result, "mode"):  # PIL before it could show itself
        buffer = io.BytesIO()
        result.save(buffer, "PNG")
        return buffer.getvalue()
    return None


def steps(generate: Callable[[str], object], prompt: str) -> Iterator[object]:
    """What ``generate`` gives, whether it returns it at once or yields it as it grows.

    >>> list(steps(str.upper, "hi")), list(steps(lambda prompt: (prompt[:n] for n in (1, 2)), "hi"))
    (['HI'], ['h', 'hi'])
    """
    result = generate(prompt)
    if isinstance(result, Iterator):
        yield from result
    else:
        yield result
