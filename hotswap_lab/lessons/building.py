"""The file that the reader builds from chapter 01 to 08, ``my_hotswap.py``: a cell for each part, checked, then kept.

A notebook begins with ``%load_ext hotswap_lab.lessons.building``. A cell that begins with ``%%part 02`` is the part of
chapter 02: it is tried together with all parts before it. If it is right, it is kept in ``my_hotswap.py`` next to the
notebook. Parts that aren't there, as on Colab, where each notebook is a new machine, are those of the solution.
A cell that begins with ``%%fresh 02`` runs in a new process, which can import that file, up to chapter 02.
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

#: what the reader has built so far
MINE = Path("my_hotswap.py")
#: in a wheel next to this file, in a checkout next to the other solutions
SOLUTION = Path(__file__).with_name("mini_hotswap.py")
if not SOLUTION.exists():
    SOLUTION = Path(__file__).parents[2] / "notebooks" / "solutions" / "mini_hotswap.py"

#: what is behind the name of a part that isn't the reader's
LENT = ", the solution's"

#: the ``padded`` of chapter 01; that of 02 takes its place
GIVEN = """
def padded(values, room):
    if values.shape != room.shape:
        raise ValueError(f"a tensor of shape {(*values.shape,)} has no place in {(*room.shape,)}")
    return values
"""


def load_ipython_extension(ipython: Any) -> None:
    """Defines ``%%part`` and ``%%fresh``, for ``%load_ext``."""

    def magic(chapter: str, text: str) -> None:
        part(chapter, text)
        with contextlib.suppress(Exception):  # the check has told it
            ipython.push({"mini": built(chapter, text)})

    ipython.register_magic_function(magic, "cell", "part")
    ipython.register_magic_function(in_new_process, "cell", "fresh")


def part(chapter: str, text: str) -> None:
    """Check a chapter's part; if it is right, keep it in :data:`MINE`."""
    if PARTS[chapter].is_right(text):
        MINE.write_text(as_file(max([chapter, *parts_of_yours()]), {chapter: text}))
        print(f"It is in {MINE} now.")


def as_file(chapter: str, own: Mapping[str, str]) -> str:
    """All parts up to a chapter's, yours or the solution's, as a file that can be imported.

    >>> exec(as_file("01b", {}), {})
    """
    parts, yours = parts_up_to(chapter, own), {"", *parts_of_yours(), *own}
    marked = {f"# ---- {name}{'' if name in yours else LENT}": text.strip() for name, text in parts.items()}
    return "\n\n".join(f"{mark}\n\n{text}\n" for mark, text in marked.items())


def in_new_process(chapter: str, code: str) -> None:
    """Run code in a new process that can import your file, up to a chapter's part, and print what it prints.

    >>> in_new_process("01b", "import my_hotswap; print(my_hotswap.NAME)")
    of the solution, not of yours: 01, 01b
    default
    """
    if lent := [name for name in parts_up_to(chapter, {}) if name and name not in parts_of_yours()]:
        print(f"of the solution, not of yours: {', '.join(lent)}")
    with tempfile.TemporaryDirectory() as place:
        Path(place, MINE.name).write_text(as_file(chapter, {}))
        code = f"import sys; sys.path[:0] = {[place, *sys.path]}\n{code}"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    print((done.stdout + (done.stderr if done.returncode else "")).rstrip())


def parts_of(file: Path) -> dict[str, str]:
    """The parts of a file by chapter; in front of the first one, by "", what all of them import."""
    first, *others = re.split(r"^# ---- (\w*).*\n", file.read_text(), flags=re.MULTILINE)
    return {"": first} | dict(zip(others[::2], others[1::2], strict=True))


def parts_of_yours() -> dict[str, str]:
    parts = parts_of(MINE) if MINE.exists() else {}
    return {name: text for name, text in parts.items() if name and f"# ---- {name}{LENT}\n" not in MINE.read_text()}


def solution(chapter: str) -> Source:
    """A chapter's part of ``mini_hotswap.py``.

    >>> print(solution("03")[:54])
    def scalings_as_tensors(model: PeftModel) -> PeftModel
    """
    return Source(parts_of(SOLUTION)[chapter].strip())


def parts_up_to(chapter: str, own: Mapping[str, str]) -> dict[str, str]:
    """The parts up to a chapter's: these, or yours, or the solution's; first what all of them import, with GIVEN."""
    parts = parts_of(SOLUTION) | parts_of_yours() | own
    parts[""] += GIVEN
    return {name: text for name, text in sorted(parts.items()) if name <= chapter}


def built(chapter: str, text: str | None = None) -> ModuleType:
    """All parts up to a chapter's as a module: yours, or the solution's where you have none.

    Parameters
    ----------
    text:
        The part of this chapter, which is to be tried. Default: yours or the solution's, as for the others.

    >>> len(built("01").read(demo.adapter_path("double")))
    16
    """
    module = ModuleType("my_hotswap")
    for name, each in parts_up_to(chapter, {} if text is None else {chapter: text}).items():
        file = f"<part {name or 'given'}>"
        linecache.cache[file] = len(each), None, each.splitlines(True), file  # for what is said of an error
        exec(compile(each, file, "exec"), module.__dict__)
    return module


# --- checks --------------------------------------------------------------------------------------------------------

FOLDERS = {name: demo.adapter_path(name) for name in demo.adapter_names()}
IDS = torch.arange(96).view(8, 12) % 90 + 4
fresh: Callable[[str], PeftModel] = functools.cache(lambda name: demo.load(name)[0])


class Calls(TorchFunctionMode):
    """Counts the calls of PyTorch's functions. What ``torch.empty`` gives holds NaN, not zeros by chance."""

    count: int = 0

    def __torch_function__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += getattr(operation, "__name__", "") != "_set_grad_enabled"  # as no_grad does
        made = operation(*args, **(kwargs or {}))
        return made.fill_(torch.nan) if operation in (torch.empty, torch.empty_like, torch.Tensor.new_empty) else made


def calls(run: Callable[..., object], *arguments: object) -> int:
    with Calls() as counted:
        run(*arguments)
    return counted.count


def addresses(model: torch.nn.Module) -> list[tuple[Any, ...]]:
    """Where the tensors are, of which dtype, and whether they are trained."""
    tables = [vars(model), *(each.scaling for each in model.modules() if hasattr(each, "lora_A"))]
    own = [each for table in tables for each in table.values() if torch.is_tensor(each)]
    return [(t.data_ptr(), t.dtype, t.requires_grad) for t in (*model.parameters(), *model.buffers(), *own)]


def called(on: bool, yours: Callable[..., Any], *arguments: object) -> Any:
    """What the reader's function gives where gradients are on, or off. It has to leave them so."""
    with torch.set_grad_enabled(on):
        made = yours(*arguments)
        if torch.is_grad_enabled() != on:
            raise RuntimeError(f"gradients are no longer {'on' if on else 'off'}")
        return made


def visits(model: PeftModel, swap: Callable[[str], object], call: Callable | None = None) -> Iterator[tuple[Any, ...]]:
    """Swap each adapter in, forwards and backwards, and compare with fresh loads."""
    before = addresses(model)
    for number, name in enumerate([*FOLDERS, *reversed(FOLDERS)]):
        called(number % 2 > 0, swap, name)
        yield name, *same_as_fresh(model, fresh(name), IDS, call)
    yield "all tensors stay at their addresses, trained as before", addresses(model) == before, True


def compiled_visits(model: PeftModel, swap: Callable[[str], object]) -> Iterator[tuple[Any, ...]]:
    """The same in a compiled model."""
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
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # two of the keys match nothing, on purpose
        # by these keys, "ends in", "is in", "the last that matches" and "a name before a pattern" are wrong
        own = {"p_proj": 3, "mlp": 5, r"layers\.[12]\..*_proj": 7, "layers.1.mlp.up_proj": 9}
        own |= {r"^model\.layers\.0\.self_attn\.v_proj": 6, "q_proj|down_proj": 11, "model.layers.0.mlp.up_proj": 4}
        own |= {"up_proj": 13, "model.layers.2.mlp.up_proj": 15}
        more: dict[str, Any] = dict(alpha_pattern=own, rank_pattern={r"layers\.[13].*": 5}, use_rslora=True)
        lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, **more)
        plain = LoraConfig(r=2, target_modules=["linear"], init_lora_weights=False)
        truths = {name: fresh(name) for name in FOLDERS}
        for name, config, make in (
            ("patterns", lora, demo.load_base),
            ("a layer called linear", plain, lambda: torch.nn.ModuleDict({"linear": torch.nn.Linear(4, 4)})),
        ):
            get_peft_model(make(), config).save_pretrained(f"{place}/{name}")
            truths[name] = PeftModel.from_pretrained(make(), f"{place}/{name}")
        for name, truth in truths.items():
            folder = FOLDERS.get(name, f"{place}/{name}")
            yours: dict[str, Any] = {}
            for path, values in mini.read(folder).items():
                yours |= zip((f"{path}.lora_A", f"{path}.lora_B", f"{path}.scaling"), values, strict=True)
            yield f"read {name}", *first_difference(yours, tensors_of(truth))
            kinds = {type(each) for key, each in yours.items() if key.endswith("scaling")}
            yield "scalings are Python numbers", kinds <= {int, float}, True


@Exercise
@torch.no_grad()
def part_01b(text):
    """plan and write: a swap into a model that has the right shapes, or a refusal."""
    mini = built("01b", text)
    live = demo.load("reverse")[0]
    for number, each in enumerate(live.parameters()):
        each.requires_grad = number % 2 == 0  # these are only written to where gradients are off
    for name in ("vowels_up", "shout", "reverse"):
        for each in mini.layers_of(live).values():
            each.lora_B["default"].weight.fill_(torch.inf)  # zeros are not what was there times zero
        before, places, new = tensors_of(live), addresses(live), mini.read(FOLDERS[name])
        layers, writes = len(new), mini.plan(live, new)
        yield f"planning {name} changes nothing", *first_difference(tensors_of(live), before)
        yield f"layers of {name} after planning it", len(new), layers
        called(name != "shout", mini.write, writes)
        yield f"write {name}", *same_as_fresh(live, fresh(name), IDS)
        yield "all tensors stay at their addresses, trained as before", addresses(live) == places, True
        yield "triples for a layer, whether or not the adapter has it", len(writes) / len(before) * 3, 3
        others = [
            key
            for table, key, value in writes
            if key == "weight"
            and not (isinstance(to := table[key], torch.nn.Parameter) and getattr(value, "shape", 0) == to.shape)
        ]
        yield "places that are no parameters, or get something of another shape", len(others), 0
    half = {path: values for number, (path, values) in enumerate(mini.read(FOLDERS["sort"]).items()) if number % 2}
    yield "planning half of sort, of several ranks", refused(lambda: mini.plan(demo.load("sort")[0], half)), "no error"
    new, before = mini.read(FOLDERS["vowels_up"]), tensors_of(live)
    new = {path: (a, b, number + 0.25) for number, (path, (a, b, _)) in enumerate(new.items())}
    planned = {float(value) for _, key, value in mini.plan(live, new) if key == "default"}
    yield "scalings that differ, all in the plan", planned >= {scaling for *_, scaling in new.values()}, True
    a, b, scaling = new[last := max(new)]
    more = new | {"lm_head": (a, b, scaling)}
    lower, others = new | {last: (a[:3], b[:, :3], scaling)}, new | {last.replace("layers.3", "layers.9"): new[last]}
    del others[last]
    for what, wrong in (("another rank", lower), ("a layer more", more), ("another layer", others)):
        yield what, refused(lambda wrong=wrong: mini.plan(live, wrong)), "ValueError"
        yield f"after {what}, nothing is written", *first_difference(tensors_of(live), before)
    place = (tensor := torch.tensor(1.0, dtype=torch.float64)).data_ptr()
    mini.write([(table := {"default": tensor}, "default", 0.375)])
    filled = table["default"] is tensor, tensor.data_ptr() == place, float(tensor), tensor.dtype, tensor.requires_grad
    expected = True, True, 0.375, torch.float64, False
    yield "a scaling that is a tensor: the same one, its memory, value, dtype, whether it is trained", filled, expected
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
    # two adapters with other ranks in each layer, the higher one now here, now there; 0 is for layers that one lacks
    whole = mini.read(FOLDERS["pig_latin"])
    ranks = {path: (n % 7, n % 5) for n, path in enumerate(whole) if n % 3}
    two = [{p: (whole[p][0][: r[i]], whole[p][1][:, : r[i]], 1.0) for p, r in ranks.items() if r[i]} for i in (0, 1)]
    model = mini.prepare(base := demo.load_base(), two)
    yield "training", model.training, False
    yield "the model is around the base that you are given", model.get_base_model() is base, True
    rooms = {path: len(layer.lora_A["default"].weight) for path, layer in mini.layers_of(model).items()}
    yield "the rank of each layer", *first_difference(rooms, {path: max(each) for path, each in ranks.items()})
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
    for each in mini.layers_of(split).values():
        each.lora_A.to("meta")  # and the rest stays where it is
        each.lora_B.to("meta")
    next(iter(mini.layers_of(split).values())).scaling["default"] = 1
    yield "you return the model itself", (on_meta := mini.scalings_as_tensors(split)) is split, True
    scalings = [torch.as_tensor(each.scaling["default"]) for each in mini.layers_of(on_meta).values()]
    kinds = {(each.dim(), str(each.device)) for each in scalings}
    yield "axes and device of each scaling, where the adapter is on meta", kinds, {(0, "meta")}
    yield "scalings in floating point; one was 1, an int", {each.is_floating_point() for each in scalings}, {True}


@Exercise
@torch.no_grad()
def part_04(text):
    """Pool: a swap is one copy."""
    mini = built("04", text)
    for name, some in ("double", ("pig_latin", "double")), (min(FOLDERS), FOLDERS):
        model, family = with_sort(mini)
        for number, each in enumerate(model.parameters()):
            each.requires_grad = number % 2 == 0
        before = [(each.dtype, each.requires_grad) for each in model.parameters()]
        pool = called(some is FOLDERS, mini.Pool, model, {each: family[each] for each in some})
        after, places = [(each.dtype, each.requires_grad) for each in model.parameters()], addresses(model)
        yield "the parameters keep their dtypes, and are trained as before", after == before, True
        yield "making the pool changes nothing", *same_as_fresh(model, fresh("sort"), IDS)
        for which in ("first", "same"):
            mini.write(mini.plan(model, family["sort"]))
            for each in mini.layers_of(model).values():
                (b := each.lora_B["default"].weight)[b != 0] = torch.inf  # a difference that is added keeps it
            pool.swap(name)
            yield f"the {which} swap, to {name}", *same_as_fresh(model, fresh(name), IDS)
        yield "no swap moves a tensor", addresses(model) == places, True
    mini.Pool(half := with_sort(mini)[0].bfloat16(), family).swap("shout")
    yield "parameters in half precision stay so", {each.dtype for each in half.parameters()}, {torch.bfloat16}
    firsts = {path: layer.lora_A["default"].weight[0] for path, layer in mini.layers_of(half).items()}
    same = all(torch.equal(firsts[path], a[0].bfloat16()) for path, (a, _, _) in family["shout"].items())
    yield "a swap in half precision arrives", same, True
    most = max(calls(pool.swap, name) for name in FOLDERS)  # the first of most, too
    yield from compiled_visits(model, pool.swap)
    yield "calls of PyTorch in a swap", f"{most}" if most > 20 else "20 at most", "20 at most"


@Exercise
@torch.no_grad()
def part_08(text):
    """Rows: in each row of a batch its own adapter."""
    mini = built("08", text)
    base, adapters = demo.load_base(), {name: mini.read(folder) for name, folder in FOLDERS.items()}
    used = {path: base.get_submodule(path) for each in adapters.values() for path in each}
    with Calls():
        layers = {path: mini.Rows(linear, 8, 32) for path, linear in used.items()}
    for path, layer in layers.items():
        base.set_submodule(path, layer)
    expected = demo.load_base()(IDS).logits
    yield "no row has an adapter yet", *first_difference({"logits": base(IDS).logits}, {"logits": expected})
    one = layers[min(adapters["pig_latin"])]
    x = torch.randn(8, 2, one.linear.in_features)
    graph = make_fx(one)(x)
    # row 0 has one adapter after the other: with the same layers, with others, larger, smaller, the same again
    before = ["pig_latin", "double", "caesar", "pig_latin", "pig_latin", "caesar", "double"]
    turns = [(0, name) for name in before] + [*enumerate(FOLDERS)]
    for row, name in [*turns, *((7 - row, name) for row, name in enumerate(FOLDERS))]:
        for path, layer in layers.items():
            nothing = torch.zeros(1, used[path].in_features), torch.zeros(used[path].out_features, 1), 0.0
            called(row % 2 > 0, layer.assign, row, *adapters[name].get(path, nothing))
        expected[row] = fresh(name)(IDS).logits[row]
        yield f"{name} in row {row}", *first_difference({"logits": base(IDS).logits}, {"logits": expected})
    yield "x of shape (rows, inputs)", *first_difference({"y": one(x[:, 0])}, {"y": one(x)[:, 0]})
    yield "a graph from before reads the same memory", *first_difference({"y": graph(x)}, {"y": one(x)})
    # a layer with a bias and one output, and texts of one token, as while generating
    with torch.random.fork_rng():  # the reader's random numbers stay theirs
        torch.manual_seed(0)
        biased, token = torch.nn.Linear(6, 1), torch.randn(3, 1, 6)
        layer, (a, b) = mini.Rows(biased, 3, 2), (torch.randn(2, 6), torch.randn(1, 2))
    yield "a bias, and texts of one token", *first_difference({"y": layer(token)}, {"y": biased(token)})
    places = addresses(layer)
    layer.assign(1, a * torch.inf, b * torch.inf, 1.0)
    yield "all tensors stay at their addresses", addresses(layer) == places, True
    layer.assign(2, 1e5 * a, b, 1e-5)  # float16 can't hold it
    (expected := biased(token))[2] += token[2] @ a.T @ b.T
    layer.assign(1, a := a[:1].bfloat16(), b := b[:, :1].bfloat16(), 1 / 3)
    expected[1] += token[1] @ a.float().T @ b.float().T / 3
    yield "rank 1 in half precision, where infinity was", *first_difference({"y": layer(token)}, {"y": expected})
    yield "x of shape (rows, inputs), one output", *first_difference({"y": layer(token[:, 0])}, {"y": expected[:, 0]})
    higher = torch.ones(3, 6), torch.ones(1, 3), 1.0
    yield "rank 3 is refused", refused(lambda: layer.assign(1, *higher)) != "no error", True
    yield "nothing is written before a refusal", *first_difference({"y": layer(token)}, {"y": expected})
    few, many = (calls(mini.Rows(one.linear, rows, 4), x[:rows]) for rows in (2, 8))
    yield "calls of PyTorch for eight rows, and for two", (many, few), (few, few)


PARTS = {name.removeprefix("part_"): each for name, each in list(globals().items()) if isinstance(each, Exercise)}
