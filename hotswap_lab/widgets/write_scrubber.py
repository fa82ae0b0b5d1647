"""WriteScrubber: the write of a swap, one row at a time, with the model's answer after each."""

from __future__ import annotations

from functools import partial

import torch

from .. import demo
from ..core.tensors import SlotTensor
from ..figures import Canvas, Figure
from ..figures.palette import INK, MUTED, OFF, adapter_color, mix
from ..figures.png import address, png
from ..swap import hotswap_adapter, prepare_model_for_compiled_hotswap, resolve_slot
from ..threads import bases_of, locked
from .view import FITS, w
from .work import WorkingView

#: tints of a color, and cells along each side of the picture of B times A
TINTS, CELLS = 24, 32
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
        self.steps: int = max(len(rows) for rows, _ in start) + 1
        self._answers: dict[int, str] = {}
        for step in (self.steps, 0):
            self.step = step

    def _rows(self) -> list[tuple[torch.Tensor, float]]:
        """For each tensor, a copy of its rank components as rows, and its layer's scaling."""
        owned = [(each, layer.module.scaling) for layer in self._slot.layers for each in layer.tensors]
        return [(_by_row(each).clone(), float(scaling["default"])) for each, scaling in owned]

    @property
    def step(self) -> int:
        """How many steps are done. Can be set: that writes to the model's memory, in place."""
        return self._now[0]

    @step.setter
    def step(self, step: int) -> None:
        if not isinstance(step, int) or not 0 <= step <= self.steps:
            raise ValueError(f"a step is 0 to {self.steps}: got {step!r}")
        self._run(partial(self._go, step))

    def _go(self, step: int) -> None:
        with locked(*bases_of(self.model)), torch.no_grad():
            # the swap itself, or back to the start, and from there a part of the write
            hotswap_adapter(self.model, demo.adapter_path(self.names[step == self.steps]), "default")
            for tensor, (new, _) in zip(self._slot.tensors, self._ends[1], strict=True):
                _by_row(tensor)[:step] = new[:step]
            self._answers[step] = demo.ask(self.model, self._tokenizer, self.word)
            self._now = step, self._rows()
        #: the model's answer at this step
        self.answer: str = self._answers[step]
        self.summary: str = f"{' to '.join(self.names)}, step {step} of {self.steps}: {self.word} → {self.answer}"

    # ---- text, picture and controls

    def _lines(self) -> list[str]:
        old, new = (int(end[0][0].any(1).sum()) for end in self._ends)
        done, spare = min(self.step, max(old, new)), len(self._ends[0][0][0]) - max(old, new)
        counts = min(done, new), max(done - new, 0), spare, max(old, new) - done
        return ["{} rows copied · {} zeroed · {} zero already · {} to write".format(*counts)]

    def figure(self) -> Figure:
        """The rows of A and B with their places in memory, and B times A with the answer: before, now and after."""
        canvas, (step, now), (start, end) = Canvas(420, 464), self._now, self._ends
        word, note = partial(canvas.text, size=12), partial(canvas.text, size=12, anchor="start", color=MUTED)
        (old, new), (a, b) = map(adapter_color, self.names), map(_by_row, self._slot.tensors[:2])
        word(210, 24, f"{self._slot.layers[0].path}, step {step} of {self.steps}", size=14)
        columns = (84, "lora_A", 0), (254, "lora_B, its columns", b.data_ptr() - a.data_ptr())
        for (left, title, offset), (rows, _) in zip(columns, now[:2], strict=True):
            word(left, TOP - 24, title, size=13, anchor="start")
            note(left, TOP - 8, f"at lora_A's address + {offset} B")
            values, high = rows.abs() / rows.abs().max(), HIGH / len(rows)
            _paint(canvas, left, TOP, 150, high, values[:step], new)
            _paint(canvas, left, TOP + high * step, 150, high, values[step:], old)
            canvas.box(left, TOP, 150, HIGH, "none", dashed=True)
        for row in range(0, len(a), 8):
            note(78, TOP + high * row + 11, f"+ {row * a.stride(0) * a.element_size():,} B", anchor="end")
        y = TOP + high * min(step, len(a))
        canvas.line(80, y, 408, y, INK, width=2)
        word(210, TOP + HIGH + 20, *self._lines())
        pooled = partial(torch.nn.functional.adaptive_avg_pool2d, output_size=CELLS)
        products = [pooled((each[1][0].T @ each[0][0] * each[0][1]).abs()[None])[0] for each in (start, now, end)]
        texts = (self.names[0], old, start, 0), ("now", INK, now, step), (self.names[1], new, end, self.steps)
        for at, (name, color, rows, when) in enumerate(texts):
            word(83 + 127 * at, 314, f"{name}: {rows[0][1]:.3g} B A", color=color)
            _paint(canvas, 30 + 127 * at, 322, 106, 106 / CELLS, products[at] / torch.stack(products).max(), color)
            word(83 + 127 * at, 450, self._answers[when], size=13, color=color, bold=name == "now")
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


def _paint(canvas: Canvas, x: float, y: float, width: float, high: float, values: torch.Tensor, color: str) -> None:
    """Draw rows of numbers between 0 and 1 as rows of cells, each ``high`` pixels high."""
    pixels = values.nan_to_num().sqrt().mul(TINTS).ceil().int().tolist()
    if not pixels:
        return
    data = png(pixels, [OFF, *(mix(color, 0.2 + 0.8 * tint / TINTS) for tint in range(TINTS))])
    area = f"x='{x:g}' y='{y:g}' width='{width}' height='{high * len(pixels):g}' preserveAspectRatio='none'"
    canvas.shapes.append(f"<image {area} style='image-rendering:pixelated' href='{address(data)}'/>")
