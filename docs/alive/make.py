"""A page on which the embedded model answers without a kernel, since all of its answers were computed beforehand.

    python docs/alive/make.py

This writes ``data.json``: every adapter's answer to each word at each strength, the tiles of the map of weights, and
the times that the real swaps took. Everything but the times is the same on each machine; tests/test_site.py compares it
with adapters that PEFT loads. :func:`fragment` is the HTML for the site, with the colors of the palette.
"""

from __future__ import annotations

import json
import statistics
import time
import timeit
from collections import defaultdict
from collections.abc import Iterator, Mapping
from html import escape
from itertools import groupby, product
from pathlib import Path

import torch
from peft.tuners.lora import LoraLayer

from hotswap_lab import AdapterPool, demo
from hotswap_lab.bench import machine
from hotswap_lab.figures.palette import BASE, CARD, DARK, INK, MUTED, adapter_color
from hotswap_lab.figures.tiles import CELLS, STEPS

FOLDER = Path(__file__).parent
WORDS = ["hotswap", "adapter", "notebook", "kernel", "weights", "gradient"]
WORDS += ["apple", "banana", "orange", "umbrella", "elephant", "hello"]
STRENGTHS = [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5]
#: the adapter that is chosen at first
FIRST = "reverse"
#: A part of a weight is stored as one of 64 characters, its level: 28 times the square root of what the adapter adds
#: there, in units of the weight's own size (root mean squares).
LEVELS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
PER_ROOT = 28
#: how often each time is measured
TIMES = 25
#: the swap that the page prints, and whose time it says
CALL = 'pool.swap("{name}", strength={strength})'
RELOAD = """model.load_adapter(folder, new)
model.set_adapter(new)
model.delete_adapter(old)"""


def layers(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yield the linear layers of all blocks, as ``("0.self_attn.q_proj", module)``, with an adapter or without."""
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer | torch.nn.Linear) and path.endswith("_proj"):
            yield path.partition(".layers.")[2], module


@torch.no_grad()
def levels(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The levels of each layer that the adapter changes, before rounding: tensors of ``CELLS`` by ``CELLS``."""
    found = {}
    for path, module in layers(model):
        if isinstance(module, LoraLayer) and (change := module.get_delta_weight("default")).any():
            parts = torch.nn.functional.adaptive_avg_pool2d(change.square()[None], CELLS)[0]
            found[path] = PER_ROOT * (parts / module.base_layer.weight.square().mean()) ** 0.25
    return found


def compute() -> dict:
    """Return everything but the times."""
    model, tokenizer = demo.load(FIRST)
    paths = [path for path, _ in layers(model)]
    folders = {name: demo.adapter_path(name) for name in demo.adapter_names()}
    pool = AdapterPool(model, adapters=folders, progress=False)
    adapters = {}
    for name in pool:
        answers = []
        for strength in STRENGTHS:
            pool.swap(name, strength)
            answers.append(demo.ask_all(model, tokenizer, WORDS))
        pool.swap(name)
        tiles = {
            path: "".join(LEVELS[round(level)] for level in each.flatten().tolist())
            for path, each in levels(model).items()
        }
        adapters[name] = {"answers": answers, "tiles": tiles}
    return {"words": WORDS, "strengths": STRENGTHS, "layers": paths, "adapters": adapters}


def measure(times: int = TIMES) -> dict:
    """Return medians in milliseconds: by adapter, of reloads by PEFT, and of the printed call for each strength.

    A swap comes from another adapter at the same strength, a change of strength from the strength next to it.
    """
    torch.set_num_threads(1)
    (model, _), (reloaded, _) = demo.load(FIRST), demo.load(FIRST)
    folders = {name: demo.adapter_path(name) for name in demo.adapter_names()}
    pool = AdapterPool(model, adapters=folders, progress=False)
    others = dict(zip(folders, [*folders][1:] + [*folders][:1], strict=True))
    found = defaultdict(list)

    def seconds(code: str, **names: object) -> float:
        return timeit.timeit(code, globals=names, number=1)

    # in rounds, so that other load on the machine affects all of them alike
    for _, name in product(range(times), folders):
        for at, strength in enumerate(STRENGTHS):
            call = CALL.format(name=name, strength=strength)
            pool.swap(others[name], strength)
            found["swap", name, at].append(seconds(call, pool=pool))
            pool.swap(name, STRENGTHS[at - 1 if at else 1])
            found["strength", name, at].append(seconds(call, pool=pool))
        old, new = reloaded.active_adapter, f"{name}-{time.perf_counter_ns()}"
        found["reload", name, 0].append(seconds(RELOAD, model=reloaded, folder=folders[name], old=old, new=new))
    by_name = defaultdict(lambda: defaultdict(list))
    for (what, name, _), each in found.items():
        by_name[what][name].append(float(f"{statistics.median(each) * 1000:.2g}"))
    return {"machine": f"medians of {times}, {machine()}", **by_name}


def filled(folder: Path, parts: Mapping[str, str]) -> str:
    """Return the HTML, style and program of a part of the site with ``{NAMES}`` filled in, in the palette's colors."""
    colors = {"card": CARD, "ink": INK, "muted": MUTED, "base": BASE}
    themes = ";".join(f"--{name}:light-dark({color},{DARK[color]})" for name, color in colors.items())
    files = {kind: (folder / f"{folder.name}.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js")}
    shared = (FOLDER / "part.css").read_text(encoding="utf-8")
    html = files["html"]
    for name, text in {"STYLE": shared + files["css"], "PROGRAM": files["js"], "THEMES": themes, **parts}.items():
        html = html.replace(f"{{{name}}}", text)
    return html


def fragment() -> str:
    """Return the page's part: controls, map and answer as HTML, with its style, its data and its program inside."""
    data = json.loads((FOLDER / "data.json").read_text(encoding="utf-8"))
    buttons = "".join(
        f'<label style="--adapter:{adapter_color(name)}"><input type="radio" name="adapter" value="{name}"'
        f"{' checked' * (name == FIRST)}><span>{name}</span></label>"
        for name in data["adapters"]
    )
    rows = groupby(data["layers"], lambda path: path.partition(".")[0])
    columns = dict.fromkeys(path.rpartition(".")[2].removesuffix("_proj") for path in data["layers"])
    tile = f'<canvas width="{CELLS}" height="{CELLS}"></canvas>'
    grid = "".join(f"<span>{each}</span>" for each in ("", *columns))
    grid += "".join(f"<span>{block}</span>{tile * len([*paths])}" for block, paths in rows)
    parts = {
        "BUTTONS": buttons,
        "WORDS": "".join(f"<option>{word}</option>" for word in data["words"]),
        "MOST": str(data["strengths"][-1]),
        "STEP": str(data["strengths"][1]),
        "GRID": grid,
        "LEGEND": "".join(f"<i></i>{each}" for each in ("0", *(f"&lt;{100 * end:g}%" for end in STEPS), "more")),
        "MACHINE": escape(data["measured"]["machine"]),
        "DATA": json.dumps(
            {**data, "LEVELS": LEVELS, "PER_ROOT": PER_ROOT, "STEPS": STEPS, "CALL": CALL}, separators=(",", ":")
        ),
    }
    return filled(FOLDER, parts)


if __name__ == "__main__":
    text = json.dumps({**compute(), "measured": measure()}, indent=0)
    (FOLDER / "data.json").write_text(text + "\n", encoding="utf-8")
