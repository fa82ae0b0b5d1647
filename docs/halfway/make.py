"""A swap that the reader stops halfway: its page, which needs no kernel, since the model answered beforehand.

    python docs/halfway/make.py

This writes ``data.json``: the model's answer to each word after each step of four swaps, row after row and layer after
layer; what a damaged file does; and what one run measured. Everything but ``measured`` is the same on each machine;
tests/test_site.py compares it with the live model. :func:`fragment` is the HTML for the site: a still picture, which
``halfway.js`` sets in motion. The code that the page prints is the code that ran here.
"""

from __future__ import annotations

import json
import re
import runpy
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import hotswap_lab
from hotswap_lab import demo
from hotswap_lab.bench import machine
from hotswap_lab.compat import fresh_inductor_cache
from hotswap_lab.figures.palette import RIGHT, WHITE, WRONG, adapter_color, mix

FOLDER = Path(__file__).parent
alive = runpy.run_path(str(FOLDER.parent / "alive" / "make.py"))
WORDS, TIMES = alive["WORDS"], alive["TIMES"]
#: swaps: to a higher rank and back, to the lowest one, and to the same
PAIRS = [("reverse", "pig_latin"), ("pig_latin", "reverse"), ("pig_latin", "double"), ("reverse", "vowels_up")]
#: the room of the layer that is shown, the step at which the page opens
ROOM, OPENS = 32, 6
#: the tensor that is damaged: its last row is missing
DAMAGED = "base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight"

#: what the page prints, and what ran
CODE = {
    "rows": """# model: prepared, with {before}; other: the same, with {after}
for layer, new in zip(layers(model), layers(other)):
    layer.lora_A["default"].weight.data[:{step}] = new.lora_A["default"].weight[:{step}]
    layer.lora_B["default"].weight.data[:, :{step}] = new.lora_B["default"].weight[:, :{step}]
    if {step} > 32:
        layer.scaling["default"] = new.scaling["default"]
demo.ask(model, tokenizer, "{word}")
# in a notebook, with buttons: WriteScrubber("{before}", "{after}", "{word}")""",
    "layers": """# model: prepared, with {before}; other: the same, with {after}
for layer, new in [*zip(layers(model), layers(other))][:{step}]:
    layer.lora_A["default"].weight.data.copy_(new.lora_A["default"].weight)
    layer.lora_B["default"].weight.data.copy_(new.lora_B["default"].weight)
    layer.scaling["default"] = new.scaling["default"]
demo.ask(model, tokenizer, "{word}")""",
    "none": """demo.ask(model, tokenizer, "{word}")  # whatever the step""",
    "reload": """model.load_adapter(demo.adapter_path("{after}"), "new")
model.set_adapter("new")
model.delete_adapter("default")""",
    "using": """pool = AdapterPool(model, adapters={"{after}": demo.adapter_path("{after}")})

with pool.using("{after}"):
    demo.ask(model, tokenizer, "{word}")""",
    "without": """compiled = torch.compile(model)
compiled(**inputs)
hotswap_adapter(model, demo.adapter_path("pig_latin"), "default")
with RecompileWatch() as watch:
    compiled(**inputs)
print(watch)""",
    "loop": """for key, tensor in load_file("adapter_model.safetensors").items():
    target = model.get_parameter(key.replace(".weight", ".default.weight"))
    target.data.copy_(tensor)""",
    "refused": """hotswap_adapter(model, "damaged", "default")""",
}
CODE["with"] = f"prepare_model_for_compiled_hotswap(model, target_rank={ROOM})\n" + CODE["without"]


def prepared(name: str) -> tuple[torch.nn.Module, object]:
    """The embedded model with an adapter, with room for each of the others."""
    model, tokenizer = demo.load(name)
    family = [demo.adapter_path(each) for each in demo.adapter_names()]
    hotswap_lab.prepare_model_for_compiled_hotswap(model, adapters=family)
    return model, tokenizer


def layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [module for _, module in alive["layers"](model)]


def by_row(before: str, after: str) -> Iterator[torch.nn.Module]:
    """Yield the model before the swap and after each of its steps: row j of all layers, and at last the scalings."""
    return stepwise("rows", before, after, ROOM + 1)


def by_layer(before: str, after: str) -> Iterator[torch.nn.Module]:
    """Yield the model before the swap and after each layer of a loop by hand."""
    return stepwise("layers", before, after, len(layers(prepared(before)[0])))


def stepwise(order: str, before: str, after: str, last: int) -> Iterator[torch.nn.Module]:
    (model, _), (other, _) = prepared(before), prepared(after)
    loop = CODE[order].partition("\ndemo")[0]
    if order == "rows":  # there and back, since a layer that an adapter lacks keeps the scaling of the one before
        for name in (after, before):
            hotswap_lab.hotswap_adapter(model, demo.adapter_path(name), "default")
    yield model
    for step in range(1, last + 1):
        with torch.no_grad():
            exec(loop.format(before=before, after=after, step=step), {"layers": layers, "model": model, "other": other})
        yield model


def answers(steps: Iterator[torch.nn.Module]) -> list[list[str]]:
    """For each step, the answers to all words."""
    tokenizer = demo.load_tokenizer()
    return [demo.ask_all(model, tokenizer, WORDS) for model in steps]


def ranks(name: str) -> list[int]:
    """The adapter's rank in each layer; 0 where it has none."""
    return [
        module.r["default"] if hasattr(module, "lora_A") and "default" in module.lora_A else 0
        for module in layers(demo.load(name)[0])
    ]


@contextmanager
def damaged(name: str) -> Iterator[Path]:
    """A copy of an adapter's folder in which a row of one tensor is missing."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "damaged")
        target.mkdir()
        for file in Path(demo.adapter_path(name)).glob("adapter_*"):
            (target / file.name).write_bytes(file.read_bytes())
        file = target / "adapter_model.safetensors"
        tensors = load_file(file)
        tensors[DAMAGED] = tensors[DAMAGED][:-1].contiguous()
        save_file(tensors, file)
        yield target


def damage(what: str) -> dict:
    """Read the damaged file by a loop, or by the package: what was raised, how many layers changed, the answers."""
    model, tokenizer = prepared("reverse")
    names = {"model": model, "hotswap_adapter": hotswap_lab.hotswap_adapter, "load_file": load_file}
    before = {name: value.clone() for name, value in model.named_parameters()}
    error = ""
    with damaged("pig_latin") as folder:
        try:
            exec(
                CODE[what]
                .replace('"adapter_model', f'"{folder}/adapter_model')
                .replace('"damaged"', repr(str(folder))),
                names,
            )
        except Exception as raised:
            error = str(raised).replace(str(folder), "damaged")
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    done = len({name.partition(".lora_")[0] for name in changed})
    return {"error": error, "changed": done, "answers": demo.ask_all(model, tokenizer, WORDS)}


def compute() -> dict:
    """Return everything but what is measured."""
    base, tokenizer = demo.load_base(), demo.load_tokenizer()
    room, _ = prepared("reverse")
    first = layers(room)[0]
    rows = sum(each["default"].weight.numel() for each in (first.lora_A, first.lora_B))
    weight = first.base_layer.weight
    names = dict.fromkeys(name for pair in PAIRS for name in pair)
    return {
        "words": WORDS,
        "layers": [path for path, _ in alive["layers"](room)],
        "sizes": {"weight": weight.numel(), "shape": [*weight.shape], "rows": rows},
        "base": demo.ask_all(base, tokenizer, WORDS),
        "adapters": {name: {"ranks": ranks(name), "answers": answers([demo.load(name)[0]])[0]} for name in names},
        "pairs": [
            {
                "before": before,
                "after": after,
                "rows": answers(by_row(before, after)),
                "layers": answers(by_layer(before, after)),
            }
            for before, after in PAIRS
        ],
        "damage": {"all": sum(map(bool, ranks("pig_latin"))), **{what: damage(what) for what in ("loop", "refused")}},
    }


# --- what is measured


def waits(before: str, after: str, times: int = TIMES) -> dict[str, float]:
    """Medians in milliseconds: how long a request for one adapter waits while another one is in the model."""
    found: dict[str, list[float]] = {"reload": [], "using": []}
    pool_model, _ = demo.load(before)
    pool = hotswap_lab.AdapterPool(pool_model, adapters={after: demo.adapter_path(after)}, progress=False)
    # of the printed blocks, what runs when the request comes, up to where it computes
    code = {"reload": CODE["reload"], "using": CODE["using"].splitlines()[2] + " ends.append(clock())"}
    for _ in range(times):
        live = {"reload": demo.load(before)[0], "using": pool_model}
        for what, model in live.items():
            ends: list[float] = []
            program = compile(code[what].format(after=after), what, "exec")
            names = {"model": model, "pool": pool, "demo": demo, "ends": ends, "clock": time.perf_counter}
            start = time.perf_counter()
            exec(program, names)
            found[what].append(((ends or [time.perf_counter()])[0] - start) * 1000)
    return {what: float(f"{statistics.median(each):.2g}") for what, each in found.items()}


def compiling(what: str, backend: str = "inductor") -> dict:
    """Compile the model with reverse, swap pig_latin in, and say what became of address, shape, guards and graph."""
    torch.compiler.reset()
    model, _ = demo.load("reverse")
    watch = hotswap_lab.RecompileWatch()
    seconds: list[float] = []
    places: list[tuple[str, list[int]]] = []

    def torch_compile(model: torch.nn.Module) -> Callable[..., object]:
        run = torch.compile(model, backend=backend)

        def call(**inputs: object) -> None:
            weight = layers(model)[0].lora_A["default"].weight
            places.append((f"{weight.data_ptr():#x}", [*weight.shape]))
            start = time.perf_counter()
            with torch.no_grad():
                run(**inputs)
            seconds.append(time.perf_counter() - start)

        return call

    class Torch:
        compile = staticmethod(torch_compile)

    names = {**vars(hotswap_lab), "demo": demo, "model": model, "inputs": model.get_base_model().dummy_inputs}
    for name in ("hotswap_adapter", "prepare_model_for_compiled_hotswap"):
        names[name] = getattr(hotswap_lab, name)
    names |= {"torch": Torch, "RecompileWatch": lambda: watch, "print": lambda _: None}
    exec(CODE[what], names)
    return {
        "addresses": [address for address, _ in places],
        "shapes": [shape for _, shape in places],
        "recompiles": watch.recompiles,
        "guards": watch.reasons,
        "seconds": float(f"{seconds[-1]:.2g}"),
        "first": float(f"{seconds[0]:.2g}"),
    }


def measure() -> dict:
    """Return what one run measures: waits, compiling with room and without."""
    torch.set_num_threads(1)
    found = {"machine": machine(), "waits": [waits(*pair) for pair in PAIRS]}
    for what in ("without", "with"):
        with fresh_inductor_cache():
            found[what] = compiling(what)
    return found


# --- the page

#: what the page says; the program fills in the rest
TEXTS = {
    "hidden": "Step {step} of {last}. Guess, or move the line.",
    "start": "Step {step} of {last}: this is {before}.",
    "end": "Step {step} of {last}: this is {after}.",
    "neither": "Step {step} of {last}: neither {before} ({old}) nor {after} ({new}).",
    "base": "Step {step} of {last}: neither {before} ({old}) nor {after} ({new}), but the base's answer, "
    "the word itself.",
    "old": "Step {step} of {last}: still {before}'s answer, though not all of {before} is left.",
    "new": "Step {step} of {last}: {after}'s answer already, though not all of {after} is written.",
    "error": "an error",
    "right": "Right, at step {step}: {answer}.",
    "guessed": "At step {step}: {answer}, not {guess}.",
    "is_neither": " Neither adapter's; no error.",
    "is_adapter": " Try the other steps.",
    "moved": "You moved the line: no guess. Another word or swap gives a new one.",
    "asked": "Your request shows the answer. Another word or swap gives a new guess.",
    "caption_rows": "First of {layers} layers; a step writes a row in each",
    "caption_layers": "All {layers} layers; a step writes one of them",
    "base_rows": "the base's weight of this layer, {shape}, drawn to scale: in this tiny model, only {times} times as "
    "many numbers as the rows have room for. No swap writes to it",
    "base_layers": "the base: no swap writes to it",
    "bar_rows": "{rows} of {name}'s {own} rows (its rank is {own})",
    "bar_layers": "{rows} of {name}'s {own} layers",
    "room_rows": "rows of zeros (padding), which add nothing: {kept} not yet written, {written} written",
    "room_layers": "layers of zeros, which add nothing: {kept} not yet written, {written} written",
    "scaling_rows": "short bar: the scaling, one number that multiplies what the rows add; the last step writes it",
    "scaling_layers": "with each layer goes its scaling, one number that multiplies what its rows add",
    "none": "It gets {short} at once{how}",
    "gets_neither": ": neither adapter's answer, and no error.",
    "gets_before": ": {before}'s answer, and no error.",
    "gets_after": ": right, though the swap is not over.",
    "gets_end": ". The swap is over: move the line back.",
    "reload": "It waits {reload}\u00a0ms while PEFT loads {after}, then gets {new}.",
    "using": "It waits {using}\u00a0ms until {after} is whole, then gets {new}. While it is answered, "
    "no other swap can begin.",
    "using_end": "{after} is whole: it gets {new}, without waiting for a swap.",
    "loop": "{changed} of pig_latin's {all} layers are written, the others not. Asked {word}, it answers {loop}.",
    "refused": "Asked {word}, it answers {refused}, as before.",
}


def bars(old: int, new: int, step: int) -> list[str]:
    """Whose each row of a layer is after a step, by the ranks of both adapters, and at last its scaling."""
    rows = ["after" if row < new else "room done" for row in range(step)][:ROOM]
    rows += ["before" if row < old else "room" for row in range(len(rows), ROOM)]
    return [*rows, "after" if step > ROOM else "before"]


def fragment() -> str:
    """Return the page's part, which is a still picture of one step until its program runs."""
    data = json.loads((FOLDER / "data.json").read_text(encoding="utf-8"))
    pair, measured, sizes = data["pairs"][0], data["measured"], data["sizes"]
    own = [data["adapters"][pair[kind]] for kind in ("before", "after")]
    (old, new), steps = (each["answers"][0] for each in own), [each[0] for each in pair["rows"]]
    waits, runs = measured["waits"][0], {what: measured[what] for what in ("without", "with")}
    kinds = bars(own[0]["ranks"][0], own[1]["ranks"][0], OPENS)
    shape = " × ".join(map(str, sizes["shape"]))
    values = {
        "before": pair["before"],
        "after": pair["after"],
        "old": old,
        "new": new,
        "word": WORDS[0],
        "shape": shape,
        "times": f"{sizes['weight'] / sizes['rows']:g}",
        "layers": len(data["layers"]),
        "kept": kinds.count("room"),
        "written": kinds.count("room done"),
    }
    values |= {
        "answer": steps[OPENS],
        "short": steps[OPENS],
        "step": OPENS,
        "last": len(steps) - 1,
        "how": TEXTS["gets_neither"],
    }
    values |= {what: f"{ms:g}" for what, ms in waits.items()}
    values |= {"changed": data["damage"]["loop"]["changed"], "all": data["damage"]["all"]}
    values |= {what: data["damage"][what]["answers"][0] for what in ("loop", "refused")}
    for kind, adapter in zip(("before", "after"), own, strict=True):
        counts = {"rows": kinds[:ROOM].count(kind), "own": adapter["ranks"][0]}
        values[f"count_{kind}"] = TEXTS["bar_rows"].format(**counts, name=pair[kind])
    cells = [owner(each, old, new, data["base"][0]) + " here" * (at == OPENS) for at, each in enumerate(steps)]
    more = {
        "TEXTS": TEXTS,
        "CODE": CODE,
        "OPENS": OPENS,
        "COLORS": {name: tinted(adapter_color(name)) for name in data["adapters"]},
    }
    parts = {
        **{name.upper(): escape(str(text)) for name, text in values.items()},
        **{name.upper(): escape(filled_in(text, values)) for name, text in TEXTS.items()},
        **{f"CODE_{name.upper()}": escape(filled_in(text, values)) for name, text in CODE.items()},
        **{f"{what}_{name}".upper(): escape(text) for what, run in runs.items() for name, text in said(run).items()},
        **{f"{what}_ERROR".upper(): breakable(data["damage"][what]["error"]) for what in ("loop", "refused")},
        **{
            f"BAR_{what.upper()}": f"{ms / max(each['reload'] for each in measured['waits']):.3f}"
            for what, ms in waits.items()
        },
        "WITHOUT_GUARD": breakable("; ".join(runs["without"]["guards"])),
        **{f"{kind.upper()}_COLOR": tinted(adapter_color(pair[kind])) for kind in ("before", "after")},
        "COLORS": ";".join(f"--{kind}:{tinted(adapter_color(pair[kind]))}" for kind in ("before", "after")),
        "RIGHT_COLOR": tinted(RIGHT),
        "WRONG_COLOR": tinted(WRONG),
        "PAIRS": "".join(
            f"<option value={at}>{each['before']} → {each['after']}</option>" for at, each in enumerate(data["pairs"])
        ),
        "WORDS": "".join(f"<option>{word}</option>" for word in data["words"]),
        "WORDS_COUNT": str(len(data["words"])),
        "BARS": marks(kinds),
        "CELLS": marks(cells),
        "AT": f"{OPENS / len(kinds):.4f}",
        "SCALE": f"{sizes['weight'] / sizes['rows']:g}",
        "ADDRESS": runs["with"]["addresses"][0],
        "TIMES": str(TIMES),
        "MACHINE": escape(measured["machine"]),
        "DATA": json.dumps({**data, **more}, separators=(",", ":"), ensure_ascii=False).replace("</", "<\\/"),
    }
    return alive["filled"](FOLDER, parts)


def filled_in(text: str, values: dict[str, object]) -> str:
    """Fill in the names that are in ``values``; there may be others, and braces of code."""
    return re.sub(r"{(\w+)}", lambda match: str(values.get(match[1], match[0])), text)


def breakable(text: str) -> str:
    """A message as HTML, whose long paths may break before a name."""
    lines = [" ".join(line.split()) for line in text.splitlines()]
    return "<br>".join(re.sub(r"\.(?=[a-z])", "<wbr>.", escape(line)) for line in lines)


def marks(kinds: list[str]) -> str:
    return "".join(f'<i class="{kind}"></i>' for kind in kinds)


def tinted(color: str) -> str:
    """A color, and a lighter one for a dark theme."""
    return f"light-dark({color},{mix(color, 0.55, WHITE)})"


def owner(answer: str, old: str, new: str, base: str) -> str:
    """Whose an answer is: that of an adapter, of the base alone, or of neither."""
    return {base: "base", new: "after", old: "before"}.get(answer, "neither")


def said(run: dict) -> dict[str, str]:
    """What the page says of a compiled model's swap."""
    found = {"recompiles": str(run["recompiles"])}
    for at in (0, 1):
        found[f"shape{at}"] = " × ".join(map(str, run["shapes"][at]))
        found[f"address{at}"] = run["addresses"][at]
    return {**found, "seconds": f"{run['seconds']:g}", "ms": f"{run['seconds'] * 1000:.2g}"}


if __name__ == "__main__":
    text = json.dumps({**compute(), "measured": measure()}, indent=0, ensure_ascii=False)
    (FOLDER / "data.json").write_text(text + "\n", encoding="utf-8")
