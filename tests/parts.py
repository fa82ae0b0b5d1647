"""The parts of the package: what each is for, what it stands on, and what stops where it is taken away.

``python tests/parts.py`` takes each away from a copy of the package, and writes what it finds to CONTRIBUTING's table.
"""

from __future__ import annotations

import ast
import functools
import importlib
import io
import json
import os
import shutil
import sys
import tempfile
import tokenize
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hotswap_lab import _PUBLIC as PUBLIC
from hotswap_lab.figures import Canvas
from hotswap_lab.figures.palette import BASE, OURS, WHITE

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hotswap_lab"
PAGE, PICTURE = ROOT / "CONTRIBUTING.md", ROOT / "docs" / "_static" / "parts.svg"
#: what is always there: the engine, and the public functions on top of it
STAY = ("__init__", "compat", "core", "swap")
#: what the public functions need next to core, always; all others are leaves
NEEDED = ("beyond", "files", "threads")
#: what a part's table is between, on the page
BEGIN, END = "<!-- parts: made by tests/parts.py -->\n", "<!-- end of parts -->"
#: tokens that are not code
SILENT = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


@functools.cache
def parts() -> list[str]:
    """The folders and top-level modules of the package."""
    found = [each.stem for each in PACKAGE.iterdir() if each.suffix == ".py" or (each / "__init__.py").exists()]
    return sorted(found)


def leaves() -> list[str]:
    return [each for each in parts() if each not in (*STAY, *NEEDED)]


def files_of(part: str, package: Path = PACKAGE) -> list[Path]:
    file = package / f"{part}.py"
    return [file] if file.exists() else sorted((package / part).glob("*.py"))


@functools.cache
def lines_of(path: Path) -> int:
    """The lines of code in a file: no docstrings, comments or blank lines."""
    source, docstrings, lines = path.read_text(encoding="utf-8"), set(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str):
                docstrings.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in SILENT:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


def purpose_of(part: str) -> str:
    path = files_of(part)[0] if (PACKAGE / f"{part}.py").exists() else PACKAGE / part / "__init__.py"
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.split("\n\n")[0].replace("\n", " ").replace("``", "`")


@functools.cache
def imported_by(part: str, anywhere: bool = False) -> frozenset[str]:
    """The parts that a part imports, when it is imported itself; or ``anywhere`` in its code."""
    found = set()
    for path in files_of(part):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree) if anywhere else _at_import(tree):
            above = len(path.relative_to(PACKAGE).parts)
            if isinstance(node, ast.ImportFrom) and node.level == above:
                names = [node.module] if node.module else [each.name for each in node.names]
                found |= {name.partition(".")[0] for name in names}
    return frozenset((found & {*parts()}) - {part, "__init__"})


def stands_on(part: str, anywhere: bool = False) -> set[str]:
    """All parts that a part imports, and those that these need; ``anywhere`` in its code, or to be imported itself."""
    waiting = [*imported_by(part, anywhere)]
    found = set(waiting)
    while waiting:
        below = imported_by(waiting.pop()) - found
        found |= below
        waiting += below
    return found


def _at_import(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when a module is imported: not those of functions, nor what is for type checkers alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _at_import(child)


# ---- taken away


def tried_without(gone: list[str], script: Callable[[], None]) -> dict[str, object]:
    """Import what is left of a copy of the package, and run a script, in a process of its own.

    Returns the modules that can't be imported, and the error of the script; None if it passes.
    """
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "hotswap_lab"
        shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
        # the chapters' file of the idea is next to the package in a checkout, and inside of it in a wheel
        shutil.copytree(ROOT / "notebooks" / "solutions", Path(folder) / "notebooks" / "solutions")
        for part in gone:
            for path in (package / part, package / f"{part}.py"):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        answer = Path(folder) / "answer.json"
        # a fork, because importing torch and transformers again for each part takes longer than all that is tried here
        if (child := os.fork()) == 0:
            try:
                for name in [each for each in sys.modules if each.partition(".")[0] == "hotswap_lab"]:
                    del sys.modules[name]  # this module has imported a part of the whole package
                sys.path.insert(0, folder)
                answer.write_text(json.dumps(_tried(package, script)))
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        return json.loads(answer.read_text())


def _tried(package: Path, script: Callable[[], None]) -> dict[str, object]:
    for name in [each for each in sys.modules if each.partition(".")[0] == "hotswap_lab"]:
        del sys.modules[name]  # this file has imported the whole package, which would answer for its copy
    failed, error = [], None
    for path in sorted(package.rglob("*.py")):
        names = [each for each in path.relative_to(package).with_suffix("").parts if each != "__init__"]
        if "__main__" in names and len(names) > 1:
            continue
        try:
            importlib.import_module(".".join(["hotswap_lab", *names]))
        except Exception as reason:
            lacks = isinstance(reason, ImportError) and "hotswap_lab" not in str(reason)
            if not lacks:  # another package, such as Ray, is not installed
                failed.append(".".join(names))
    try:
        assert Path(importlib.import_module("hotswap_lab").__file__).parent == package
        script()
    except Exception:
        error = traceback.format_exc()
    return {"failed": failed, "error": error}


def swaps() -> None:
    """Load, swap, prepare, compile, swap, refuse: plain LoRA, with the public functions."""
    from hotswap_lab import HotswapError, hotswap_adapter, prepare_model_for_compiled_hotswap, save_adapter

    folders, load, same = _family()
    model = load(folders[0])
    hotswap_adapter(model, folders[1])
    same(model, folders[1])
    prepare_model_for_compiled_hotswap(model, adapters=folders)
    compiled, compiles = _compiled(model)
    for folder in [*folders, *folders]:
        hotswap_adapter(compiled, folder)
        same(compiled, folder)
    assert len(compiles) == 1, compiles
    save_adapter(model, f"{folders[0]}-saved")
    same(model, f"{folders[0]}-saved")
    with pytest.raises(HotswapError, match="other"):
        hotswap_adapter(compiled, folders[0], adapter_name="other")


def core_alone() -> None:
    """The same with core alone: adapters from memory."""
    from peft import PeftConfig
    from safetensors.torch import load_file

    from hotswap_lab.core.adapter import Adapter
    from hotswap_lab.core.change import apply
    from hotswap_lab.core.errors import HotswapError
    from hotswap_lab.core.host import find_host
    from hotswap_lab.core.planner import LORA, LORA_PASSES, make_plan
    from hotswap_lab.core.prepare import changes_to_prepare
    from hotswap_lab.core.slot import slot_for

    folders, load, same = _family()
    adapters = [
        Adapter.from_state_dict(load_file(f"{each}/adapter_model.safetensors"), PeftConfig.from_pretrained(each))
        for each in folders
    ]

    def swap(model, adapter) -> None:
        plan = make_plan(slot_for(LORA, find_host(model, "default"), "default"), adapter, passes=LORA_PASSES)
        plan.raise_if_refused()
        apply([plan.change()])

    model = load(folders[0])
    swap(model, adapters[1])
    same(model, folders[1])
    apply(changes_to_prepare(LORA, model, adapters))
    compiled, compiles = _compiled(model)
    for folder, adapter in [*zip(folders, adapters, strict=True)] * 2:
        swap(compiled, adapter)
        same(compiled, folder)
    assert len(compiles) == 1, compiles
    adapters[1].config.use_dora = True
    with pytest.raises(HotswapError, match="use_dora"):
        swap(compiled, adapters[1])


def _family():
    """Three adapters of other ranks and alphas with random weights, a function to load one, and one to compare."""
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4)).double()
    state, inputs, folder = base.state_dict(), torch.randn(3, 8).double(), tempfile.mkdtemp()

    def fresh() -> torch.nn.Module:
        model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4)).double()
        model.load_state_dict(state)
        return model.eval()

    def load(path: str) -> PeftModel:
        return PeftModel.from_pretrained(fresh(), path).eval()

    def same(model, path: str) -> None:
        with torch.no_grad():
            expected, found, without = load(path)(inputs), model(inputs), fresh()(inputs)
        assert torch.allclose(found, expected, rtol=0, atol=1e-9), (found - expected).abs().max()
        assert (expected - without).abs().max() > 0.01

    folders = []
    for rank in (4, 2, 6):
        config = LoraConfig(r=rank, lora_alpha=3 * rank, target_modules=["0", "2"], init_lora_weights=False)
        get_peft_model(fresh(), config).save_pretrained(path := f"{folder}/{rank}")
        folders.append(path)
    return folders, load, same


def _compiled(model):
    import torch

    compiles: list[str] = []

    def backend(graph, inputs):
        compiles.append(str(graph.graph))
        return graph.forward

    return torch.compile(model, backend=backend, dynamic=False), compiles


# ---- the table


def stops_without(part: str, failed: list[str]) -> str:
    """What stops where a part is taken away: the public names in it, the parts that fail, and those that do in part."""
    whole, partly = [], []
    for other in (each for each in by_floor() if each not in (part, "__init__")):
        modules = [each for each in failed if each.partition(".")[0] == other]
        later = part in imported_by(other, anywhere=True) - imported_by(other)
        if len(modules) > len(files_of(other)) / 2:
            whole.append(f"`{other}`")
        elif modules or later:
            partly.append(f"`{other}`")
    public = [
        f"`{name}`" for module, names in PUBLIC.items() if module.partition(".")[0] == part for name in names.split()
    ]
    text = ", ".join([*public, *whole])
    return "; ".join(each for each in (text, f"partly {', '.join(partly)}" if partly else "") if each) or "nothing else"


@functools.cache
def floor_of(part: str) -> int:
    """How many parts stand below a part at most, one on another."""
    return max((1 + floor_of(each) for each in imported_by(part)), default=0)


def by_floor() -> list[str]:
    return sorted((each for each in parts() if each != "__init__"), key=lambda part: (floor_of(part), part))


def size_of(part: str) -> str:
    """The lines of a part, rounded, so that the table changes where a part does."""
    count = sum(map(lines_of, files_of(part)))
    return f"{round(count, -2 if count >= 1000 else -1):,}"


def table(found: dict[str, dict]) -> str:
    lines = [
        "| part | lines | what it is for | stands on | without it, these stop |",
        "| --- | ---: | --- | --- | --- |",
    ]
    for part in by_floor():
        below = ", ".join(f"`{each}`" for each in by_floor() if each in imported_by(part)) or "nothing"
        stops = "all" if part in STAY else stops_without(part, found[part]["failed"])
        lines.append(f"| `{part}` | {size_of(part)} | {purpose_of(part)} | {below} | {stops} |")
    return "\n".join(lines) + "\n"


def picture() -> str:
    """The floors of the house, the public functions and what they need in color."""
    floors: dict[int, list[str]] = {}
    for part in by_floor():
        floors.setdefault(floor_of(part), []).append(part)
    width, high = 830, 46
    canvas = Canvas(width, high * len(floors) + 24)
    for floor, members in floors.items():
        y, wide = canvas.height - 12 - high * (floor + 1), (width - 24) / len(members)
        for number, part in enumerate(members):
            fill = OURS if part in STAY else BASE if part in NEEDED else WHITE
            canvas.box(12 + wide * number + 3, y + 3, wide - 6, high - 6, fill)
            label = f"{part}, {size_of(part)} lines" if part != "__main__" else f"command, {size_of(part)} lines"
            canvas.text(12 + wide * (number + 0.5), y + 28, label, bold=part == "core")
    return canvas.figure("The parts of the package, each above those that it imports").svg + "\n"


def on_page(page: str, rows: str) -> str:
    """A page with these rows as its table."""
    before, _, rest = page.partition(BEGIN)
    return before + BEGIN + rows + END + rest.partition(END)[2]


def tried(*chosen: str) -> dict[str, dict]:
    """What is found without each part, without all ``leaves``, and with ``core alone``; or of these the ``chosen``."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for name in ("torch", "peft", "transformers", "diffusers", "fastapi", "ipywidgets", "torch._dynamo"):
        importlib.import_module(name)  # once, for all forks
    everything = [each for each in parts() if each not in ("__init__", "compat", "core")]
    tries = {part: ([part], swaps) for part in (*leaves(), *NEEDED)}
    tries |= {"leaves": (leaves(), swaps), "core alone": (everything, core_alone)}
    return {name: tried_without(*tries[name]) for name in chosen or tries}


if __name__ == "__main__":
    found = tried(*sys.argv[2:])
    if sys.argv[1:]:  # --json, and what to try
        print(json.dumps(found))
    else:
        PICTURE.write_text(picture(), encoding="utf-8")
        PAGE.write_text(on_page(PAGE.read_text(encoding="utf-8"), table(found)), encoding="utf-8")
