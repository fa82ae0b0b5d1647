"""What a run gave, and how it looks: text, or an image."""

from __future__ import annotations

import base64
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from .view import escape
from .work import Stopped


@dataclass
class Run:
    """One answer to one prompt.

    Parameters
    ----------
    prompt, where, strength:
        What was asked, with which adapter (``"off"`` for none), at what strength (None where there is no such thing).
    result:
        What ``generate`` returned, or its text so far.
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
        text = str(self.result) if self._png is None else f"an image ({type(self.result).__name__})"
        return text if self.state == "done" else f"{text} ({self.state})"

    def to_html(self, title: str) -> str:
        """A card: whose answer it is, and the answer."""
        return (
            f"<div><strong>{escape(title)}</strong>: {escape(self.label)}</div>{self.shown}"
            f'<div class="hotswap-muted">{escape(self.state)}</div>'
        )

    @property
    def shown(self) -> str:
        """The result alone, as HTML."""
        png = self._png
        if png is None:
            return f'<div class="hotswap-text" style="white-space:pre-wrap">{escape(self.result)}</div>'
        alt = escape(f"the image for “{self.prompt}” with {self.label}")
        return f'<img alt="{alt}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'

    @property
    def _png(self) -> bytes | None:
        """The result, if it is an image: anything that Jupyter shows as one, or the first of a pipeline's output."""
        images = getattr(self.result, "images", self.result)
        image = images[0] if isinstance(images, list) and images else images
        return image._repr_png_() if hasattr(image, "_repr_png_") else None


@contextlib.contextmanager
def answering(runs: Sequence[Run], forget: Callable[[], object]) -> Iterator[None]:
    """A block that answers some runs. If it fails, and was not just stopped, it is as if it had not been tried."""
    start, state = time.perf_counter(), "stopped"

    def end() -> None:
        for run in runs:
            run.state, run.seconds = state, time.perf_counter() - start

    try:
        yield
        state = "done"
    except (Stopped, KeyboardInterrupt):
        raise
    except BaseException:
        forget()
        raise
    finally:
        try:
            end()
        except KeyboardInterrupt:
            end()
            raise
