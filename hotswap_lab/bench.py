"""A benchmark of adapter swaps: each way of swapping, in one run on one machine.

On the command line::

    python -m hotswap_lab.bench
    python -m hotswap_lab.bench --model tiny --rank 4 --n 5
    python -m hotswap_lab.bench --rank 64 --json bench.json

The weights are random, because their values don't affect the time of a swap. The ways take turns, a few calls each, so
other load on the machine affects all of them equally. Each way swaps back and forth between two adapters. Its outputs
are checked first against ``PeftModel.from_pretrained`` of both. The last line of each part of the table is what the
others are compared with: a plain copy of the same bytes, for example.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import os
import platform
import re
import statistics
import sys
import tempfile
import time
import timeit
import warnings
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from .core.numerals import MOST_RANK, MOST_THREADS, MOST_TIMES, integer_from
from .core.report import readable_bytes, wrapped
from .files.reading import Adapter
from .pools.adapter_pool import AdapterPool
from .swap import hotswap_adapter, hotswap_adapter_from_state_dict, prepare_model_for_compiled_hotswap

# a separate copy of PEFT's module: its functions call one another even while ``patch_peft`` has replaced PEFT's
_SPEC: Any = find_spec("peft.utils.hotswap")
PEFT: Any = module_from_spec(_SPEC)
_SPEC.loader.exec_module(PEFT)

SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
#: the sizes of each model
SHAPES = {"smollm2": (576, 1536, 30, 9, 3), "demo": (128, 448, 4, 4, 4), "tiny": (32, 64, 2, 4, 2)}
#: by dtype, the largest error against a fresh load, relative to the largest output: rounding depends on memory layout
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
MEMCPY = "memcpy of the same bytes"
#: calls of one way before the next one's turn
PER_ROUND = 5


# --- timing ----------------------------------------------------------------------------------------------------------


class Timing(NamedTuple):
    """The median and minimum time of ``n`` calls, in seconds."""

    median: float
    minimum: float
    n: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        """Summarize the times of calls."""
        return cls(statistics.median(seconds), min(seconds), len(seconds))


def in_rounds(runs: Mapping[str, Callable[[], object]], n: int) -> dict[str, Timing]:
    """Time several functions in turns of a few calls each, until each was timed ``n`` times.

    So other load on the machine affects all of them equally. An untimed call of the same function precedes each timed
    one, so the caches are in the state in which the function itself leaves them.

    >>> timings = in_rounds({"short": lambda: sum(range(10)), "long": lambda: sum(range(10000))}, n=7)
    >>> {name: timing.n for name, timing in timings.items()}
    {'short': 7, 'long': 7}
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for done in range(0, n, PER_ROUND):
        for name, run in runs.items():
            seconds[name] += timeit.repeat(run, setup=run, number=1, repeat=min(PER_ROUND, n - done))
    return {name: Timing.of(times) for name, times in seconds.items()}


def machine() -> str:
    """Return one line with the machine and the versions, to be printed with a measurement."""
    threads, cpuinfo = torch.get_num_threads(), Path("/proc/cpuinfo")
    match = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text(encoding="utf-8")) if cpuinfo.exists() else None
    processor = match[1] if match else platform.processor() or platform.machine()
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    cores = f"{os.cpu_count()} cores, {threads} thread{'s' if threads > 1 else ''}"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, peft {peft.__version__}"
    return f"{processor}, {cores}{gpu}, {platform.system()}, {versions}"


def waited_for_a_core() -> float:
    """Return the seconds that threads of this process waited for a core; 0 if the system doesn't count them.

    A copy by two threads takes a fraction of a millisecond, but waits for milliseconds if another program has one of
    the cores. If that happens at every call, a median can't show it.
    """
    return sum(int(file.read_text().split()[1]) for file in Path("/proc/self/task").glob("*/schedstat")) / 1e9


# --- settings and results --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """The settings of a run of the benchmark.

    Parameters
    ----------
    model:
        The shape: ``"smollm2"`` (SmolLM2-135M, with a small vocabulary), ``"demo"`` (the embedded model), ``"tiny"``.
    layers:
        The number of layers. Default: the model's.
    ranks:
        The ranks of the adapters; a part of the table for each.
    dtype:
        The dtype of model and adapters: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
    device:
        The device of the model. The adapters are in files, or in the CPU's memory.
    threads:
        The number of threads for torch.
    n:
        Timed calls of each way.
    """

    model: str = "smollm2"
    layers: int | None = None
    ranks: Sequence[int] = (8, 64)
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 2
    n: int = 25


@dataclass(frozen=True)
class Measured:
    """A line of the table.

    Parameters
    ----------
    part, way:
        The title of the part of the table, and the name of the way.
    state:
        ``"right"``, ``"wrong"`` (no error, but other outputs than a fresh load) or ``"refused"`` (not timed).
    timing:
        Seconds of one call.
    note:
        The error, if it was refused; or a remark.
    """

    part: str
    way: str
    state: str
    timing: Timing | None = None
    note: str = ""

    @property
    def label(self) -> str:
        """The way, and its state unless it was right."""
        return self.way if self.state == "right" else f"{self.way} ({self.state})"


@dataclass(frozen=True)
class Report:
    """The results of :func:`run`. Prints as a table.

    Parameters
    ----------
    machine:
        Hardware, threads and the most important versions, in one line.
    settings:
        The settings of the run.
    rows:
        The lines of the table.
    waiting:
        A remark on other load on the machine.
    """

    machine: str
    settings: Settings
    rows: Sequence[Measured]
    waiting: str = ""

    def __repr__(self) -> str:
        lines = [self.machine, f"{self.settings}"]
        width = max((len(row.label) for row in self.rows), default=0)
        for part, rows in itertools.groupby(self.rows, key=lambda row: row.part):
            *_, last = rows = list(rows)
            lines += ["", part, f"{'way':{width}}    median ms      min ms    n  x last line"]
            for row in rows:
                numbers = ""
                if row.timing:
                    median, minimum, n = row.timing
                    ratio = f"{median / last.timing.median:,.2f}" if last.timing else ""
                    numbers = f"{1000 * median:11,.3f}  {1000 * minimum:10,.3f}  {n:3}  {ratio:>11}"
                lines.append(f"{row.label:{width}}  {numbers}  {row.note}".rstrip())
        return "\n".join([*lines, "", self.waiting]).rstrip()

    @property
    def ok(self) -> bool:
        """Whether all ways except PEFT's gave the outputs of a fresh load."""
        return all(row.state == "right" for row in self.rows if not row.way.startswith("PEFT"))

    def to_json(self) -> str:
        """The report as JSON, with times in seconds."""
        rows = [{**vars(row), "timing": row.timing and row.timing._asdict()} for row in self.rows]
        return json.dumps({**vars(self), "settings": vars(self.settings), "rows": rows}, indent=1)


# --- the model, its adapters, and what a fresh load of each computes -------------------------------------------------


def make_base(settings: Settings) -> torch.nn.Module:
    """Make a base model of a real shape with random weights, the same every time.

    >>> base = make_base(Settings(model="tiny", layers=3))
    >>> len(base.model.layers), base.config.hidden_size
    (3, 32)
    """
    sizes = dict(zip(SIZES, SHAPES[settings.model], strict=True))
    sizes["num_hidden_layers"] = settings.layers or sizes["num_hidden_layers"]
    config = LlamaConfig(vocab_size=1000, **sizes)  # a vocabulary of any size is as quick to swap
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval().to(settings.device, getattr(torch, settings.dtype))


class Way(NamedTuple):
    """One way of swapping: a function that swaps in an adapter by its number, and one that checks the swap."""

    swap: Callable[[int], object]
    is_right: Callable[[int], bool]
    model: Any = None

    def check(self) -> bool:
        """Swap back and forth, to end at adapter 1. Returns whether all of it was right."""
        for number in (1, 0, 1):
            self.swap(number)
            if not self.is_right(number):
                return False
        return True


class Scene:
    """A base model, adapters for it in folders, and the outputs of a fresh load of each.

    Parameters
    ----------
    base, settings:
        The model, and the settings of the run.
    folders:
        The folders of the adapters.

    Examples
    --------
    >>> from hotswap_lab import demo
    >>> settings = Settings(model="demo")
    >>> scene = Scene(demo.load_base(), settings, [demo.adapter_path(name) for name in ("reverse", "sort")])
    >>> scene.is_close(scene.outputs(scene.load(1)), scene.expected[1])
    True
    """

    def __init__(self, base: torch.nn.Module, settings: Settings, folders: Sequence[str]):
        self.base = base
        self.settings = settings
        self.folders = folders
        self.adapters: list[Adapter] = [Adapter.load(folder) for folder in folders]
        # adapters of a half-precision model stay in half precision
        self.options: dict[str, Any] = dict(torch_device=settings.device, autocast_adapter_dtype=False)
        #: token ids
        self.inputs: torch.Tensor = torch.arange(16, device=base.device)[None] * 7 % base.config.vocab_size
        self.expected: list[torch.Tensor] = [self.outputs(self.load(number)) for number in range(len(folders))]

    def load(self, number: int = 0) -> PeftModel:
        """Load an adapter by PEFT alone. The model shares the base's weights, which no way of swapping changes."""
        shared = {id(tensor): tensor for tensor in (*self.base.parameters(), *self.base.buffers())}
        return PeftModel.from_pretrained(copy.deepcopy(self.base, shared), self.folders[number], **self.options).eval()

    def prepared(self) -> PeftModel:
        """Load the first adapter, and prepare the model for all."""
        model = self.load()
        prepare_model_for_compiled_hotswap(model, adapters=self.folders)
        return model

    def pool(self) -> AdapterPool:
        """Make a pool on a model of its own; an adapter's name is its number."""
        adapters = {f"{number}": folder for number, folder in enumerate(self.folders)}
        return AdapterPool(self.load(), adapters=adapters, progress=False)

    @torch.no_grad()
    def outputs(self, model: Callable[..., Any]) -> torch.Tensor:
        """Return the model's logits."""
        return model(input_ids=self.inputs, use_cache=False).logits

    def is_close(self, actual: torch.Tensor, expected: torch.Tensor) -> bool:
        """Whether two outputs differ by rounding at most."""
        tolerance = TOLERANCE[self.settings.dtype] * expected.abs().max().item()
        return torch.allclose(actual, expected, rtol=0, atol=tolerance)

    def way(self, model: torch.nn.Module, swap: Callable) -> Way:
        """Make a way of swapping in ``model`` that is checked by its outputs."""
        return Way(swap, lambda number: self.is_close(self.outputs(model), self.expected[number]), model)

    def copying(self, nbytes: int) -> Way:
        """Make a plain copy of as many bytes to the model's device: a lower limit for every way."""
        target = torch.zeros(nbytes, dtype=torch.uint8, device=self.settings.device)
        # not zeros, which may all be one page of memory; pinned for a GPU, as a pool's memory is
        pinned = self.settings.device.startswith("cuda")
        how: dict[str, Any] = dict(dtype=torch.uint8, pin_memory=pinned, device="cpu")
        sources = [torch.full((nbytes,), number + 1, **how) for number in range(len(self.folders))]
        copy_in = functools.partial(target.copy_, non_blocking=True)
        return Way(lambda number: copy_in(sources[number]), lambda number: torch.equal(target.cpu(), sources[number]))

    def measure(self, part: str, ways: Mapping[str, Way]) -> list[Measured]:
        """Check all ways, then time those that raised nothing. Returns a part of the table."""
        checked, runs = [], {}
        for name, way in ways.items():
            try:
                state, note = ("right" if way.check() else "wrong"), ""
                runs[name] = self.alternating(way)
            except Exception as error:
                # an error is the result of this way, so that the others are still measured
                state, note = "refused", (str(error).strip() or type(error).__name__).splitlines()[0]
            checked.append((name, state, note))
        timings = in_rounds(runs, self.settings.n)
        return [Measured(part, name, state, timings.get(name), note) for name, state, note in checked]

    def alternating(self, way: Way) -> Callable[[], object]:
        """Return a function that swaps to the other adapter and waits until that is done, on an accelerator, too."""
        wait = (lambda: None) if self.settings.device == "cpu" else torch.accelerator.synchronize
        numbers = itertools.cycle((0, 1))  # so that each timed call swaps to adapter 1
        return lambda: (way.swap(next(numbers)), wait())


def save_adapters(base: torch.nn.Module, rank: int, folder: str) -> list[str]:
    """Save two random adapters of one rank, by PEFT alone. Returns their folders."""
    folders = [f"{folder}/{number}" for number in (0, 1)]
    for number, path in enumerate(folders):
        # B is random, because no output would show a wrong swap if it were 0. Different alphas give different scalings
        alpha = rank * (number + 1)
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", init_lora_weights=False)
        with torch.random.fork_rng():
            torch.manual_seed(number)
            model = get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False)
        model.save_pretrained(path, save_embedding_layers=False)
    return folders


# --- the ways of swapping --------------------------------------------------------------------------------------------


def ways_of(scene: Scene) -> dict[str, Callable[[], Way]]:
    """Return all ways of swapping, as functions that make each one on a model of its own."""
    adapters = scene.adapters

    def load_and_delete() -> Way:
        model, names = scene.load(), (f"adapter{number}" for number in itertools.count())

        def swap(number: int) -> None:
            old, new = model.active_adapter, next(names)
            model.load_adapter(scene.folders[number], new, **scene.options)
            model.set_adapter(new)
            model.delete_adapter(old)

        return scene.way(model, swap)

    def in_memory() -> Way:
        model = scene.load()
        for number in range(1, 8):
            model.load_adapter(scene.folders[number % len(adapters)], str(number), **scene.options)
        return scene.way(model, lambda number: model.set_adapter(str(number or "default")))

    def from_source(model: PeftModel, swap: Callable, sources: Sequence = scene.folders, **options: object) -> Way:
        return scene.way(model, lambda number: swap(model, sources[number], "default", **options))

    def from_tensors(model: PeftModel, swap: Callable) -> Way:
        # PEFT requires the adapter's name in the keys, which end with "weight"
        named = [{key[:-6] + "default.weight": t for key, t in adapter.tensors.items()} for adapter in adapters]
        return scene.way(model, lambda number: swap(model, named[number], "default", adapters[number].config))

    def pooled() -> Way:
        pool = scene.pool()
        return scene.way(pool.model, lambda number: pool.swap(str(number)))

    device = scene.settings.device
    return {
        "PEFT load + set + delete": load_and_delete,
        "PEFT set_adapter, 8 in memory": in_memory,
        "PEFT hotswap, disk": lambda: from_source(scene.load(), PEFT.hotswap_adapter, torch_device=device),
        "PEFT hotswap, state dict": lambda: from_tensors(scene.load(), PEFT.hotswap_adapter_from_state_dict),
        "hotswap_lab, disk": lambda: from_source(scene.load(), hotswap_adapter),
        "hotswap_lab, disk, prepared": lambda: from_source(scene.prepared(), hotswap_adapter),
        "hotswap_lab, state dict, prepared": lambda: from_tensors(scene.prepared(), hotswap_adapter_from_state_dict),
        "hotswap_lab, Adapter, prepared": lambda: from_source(scene.prepared(), hotswap_adapter, adapters),
        "hotswap_lab, pool": pooled,
        MEMCPY: lambda: scene.copying(scene.pool().nbytes // len(adapters)),
    }


# --- all of it -------------------------------------------------------------------------------------------------------


def run(settings: Settings, log: Callable[[str], object] = lambda text: None) -> Report:
    """Run the benchmark.

    Parameters
    ----------
    settings:
        Shape, ranks, dtype, device and repeats.
    log:
        Called with a line of text at each step.

    Returns
    -------
    Report
        It prints as a table; ``rows`` and ``to_json()`` have the rest.

    Examples
    --------
    >>> report = run(Settings(model="tiny", ranks=(2,), n=1))
    >>> len(report.rows), {row.state for row in report.rows}
    (10, {'right'})
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        rows, base, began, waited = [], make_base(settings), time.perf_counter(), waited_for_a_core()
        for rank in settings.ranks:
            with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PEFT and transformers warn about random adapters
                log(f"rank {rank}: making two adapters, timing each way {settings.n} times")
                scene = Scene(base, settings, save_adapters(base, rank, folder))
                first, packed = scene.adapters[0], readable_bytes(scene.pool().nbytes // 2)
                sizes = f"{len(first.tensors)} tensors, {readable_bytes(first.nbytes)} per adapter, {packed} packed"
                rows += scene.measure(f"rank {rank}: {sizes}", {name: make() for name, make in ways_of(scene).items()})
        share = (waited_for_a_core() - waited) / (time.perf_counter() - began)
        waiting = f"waited for a core that another program had: {share:.1%} of the time; above 2%, measure again"
        return Report(machine(), settings, rows, waiting)
    finally:
        torch.set_num_threads(threads)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark from the command line. Returns 1 if one of our ways is wrong, 0 otherwise."""
    default, doc = Settings(), (__doc__ or "").replace("::", ":")  # the site needs two
    parser = ArgumentParser("python -m hotswap_lab.bench", description=doc, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", choices=SHAPES, default=default.model, help="shape of the model; smollm2 is that of SmolLM2-135M")
    rank = dict(dest="ranks", type=integer_from(1, MOST_RANK), default=default.ranks, nargs="+")
    add("--rank", help="ranks of the adapters: the table has a part for each", **rank)
    add("--dtype", choices=TOLERANCE, default=default.dtype, help="dtype of model and adapters")
    add("--device", default=default.device, help="device of the model")
    add("--threads", type=integer_from(1, MOST_THREADS), default=default.threads, help="number of threads for torch")
    add("--n", type=integer_from(1, MOST_TIMES), default=default.n, help="number of timed calls of each way")
    add("--json", metavar="FILE", help="write the results to this file, times in seconds")
    options = vars(parser.parse_args(arguments))
    file, log = options.pop("json"), functools.partial(print, file=sys.stderr, flush=True)
    report = run(Settings(**options), log)
    print(wrapped(report))
    if file:
        Path(file).write_text(report.to_json() + "\n", encoding="utf-8")
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
