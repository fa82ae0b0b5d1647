"""How long a swap takes, each way of doing it, in one run on one machine.

python -m hotswap_lab.bench
python -m hotswap_lab.bench --model tiny --rank 4 --n 5
python -m hotswap_lab.bench --rank 64 --compiled --spread --memory 10000 --json bench.json --plot bench.svg

The weights are random: a swap copies them and never looks at what they mean. The ways take turns, a few calls each, so
that whatever else the machine does in between hits all of them alike. Each goes back and forth between two adapters,
and is checked before against ``PeftModel.from_pretrained`` of both.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import gc
import itertools
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter as peft_hotswap
from peft.utils.hotswap import hotswap_adapter_from_state_dict as peft_hotswap_from_state_dict
from peft.utils.hotswap import prepare_model_for_compiled_hotswap as peft_prepare

from . import demo
from .adapter import Adapter
from .backend import pick_backend
from .hotswap import hotswap_adapter, hotswap_adapter_from_state_dict
from .lessons.figures import FROZEN, MUTED, NEW, OFF, OLD, Canvas, Figure
from .pool import HISTORY, AdapterPool
from .prepare import prepare_model_for_compiled_hotswap
from .timing import Timing, machine, measure
from .version import __version__
from .watch import RecompileWatch

MODELS = ("smollm2", "demo", "tiny")
DTYPES = ("float32", "bfloat16", "float16")
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

#: how far an output may be from a fresh load's, as a part of the largest one: layouts differ, and so does rounding
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}

#: the two ways that the others are compared with
PEFT_STATE_DICT = "PEFT hotswap, state dict"
MEMCPY = "memcpy of the same bytes"

#: calls of one way before it is another one's turn
PER_ROUND = 5
#: how often a recompile is timed: it takes seconds to minutes
RECOMPILES = 3
#: the share of the time spent waiting for a core from which on the machine was too busy to trust the table
BUSY = 0.02


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Parameters
    ----------
    model:
        The shape: ``"smollm2"`` (SmolLM2-135M, with a small vocabulary), ``"demo"`` (the embedded model), ``"tiny"``.
    layers:
        Another number of layers than the model has.
    ranks:
        The ranks of the adapters; one table for each.
    target_rank:
        The rank that prepared models have room for. Default: that of the adapters.
    dtype:
        Of model and adapters: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
    device:
        Where the model is. The adapters are in files, or in the CPU's memory.
    threads:
        How many threads torch may use.
    n:
        Timed calls of each way.
    compiled:
        Whether to time compiled models too. This forgets everything that was compiled in the process before.
    backend:
        The compiler. Default: what :func:`hotswap_lab.pick_backend` finds.
    tokens:
        The length of the input where a forward call is timed.
    memory:
        After how many swaps to look whether the process has grown. 0: not at all.
    spread:
        Whether to time the same bytes over ten times as many tensors.
    """

    model: str = "smollm2"
    layers: int | None = None
    ranks: tuple[int, ...] = (8, 64)
    target_rank: int | None = None
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 2
    n: int = 25
    compiled: bool = False
    backend: str | None = None
    tokens: int = 64
    memory: int = 0
    spread: bool = False

    def __post_init__(self) -> None:
        if self.model not in MODELS or self.dtype not in DTYPES:
            raise ValueError(
                f"model must be one of {MODELS}, dtype one of {DTYPES}: got {self.model!r}, {self.dtype!r}"
            )
        if not self.ranks or (self.target_rank is not None and self.target_rank < max(self.ranks)):
            raise ValueError(f"ranks must hold one rank or more, none above target_rank: got {self.ranks}")
        numbers = (*self.ranks, self.n, self.threads, self.tokens, 1 if self.layers is None else self.layers)
        if min(numbers) < 1 or self.memory < 0:
            raise ValueError("ranks, n, threads, tokens and layers must be 1 or more, memory 0 or more")


# ---- what comes out


@dataclass(frozen=True)
class Row:
    """One way of swapping adapters of one rank.

    Parameters
    ----------
    rank, way:
        What was timed.
    state:
        ``"right"``, ``"wrong"`` (no error, but other outputs than a fresh load) or ``"refused"`` (not timed).
    timing:
        Seconds of one call.
    as_fast:
        How many times as fast as PEFT's hotswap from a state dict.
    times_memcpy:
        How many times as long as copying the same bytes.
    note:
        The error, if it was refused.
    """

    rank: int
    way: str
    state: str
    timing: Timing | None = None
    as_fast: float | None = None
    times_memcpy: float | None = None
    note: str = ""

    @property
    def cells(self) -> tuple[str, ...]:
        """The row as the table shows it."""
        if self.timing is None:
            return self.way, self.state, "", "", "", ""
        return (
            self.way if self.state == "right" else f"{self.way} ({self.state})",
            f"{self.timing.median * 1000:.3f}",
            f"{self.timing.minimum * 1000:.3f}",
            str(self.timing.n),
            _factor(self.as_fast),
            _factor(self.times_memcpy),
        )


def _factor(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}" if value < 1 else f"{value:.3g}"


@dataclass(frozen=True)
class Size:
    """How large an adapter of one rank is: in its file, and packed by a pool."""

    rank: int
    tensors: int
    nbytes: int
    packed_nbytes: int

    def __str__(self) -> str:
        own, packed = self.nbytes / 1e6, self.packed_nbytes / 1e6
        return f"rank {self.rank}: {self.tensors} tensors, {own:.3g} MB per adapter, {packed:.3g} MB packed"


@dataclass(frozen=True)
class Extra:
    """A further measurement: a line to read, and its numbers (times in seconds)."""

    name: str
    rank: int
    text: str
    values: Mapping[str, object]


@dataclass(frozen=True)
class Report:
    """What :func:`run` measured. Shows itself as text.

    Parameters
    ----------
    machine:
        Hardware, threads and the versions that matter most, in one line.
    versions:
        Of every package that takes part.
    settings:
        What was asked for.
    sizes, rows, extras:
        The adapters, the table, and what was measured beyond it.
    """

    machine: str
    versions: Mapping[str, str]
    settings: Settings
    sizes: tuple[Size, ...]
    rows: tuple[Row, ...]
    extras: tuple[Extra, ...] = ()

    COLUMNS = ("way", "median ms", "min ms", "n", "times as fast as PEFT's state dict", "x memcpy")

    def __str__(self) -> str:
        lines = [self.machine, self._shape()]
        for size in self.sizes:
            rows = [row for row in self.rows if row.rank == size.rank]
            lines += ["", str(size), *_aligned([self.COLUMNS, *(row.cells for row in rows)])]
            lines += [f"{row.way} refused: {row.note}" for row in rows if row.note]
            extras = [extra.text for extra in self.extras if extra.rank == size.rank]
            lines += ["", *extras] if extras else []
        return "\n".join(lines)

    def _shape(self) -> str:
        settings = self.settings
        layers = f", {settings.layers} layers" if settings.layers else ""
        room = f"room for rank {settings.target_rank or 'of the adapters'}"
        return f"shape {settings.model}{layers}, {settings.dtype}, {_device_name(settings.device)}, {room}"

    __repr__ = __str__

    def timing(self, way: str, rank: int) -> Timing | None:
        """The time of one way; None if it was refused, or not tried."""
        return next((row.timing for row in self.rows if (row.way, row.rank) == (way, rank)), None)

    @property
    def ok(self) -> bool:
        """Whether all ways but PEFT's gave the outputs of a fresh load."""
        measured = [(row.way, row.state) for row in self.rows]
        measured += [(extra.values["way"], extra.values["state"]) for extra in self.extras if "way" in extra.values]
        return all(state == "right" for way, state in measured if not way.startswith("PEFT"))

    def to_json(self) -> str:
        """Everything, as JSON; times are in seconds."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The report that :meth:`to_json` wrote.

        >>> row = Row(8, MEMCPY, "right", Timing(median=2.0, minimum=1.0, n=3))
        >>> report = Report("a machine", {"torch": "2"}, Settings(), (), (row,))
        >>> Report.from_json(report.to_json()) == report
        True
        """
        found = json.loads(text)
        settings = Settings(**{**found["settings"], "ranks": tuple(found["settings"]["ranks"])})
        rows = [{**row, "timing": row["timing"] and Timing(**row["timing"])} for row in found["rows"]]
        return cls(
            found["machine"],
            found["versions"],
            settings,
            tuple(Size(**size) for size in found["sizes"]),
            tuple(Row(**row) for row in rows),
            tuple(Extra(**extra) for extra in found["extras"]),
        )

    def figure(self) -> Figure:
        """The medians as bars on a logarithmic scale, one panel for each rank."""
        return _bars("One swap", self)


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    lines = []
    for row in table:
        first, *numbers = (
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join([first, *numbers]).rstrip())
    return lines


def _device_name(device: str) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.startswith("cuda") else device


def _bars(title: str, report: Report) -> Figure:
    left, right, top, height, gap = 250, 96, 74, 24, 52
    timed = {size: [row for row in report.rows if row.rank == size.rank and row.timing] for size in report.sizes}
    seconds = [row.timing.median for rows in timed.values() for row in rows]
    # one decade more to the left, so that the shortest bar can be seen
    low, high = math.floor(math.log10(min(seconds))) - 1, math.ceil(math.log10(max(seconds)))
    canvas = Canvas(760, top + sum(len(rows) * height + gap for rows in timed.values()) - gap + 56)
    width = canvas.width - left - right
    canvas.text(canvas.width / 2, 28, f"{title}: {report.settings.model}, {report.settings.dtype}", size=15)
    y = top
    for size, rows in timed.items():
        canvas.text(left, y - 8, str(size), size=12, anchor="start", color=MUTED)
        for decade in range(low, high + 1):
            x = left + width * (decade - low) / (high - low)
            canvas.shapes.append(
                f"<line x1='{x:.1f}' y1='{y}' x2='{x:.1f}' y2='{y + len(rows) * height}' stroke='{FROZEN}'/>"
            )
            canvas.text(x, y + len(rows) * height + 14, _readable(10.0**decade), size=10, color=MUTED)
        for number, row in enumerate(rows):
            length = width * (math.log10(row.timing.median) - low) / (high - low)
            canvas.text(left - 8, y + number * height + 16, row.cells[0], size=12, anchor="end")
            canvas.box(left, y + number * height + 3, length, height - 6, _color(row.way))
            label = _readable(row.timing.median)
            canvas.text(left + length + 6, y + number * height + 16, label, size=12, anchor="start")
        y += len(rows) * height + gap
    canvas.text(canvas.width / 2, canvas.height - 12, report.machine, size=10, color=MUTED)
    listed = ". ".join(
        f"{size}: " + ", ".join(f"{row.cells[0]} {_readable(row.timing.median)}" for row in rows)
        for size, rows in timed.items()
    )
    n = report.settings.n
    return canvas.figure(f"{title}, median of {n}, logarithmic scale. {listed}. Measured on {report.machine}.")


def _color(way: str) -> str:
    if way == MEMCPY:
        return OFF
    return OLD if way.startswith("PEFT") else NEW


def _readable(seconds: float) -> str:
    """
    >>> _readable(2.0), _readable(0.0123), _readable(0.0000456)
    ('2 s', '12.3 ms', '45.6 µs')
    """
    for unit, factor in (("s", 1), ("ms", 1e3), ("µs", 1e6)):
        if seconds * factor >= 0.9995:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


# ---- measuring


def in_rounds(runs: Mapping[str, Callable[[], object]], n: int) -> dict[str, Timing]:
    """Times several functions that take turns, a few calls each, until each was timed ``n`` times.

    An uncounted call of the same function goes ahead of each timed one, so the caches are in the state that the
    function itself leaves them in.

    >>> timings = in_rounds({"short": lambda: sum(range(10)), "long": lambda: sum(range(10000))}, n=7)
    >>> {name: timing.n for name, timing in timings.items()}
    {'short': 7, 'long': 7}
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for start in range(0, n, PER_ROUND):
        for name, run in runs.items():
            for _ in range(min(PER_ROUND, n - start)):
                # one at a time: of more, only their median would be left, and medians can't be merged
                seconds[name].append(measure(run, n=1).median)
    return {name: Timing(statistics.median(each), min(each), n) for name, each in seconds.items()}


@dataclass(frozen=True)
class Way:
    """One way of getting from one adapter to another.

    Parameters
    ----------
    name:
        As the table shows it.
    swap:
        Puts one of the two adapters in, by its number, 0 or 1.
    is_right:
        Whether what is there now is what a fresh load of that adapter gives.
    """

    name: str
    swap: Callable[[int], object]
    is_right: Callable[[int], bool]

    def check(self) -> tuple[str, str]:
        """Swaps to each adapter once. Returns the state, and a note on why it was refused."""
        try:
            states = []
            for number in (1, 0):
                self.swap(number)
                states.append(self.is_right(number))
        except Exception as error:
            # whatever it raises, that is how this way does here; the others are measured all the same
            return "refused", (str(error).strip() or type(error).__name__).splitlines()[0]
        return ("right" if all(states) else "wrong"), ""

    def alternating(self, device: str) -> Callable[[], None]:
        """A function that swaps to the adapter that is not in, and waits until it is there."""
        numbers = itertools.cycle((1, 0))  # the check has left number 0 in
        if torch.device(device).type == "cpu":
            return lambda: self.swap(next(numbers))

        def swap_and_wait() -> None:
            self.swap(next(numbers))
            torch.accelerator.synchronize()

        return swap_and_wait


# ---- what it is measured on


def make_base(settings: Settings) -> torch.nn.Module:
    """A base model of that shape with random weights, the same every time.

    >>> base = make_base(Settings(model="tiny", layers=3))
    >>> len(base.model.layers), base.config.hidden_size
    (3, 32)
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    if settings.model == "demo":
        config = LlamaConfig.from_pretrained(demo.BASE_DIR)
    else:
        hidden, intermediate, layers, heads, kv_heads = {
            "smollm2": (576, 1536, 30, 9, 3),
            "tiny": (32, 64, 2, 4, 2),
        }[settings.model]
        config = LlamaConfig(
            vocab_size=1000,  # plays no part in a swap
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
        )
    config.num_hidden_layers = settings.layers or config.num_hidden_layers
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval().to(settings.device, getattr(torch, settings.dtype))


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Random values for A and B alike: PEFT starts with B = 0, and then no output would show a wrong swap."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                values = torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5
                parameter.copy_(values)


class Scene:
    """A base model, two adapters for it in folders, and what a fresh load of each gives.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     scene = Scene(make_base(Settings(model="tiny")), Settings(model="tiny"), rank=4, folder=folder)
    >>> scene.size.tensors, len(scene.expected)
    (28, 2)
    """

    def __init__(self, base: torch.nn.Module, settings: Settings, rank: int, folder: str):
        self.base, self.settings, self.rank = base, settings, rank
        self.target_rank = settings.target_rank or rank
        self.inputs = self.make_inputs(16)
        # other alphas, so that a swap has to change the scalings too
        self.folders = [self._save(f"{folder}/{number}", number, alpha=rank * (number + 1)) for number in (0, 1)]
        self.expected = [self.outputs(self.load(number)) for number in (0, 1)]
        self.tolerance = TOLERANCE[settings.dtype] * self.expected[0].abs().max().item()
        if (self.expected[0] - self.expected[1]).abs().max() < 10 * self.tolerance:
            raise RuntimeError("the two adapters give nearly the same outputs, so no check could tell them apart")
        adapters = [Adapter.load(folder) for folder in self.folders]
        self.adapters = adapters
        packed = self.pool()
        self.size = Size(rank, len(adapters[0].tensors), adapters[0].nbytes, packed.nbytes // len(packed))

    def make_inputs(self, tokens: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, self.base.config.vocab_size, (1, tokens), generator=generator)
        return ids.to(self.settings.device)

    def copy_of_base(self) -> torch.nn.Module:
        """Modules of its own, on the same weights: nothing here writes to those."""
        shared = {id(tensor): tensor for tensor in (*self.base.parameters(), *self.base.buffers())}
        return copy.deepcopy(self.base, shared)

    def _save(self, folder: str, seed: int, alpha: int) -> str:
        config = LoraConfig(r=self.rank, lora_alpha=alpha, target_modules=list(MODULES))
        model = get_peft_model(self.copy_of_base(), config, autocast_adapter_dtype=False)
        randomize(model, seed)
        model.save_pretrained(folder, save_embedding_layers=False)
        return folder

    def load(self, number: int = 0) -> PeftModel:
        """A fresh load of one of the adapters, by PEFT alone."""
        return PeftModel.from_pretrained(
            self.copy_of_base(),
            self.folders[number],
            torch_device=self.settings.device,
            autocast_adapter_dtype=False,  # half precision stays half precision
        ).eval()

    def load_prepared(self) -> PeftModel:
        model = self.load()
        prepare_model_for_compiled_hotswap(model, target_rank=self.target_rank)
        return model

    def load_prepared_by_peft(self) -> PeftModel:
        model = self.load()
        peft_prepare(model, target_rank=self.target_rank)
        return model

    def pool(self) -> AdapterPool:
        """A pool of both adapters, called ``"0"`` and ``"1"``, for a model of its own."""
        adapters = dict(zip("01", self.folders, strict=True))
        return AdapterPool(self.load(), adapters=adapters, target_rank=self.target_rank, progress=False)

    @torch.no_grad()
    def outputs(self, model: torch.nn.Module, inputs: torch.Tensor | None = None) -> torch.Tensor:
        return model(input_ids=self.inputs if inputs is None else inputs, use_cache=False).logits

    def matches(self, outputs: torch.Tensor, number: int) -> bool:
        return torch.allclose(outputs, self.expected[number], rtol=0, atol=self.tolerance)

    def way(self, name: str, model: torch.nn.Module, swap: Callable[[int], object]) -> Way:
        return Way(name, swap, lambda number: self.matches(self.outputs(model), number))


# ---- the ways


def make_ways(scene: Scene) -> list[Way]:
    """All ways of swapping, each on a model of its own."""
    return [
        peft_load_way(scene),
        peft_hotswap_way(scene),
        peft_state_dict_way(scene),
        disk_way(scene, "hotswap_lab, disk", scene.load()),
        disk_way(scene, "hotswap_lab, disk, prepared", scene.load_prepared()),
        state_dict_way(scene),
        adapter_way(scene),
        pool_way(scene),
        memcpy_way(scene),
    ]


def peft_load_way(scene: Scene) -> Way:
    """Without hotswapping: load under a new name, activate it, delete the old one."""
    model = scene.load()
    return scene.way("PEFT load + set + delete", model, peft_load(scene, model))


def peft_load(scene: Scene, model: PeftModel) -> Callable[[int], None]:
    names = (f"adapter{number}" for number in itertools.count())

    def swap(number: int) -> None:
        old, new = model.active_adapter, next(names)
        model.load_adapter(scene.folders[number], new, torch_device=scene.settings.device, autocast_adapter_dtype=False)
        model.set_adapter(new)
        model.delete_adapter(old)

    return swap


def peft_hotswap_way(scene: Scene) -> Way:
    model = scene.load()
    device = scene.settings.device
    return scene.way(
        "PEFT hotswap, disk",
        model,
        lambda number: peft_hotswap(model, scene.folders[number], adapter_name="default", torch_device=device),
    )


def peft_state_dict_way(scene: Scene) -> Way:
    model = scene.load()
    # PEFT wants the adapter's name in the keys
    named = [
        {key.removesuffix(".weight") + ".default.weight": tensor for key, tensor in adapter.tensors.items()}
        for adapter in scene.adapters
    ]
    return scene.way(
        PEFT_STATE_DICT,
        model,
        lambda number: peft_hotswap_from_state_dict(model, named[number], "default", scene.adapters[number].config),
    )


def disk_way(scene: Scene, name: str, model: PeftModel) -> Way:
    return scene.way(name, model, lambda number: hotswap_adapter(model, scene.folders[number], "default"))


def state_dict_way(scene: Scene) -> Way:
    model, adapters = scene.load_prepared(), scene.adapters
    return scene.way(
        "hotswap_lab, state dict, prepared",
        model,
        lambda number: hotswap_adapter_from_state_dict(
            model, adapters[number].tensors, "default", adapters[number].config
        ),
    )


def adapter_way(scene: Scene) -> Way:
    model = scene.load_prepared()
    return scene.way(
        "hotswap_lab, Adapter, prepared",
        model,
        lambda number: hotswap_adapter(model, scene.adapters[number], "default"),
    )


def pool_way(scene: Scene) -> Way:
    pool = scene.pool()
    return scene.way("hotswap_lab, pool", pool.model, lambda number: pool.swap(str(number)))


def memcpy_way(scene: Scene) -> Way:
    """The bytes of the adapter, as a pool packs them, from one piece of memory to another: nothing can be faster."""
    device, dtype = torch.device(scene.settings.device), getattr(torch, scene.settings.dtype)
    target = torch.zeros(scene.size.packed_nbytes // dtype.itemsize, dtype=dtype, device=device)
    # not zeros, which may be one page of memory shown many times; pinned for a GPU, as a pool's are
    sources = [torch.full(target.shape, number + 1.0, dtype=dtype) for number in (0, 1)]
    sources = [source.pin_memory() if device.type == "cuda" else source for source in sources]
    return Way(
        MEMCPY,
        lambda number: target.copy_(sources[number], non_blocking=True),
        lambda number: torch.equal(target.cpu(), sources[number]),
    )


def measure_ways(scene: Scene) -> list[Row]:
    """The table for one rank."""
    ways = {way.name: way for way in make_ways(scene)}
    checks = {name: way.check() for name, way in ways.items()}
    runs = {name: way.alternating(scene.settings.device) for name, way in ways.items() if checks[name][0] != "refused"}
    timings = in_rounds(runs, scene.settings.n)
    theirs, floor = timings.get(PEFT_STATE_DICT), timings.get(MEMCPY)
    rows = []
    for name, (state, note) in checks.items():
        timing = timings.get(name)
        as_fast = theirs.median / timing.median if timing and theirs else None
        times_memcpy = timing.median / floor.median if timing and floor else None
        rows.append(Row(scene.rank, name, state, timing, as_fast, times_memcpy, note))
    return rows


def waited_for_a_core() -> float | None:
    """Seconds that the threads of this process were ready but had no core to run on; None where nobody counts them."""
    try:
        return sum(int(file.read_text().split()[1]) for file in Path("/proc/self/task").glob("*/schedstat")) / 1e9
    except (OSError, IndexError):
        return None


def measure_waiting(rank: int, run: Callable[[], list[Row]]) -> tuple[list[Row], list[Extra]]:
    """Runs ``run``, and says whether other programs were in its way.

    A copy by two threads that finds one core taken waits for the scheduler: milliseconds, where it takes a fraction of
    one. A median can't show that if it happens at every call.
    """
    before, start = waited_for_a_core(), time.perf_counter()
    rows = run()
    seconds, after = time.perf_counter() - start, waited_for_a_core()
    if not before or not after:  # 0 where the kernel has the file but doesn't count
        return rows, []
    share = (after - before) / seconds
    text = f"waiting for a core that another program had: {share:.1%} of the time"
    if share > BUSY:
        text += ". TOO BUSY: measure again when the machine is idle, or with --threads 1"
    return rows, [Extra("waiting", rank, text, {"share": share, "seconds": seconds})]


# ---- compiled models


def measure_first_outputs(scene: Scene) -> list[Extra]:
    """From asking for another adapter to its first output, in a compiled model.

    One contender after the other, since each begins with nothing compiled. Inductor's cache on disk is left as it is
    set up: where it is on, a recompile finds code for an equal graph there and takes less time.
    """
    backend = scene.settings.backend or pick_backend()
    pool, prepared, by_peft = scene.pool(), scene.load_prepared(), scene.load_prepared_by_peft()
    loaded, device = scene.load(), scene.settings.device
    swaps: dict[str, tuple[torch.nn.Module, Callable[[int], object]]] = {
        "hotswap_lab, pool": (pool.model, lambda number: pool.swap(str(number))),
        "hotswap_lab, disk, prepared": (
            prepared,
            lambda number: hotswap_adapter(prepared, scene.folders[number], "default"),
        ),
        "PEFT hotswap, disk, prepared by PEFT": (
            by_peft,
            lambda number: peft_hotswap(by_peft, scene.folders[number], adapter_name="default", torch_device=device),
        ),
        "PEFT load + set + delete": (loaded, peft_load(scene, loaded)),
    }
    return [_first_output(scene, name, model, swap, backend) for name, (model, swap) in swaps.items()]


def _first_output(
    scene: Scene, name: str, model: torch.nn.Module, swap: Callable[[int], object], backend: str
) -> Extra:
    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend)
    outputs = scene.outputs(compiled)

    def swap_and_call(number: int) -> None:
        nonlocal outputs
        swap(number)
        outputs = scene.outputs(compiled)

    way = Way(name, swap_and_call, lambda number: scene.matches(outputs, number))
    # by default PyTorch gives up after 8 graphs and runs the model uncompiled from then on
    with torch._dynamo.config.patch(recompile_limit=64):
        with RecompileWatch() as watch:
            state, note = way.check()
        n = min(scene.settings.n, RECOMPILES) if watch.recompiles else scene.settings.n
        with RecompileWatch() as watch:
            timing = None if note else measure(way.alternating(scene.settings.device), n=n)
    torch.compiler.reset()
    values = {"way": name, "backend": backend, "state": state, "note": note, **_values(timing)}
    text = f"compiled ({backend}), swap and first output: {name}: "
    if timing is None:
        return Extra("first output", scene.rank, f"{text}refused: {note}", values)
    values |= {"recompiles": watch.recompiles, "calls": n + 1}
    text += f"{_described(timing)}, {watch.recompiles} recompiles in {n + 1} calls"
    return Extra("first output", scene.rank, text + (", wrong" if state == "wrong" else ""), values)


def measure_forward(scene: Scene, compiled: bool) -> Extra:
    """A forward call with the adapter in prepared memory, against one with ordinary parameters."""
    models = {"ordinary": scene.load(), "prepared": scene.load_prepared()}
    kind = "eager"
    if compiled:
        torch.compiler.reset()
        kind = scene.settings.backend or pick_backend()
        models = {name: torch.compile(model, backend=kind) for name, model in models.items()}
    inputs = scene.make_inputs(scene.settings.tokens)
    wait = torch.device(scene.settings.device).type != "cpu"

    def call(model: torch.nn.Module) -> None:
        scene.outputs(model, inputs)
        if wait:
            torch.accelerator.synchronize()

    for model in models.values():
        call(model)
    timings = in_rounds({name: lambda model=model: call(model) for name, model in models.items()}, scene.settings.n)
    if compiled:
        torch.compiler.reset()
    ratio = timings["prepared"].median / timings["ordinary"].median
    minima = timings["prepared"].minimum / timings["ordinary"].minimum
    values = {name: _values(timing) for name, timing in timings.items()}
    return Extra(
        "forward",
        scene.rank,
        f"forward, {kind}, {scene.settings.tokens} tokens, prepared for rank {scene.target_rank} against ordinary "
        f"parameters: {ratio:.3f} times as long ({minima:.3f} by minima): {_described(timings['prepared'])}; "
        f"{_described(timings['ordinary'])}",
        {"kind": kind, "tokens": scene.settings.tokens, "ratio": ratio, "ratio_of_minima": minima, **values},
    )


def _values(timing: Timing | None) -> dict[str, object]:
    return {} if timing is None else dataclasses.asdict(timing)


def _described(timing: Timing) -> str:
    return f"{_readable(timing.median)} (min {_readable(timing.minimum)}, n {timing.n})"


# ---- memory, and many tensors


def resident_mb() -> float | None:
    """The memory that this process has in RAM, in MB (10^6 bytes); None where the system doesn't say."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return None
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def measure_memory(scene: Scene, swaps: int) -> Extra:
    """How much the process grows over many swaps of a pool."""
    pool = scene.pool()

    def swap(times: int) -> float | None:
        for number in range(times):
            pool.swap(str(number % 2))
        gc.collect()
        return resident_mb()

    before = swap(2 * HISTORY)  # what undo() needs is full by then
    after = swap(swaps)
    growth = None if before is None or after is None else after - before
    text = f"memory, {swaps} pool swaps: "
    text += (
        "not available on this system"
        if growth is None
        else f"{before:.1f} MB resident before, {after:.1f} MB after, {growth:+.2f} MB"
    )
    values = {"swaps": swaps, "before_mb": before, "after_mb": after, "growth_mb": growth}
    return Extra("memory", scene.rank, text, values)


class Chain(torch.nn.Module):
    """Square layers in a row. They share one weight, since a swap has nothing to do with it.

    >>> chain = Chain(count=3, width=4)
    >>> chain(torch.ones(2, 4)).shape, len(list(chain.parameters()))
    (torch.Size([2, 4]), 1)
    """

    def __init__(self, count: int, width: int):
        super().__init__()
        first = torch.nn.Linear(width, width, bias=False)
        self.layers = torch.nn.ModuleList([first])
        for _ in range(count - 1):
            layer = torch.nn.Linear(width, width, bias=False, device="meta")
            layer.weight = first.weight
            self.layers.append(layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def chain_pool(settings: Settings, rank: int, count: int, width: int) -> AdapterPool:
    """A pool of two adapters for a :class:`Chain`."""
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=r"layers\.\d+")
    chain = Chain(count, width).to(settings.device, getattr(torch, settings.dtype)).eval()
    model = get_peft_model(chain, config, autocast_adapter_dtype=False)
    adapters = {}
    for number in (0, 1):
        randomize(model, number)
        tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
        adapters[str(number)] = ({key: tensor.clone() for key, tensor in tensors.items()}, config)
    return AdapterPool(model, adapters=adapters, progress=False)


def measure_spread(scene: Scene) -> Extra:
    """A pool's swap of the same bytes in a few wide layers, and in ten times as many of a tenth of the width."""
    count = scene.size.tensors // 2
    per_row = scene.size.nbytes / getattr(torch, scene.settings.dtype).itemsize / scene.rank
    # widths of whole cache lines, so that the packed bytes are the same, too
    width = max(round(per_row / (2 * count) / 10 / 32), 1) * 32
    pools = {
        "few": chain_pool(scene.settings, scene.rank, count, width * 10),
        "many": chain_pool(scene.settings, scene.rank, count * 10, width),
    }
    runs = {}
    for name, pool in pools.items():
        way = Way(name, lambda number, pool=pool: pool.swap(str(number)), lambda number: True)
        way.swap(0)
        runs[name] = way.alternating(scene.settings.device)
    timings = in_rounds(runs, scene.settings.n)
    ratio = timings["many"].median / timings["few"].median
    values = {
        name: {"tensors": tensors, "packed_nbytes": pools[name].nbytes // 2, **_values(timings[name])}
        for name, tensors in (("few", 2 * count), ("many", 20 * count))
    }
    text = (
        f"spread, {values['many']['packed_nbytes'] / 1e6:.3g} MB packed: pool swap over {20 * count} tensors takes "
        f"{ratio:.2f} times as long as over {2 * count}: {_described(timings['many'])}; {_described(timings['few'])}"
    )
    return Extra("spread", scene.rank, text, {"ratio": ratio, **values})


# ---- all of it


def run(settings: Settings, say: Callable[[str], object] = lambda text: None) -> Report:
    """Measures what ``settings`` ask for.

    Parameters
    ----------
    settings:
        Shape, ranks, dtype, device, repeats and the further measurements.
    say:
        Is told what is being done.

    Returns
    -------
    Report
        Shows itself as a table; ``rows``, ``extras``, ``to_json()`` and ``figure()`` give the rest.

    Examples
    --------
    >>> report = run(Settings(model="tiny", ranks=(2,), n=1))
    >>> len(report.rows), {row.state for row in report.rows}
    (9, {'right'})
    >>> report.timing("hotswap_lab, pool", rank=2).n
    1
    """
    sizes, rows, extras = [], [], []
    with _set_up(settings.threads):
        base = make_base(settings)
        for rank in settings.ranks:
            with tempfile.TemporaryDirectory() as folder:
                say(f"rank {rank}: making two adapters")
                scene = Scene(base, settings, rank, folder)
                sizes.append(scene.size)
                say(f"rank {rank}: timing each way {settings.n} times")
                table, waiting = measure_waiting(rank, lambda scene=scene: measure_ways(scene))
                rows += table
                extras += waiting
                extras += _further(scene, say)
        return Report(machine(), versions(), settings, tuple(sizes), tuple(rows), tuple(extras))


def _further(scene: Scene, say: Callable[[str], object]) -> Iterator[Extra]:
    settings = scene.settings
    if settings.compiled:
        say(f"rank {scene.rank}: compiled models; this takes minutes if they are large")
        yield from measure_first_outputs(scene)
        yield measure_forward(scene, compiled=False)
        yield measure_forward(scene, compiled=True)
    if settings.memory:
        say(f"rank {scene.rank}: memory over {settings.memory} swaps")
        yield measure_memory(scene, settings.memory)
    if settings.spread:
        say(f"rank {scene.rank}: the same bytes over more tensors")
        yield measure_spread(scene)


@contextlib.contextmanager
def _set_up(threads: int) -> Iterator[None]:
    """The threads asked for, and none of PEFT's and transformers' warnings; both as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_num_threads(before)


def versions() -> dict[str, str]:
    """Of Python and every package that takes part."""
    packages = {name: version(name) for name in ("torch", "peft", "transformers", "safetensors")}
    return {"python": platform.python_version(), "hotswap_lab": __version__, **packages}


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    options = vars(parser.parse_args(arguments))
    quiet, json_file, plot_file = (options.pop(name) for name in ("quiet", "json", "plot"))
    try:
        settings = Settings(**{**options, "ranks": tuple(options["ranks"])})
    except ValueError as error:
        parser.error(str(error))
    report = run(settings, (lambda text: None) if quiet else (lambda text: print(text, file=sys.stderr, flush=True)))
    print(report)
    if json_file:
        Path(json_file).write_text(report.to_json() + "\n", encoding="utf-8")
    if plot_file:
        Path(plot_file).write_text(report.figure().svg, encoding="utf-8")
    return 0 if report.ok else 1


def _parser() -> argparse.ArgumentParser:
    default = Settings()
    parser = argparse.ArgumentParser(
        prog="python -m hotswap_lab.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", choices=MODELS, default=default.model, help="the shape; smollm2 is SmolLM2-135M's")
    add("--layers", type=int, help="another number of layers than the model has")
    add("--rank", dest="ranks", type=int, nargs="+", default=default.ranks, help="of the adapters: a table for each")
    add("--target-rank", type=int, help="what prepared models have room for (default: the rank of the adapters)")
    add("--dtype", choices=DTYPES, default=default.dtype, help="of model and adapters")
    add("--device", default=default.device, help="where the model is")
    add("--threads", type=int, default=default.threads, help="threads that torch may use")
    add("--n", type=int, default=default.n, help="timed calls of each way")
    add("--compiled", action="store_true", help="also: first output after a swap in a compiled model; forward time")
    add("--backend", help="of torch.compile (default: inductor where it works)")
    add("--tokens", type=int, default=default.tokens, help="input length of the forward call that --compiled times")
    add("--memory", type=int, default=0, metavar="N", help="also: how much the process grows over N pool swaps")
    add("--spread", action="store_true", help="also: the same bytes over ten times as many tensors")
    add("--json", metavar="FILE", help="write everything there, times in seconds")
    add("--plot", metavar="FILE", help="write a bar chart there, as SVG")
    add("--quiet", action="store_true", help="print the report only, not what is being done")
    return parser


if __name__ == "__main__":
    sys.exit(main())
