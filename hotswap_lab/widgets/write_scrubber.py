"""WriteScrubber: the write of a swap, one row at a time, with the model's answer after each."""

from __future__ import annotations

from functools import partial

import torch

from .. import demo
from ..core.tensors import SlotTensor
from ..figures import Canvas, Figure, area
from ..figures.palette import INK, MUTED, OFF, adapter_color
from ..swap import hotswap_adapter, prepare_model_for_compiled_hotswap, resolve_slot
from ..threads import bases_of, locked
from .view import FITS, w
from .work import WorkingView

#: where the pictures of rows begin, and how high they are
TOP, HIGH = 74, 192


class WriteScrubber(WorkingView):
    """The first ``lora_A`` and ``lora_B`` of a model while a swap writes them, and what the model answers meanwhile.

    It makes its own model, prepared for all demo adapters, and swaps once to know what is written. Row j of a prepared
    model's memory holds component j of every layer, so each step writes one row, and the last one the scalings.

    Parameters
    ----------
    before, after:
        Names of two demo adapters.
    word:
        The word that the model is asked at each step.

    Examples
    --------
    >>> from hotswap_lab.widgets import WriteScrubber
    >>> view = WriteScrubber()
    >>> view.steps, view.answer
    (33, 'otswaphay')
    >>> view.step = 33
    >>> print(view)
    WriteScrubber: pig_latin to double, step 33 of 33: hotswap → hotswaphotswap
    2 rows copied · 30 zeroed · 0 zero already · 0 to write

    How to read it: between the first and the last step, the model is neither adapter, so no call may come in between.
    """

    title = "Scrub the write: a swap, row by row"
    doing = "writing and asking"

    def __init__(self, before: str = "pig_latin", after: str = "double", word: str = "hotswap"):
        self.names: tuple[str, str] = before, after
        self.word = word
        self.model: torch.nn.Module
        self.model, self._tokenizer = demo.load(before)
        prepare_model_for_compiled_hotswap(self.model, adapters=[*map(demo.adapter_path, demo.adapter_names())])
        self._slot = resolve_slot(self.model, "default")
        start = self._rows()
        hotswap_adapter(self.model, demo.adapter_path(after), "default")
        self._ends = start, self._rows()
        #: the number of steps: the rows, and the scalings
        self.steps: int = max(map(len, start)) + 1
        self.step = 0

    def _rows(self) -> list[torch.Tensor]:
        """For each tensor, a copy of its rank components as rows."""
        return [_by_row(each).clone() for each in self._slot.tensors]

    @property
    def step(self) -> int:
        """How many steps are done. Can be set: that writes to the model's memory, in place."""
        return self._step

    @step.setter
    def step(self, step: int) -> None:
        if not isinstance(step, int) or not 0 <= step <= self.steps:
            raise ValueError(f"a step is 0 to {self.steps}: got {step!r}")
        self._run(partial(self._go, step))

    def _go(self, step: int) -> None:
        with locked(*bases_of(self.model)), torch.no_grad():
            # the swap itself, or back to the start, and from there a part of the write
            hotswap_adapter(self.model, demo.adapter_path(self.names[step == self.steps]), "default")
            for tensor, new in zip(self._slot.tensors, self._ends[1], strict=True):
                _by_row(tensor)[:step] = new[:step]
            self._step, answer = step, demo.ask(self.model, self._tokenizer, self.word)
        #: the model's answer at this step
        self.answer: str = answer
        self.summary: str = f"{' to '.join(self.names)}, step {step} of {self.steps}: {self.word} → {self.answer}"

    # ---- text, picture and controls

    def _lines(self) -> list[str]:
        old, new = (int(rows.any(1).sum()) for rows, *_ in self._ends)
        done, spare = min(self.step, max(old, new)), len(self._ends[0][0]) - max(old, new)
        counts = min(done, new), max(done - new, 0), spare, max(old, new) - done
        return ["{} rows copied · {} zeroed · {} zero already · {} to write".format(*counts)]

    def figure(self) -> Figure:
        """The first lora_A and lora_B at their places in memory: a bar for each row, in the color of its adapter."""
        canvas, (a, b), step = Canvas(420, 336), map(_by_row, self._slot.tensors[:2]), self._step
        word, note = partial(canvas.text, size=12), partial(canvas.text, size=12, anchor="start", color=MUTED)
        high, (old, new) = HIGH / len(a), map(adapter_color, self.names)
        for name, color, x, anchor in zip(self.names, (old, new), (226, 254), ("end", "start"), strict=True):
            word(x, 24, name, size=14, anchor=anchor, color=color, bold=True)
        word(240, 24, "→", size=14)
        for at, (left, title) in enumerate({84: "lora_A", 254: "lora_B, its columns"}.items()):
            word(left, TOP - 24, title, size=13, anchor="start")
            note(left, TOP - 8, f"at lora_A's address + {at * (b.data_ptr() - a.data_ptr())} B")
            rows = [*self._ends[1][at][:step], *self._ends[0][at][step:]]
            for row, used in enumerate(map(torch.any, rows)):
                color = OFF if not used else new if row < step else old
                canvas.shapes.append(f"<rect {area(left, TOP + high * row, 150, high - 1)} fill='{color}'/>")
        y = TOP + high * min(step, len(a)) - 0.5
        note(76, y + 4, f"step {step}", anchor="end")
        canvas.line(80, y, 408, y, INK, width=2)
        word(210, TOP + HIGH + 20, *self._lines())
        word(210, TOP + HIGH + 52, f"{self.word} → {self.answer}", size=18, bold=True)
        return canvas.figure(str(self))

    def _controls(self) -> list:
        self._with_stop()  # of no control: the slider stays enabled
        self._address = w.HTML()
        self._slider = w.IntSlider(max=self.steps, description="step", layout=w.Layout(width="420px", max_width=FITS))
        self._when_set(self._slider, lambda step: self._come(f"step {step}", partial(self._go, step)))
        return [self._slider, self._address]

    def _refresh(self) -> None:
        super()._refresh()
        self._address.value = f"lora_A is at <code>{self._slot.tensors[0].memory.data_ptr():#x}</code>"
        self._slider.value = self._slider.value if self.busy else self.step  # not back while the user moves it


def _by_row(tensor: SlotTensor) -> torch.Tensor:
    """The memory of a tensor, with its rank components as rows."""
    return tensor.memory.detach().movedim(tensor.rank_axis, 0)
