"""Swaps through the embedded adapters in a terminal, and shows that it works and how long it takes.

python -m hotswap_lab
python -m hotswap_lab --word banana --repeats 50

More commands: python -m hotswap_lab.bench (a full measurement), python -m hotswap_lab.serving (OpenAI's API in front).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import textwrap
import warnings

import torch

from . import demo
from .bench import Row, Scene, Settings, machine, ways_of
from .swap import hotswap_adapter

#: the adapter that is loaded first: it has every layer, so every other adapter can replace it
FIRST = "reverse"
WAYS = ("hotswap_lab, disk", "PEFT hotswap, disk", "PEFT load + set + delete")


def compare(name: str, repeats: int) -> list[Row]:
    """Time the swap from ``FIRST`` to another adapter in all three ways, each on a model of its own."""
    folders = [demo.adapter_path(FIRST), demo.adapter_path(name)]
    scene = Scene(demo.load_base(), Settings(model="demo", n=repeats), folders)
    return scene.measure(f"{FIRST} to {name}", {way: ways_of(scene)[way]() for way in WAYS})


def shown(row: Row, ours: Row | None = None) -> str:
    """The median, how many times ours that is, and what was wrong; right-aligned."""
    time = f"{1000 * row.timing.median:.3g} ms" if row.timing else ""
    ratio = f"{row.timing.median / ours.timing.median:.3g}x" if row.timing and ours and ours.timing else ""
    state = "" if row.state == "right" else row.state
    return f"{' '.join(filter(None, [time, state])):>10}" + (f"{ratio:>6}" if ours else "")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m hotswap_lab", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--word", default="hotswap", help="the word that the model is asked, 1 to 10 letters")
    parser.add_argument("--repeats", type=int, default=15, help="swaps per figure")
    parser.add_argument("--threads", type=int, default=1, help="threads that torch may use")
    options = parser.parse_args(arguments)
    if not (options.word.isascii() and options.word.isalpha() and options.word.islower() and len(options.word) <= 10):
        parser.error("--word must be 1 to 10 letters from a to z: the embedded model was trained on no others")
    torch.set_num_threads(options.threads)

    width = max(len(options.word) * 2, 12)
    print(f"One live model, {len(demo.adapter_names())} adapters. Each takes the place of the loaded one.\n")
    print(f"{'adapter':10}{'answer':{width}} {'equal':5}{'this':>10}{'PEFT hotswap':>16}{'PEFT load':>16}")
    print(f"{'(base)':10}{demo.ask(demo.load_base(), demo.load_tokenizer(), options.word)}")
    states, refusals = [], {}
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        live, tokenizer = demo.load(FIRST)
        for name in demo.adapter_names():
            hotswap_adapter(live, demo.adapter_path(name), "default")
            rows = compare(name, options.repeats)
            ours = shown(rows[0]) + "".join(shown(row, rows[0]) for row in rows[1:])
            states.append([row.state for row in rows])
            if rows[1].note:
                refusals[name] = rows[1].note
            answer, equal = demo.ask(live, tokenizer, options.word), str(rows[0].state == "right")
            print(f"{name:10}{answer:{width}} {equal:5}{ours}".rstrip(), flush=True)
    notes = [
        "",
        "equal: to a fresh load. this: hotswap_lab. PEFT load: load + set + delete.",
        f"Times: from {FIRST} to this adapter, from disk, median of {options.repeats}",
        *(f"PEFT hotswap refuses {name}: {refusal}" for name, refusal in refusals.items()),
        machine(),
    ]
    if any("wrong" in each for each in states):
        notes.insert(2, "wrong: no error, but other outputs than a fresh load")
    for note in notes:
        print(textwrap.fill(note, 80, subsequent_indent="  ", break_long_words=False))
    return 0 if all(ours == "right" for ours, *_ in states) else 1


if __name__ == "__main__":
    sys.exit(main())
