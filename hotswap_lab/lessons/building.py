"""The file ``my_hotswap.py`` that the reader builds in chapters 01 to 08: a cell for each part, checked, then saved.

A notebook begins with ``%load_ext hotswap_lab.lessons.building``. A cell that begins with ``%%part 02`` is the part of
chapter 02 and is checked together with all parts before it. A correct part is saved to ``my_hotswap.py`` next to the
notebook. Missing parts are taken from the solution, for example on Colab, where each notebook is a new machine.
A cell that begins with ``%%fresh 02`` runs in a new process, which can import that file, up to chapter 02.

Tests: ``tests/lessons/test_exercises.py``.
"""

import contextlib
import functools
import itertools
import linecache
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from .. import demo
from ..watch import RecompileWatch
from . import Source
from .exercise import Exercise, first_difference, refused, same_as_fresh, tensors_of, uncompiled_calls

#: the reader's file
MINE = Path("my_hotswap.py")
#: in a wheel next to this file, in a checkout next to the other solutions
SOLUTION = Path(__file__).with_name("mini_hotswap.py")
if not SOLUTION.exists():
    SOLUTION = Path(__file__).parents[2] / "notebooks" / "solutions" / "mini_hotswap.py"

#: the mark after the name of a part from the solution
LENT = ", the solution's"

#: the ``padded`` of chapter 01; the reader replaces it in chapter 02
FIRST_PADDED = """
def padded(values, room):
    if values.shape != room.shape:
        raise ValueError(f"a tensor of shape {(*values.shape,)} has no place in {(*room.shape,)}")
    return values
"""


def load_ipython_extension(ipython: Any) -> None:
    """Define ``%%part`` and ``%%fresh``, for ``%load_ext``."""

    def check_and_import(chapter: str, text: str) -> None:
        part(chapter, text)
        with contextlib.suppress(Exception):  # the check has printed the error
            ipython.push({"mini": built(chapter, text)})

    ipython.register_magic_function(check_and_import, "cell", "part")
    ipython.register_magic_function(in_new_process, "cell", "fresh")


def part(chapter: str, text: str) -> None:
    """Check a chapter's part, and save it to :data:`MINE` if it is right."""
    if PARTS[chapter].is_right(text):
        MINE.write_text(as_file(max([chapter, *parts_of_yours()]), {chapter: text}))
        print(f"It is in {MINE} now.")


def as_file(chapter: str, own: Mapping[str, str]) -> str:
    """Return all parts up to a chapter's, yours or the solution's, as the text of a module.

    >>> exec(as_file("01b", {}), {})
    """
    yours, texts = {"", *parts_of_yours(), *own}, []
    for name, text in parts_up_to(chapter, own).items():
        mark = "" if name in yours else LENT
        texts.append(f"# ---- {name}{mark}\n\n{text.strip()}\n")
    return "\n\n".join(texts)


def in_new_process(chapter: str, code: str) -> None:
    """Run code in a new process that can import your file, up to a chapter's part, and print its output.

    >>> in_new_process("01b", "import my_hotswap; print(my_hotswap.NAME)")
    of the solution, not of yours: 01, 01b
    default
    """
    if lent := [name for name in parts_up_to(chapter, {}) if name and name not in parts_of_yours()]:
        print(f"of the solution, not of yours: {', '.join(lent)}")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, MINE.name).write_text(as_file(chapter, {}))
        code = f"import sys; sys.path[:0] = {[folder, *sys.path]}\n{code}"
        process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    print((process.stdout + (process.stderr if process.returncode else "")).rstrip())


def parts_of(file: Path) -> dict[str, str]:
    """Return the parts of a file by chapter. The imports, in front of the first part, have the name ""."""
    imports, *parts = re.split(r"^# ---- (\w*).*\n", file.read_text(), flags=re.MULTILINE)
    return {"": imports} | dict(zip(parts[::2], parts[1::2], strict=True))


def parts_of_yours() -> dict[str, str]:
    """Return the parts in :data:`MINE` that aren't from the solution, by chapter."""
    if not MINE.exists():
        return {}
    lent = re.findall(rf"^# ---- (\w*){LENT}$", MINE.read_text(), flags=re.MULTILINE)
    return {name: text for name, text in parts_of(MINE).items() if name and name not in lent}


def solution(chapter: str) -> Source:
    """Return a chapter's part of ``mini_hotswap.py``.

    >>> print(solution("03")[:54])
    def scalings_as_tensors(model: PeftModel) -> PeftModel
    """
    return Source(parts_of(SOLUTION)[chapter].strip())


def parts_up_to(chapter: str, own: Mapping[str, str]) -> dict[str, str]:
    """Return the imports and the parts up to a chapter's, from ``own``, or else your file, or else the solution."""
    parts = parts_of(SOLUTION) | parts_of_yours() | own
    parts[""] += FIRST_PADDED
    return {name: text for name, text in sorted(parts.items()) if name <= chapter}


def built(chapter: str, text: str | None = None) -> ModuleType:
    """Return all parts up to a chapter's as a module: yours, or the solution's where yours is missing.

    Parameters
    ----------
    text:
        The part of this chapter. Default: yours or the solution's, as for the others.

    >>> len(built("01").read(demo.adapter_path("double")))
    16
    """
    module = ModuleType("my_hotswap")
    for name, code in parts_up_to(chapter, {} if text is None else {chapter: text}).items():
        file = f"<part {name or 'given'}>"
        linecache.cache[file] = len(code), None, code.splitlines(True), file  # for the line in an error's text
        exec(compile(code, file, "exec"), module.__dict__)
    return module


# --- checks --------------------------------------------------------------------------------------------------------

FOLDERS = {name: demo.adapter_path(name) for name in demo.adapter_names()}
IDS = torch.arange(96).view(8, 12) % 90 + 4
fresh: Callable[[str], PeftModel] = functools.cache(lambda name: demo.load(name)[0])


class Calls(TorchFunctionMode):
    """Count the calls of PyTorch's functions, and fill empty tensors with NaN, so that they aren't zeros by chance."""

    count: int = 0

    def __torch_function__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += getattr(operation, "__name__", "") != "_set_grad_enabled"  # as no_grad does
        result = operation(*args, **(kwargs or {}))
        is_empty = operation in (torch.empty, torch.empty_like, torch.Tensor.new_empty)
        return result.fill_(torch.nan) if is_empty else result


def calls(run: Callable[..., object], *arguments: object) -> int:
    with Calls() as counter:
        run(*arguments)
    return counter.count


def addresses(model: torch.nn.Module) -> list[tuple[Any, ...]]:
    """The address and the dtype of each tensor, scalings included, and whether it is trained."""
    tables = [vars(model), *(layer.scaling for layer in model.modules() if hasattr(layer, "lora_A"))]
    others = [value for table in tables for value in table.values() if torch.is_tensor(value)]
    return [(t.data_ptr(), t.dtype, t.requires_grad) for t in (*model.parameters(), *model.buffers(), *others)]


def train_every_second(model: torch.nn.Module) -> None:
    """Turn gradients on for every second parameter. These can only be written to where gradients are off."""
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad = number % 2 == 0


def called(grad: bool, yours: Callable[..., Any], *arguments: object) -> Any:
    """Call the reader's function with gradients on or off. Raise if it leaves them changed."""
    with torch.set_grad_enabled(grad):
        result = yours(*arguments)
        if torch.is_grad_enabled() != grad:
            raise RuntimeError(f"gradients are no longer {'on' if grad else 'off'}")
        return result


def same_outputs(yours: torch.Tensor, expected: torch.Tensor, name: str = "logits") -> tuple[str, ...]:
    return first_difference({name: yours}, {name: expected})


def visits(model: PeftModel, swap: Callable[[str], object], call: Callable | None = None) -> Iterator[tuple[Any, ...]]:
    """Swap each adapter in, forwards and backwards, and compare with fresh loads."""
    before = addresses(model)
    for number, name in enumerate([*FOLDERS, *reversed(FOLDERS)]):
        called(number % 2 > 0, swap, name)
        yield name, *same_as_fresh(model, fresh(name), IDS, call)
    yield "all tensors stay at their addresses, trained as before", addresses(model) == before, True


def compiled_visits(model: PeftModel, swap: Callable[[str], object]) -> Iterator[tuple[Any, ...]]:
    """:func:`visits` in a compiled model."""
    torch.compiler.reset()
    uncompiled = uncompiled_calls(model)
    compiled = torch.compile(model, backend="eager", dynamic=False)
    compiled(IDS)
    with RecompileWatch() as watch:
        # after a recompile, each further swap would take a second, too
        yield from itertools.takewhile(lambda _: not watch.recompiles, visits(model, swap, compiled))
    yield "recompiles", str(watch).strip(), "0 compiled, 0 recompiles"
    yield "calls that are not compiled", len(uncompiled), 0


@Exercise
@torch.no_grad()
def part_01(text):
    """read: a folder's tensors and scalings, layer by layer."""
    mini = built("01", text)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # two of the keys match nothing, on purpose
        # by these keys, "ends in", "is in", "the last that matches" and "a name before a pattern" are wrong
        alphas = {"p_proj": 3, "mlp": 5, r"layers\.[12]\..*_proj": 7, "layers.1.mlp.up_proj": 9}
        alphas |= {r"^model\.layers\.0\.self_attn\.v_proj": 6, "q_proj|down_proj": 11, "model.layers.0.mlp.up_proj": 4}
        alphas |= {"up_proj": 13, "model.layers.2.mlp.up_proj": 15}
        options: dict[str, Any] = dict(alpha_pattern=alphas, rank_pattern={r"layers\.[13].*": 5}, use_rslora=True)
        lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, **options)
        plain = LoraConfig(r=2, target_modules=["linear"], init_lora_weights=False)
        folders, models = dict(FOLDERS), {name: fresh(name) for name in FOLDERS}
        for name, config, make in (
            ("patterns", lora, demo.load_base),
            ("a layer called linear", plain, lambda: torch.nn.ModuleDict({"linear": torch.nn.Linear(4, 4)})),
        ):
            folders[name] = f"{folder}/{name}"
            get_peft_model(make(), config).save_pretrained(folders[name])
            models[name] = PeftModel.from_pretrained(make(), folders[name])
        for name, model in models.items():
            yours: dict[str, Any] = {}
            for path, values in mini.read(folders[name]).items():
                yours |= zip((f"{path}.lora_A", f"{path}.lora_B", f"{path}.scaling"), values, strict=True)
            yield f"read {name}", *first_difference(yours, tensors_of(model))
            types = {type(value) for key, value in yours.items() if key.endswith("scaling")}
            yield "scalings are Python numbers", types <= {int, float}, True


@Exercise
@torch.no_grad()
def part_01b(text):
    """plan and write: a swap into a model that has the right shapes, or a refusal."""
    mini = built("01b", text)
    live = demo.load("reverse")[0]
    train_every_second(live)
    for name in ("vowels_up", "shout", "reverse"):
        for layer in mini.layers_of(live).values():
            layer.lora_B["default"].weight.fill_(torch.inf)  # infinity times zero is not zero
        before, places, new = tensors_of(live), addresses(live), mini.read(FOLDERS[name])
        layers, writes = len(new), mini.plan(live, new)
        yield f"planning {name} changes nothing", *first_difference(tensors_of(live), before)
        yield f"layers of {name} after planning it", len(new), layers
        called(name != "shout", mini.write, writes)
        yield f"write {name}", *same_as_fresh(live, fresh(name), IDS)
        yield "all tensors stay at their addresses, trained as before", addresses(live) == places, True
        yield "triples for a layer, whether or not the adapter has it", len(writes) / len(before) * 3, 3
        weights = [(table[key], value) for table, key, value in writes if key == "weight"]
        fitting = [
            isinstance(target, torch.nn.Parameter) and getattr(value, "shape", None) == target.shape
            for target, value in weights
        ]
        yield "places that are no parameters, or get something of another shape", len(weights) - sum(fitting), 0
    half = {path: values for number, (path, values) in enumerate(mini.read(FOLDERS["sort"]).items()) if number % 2}
    yield "planning half of sort, of several ranks", refused(lambda: mini.plan(demo.load("sort")[0], half)), "no error"
    new, before = mini.read(FOLDERS["vowels_up"]), tensors_of(live)
    new = {path: (a, b, number + 0.25) for number, (path, (a, b, _)) in enumerate(new.items())}
    planned = {float(value) for _, key, value in mini.plan(live, new) if key == "default"}
    yield "scalings that differ, all in the plan", planned >= {scaling for *_, scaling in new.values()}, True
    last = max(new)
    a, b, scaling = new[last]
    lower_rank, one_more = new | {last: (a[:3], b[:, :3], scaling)}, new | {"lm_head": new[last]}
    renamed = {path.replace(last, last.replace("layers.3", "layers.9")): values for path, values in new.items()}
    for mistake, wrong in (("another rank", lower_rank), ("a layer more", one_more), ("another layer", renamed)):
        yield mistake, refused(lambda wrong=wrong: mini.plan(live, wrong)), "ValueError"
        yield f"after {mistake}, nothing is written", *first_difference(tensors_of(live), before)
    tensor = torch.tensor(1.0, dtype=torch.float64)
    address, table = tensor.data_ptr(), {"default": tensor}
    mini.write([(table, "default", 0.375)])
    state = table["default"] is tensor, tensor.data_ptr() == address, float(tensor), tensor.dtype, tensor.requires_grad
    expected = True, True, 0.375, torch.float64, False
    yield "a scaling that is a tensor: the same one, its memory, value, dtype, whether it is trained", state, expected
    mini.padded = lambda values, room: torch.full_like(room, 7)
    sevens = [bool((value == 7).all()) for _, key, value in mini.plan(live, new) if key == "weight"]
    yield "tensors in a plan that padded has made", sum(sevens), len(sevens)


def prepared(mini: ModuleType) -> tuple[PeftModel, dict[str, Any]]:
    family = {name: mini.read(folder) for name, folder in FOLDERS.items()}
    return mini.prepare(demo.load_base(), [*family.values()]), family


def with_sort(mini: ModuleType) -> tuple[PeftModel, dict[str, Any]]:
    """A prepared model with an adapter in it, and its scalings as tensors."""
    model, family = prepared(mini)
    mini.write(mini.plan(model, family["sort"]))
    return mini.scalings_as_tensors(model), family


@Exercise
@torch.no_grad()
def part_02(text):
    """padded and prepare: one memory for a family."""
    mini = built("02", text)
    values, room = torch.arange(1.0, 7).view(2, 3), torch.full((4, 5), torch.inf, dtype=torch.half)
    expected = torch.nn.functional.pad(values, (0, 2, 0, 2)).half()
    yours = mini.padded(values, room)
    yield "2 x 3 in 4 x 5", *first_difference({"padded": yours}, {"padded": expected})
    yield "values and room stay as they are", (values.sum().item(), room.min().item()), (21.0, torch.inf)
    yield "the dtype, also where all is full", {yours.dtype, mini.padded(room.float(), room).dtype}, {room.dtype}
    yield "a new tensor, also where all is full", mini.padded(room, room).data_ptr() == room.data_ptr(), False
    for rows, columns in ((5, 4), (4, 6), (3, 6)):
        no_place = refused(lambda rows=rows, columns=columns: mini.padded(torch.ones(rows, columns), room))
        yield f"{rows} x {columns} has no place in 4 x 5", no_place, "ValueError"
    # two adapters with different ranks in each layer, where now the one has the higher rank, now the other; 0: no layer
    whole = mini.read(FOLDERS["pig_latin"])
    ranks = {path: (n % 7, n % 5) for n, path in enumerate(whole) if n % 3}
    adapters: list[dict[str, Any]] = [{}, {}]
    for path, ranks_of_layer in ranks.items():
        a, b, _ = whole[path]
        for adapter, rank in zip(adapters, ranks_of_layer, strict=True):
            if rank:
                adapter[path] = a[:rank], b[:, :rank], 1.0
    model = mini.prepare(base := demo.load_base(), adapters)
    yield "training", model.training, False
    yield "the model is around the base that you are given", model.get_base_model() is base, True
    reserved = {path: len(layer.lora_A["default"].weight) for path, layer in mini.layers_of(model).items()}
    yield "the rank of each layer", *first_difference(reserved, {path: max(pair) for path, pair in ranks.items()})
    model, family = prepared(mini)
    yield from visits(model, lambda name: mini.write(mini.plan(model, family[name])))


@Exercise
@torch.no_grad()
def part_03(text):
    """scalings_as_tensors, in a compiled model."""
    mini = built("03", text)
    model, family = with_sort(mini)
    yield "what you return", type(model).__name__, "PeftModel"
    yield "sort is still in the model", *same_as_fresh(model, fresh("sort"), IDS)
    yield from compiled_visits(model, lambda name: mini.write(mini.plan(model, family[name])))
    split = prepared(mini)[0]
    layers = [*mini.layers_of(split).values()]
    for layer in layers:
        layer.lora_A.to("meta")  # and the rest stays where it is
        layer.lora_B.to("meta")
    layers[0].scaling["default"] = 1
    yield "you return the model itself", (on_meta := mini.scalings_as_tensors(split)) is split, True
    scalings = [torch.as_tensor(layer.scaling["default"]) for layer in mini.layers_of(on_meta).values()]
    kinds = {(scaling.dim(), str(scaling.device)) for scaling in scalings}
    yield "axes and device of each scaling, where the adapter is on meta", kinds, {(0, "meta")}
    yield "scalings in floating point; one was 1, an int", {scaling.is_floating_point() for scaling in scalings}, {True}


@Exercise
@torch.no_grad()
def part_04(text):
    """Pool: a swap is one copy."""
    mini = built("04", text)
    for name, members in ("double", ("pig_latin", "double")), (min(FOLDERS), FOLDERS):
        model, family = with_sort(mini)
        train_every_second(model)
        before = [(parameter.dtype, parameter.requires_grad) for parameter in model.parameters()]
        pool = called(members is FOLDERS, mini.Pool, model, {member: family[member] for member in members})
        after = [(parameter.dtype, parameter.requires_grad) for parameter in model.parameters()]
        places = addresses(model)
        yield "the parameters keep their dtypes, and are trained as before", after == before, True
        yield "making the pool changes nothing", *same_as_fresh(model, fresh("sort"), IDS)
        for which in ("first", "same"):
            mini.write(mini.plan(model, family["sort"]))
            for layer in mini.layers_of(model).values():
                b = layer.lora_B["default"].weight
                b[b != 0] = torch.inf  # stays infinite if a difference is added
            pool.swap(name)
            yield f"the {which} swap, to {name}", *same_as_fresh(model, fresh(name), IDS)
        yield "no swap moves a tensor", addresses(model) == places, True
    mini.Pool(half := with_sort(mini)[0].bfloat16(), family).swap("shout")
    yield "parameters in half precision stay so", {p.dtype for p in half.parameters()}, {torch.bfloat16}
    firsts = {path: layer.lora_A["default"].weight[0] for path, layer in mini.layers_of(half).items()}
    same = all(torch.equal(firsts[path], a[0].bfloat16()) for path, (a, _, _) in family["shout"].items())
    yield "a swap in half precision arrives", same, True
    most = max(calls(pool.swap, name) for name in FOLDERS)
    yield from compiled_visits(model, pool.swap)
    yield "calls of PyTorch in a swap", f"{most}" if most > 20 else "20 at most", "20 at most"


@Exercise
@torch.no_grad()
def part_08(text):
    """Rows: in each row of a batch its own adapter."""
    mini = built("08", text)
    base, adapters = demo.load_base(), {name: mini.read(folder) for name, folder in FOLDERS.items()}
    used = {path: base.get_submodule(path) for adapter in adapters.values() for path in adapter}
    with Calls():
        layers = {path: mini.Rows(linear, 8, 32) for path, linear in used.items()}
    for path, layer in layers.items():
        base.set_submodule(path, layer)
    expected = demo.load_base()(IDS).logits
    yield "no row has an adapter yet", *same_outputs(base(IDS).logits, expected)
    one = layers[min(adapters["pig_latin"])]
    x = torch.randn(8, 2, one.linear.in_features)
    graph = make_fx(one)(x)
    # row 0 has one adapter after the other: with the same layers, with others, larger, smaller, the same again
    names = ["pig_latin", "double", "caesar", "pig_latin", "pig_latin", "caesar", "double"]
    assignments = [(0, name) for name in names] + [*enumerate(FOLDERS), *zip(range(7, -1, -1), FOLDERS, strict=True)]
    for row, name in assignments:
        for path, layer in layers.items():
            nothing = torch.zeros(1, used[path].in_features), torch.zeros(used[path].out_features, 1), 0.0
            called(row % 2 > 0, layer.assign, row, *adapters[name].get(path, nothing))
        expected[row] = fresh(name)(IDS).logits[row]
        yield f"{name} in row {row}", *same_outputs(base(IDS).logits, expected)
    yield "x of shape (rows, inputs)", *same_outputs(one(x[:, 0]), one(x)[:, 0], "y")
    yield "a graph from before reads the same memory", *same_outputs(graph(x), one(x), "y")
    # a layer with a bias and one output, and texts of one token, as while generating
    with torch.random.fork_rng():  # the reader's random numbers stay theirs
        torch.manual_seed(0)
        biased, token = torch.nn.Linear(6, 1), torch.randn(3, 1, 6)
        layer, (a, b) = mini.Rows(biased, 3, 2), (torch.randn(2, 6), torch.randn(1, 2))
    yield "a bias, and texts of one token", *same_outputs(layer(token), biased(token), "y")
    places = addresses(layer)
    layer.assign(1, a * torch.inf, b * torch.inf, 1.0)
    yield "all tensors stay at their addresses", addresses(layer) == places, True
    layer.assign(2, 1e5 * a, b, 1e-5)  # float16 can't hold it
    expected = biased(token)
    expected[2] += token[2] @ a.T @ b.T
    layer.assign(1, a := a[:1].bfloat16(), b := b[:, :1].bfloat16(), 1 / 3)
    expected[1] += token[1] @ a.float().T @ b.float().T / 3
    yield "rank 1 in half precision, where infinity was", *same_outputs(layer(token), expected, "y")
    yield "x of shape (rows, inputs), one output", *same_outputs(layer(token[:, 0]), expected[:, 0], "y")
    higher = torch.ones(3, 6), torch.ones(1, 3), 1.0
    yield "rank 3 is refused", refused(lambda: layer.assign(1, *higher)) != "no error", True
    yield "nothing is written before a refusal", *same_outputs(layer(token), expected, "y")
    few, many = (calls(mini.Rows(one.linear, rows, 4), x[:rows]) for rows in (2, 8))
    yield "calls of PyTorch for eight rows, and for two", (many, few), (few, few)


PARTS = {name.removeprefix("part_"): value for name, value in list(globals().items()) if isinstance(value, Exercise)}
