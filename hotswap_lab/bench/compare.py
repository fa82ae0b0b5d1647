"""A small comparison of three ways to swap the embedded adapters: ours, PEFT's hotswap, PEFT's load and delete.

Each way makes the same swap on a model of its own. It is checked against a fresh load, then timed.
"""

from __future__ import annotations

import contextlib
import io
import warnings

from .. import demo
from .report import Row
from .scene import Scene, Way
from .settings import Settings
from .timing import measure
from .ways import disk_way, peft_hotswap_way, peft_load_way

#: the adapter that is loaded first: it targets every layer, so every other adapter can replace it
FIRST = "reverse"


def compare(name: str, word: str, repeats: int) -> tuple[str, list[Row]]:
    """Swap the adapter ``name`` in, in all three ways, ``repeats`` times each. The swap back isn't timed.

    Returns the model's answer to ``word`` afterwards, and a line of the table for each way.
    """
    folders = demo.adapter_path(FIRST), demo.adapter_path(name)
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        scene = Scene(demo.load_base(), Settings(model="demo"), rank=8, folders=folders)
        ways = disk_way(scene, "hotswap_lab, disk", scene.load()), peft_hotswap_way(scene), peft_load_way(scene)
        rows = [_row(scene, way, repeats) for way in ways]
        return demo.ask(ways[0].model, demo.load_tokenizer(), word), rows


def _row(scene: Scene, way: Way, repeats: int) -> Row:
    state, note = way.check()
    timing = None
    if state != "refused":
        timing = measure(lambda: way.swap(1), before=lambda: way.swap(0), n=repeats)
    return Row(scene.rank, way.name, state, timing, note=note)
