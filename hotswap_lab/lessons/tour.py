"""The tour of ``hotswap-lab``: swaps of all embedded adapters in one model, with their times.

Tests: ``tests/test_main.py``.
"""

import contextlib
import io
import warnings
from dataclasses import asdict
from typing import Any

import torch

from .. import demo
from ..bench import Measured, Scene, Settings, machine, ways_of
from ..core.report import wrapped
from ..swap import hotswap_adapter

#: the adapter that is loaded first: it has every layer, so each other adapter can replace it
FIRST = "reverse"
WAYS = ("hotswap_lab, disk", "PEFT hotswap, disk", "PEFT load + set + delete")
LINE = "{:10}{:21}{:6}{:>9}  {:>15}  {:>15}"


def compare(name: str, repeats: int) -> list[Measured]:
    """Time the swap from ``FIRST`` to another adapter in all three ways, each on its own model."""
    scene = Scene(demo.load_base(), Settings(model="demo", n=repeats), [*map(demo.adapter_path, (FIRST, name))])
    return scene.measure(f"{FIRST} to {name}", {way: ways_of(scene)[way]() for way in WAYS})


def shown(row: Measured, ours: Measured) -> str:
    """Format the median in milliseconds, and its ratio to ours or a state that isn't "right"."""
    if row.timing is None or ours.timing is None:
        return row.state
    median = f"{1000 * row.timing.median:.2f}"
    if row is ours:
        return median
    ratio = f"{row.timing.median / ours.timing.median:.1f}x" if row.state == "right" else row.state
    return f"{median} {ratio:>6}"


def tour(word: str = "hotswap", repeats: int = 15, threads: int = 1) -> dict[str, Any]:
    """Print the tour line by line. Return its results; ``ok`` is whether each of our swaps was right."""
    torch.set_num_threads(threads)
    print(f"One live model, {len(demo.adapter_names())} adapters. Each takes the place of the loaded one.\n")
    print(LINE.format("", "", "", "ours", "PEFT hotswap", "PEFT reload"))
    print(LINE.format("adapter", "answer", "right", "ms", "ms x ours", "ms x ours"))
    print(LINE.format("(base)", demo.ask(demo.load_base(), demo.load_tokenizer(), word), "", "", "", "").rstrip())
    results: dict[str, Any] = {}
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        live, tokenizer = demo.load(FIRST)
        for name in demo.adapter_names():
            hotswap_adapter(live, demo.adapter_path(name), "default")
            rows = compare(name, repeats)
            answer, is_right = demo.ask(live, tokenizer, word), rows[0].state == "right"
            results[name] = {"answer": answer, "rows": [asdict(row) for row in rows]}
            print(LINE.format(name, answer, str(is_right), *(shown(row, rows[0]) for row in rows)), flush=True)
    states = [[row["state"] for row in result["rows"]] for result in results.values()]
    notes = [f"Times: from {FIRST} to this adapter, from disk, median of {repeats}. PEFT reload: load, set, delete"]
    if any("wrong" in row for row in states):
        notes.append("wrong: no error, but other outputs than a fresh load")
    for name, result in results.items():
        if reason := result["rows"][1]["note"]:
            notes.append(f"PEFT hotswap refuses {name}: {reason}")
    print("", *map(wrapped, [*notes, machine()]), sep="\n")
    return {"ok": all(row[0] == "right" for row in states), "adapters": results}
