"""The result of a run, text or an image, as text and HTML."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ..figures.png import address
from .view import escape
from .work import Stopped


@dataclass
class Run:
    """One answer to one prompt.

    Parameters
    ----------
    prompt, where, strength:
        The prompt, the adapter (``"off"`` for none), and its strength (None if it has none).
    result:
        The result of ``generate``, or its text so far.
    seconds:
        The time it took.
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
        """The adapter, with its strength if that is not 1.

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
        """A card with the title, the adapter and the answer, as HTML."""
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
        return f'<img alt="{alt}" src="{address(png)}">'

    @property
    def _png(self) -> bytes | None:
        """The result as PNG, if it or the first of a pipeline's images is something that Jupyter shows as one."""
        images = getattr(self.result, "images", self.result)
        first = images[:1] if isinstance(images, list) else []
        image = next((each for each in (self.result, *first) if hasattr(each, "_repr_png_")), None)
        return None if image is None else image._repr_png_()


@contextlib.contextmanager
def answering(runs: Sequence[Run], forget: Callable[[], object]) -> Iterator[None]:
    """A context that sets the state and time of runs at its end, and calls ``forget`` after an error (not a stop)."""
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
