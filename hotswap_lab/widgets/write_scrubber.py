"""WriteScrubber: a swap stopped at any step: the memory, the model's answer, and the answer of a request."""

import time
from collections.abc import Callable
from functools import partial
from string import Template
from types import SimpleNamespace

import torch

from .. import demo
from ..core.tensors import SlotTensor
from ..figures import Canvas, Figure, palette
from ..figures.latency import readable
from ..figures.png import address, png
from ..pools.adapter_pool import AdapterPool
from ..swap import resolve_slot
from ..threads import bases_of, locked
from .switch import demo_pool
from .view import FITS, FOLDER, announced, escape, w, wrapping_row
from .work import WorkingView

#: the halves of the picture, next to each other on a wide page, for the sizes of all demo models
PICTURE = Template((FOLDER / "scrubber.svg").read_text("utf-8"))
#: ways to handle a request during a swap: the line that it runs, and a sentence about its result
REQUESTS = {
    "no lock": ("demo.ask(model, tokenizer, {word!r})", "it gets {1}"),
    "demo.load": ("demo.ask(*demo.load({after!r}), {word!r})", "it waits {0}, then gets {1}"),
    "pool.using": ("with pool.using({after!r}): demo.ask(model, tokenizer, {word!r})", "it waits {0}, then gets {1}"),
}
#: the columns of A and of B that are drawn, the pixels of a cell, and the number of its shades
COLUMNS, CELL, SHADES = 24, 6, 9


class WriteScrubber(WorkingView):
    """One layer's memory while a swap writes it, the model's answer at that step, and its answers at all other steps.

    It makes its own model, and asks it after each step. Row j of a prepared model's memory holds component j of
    every layer, so each step writes one row, and the last one the scalings.

    Parameters
    ----------
    before, after:
        Names of two demo adapters.
    word:
        The word that the model is asked at each step. The two adapters must answer differently, or no answer on the way
        would show which of them it is.
    guess_at:
        The step whose answer the reader is asked to guess.

    Examples
    --------
    >>> from hotswap_lab.widgets import WriteScrubber
    >>> view = WriteScrubber()
    >>> view.go(6)
    >>> print(view)
    WriteScrubber: reverse to pig_latin, step 6 of 33: hotswap → hotswap

    How to read it: between the first and the last step, the model is neither adapter, so no call may come in between.
    """

    title = "Stop a swap halfway. Which model is this?"
    doing = "writing and asking"

    def __init__(self, before: str = "reverse", after: str = "pig_latin", word: str = "hotswap", guess_at: int = 6):
        self.names: tuple[str, str] = before, after
        self.word: str = word
        self.guess_at: int = guess_at
        #: the verdict on the reader's guess
        self.guessed: str = ""
        pool, self._tokenizer = demo_pool()
        self.pool: AdapterPool = pool
        self.model: torch.nn.Module = pool.model
        self._slot = resolve_slot(self.model, "default")
        self._ends = [self._rows(name) for name in self.names]
        # the layer where the sum of the ranks is the highest; each layer has two tensors, A and B
        old_ranks, new_ranks = ([int(rows.any(1).sum()) for rows in end[::2]] for end in self._ends)
        ranks = [*zip(old_ranks, new_ranks, strict=True)]
        self._ranks = max(ranks, key=sum)
        self._layer = ranks.index(self._ranks)
        self._lines_run = {way: line.format(after=after, word=word) for way, (line, _) in REQUESTS.items()}
        #: the number of steps: the rows, and the scalings
        self.steps: int = max(map(len, self._ends[0])) + 1
        #: the answer at each step
        self.answers: dict[int, str] = {}
        for step in range(self.steps, -1, -1):
            self._run(partial(self._go, step))
        if self.answers[0] == self.answers[self.steps]:
            raise ValueError(f"{before} and {after} answer {word!r} alike, {self.answers[0]!r}: ask another word")

    def _rows(self, name: str) -> list[torch.Tensor]:
        """For each tensor of an adapter, a copy of its rank components as rows."""
        self.pool.swap(name)
        return [_by_row(tensor).clone() for tensor in self._slot.tensors]

    def go(self, step: int) -> None:
        """Do this many steps of the swap, which writes to the model's memory, in place."""
        if not isinstance(step, int) or not 0 <= step <= self.steps:
            raise ValueError(f"a step is 0 to {self.steps}: got {step!r}")
        self._run(partial(self._go, step))

    def _go(self, step: int) -> None:
        with locked(*bases_of(self.model)), torch.no_grad():
            # the scalings and the config of one of the two, then the rows of both
            self.pool.swap(self.names[step == self.steps])
            for tensor, old, new in zip(self._slot.tensors, *self._ends, strict=True):
                _by_row(tensor).copy_(torch.cat([new[:step], old[step:]]))
            answer = self.answers[step] = demo.ask(self.model, self._tokenizer, self.word)
            self._seen = self._now()
        #: the results of the requests at this step
        self.arrived: dict[str, str] = {}
        self.step: int = step
        self.summary: str = f"{' to '.join(self.names)}, step {step} of {self.steps}: {self.word} → {answer}"

    def _guess(self, word: str) -> None:
        self._go(self.guess_at)
        self.guessed = f"You said {word}. It is {self.answers[self.guess_at]}."

    def _request(self, way: str) -> None:
        start, results = time.perf_counter(), []

        def ask(*arguments: object) -> None:
            results.extend((readable(time.perf_counter() - start), demo.ask(*arguments)))

        names = {"pool": self.pool, "model": self.model, "tokenizer": self._tokenizer}
        names["demo"] = SimpleNamespace(ask=ask, load=demo.load)
        exec(self._lines_run[way], names)  # the line that is shown is the one that is measured
        self._seen = self._now()
        self.arrived = self.arrived | {way: REQUESTS[way][1].format(*results)}

    # ---- picture and controls

    def figure(self) -> Figure:
        """One layer's memory, a cell for a number in its adapter's color, and a cell for each step's answer."""
        canvas = Canvas(660, 318)
        canvas.shapes = [self._picture(with_ribbon=True)]
        return canvas.figure(str(self))

    def _inside(self) -> str:
        look = f"data-note='{escape(self._note)}' style='display:flex;flex-wrap:wrap'"
        return f"<div class='hotswap-picture' {look}>{self._picture(with_ribbon=bool(self.guessed))}</div>"

    def _picture(self, with_ribbon: bool) -> str:
        step, (old, new), (old_rank, new_rank) = self.step, self.names, self._ranks
        answers = [escape(text) for _, text in sorted(self.answers.items())]
        first, middle, last, answer = (answers[at] for at in (0, 17, self.steps, step))
        verdict, more, verdict_color = f"neither {old} ({first})", f"nor {new} ({last})", palette.WRONG
        if owner := {first: old, last: new}.get(answer):
            verdict, more, verdict_color = f"what {owner} answers", "", palette.RIGHT
        colors = {first: palette.adapter_color(old), last: palette.adapter_color(new)}
        fills = [colors.get(text, palette.MUTED) for text in answers]
        cells = "".join(f"<rect x='{at}' width='.9' height='28' fill='{fill}'/>" for at, fill in enumerate(fills))
        texts = dict(old=old, new=new, first=first, middle=middle, last=last, answer=answer, word=escape(self.word))
        is_base = f"{escape(self.word)}: what the base answers without an adapter"
        texts |= dict(old_rank=old_rank, new_rank=new_rank, is_base=is_base if self.word in answers else "")
        texts |= dict(verdict=f"step {step} of {self.steps}: {verdict}", more=more, neither=fills.count(palette.MUTED))
        texts |= dict(layer=self._slot.layers[self._layer].path.removeprefix("model.layers."))
        looks = dict(cells=cells, verdict_color=verdict_color, old_color=colors[first], new_color=colors[last])
        looks |= dict(memory=address(self._memory()), edge=60 + CELL * min(step, self.steps - 1), step=step)
        looks |= dict(size=480 // max(16, len(answer)), ribbon="visible" if with_ribbon else "hidden")
        looks |= dict(question="hidden" if with_ribbon else "visible")
        return PICTURE.substitute(vars(palette), **texts, **looks)

    def _memory(self) -> bytes:
        """The first columns of A and B as a PNG: a row of cells for each component, or of dots where it is zero."""
        shades = [(number + 1) / SHADES for number in range(SHADES)]
        adapters = [palette.mix(palette.adapter_color(name), s, palette.WHITE) for name in self.names for s in shades]
        sides = []
        for number in (2 * self._layer, 2 * self._layer + 1):
            old, new = (end[number].abs() for end in self._ends)
            is_new = torch.arange(len(old), device="cpu")[:, None] < self.step
            full = torch.where(is_new, _typical_maximum(new), _typical_maximum(old))
            values = torch.where(is_new, new, old)[:, :COLUMNS]
            shade = (values / full * SHADES).clamp(max=SHADES - 1).int() + SHADES * is_new
            sides.append(torch.where(values.any(1, keepdim=True), shade + 2, 1))
        cells = torch.cat([sides[0], torch.zeros_like(sides[0][:, :2]), sides[1]], 1)
        pixels = cells.repeat_interleave(CELL, 0).repeat_interleave(CELL, 1)
        pixels[CELL - 1 :: CELL] = 0  # the lines between cells
        pixels[:, CELL - 1 :: CELL] = 0
        centers = torch.zeros_like(pixels)
        centers[CELL // 2 - 1 :: CELL, CELL // 2 - 1 :: CELL] = 1
        pixels[pixels == 1] = centers[pixels == 1]
        return png(pixels.tolist(), [palette.CARD, palette.MUTED, *adapters])

    def _controls(self) -> list:
        self._with_stop()  # of no control: the slider stays enabled
        self._said = announced()
        self._slider = w.IntSlider(max=self.steps, description="step", layout=w.Layout(width="660px", max_width=FITS))
        self._when_set(self._slider, lambda step: self._enqueue(f"step {step}", partial(self._go, step)))
        words = self.answers[0], self.answers[self.steps], "another"
        guesses = [self._starter(word, f"guess: {word}", self._guess) for word in words]
        self._results = {way: announced(layout=w.Layout(flex="1 1 200px", margin="2px 8px")) for way in REQUESTS}
        starters = [self._starter(way, self._lines_run[way], self._request) for way in REQUESTS]
        requests = map(wrapping_row, starters, self._results.values())
        arrive = w.HTML(f"<strong>Let a request for {self.names[1]} arrive now</strong>")
        question = w.HTML(f"Guess first: which word at step {self.guess_at}?")
        return [w.VBox([wrapping_row(question, *guesses), self._said]), self._slider, arrive, *requests]

    def _starter(self, label: str, tooltip: str, job: Callable[[str], None]) -> w.Button:
        act = partial(self._enqueue, label, partial(job, label))
        return self._button(label, tooltip, act, layout=w.Layout(min_width="104px"))

    def _build(self) -> list:
        title, guess, *others, body, problem = super()._build()
        return [title, guess, body, *others, problem]

    def _refresh(self) -> None:
        super()._refresh()
        self._said.value = f"&nbsp;{escape(self.guessed)}"  # so that its line is there before it, and nothing moves
        self._slider.value = self._slider.value if self.busy else self.step  # not back while the user moves it
        for way, text in self._results.items():
            text.value = f"<code>{escape(self._lines_run[way])}</code><br>&nbsp;{escape(self.arrived.get(way, ''))}"


def _typical_maximum(rows: torch.Tensor) -> torch.Tensor:
    """The 95th percentile of the rows that aren't zero; 1 if all are."""
    used = rows[rows.any(1)]
    return used.quantile(0.95) if len(used) else rows.new_ones(())


def _by_row(tensor: SlotTensor) -> torch.Tensor:
    """The memory of a tensor, with its rank components as rows."""
    return tensor.memory.detach().movedim(tensor.rank_axis, 0)
