"""README's picture and times, and chapter 05's: one model, one measurement.

python notebooks/pictures/first.py          # measures, in minutes on an idle machine; then writes all of these
python notebooks/pictures/first.py --drawn  # writes them from the last measurement: first.json

Where other programs took the cores for too long, it writes nothing and exits with 1.

SmolLM2-135M with three of its voices. Each way of swapping has a model of its own, whose base weights they all share,
and the ways take turns. In its turn, each voice is swapped in, and the model then reads a question, as in use: when a
swap begins, the processor's cache holds what the model has left there. Times are of the swap, and of the first token,
which is compared with that of a fresh load. Needs Chromium, for the PNG.
"""

from __future__ import annotations

import gc
import itertools
import json
import re
import runpy
import sys
import textwrap
import time
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import nbformat
import torch

from hotswap_lab import (
    AdapterPool,
    RecompileWatch,
    hotswap_adapter,
    lessons,
    pick_backend,
    prepare_model_for_compiled_hotswap,
)
from hotswap_lab.bench import MEMCPY, PEFT, Scene, Settings, Timing, machine, waited_for_a_core, ways_of
from hotswap_lab.demo import smollm2, voices
from hotswap_lab.figures import Canvas, Figure, area
from hotswap_lab.figures.palette import BASE, DARK, MUTED, OURS, WHITE, adapter_color
from hotswap_lab.figures.palette import PEFT as PEFTS
from hotswap_lab.lessons.real_llm import Chat

FOLDER = Path(__file__).parent
README, CHAPTER = FOLDER.parents[1] / "README.md", FOLDER.parent / "05_real_llm.ipynb"
#: what chapter 05 prints
TEXT = Path(lessons.__file__).parent / "swaps_of_voices.txt"
VOICES, QUESTION = ("json", "haiku", "pirate"), "What is Paris?"
#: turns of each way that are timed; one before is not, in which what is compiled compiles
ROUNDS = 10
#: the largest share of the time that threads may have waited for a core; above it, nothing is written
MOST_WAITED = 0.02
#: as in the chapters; with two, threads wait for each other wherever another program has one of two cores
THREADS = 1
#: how the name of a way ends whose model is not compiled, if there is one with a compiled model
EAGER = ", eager"
#: of chapter 05: the room that all layers get, so that they share one graph
RANK = 16

# --- measuring -------------------------------------------------------------------------------------------------------


class Timed:
    """One way of swapping, with a model that reads the question after each swap.

    Parameters
    ----------
    swap:
        A function that puts in the voice of a number.
    chat:
        The model. None: the model of another way reads.
    """

    def __init__(self, swap: Any, chat: Chat):
        self.swap, self.chat = swap, chat
        self.swaps: list[float] = []
        self.firsts: list[float] = []

    def turn(self, expected: list[torch.Tensor] | None) -> None:
        """Swap in each voice and read the question. ``expected``: logits of fresh loads, if they are compared."""
        for number in range(len(VOICES)):
            gc.collect()
            gc.disable()  # as timeit does
            began = time.perf_counter()
            self.swap(number)
            swapped = time.perf_counter()
            self.chat.forget()
            logits = self.chat.read(self.chat.ids(QUESTION))
            token = int(logits.argmax())
            ended = time.perf_counter()
            gc.enable()
            self.swaps.append(swapped - began)
            self.firsts.append(ended - swapped)
            if expected:
                torch.testing.assert_close(logits, expected[number], rtol=0, atol=1e-2)
                assert token == int(expected[number].argmax())


def replaced_by_peft(model: Any, folders: Sequence[str], number: int) -> None:
    """Swap from disk by PEFT."""
    PEFT.hotswap_adapter(model, folders[number], "default", "cpu")


def replaced(model: Any, folders: Sequence[str], number: int) -> None:
    """Swap from disk by this package."""
    hotswap_adapter(model, folders[number], "default")


def taken(pool: AdapterPool, number: int) -> None:
    """Swap from memory."""
    pool.swap(VOICES[number])


def ways(scene: Scene, tokenizer: Any) -> dict[str, Timed]:
    """All that is timed. The first two ways would compile again at each swap, so their models are not compiled.

    A model that is not compiled is prepared only where PEFT needs that to swap another rank.
    """

    def chat_of(model: torch.nn.Module, backend: str = "") -> Chat:
        chat = Chat(model, tokenizer, chunk=48, room=384)
        if backend:
            chat.compile(backend)
        return chat

    made, backend = ways_of(scene), pick_backend()
    found = {}
    for name in ("PEFT load + set + delete", "PEFT set_adapter, 8 in memory"):
        way = made[name]()
        found[name] = Timed(way.swap, chat_of(way.model))

    family = dict(zip(VOICES, scene.folders, strict=True))
    for eager, way_backend in ((EAGER, ""), ("", backend)):
        theirs, ours = scene.load(), scene.load()
        PEFT.prepare_model_for_compiled_hotswap(theirs, target_rank=RANK)
        if way_backend:
            prepare_model_for_compiled_hotswap(ours, target_rank=RANK)
        pool = AdapterPool(scene.load(), adapters=family, target_rank=RANK if way_backend else None, progress=False)
        for name, model, swap in (
            ("PEFT hotswap, disk", theirs, partial(replaced_by_peft, theirs, scene.folders)),
            ("hotswap_lab, disk", ours, partial(replaced, ours, scene.folders)),
            ("hotswap_lab, pool", pool.model, partial(taken, pool)),
        ):
            found[name + eager] = Timed(swap, chat_of(model, way_backend))
    copy = scene.copying(pool.nbytes // len(VOICES))
    found[MEMCPY] = Timed(copy.swap, found["hotswap_lab, pool"].chat)
    return found


@torch.no_grad()
def measure(turns: int = ROUNDS) -> dict[str, Any]:
    """All times, answers and sizes."""
    settings = Settings(n=turns * len(VOICES), threads=THREADS)
    torch.set_num_threads(settings.threads)
    base, tokenizer = smollm2.load_base(), smollm2.load_tokenizer()
    scene = Scene(base, settings, [voices.path(name) for name in VOICES])
    fresh = [scene.load(number) for number in range(len(VOICES))]
    ids = Chat(base, tokenizer).ids(QUESTION)
    expected = [model(ids[None]).logits[0, -1] for model in fresh]
    for one, other in itertools.combinations(expected, 2):
        assert (one - other).abs().max() > 1, "a wrong voice would not be seen"
    answers = [voices.ask(model, tokenizer, QUESTION) for model in fresh]

    timed = ways(scene, tokenizer)
    for way in timed.values():
        way.turn(None)
        way.swaps.clear(), way.firsts.clear()
    began, waited = time.perf_counter(), waited_for_a_core()
    with RecompileWatch() as watch:
        for turn in range(turns):
            print(f"turn {turn + 1} of {turns}", file=sys.stderr, flush=True)
            for name, way in timed.items():
                way.turn(None if name == MEMCPY else expected)
    share = (waited_for_a_core() - waited) / (time.perf_counter() - began)
    chat = timed["hotswap_lab, pool"]
    for number, answer in enumerate(answers):
        chat.swap(number)
        assert chat.chat.ask(QUESTION, max_new_tokens=voices.MAX_NEW_TOKENS) == answer, VOICES[number]
    sizes = [sum(each.numel() for each in adapter.tensors.values()) for adapter in scene.adapters]
    return {
        "machine": machine(),
        "settings": {"question": QUESTION, "tokens": len(ids), "turns": turns, "threads": settings.threads},
        "base": sum(each.numel() for each in base.parameters()),
        "voices": [dict(name=n, numbers=s, answer=a) for n, s, a in zip(VOICES, sizes, answers, strict=True)],
        "recompiles": watch.compiles + watch.recompiles,
        "ways": {
            name: {"swap": Timing.of(way.swaps)._asdict(), "first_token": Timing.of(way.firsts)._asdict()}
            for name, way in timed.items()
        },
        "waited": share,
    }


# --- the picture -----------------------------------------------------------------------------------------------------

#: the files: the width, and whether it is dark
FORMS = {"first": (830, False), "first-dark": (830, True), "first-phone": (390, False), "first-phone-dark": (390, True)}
#: the kinds of models, and for each way its name in a measurement with one of each; None if it would compile again
KINDS = ("not compiled", "compiled")
DRAWN = {
    "PEFT: load, set, delete": ("PEFT load + set + delete", None),
    "PEFT set_adapter, 8 in memory": ("PEFT set_adapter, 8 in memory", None),
    "PEFT hotswap, from disk": (f"PEFT hotswap, disk{EAGER}", "PEFT hotswap, disk"),
    "hotswap_lab, from disk": (f"hotswap_lab, disk{EAGER}", "hotswap_lab, disk"),
    "hotswap_lab, in memory": (f"hotswap_lab, pool{EAGER}", "hotswap_lab, pool"),
}
#: below this width, one square is below the other, and labels are above their bars
NARROW = 600


def readable(seconds: float) -> str:
    """In milliseconds.

    >>> readable(0.2264), readable(0.0123), readable(0.00138)
    ('226 ms', '12 ms', '1.4 ms')
    """
    ms = 1000 * seconds
    return f"{ms:.0f} ms" if ms >= 9.95 else f"{ms:.1f} ms"


def times_of(measured: Mapping[str, Any], kind: str) -> dict[str, tuple[float, float]]:
    """The medians of a swap and of the first token after it, for each way that was measured with this kind of model."""
    ways = {label: names[KINDS.index(kind)] for label, names in DRAWN.items()}
    rows = {label: measured["ways"][way] for label, way in ways.items() if way in measured["ways"]}
    return {label: (row["swap"]["median"], row["first_token"]["median"]) for label, row in rows.items()}


def summed(swap: float, token: float) -> str:
    """Both times, rounded, and the sum of these.

    >>> summed(0.0251, 0.156), summed(0.0803, 0.2687)
    ('25 + 156 = 181 ms', '80 + 269 = 349 ms')
    """
    one, other = number_of(swap), number_of(token)
    return f"{one} + {other} = {readable((float(one) + float(other)) / 1000)}"


def number_of(seconds: float) -> str:
    """Milliseconds, without the unit."""
    return readable(seconds).removesuffix(" ms")


def share_of(measured: Mapping[str, Any]) -> str:
    """How much of the base model an adapter has, in percent: "1 to 2"."""
    shares = [f"{100 * each['numbers'] / measured['base']:.0f}" for each in measured["voices"]]
    return " to ".join(dict.fromkeys((min(shares, key=float), max(shares, key=float))))


def lines_of(text: str, width: int, most: int) -> list[str]:
    """The first lines of an answer; three dots if there are more.

    >>> lines_of("Arr, Paris be\\nthe city", 9, 2)
    ['Arr,', 'Paris …']
    """
    lines = [part for line in text.splitlines() for part in textwrap.wrap(line, width)]
    if len(lines) > most:
        lines = [*lines[: most - 1], textwrap.shorten(" ".join(lines[most - 1 :]), width, placeholder=" …")]
    return lines


def drawn(measured: Mapping[str, Any], width: int = 830, dark: bool = False) -> Figure:
    """The picture of a measurement: one model three times, its adapters to scale, its answers; a bar for each way."""
    narrow = width < NARROW
    canvas = Canvas(width, 0)  # whose height is known at the end
    head = f"One model stays in memory. A swap overwrites the {share_of(measured)}% next to it."
    y = 14
    for line in textwrap.wrap(head, 34 if narrow else 90):
        y += 22
        canvas.text(14, y, line, size=18 if narrow else 20, anchor="start", bold=True)

    # the model, once for each voice
    side, step = (104, 136) if narrow else (116, 272)
    top = y + 18
    for number, voice in enumerate(measured["voices"]):
        x, y = (14, top + step * number) if narrow else (14 + step * number, top)
        color = adapter_color(voice["name"])
        canvas.shapes.append(f"<rect {area(x, y, side, side)} fill='{BASE}'/>")
        for line, text in enumerate(("SmolLM2-135M", "same object", "same addresses")):
            canvas.text(x + 9, y + 22 + 18 * line, text, size=12 if narrow else 13, anchor="start")
        edge = side * (voice["numbers"] / measured["base"]) ** 0.5
        canvas.text(x + side + 8, y + side - edge / 2 + 5, "+", size=15, bold=True)
        canvas.shapes.append(f"<rect {area(x + side + 15, y + side - edge, edge, edge)} fill='{color}'/>")
        right, label = x + side + 34, 8.5 * len(voice["name"]) + 16
        canvas.shapes.append(f"<rect {area(right, y, label, 22)} rx='4' fill='{color}'/>")
        canvas.text(right + label / 2, y + 16, voice["name"], color=WHITE, bold=True)
        for line, text in enumerate(lines_of(voice["answer"], 30 if narrow else 20, 4)):
            canvas.text(right, y + 39 + (17 if narrow else 16) * line, text, anchor="start")
        if number + 1 < len(measured["voices"]):
            ends = (x + side / 2, y + side + 5, x + side / 2, y + step - 6)
            if not narrow:
                ends = (right, y + side - 3, x + step - 12, y + side - 3)
            canvas.line(*ends, MUTED, width=2)
            points = (-5, -6, 0, 0, 5, -6) if narrow else (-6, -5, 0, 0, -6, 5)
            path = "L".join(
                f"{ends[2] + dx:g} {ends[3] + dy:g}" for dx, dy in zip(points[::2], points[1::2], strict=True)
            )
            canvas.shapes.append(f"<path d='M{path}' fill='none' stroke='{MUTED}' stroke-width='2'/>")
            at = (x + side / 2 + 12, y + side + 20) if narrow else ((ends[0] + ends[2]) / 2, ends[1] - 6)
            canvas.text(*at, "swap", anchor="start" if narrow else "middle", bold=True)

    sizes = [each["numbers"] / 1e6 for each in measured["voices"]]
    gray = f"Gray: {measured['base'] / 1e6:.1f} million numbers, never touched."
    colored = f"Colored: the adapter, {min(sizes):.1f} to {max(sizes):.1f} million, its area to scale."
    note = f"{gray} {colored} Asked: “{measured['settings']['question']}”"
    y += side + 10

    def noted(y: float, text: str) -> float:
        for line in textwrap.wrap(text, 58 if narrow else 132):
            y += 17
            canvas.text(14, y, line, size=12 if narrow else 13, anchor="start", color=MUTED)
        return y

    y = noted(y, note) + 36

    # a bar for each way: the swap, and what a person waits for anyway
    times = {kind: times_of(measured, kind) for kind in KINDS}
    for line in textwrap.wrap("A swap (colored) and the first token after it (gray), on a CPU", 40 if narrow else 90):
        canvas.text(14, y, line, size=15, anchor="start", bold=True)
        y += 20
    left, row = (14, 40) if narrow else (226, 27)
    scale = (width - left - (132 if narrow else 150)) / max(
        sum(each) for kind in KINDS for each in times[kind].values()
    )
    for kind in KINDS:
        canvas.text(14, y + 8, f"Model {kind}", anchor="start", color=MUTED, bold=True)
        y += 10
        for label, (swap, token) in times[kind].items():
            if narrow:
                canvas.text(left, y + 22, label, anchor="start")
            else:
                canvas.text(left - 10, y + 24, label, anchor="end")
            at, height = (y + 27, 13) if narrow else (y + 10, 20)
            ends = [0, max(swap * scale, 1.5), (swap + token) * scale]
            for (start, end), fill in zip(
                itertools.pairwise(ends), (PEFTS if label.startswith("PEFT") else OURS, BASE), strict=True
            ):
                canvas.shapes.append(f"<rect {area(left + start, at, end - start, height)} fill='{fill}'/>")
            canvas.text(left + ends[-1] + 8, at + (11 if narrow else 15), summed(swap, token), anchor="start")
            y += row
        y += 18
    y = noted(y - 4, f"CPU; GPUs are not measured yet. {described(measured)}")
    canvas.height = round(y + 14)

    listed = "; ".join(
        f"{kind}: " + ", ".join(f"{label} {summed(*each)}" for label, each in times[kind].items()) for kind in KINDS
    )
    figure = canvas.figure(
        f"{head} {note} A swap and the first token after it. {listed}. CPU; GPUs are not measured yet."
    )
    if not dark:
        return figure
    svg = figure.svg
    for light, own in DARK.items():
        svg = svg.replace(light, own)
    return Figure(svg, figure.text)


def described(measured: Mapping[str, Any]) -> str:
    """Where and how it was measured, in one sentence or two."""
    n = measured["ways"][MEMCPY]["swap"]["n"]
    return f"Medians of {n}, in turns, a question after each. {measured['machine']}."


# --- README and chapter 05 -------------------------------------------------------------------------------------------


def table_of_readme(measured: Mapping[str, Any]) -> str:
    lines = [f"| ms, swap + first token | {' | '.join(KINDS)} |", "| --- | ---: | ---: |"]
    for label, names in DRAWN.items():
        cells = []
        for kind, name in zip(KINDS, names, strict=True):
            times = times_of(measured, kind).get(label)
            cells.append(" + ".join(map(number_of, times)) if times else "" if name else "recompiles")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def text_of_chapter(measured: Mapping[str, Any]) -> str:
    """What chapter 05 prints from its file in the package, where it also finds it on Colab."""
    lines = [f"{'median (minimum)':28}{'swap':20}then the first token"]
    for label, (_, way) in reversed(DRAWN.items()):
        if not way:
            continue
        times = [measured["ways"][way][what] for what in ("swap", "first_token")]
        swap, token = (f"{readable(each['median'])} ({readable(each['minimum'])})" for each in times)
        lines.append(f"{label:28}{swap:20}{token}")
    return "\n".join([*textwrap.wrap(described(measured), 80), "", *lines]) + "\n"


def with_times(readme: str, measured: Mapping[str, Any]) -> str:
    """README with this measurement: the table between two comments, the machine, and the first sentences."""
    disk, pool = (readable(measured["ways"][f"hotswap_lab, {way}"]["swap"]["median"]) for way in ("disk", "pool"))
    table = table_of_readme(measured)
    for pattern, new in (
        (r"(?<=<!-- times: made by notebooks/pictures/first.py -->\n).*?(?=\n<!-- end of times -->)", table),
        (r"[\d.]+ ms from disk, [\d.]+ ms from memory", f"{disk} from disk, {pool} from memory"),
        (r"Medians of \d+, .*?peft [\w.]+\.", described(measured)),
        (r"[\d.]+(?: to [\d.]+)?% of a model", f"{share_of(measured)}% of a model"),
    ):
        readme, found = re.subn(pattern, lambda _, new=new: new, readme, flags=re.DOTALL)
        assert found == 1, pattern
    return readme


def with_output(chapter: nbformat.NotebookNode, text: str) -> nbformat.NotebookNode:
    """Chapter 05 with what its cell prints once the file in the package has this text."""
    (cell,) = (cell for cell in chapter.cells if cell.cell_type == "code" and TEXT.name in cell.source)
    cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=text)]
    return chapter


def main(arguments: list[str]) -> None:
    """Measure, unless the last measurement is to be drawn again; then write all that shows it."""
    file = FOLDER / "first.json"
    if "--drawn" not in arguments:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's and transformers' own, which no reader of a time needs
            measured = measure()
        said = f"waited for a core that another program had: {measured['waited']:.1%} of the time"
        if measured["waited"] > MOST_WAITED:
            raise SystemExit(f"{said}, at most {MOST_WAITED:.0%} is right; nothing was written: measure again")
        print(said)
        file.write_text(json.dumps(measured, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    measured = json.loads(file.read_text(encoding="utf-8"))
    for name, form in FORMS.items():
        (FOLDER / f"{name}.svg").write_text(drawn(measured, *form).svg + "\n", encoding="utf-8")
    runpy.run_path(str(FOLDER.parent / "refresh.py"))["draw_first"]()
    README.write_text(with_times(README.read_text(encoding="utf-8"), measured), encoding="utf-8")
    text = text_of_chapter(measured)
    TEXT.write_text(text, encoding="utf-8")
    chapter = with_output(nbformat.read(CHAPTER, as_version=4), text)
    CHAPTER.write_text(nbformat.writes(chapter) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
