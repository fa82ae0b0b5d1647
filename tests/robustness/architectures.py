"""Tiny models of many architectures, random families of adapters, and everything that swaps, pools and rows can do.

Every result is compared with a fresh load in float64, where the tolerance can be tiny. It equals that, or it was
refused for a reason that is known to be right here, and nothing was changed. For minutes to an hour::

    python tests/robustness/architectures.py --minutes 20

It prints its figures, and for each failure a command that shows it again.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import itertools
import math
import os
import random
import re
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1])]
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

import compiled_ahead
import torch
import transformers
from models import call, load
from oracle import assert_equals, assert_untouched, snapshot
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from row_truth import Truth
from tiny_models import ARCHITECTURES, STRUCTURES, WAYS, Architecture, draw_lora, draw_structure, save_random
from torch import nn
from transformers.pytorch_utils import Conv1D

from hotswap_lab import (
    Adapter,
    AdapterPool,
    HotswapError,
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
    set_strength,
)
from hotswap_lab import prepare_model_for_compiled_hotswap as prepare

#: of the largest output: what sums in another order may change, and what numbers that were float32 on the way change
TOLERANCE, ROUNDED = 1e-10, 1e-5
ROWS = 4


class Reference(Truth):
    """Fresh loads of mixes, each kept as a model."""

    def __init__(self, kind: Architecture, folders: dict[str, str]):
        self.kind, self.folders, self.options = kind, folders, {}
        self.models: dict[tuple, nn.Module] = {}

    def loaded(self, row: Row, strength: float = 1.0) -> nn.Module:
        key = row.weights, row.strength * strength
        if key not in self.models:
            self.models[key] = self.model(*key) if row.weights else self.kind.base()
        return self.models[key]


# ---- what a model should have


@dataclass(eq=False)
class Member:
    """An adapter of a pool, and whose weights it has now."""

    label: str


@dataclass(frozen=True)
class Row:
    """How much of which, all of it at a strength."""

    shares: tuple[tuple[Member, float], ...] = ()
    strength: float = 1.0

    @property
    def weights(self) -> tuple[tuple[str, float], ...]:
        found: defaultdict[str, float] = defaultdict(float)
        for member, weight in self.shares:
            found[member.label] += weight
        return tuple(sorted(found.items()))


@dataclass(frozen=True)
class Now:
    """One row for all of a batch, whatever its size, or one for each if they are assigned."""

    rows: tuple[Row, ...]
    strength: float = 1.0
    assigned: bool = False

    @property
    def differs(self) -> bool:
        return len({(row.weights, row.strength) for row in self.rows}) > 1

    @property
    def members(self) -> list[Member]:
        return [member for row in self.rows for member, _ in row.shares]

    def __str__(self) -> str:
        return "rows that differ" if self.differs else "equal rows" if self.assigned else "any size"


#: the beginning of each message with which something may be refused, and when that is right
RIGHT_REFUSALS: dict[str, Callable[[Case], bool]] = {
    r"The layer .* can't have another adapter in each row": lambda case: case.has_no_rows,
    r"The rows of a batch can't have different adapters at": lambda case: case.has_no_rows,
    r"The adapter .* can't be another one in each row": lambda case: case.structure != "plain",
    r"A pool is for LoRA alone": lambda case: case.structure in ("bias", "tokens", "any"),
    r"The adapter .* is in the model": lambda case: case.removed in case.now.members,
    r"The adapter .* does not fit into the pool's memory": lambda case: "max_bytes" in case.options,
    r"The mix of .* needs more rank": lambda case: case.options["target_rank"] is None,
    r"The adapters .* can't be mixed": lambda case: case.structure == "dora",
    r"The strength of .* can't be set": lambda case: case.structure != "plain",
    r"(The model's adapter is no longer where|The weights of .* are not where)": lambda case: case.was_moved,
    r"A model can't be prepared for the loaded adapter": lambda case: case.structure in ("bias", "tokens", "any"),
    # no room is made for layers and ranks of what is more than LoRA
    r"This swap can't be done in a prepared model": lambda case: case.structure not in ("plain", "dora"),
    r"Hot swapping .* is on layers that the loaded adapter lacks": lambda case: case.structure not in ("plain", "dora"),
    r"Adapters with and without DoRA": lambda case: case.structure == "any",
    r"The model can't be prepared for an adapter that is of another kind": lambda case: case.structure == "any",
    # whose saved head has one bias by two names
    r"The adapter comes with other base weights": lambda case: case.name == "roberta" and case.structure == "saved",
    r"The adapter .* has other whole modules": lambda case: case.structure == "any",
    r"The adapter in the model came with base weights": lambda case: (
        # in a prepared model, embeddings that are turned off stay wrapped
        (case.base_weights is None or case.check == "prepared") and case.has_base_weights
    ),
}
AHEAD = (
    r".* can't be exported",
    r"These inputs can't be compiled ahead of time",
    r".* has no layers that are known to be repeated",
    r"This file was not compiled for such inputs",
    r"This file was compiled for a model with other settings",
)
RIGHT_REFUSALS |= dict.fromkeys(AHEAD, lambda case: case.check == "ahead")
#: what differs from one refusal to another of its kind
NAMES = r"'[^']*'|[^ ]+[.][^ ]+[.][^ ]+|[0-9]+"
COMMAND = "python tests/robustness/architectures.py"


@dataclass
class Report:
    figures: Counter = field(default_factory=Counter)
    refused: Counter = field(default_factory=Counter)
    names: set[str] = field(default_factory=set)
    #: by what went wrong: the architectures, and commands that show it again
    failures: defaultdict[str, dict[str, str]] = field(default_factory=lambda: defaultdict(dict))

    def __str__(self) -> str:
        figures = [f"{count} {what}" for what, count in self.figures.items()]
        lines = [", ".join([f"{len(self.names)} architectures", *figures])]
        lines += [f"{self.refused.total()} refused as they should be:"]
        lines += [f"{count:6}  {message}" for message, count in self.refused.most_common()]
        lines += [f"{len(self.failures)} failures:"]
        for what, found in sorted(self.failures.items()):
            lines += [f"  {what}  ({', '.join(found)})", f"    {next(iter(found.values()))}"]
        return "\n".join(lines)


class Case:
    """One check of one architecture with one random family."""

    #: the beginning of each message that something may be refused with, and when that is right
    refusals = RIGHT_REFUSALS
    model: nn.Module
    #: the model, perhaps compiled
    computing: nn.Module
    pool: AdapterPool
    now: Now

    def __init__(self, name: str, check: str, seed: int, report: Report):
        self.name, self.check, self.seed, self.report = name, check, seed, report
        self.draw = random.Random(f"{seed}/{name}/{check}")
        self.kind = ARCHITECTURES[name]
        self.options: dict = {}
        self.removed = self.base_weights = self.result = None
        self.was_moved, self.is_right, self.foreign = False, True, 0

    def run(self) -> None:
        with tempfile.TemporaryDirectory() as self.folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                CHECKS[self.check](self)
            except Exception as error:
                line = traceback.extract_tb(error.__traceback__)[-1].line
                self.wrong(f"{type(error).__name__}: {str(error)[:100]} in {line}")
        self.report.figures["cases"] += 1
        self.report.names.add(self.name)

    def load_family(self, structures: tuple[str, ...], count: int = 3, **loading: object) -> None:
        """Makes random adapters, and loads the first one."""
        self.structure, modules = self.draw.choice(structures), self.kind.modules
        common = draw_structure(self.draw, self.kind, self.structure)
        if self.draw.random() < 0.4:  # all of them on the same few layers
            modules = modules[(first := self.draw.randrange(len(modules))) : first + 2]
        self.folders: dict[str, str] = {}
        for number in range(40):
            if number == 20 and not self.folders:  # PEFT can't have it here
                self.structure, common, modules = "plain", {}, self.kind.modules
            own = draw_structure(self.draw, self.kind, self.draw.choice(STRUCTURES)) if self.structure == "any" else {}
            settings, folder = draw_lora(self.draw, modules) | common | own, f"{self.folder}/{number}"
            if len(self.folders) < count and save_random(self.kind, settings, folder, number):
                self.folders["abcd"[len(self.folders)]] = folder
        # where PEFT makes target_parameters of "all-linear", in mixtures of experts
        if any(LoraConfig.from_pretrained(each).target_parameters for each in self.folders.values()):
            self.structure = "any"
        self.reference = Reference(self.kind, self.folders)
        self.computing = self.model = load(self.kind, self.folders["a"], **loading).requires_grad_(False)
        self.members = {name: Member(name) for name in self.folders}
        self.now = self.all_have("a")

    def all_have(self, name: str) -> Now:
        return Now((Row(((self.members[name], 1.0),)),))

    # ---- what is right

    @functools.cached_property
    def layers(self) -> dict[str, nn.Module]:
        """Those that any adapter of the family is on."""
        found = {}
        for folder in self.folders.values():
            modules = load(self.kind, folder).named_modules()
            found |= {path: each.get_base_layer() for path, each in modules if isinstance(each, LoraLayer)}
        return found

    @property
    def has_base_weights(self) -> bool:
        is_embedded = any("embed" in path for path in self.layers)
        return is_embedded or self.structure in ("bias", "any")

    @property
    def has_no_rows(self) -> bool:
        """Whether the family is on layers that can't have another adapter in each row, of these rows or of any."""
        plain = (nn.Linear, nn.Embedding, nn.Conv2d, Conv1D)
        if any(not isinstance(each, plain) or getattr(each, "groups", 1) > 1 for each in self.layers.values()):
            return True
        return self.now.differs and any(re.search(self.kind.mixed, path) for path in self.layers)

    def wrong(self, what: str) -> None:
        command = f"{COMMAND} --only {self.name} --checks {self.check} --seed {self.seed} --cases 1"
        self.report.failures[f"{self.check}: {what}"].setdefault(self.name, command)

    def done(self, what: str, action: Callable, *arguments: object, **options: object) -> bool:
        """Whether it was done; otherwise it was refused, and the model is untouched."""
        before = snapshot(self.model)
        try:
            self.result = action(*arguments, **options)
            return True
        except HotswapError as error:
            summary = str(error).partition("\n")[0]
        right = next((each for each in self.refusals if re.match(each, summary)), None)
        if right is not None and self.refusals[right](self):
            self.report.refused[right] += 1
        else:
            self.wrong(f"{what} refused: {re.sub(NAMES, '…', summary)[:100]}")
        try:
            assert_untouched(self.model, before)
        except AssertionError as error:
            self.wrong(f"{what} refused, and the model was changed: {str(error)[:100]}")
        return False

    def same(self, what: str, actual: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> bool:
        is_like = actual.shape == expected.shape
        off = float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30)) if is_like else math.inf
        if not off <= tolerance:
            self.wrong("numbers were rounded to float32" if off <= ROUNDED else f"{what} is wrong")
        self.is_right &= off <= max(tolerance, ROUNDED)
        return off <= tolerance

    def equals(self, what: str, name: str, prepared: bool) -> None:
        """Outputs, config, scalars, tensors and files are those of a fresh load."""
        fresh = load(self.kind, self.folders[name])
        self.report.figures["results compared"] += 1
        if self.same(what, call(self.model, self.kind.inputs()), call(fresh, self.kind.inputs())):
            try:
                settings = dict(tolerance=TOLERANCE, margin=1, training=False)
                assert_equals(self.model, fresh, self.kind, prepared=prepared, **settings)
            except AssertionError as error:
                line = traceback.extract_tb(error.__traceback__)[-1].line
                self.wrong(f"{what} differs from a fresh load: {line} {str(error).partition(chr(10))[0]}"[:150])

    # ---- swaps

    def swaps(self) -> None:
        """From any adapter to any other, with add_layers and mostly with base_weights."""
        self.load_family(STRUCTURES, 4)
        self.swap_all()

    def prepared(self) -> None:
        self.load_family(STRUCTURES)
        rank = self.draw.choice([None, 12])
        if self.done("preparing", prepare, self.model, target_rank=rank, adapters=self.folders.values()):
            self.swap_all(prepared=True)

    def swap_all(self, prepared: bool = False) -> None:
        for name in self.draw.choices([*self.folders], k=3):
            self.base_weights = self.kind.base().state_dict() if self.draw.random() < 0.7 else None
            options = dict(base_weights=self.base_weights, add_layers=not prepared)
            new, swap, arguments = Adapter.load(self.folders[name]), hotswap_adapter, [self.folders[name], "default"]
            if self.draw.random() < 0.3:
                swap, arguments = hotswap_adapter_from_state_dict, [new.tensors, "default", new.config]
            if self.done("a swap", swap, self.model, *arguments, **options):
                self.now = self.all_have(name)
                self.equals("a swap", name, prepared)
            strength = self.draw.choice([0.5, -2.0, 0.0])
            if self.structure == "plain" and self.done("a strength", set_strength, self.model, strength):
                expected = call(self.reference.loaded(self.now.rows[0], strength), self.kind.inputs())
                self.same("a strength", call(self.model, self.kind.inputs()), expected)

    def half(self) -> None:
        """Bit for bit, since the same numbers go through the same operations; but a DoRA that is off is rounded."""
        self.kind = replace(self.kind, dtype=self.draw.choice([torch.bfloat16, torch.float16]))
        loading = dict(autocast_adapter_dtype=self.draw.random() < 0.5)
        self.load_family(("plain", "plain", "dora"), **loading)
        for folder in self.draw.choices([*self.folders.values()], k=3):
            if self.done("a swap", hotswap_adapter, self.model, folder, "default", add_layers=True):
                models = self.model, load(self.kind, folder, **loading)
                actual, expected = (call(model, self.kind.inputs()).double() for model in models)
                self.same("a swap", actual, expected, 0.05 if self.structure == "dora" else 0)

    def shared(self) -> None:
        """A model in shared memory: a swap is seen by a process that was forked before."""
        self.load_family(("plain",))
        way = self.draw.choice(["prepared first", "shared first", "a pool, shared first"])
        make = partial(prepare, self.model, adapters=self.folders.values())
        if "pool" in way:
            make = partial(AdapterPool, self.model, adapters=self.folders, progress=False)
        for step in [make, self.model.share_memory][:: 1 if way == "prepared first" else -1]:
            if not self.done(way, step):
                return
        with forked(partial(call, self.model, self.kind.inputs())) as compute:
            if self.done("a swap", hotswap_adapter, self.model, self.folders["b"], "default"):
                expected = call(load(self.kind, self.folders["b"]), self.kind.inputs())
                self.same(f"{way}: what another process computes", compute(), expected)

    # ---- pools and rows

    def pools(self) -> None:
        self.load_family(("plain", "plain", "plain", "dora", "saved", "bias"))
        self.walk(1)

    def rows(self) -> None:
        self.load_family(("plain",) * 9 + ("dora",))
        self.walk(ROWS)

    def generate(self) -> None:
        if not self.kind.ways:
            return
        self.load_family(("plain",))
        made = self.make_pool(ROWS)
        for _ in range(2 if made else 0):
            way, count = self.draw.choice(self.kind.ways), self.draw.choice([1, ROWS])
            now, wanted = self.draw_rows(count)
            if not self.done("assign", self.pool.assign, wanted):
                continue
            self.now = now
            inputs = {key: each for key, each in self.kind.of(count, 4).inputs().items() if "decoder" not in key}
            inputs |= dict(max_new_tokens=5, min_new_tokens=5, pad_token_id=0, **WAYS[way])
            if self.done(f"{way} generate", self.model.generate, **inputs):
                copies = len(self.result) // count
                for start, row in zip(itertools.count(0, copies), now.rows, strict=False):
                    expected = self.reference.loaded(row).generate(**inputs)
                    if not torch.equal(self.result[start : start + copies], expected[start : start + copies]):
                        self.wrong(f"{way} generate is wrong")

    def tasks(self) -> None:
        """Two tasks of one thread: each has its adapter for as long as it waits, or one of them is refused."""
        self.load_family(("plain",))

        async def ask(name: str) -> None:
            with contextlib.suppress(HotswapError), self.pool.using(name):
                await asyncio.sleep(0)
                actual = call(self.model, self.kind.inputs())
                self.same("an answer", actual, call(load(self.kind, self.folders[name]), self.kind.inputs()))
                await asyncio.sleep(0)

        async def ask_both() -> None:
            await asyncio.gather(ask("a"), ask("b"))

        if self.make_pool(1):
            asyncio.run(ask_both())

    def make_pool(self, rows: int) -> bool:
        self.options = dict(target_rank=self.draw.choice([None, 40]), rows=rows, progress=False)
        if rows == 1 and self.draw.random() < 0.5:
            with contextlib.suppress(HotswapError):
                whole = AdapterPool(load(self.kind, self.folders["a"]), adapters=self.folders, **self.options)
                self.options["max_bytes"] = whole.nbytes * 2 // 3
        made = self.done("a pool", AdapterPool, self.model, adapters=self.folders, **self.options)
        self.pool = self.result
        return made

    def walk(self, rows: int) -> None:
        """What the pool is told to do, in random order."""
        if not self.make_pool(rows):
            return
        self.compare("of a new pool")
        # of all mistakes, that of an update to what was loaded is the quietest
        first = [self.update] if self.draw.random() < 0.3 else []
        for operation in first + self.draw.choices(self.operations(rows), k=8):
            if not self.is_right:  # what follows is wrong as well
                return
            operation()
            self.compare(f"after {operation.__name__}")
        if self.draw.random() < 0.3:
            self.move()

    def operations(self, rows: int) -> list[Callable[[], None]]:
        found = [self.swap, self.swap, self.strength, self.off, self.update, self.update]
        found += [self.using, self.remove, self.add, self.hotswap, self.hotswap]
        return found + ([self.assign, self.assign, self.assign, self.assigned] if rows > 1 else [])

    def compare(self, what: str) -> None:
        """Each row with its own fresh load."""
        now, (count, tokens) = self.now, self.draw_size()
        kind = self.kind.of(count, tokens)
        if now.assigned and now.differs and self.draw.random() < 0.5:
            wrong = self.draw.choice([1, *[each for each in range(1, count + 2) if each % count]])
            with contextlib.suppress(HotswapError):  # as many tokens as there are rows
                call(self.model, self.kind.of(wrong, count).inputs())
                self.wrong(f"a batch of {wrong} is accepted where {count} rows are assigned")
        if not self.done(f"a batch, {now},", call, self.computing, kind.inputs()):
            return
        self.report.figures["row batches" if now.assigned else "results compared"] += 1
        for number, actual in enumerate(self.result):
            row = now.rows[number if now.assigned else 0]
            truth = call(self.reference.loaded(row, now.strength), kind.inputs())
            if not self.same(f"a batch, {now}, {what}", actual, truth[number]):
                return

    def draw_size(self) -> tuple[int, int]:
        """How many rows and tokens the next batch has."""
        return len(self.now.rows) if self.now.assigned else self.draw.randint(1, ROWS), self.draw.choice([4, 5])

    def move(self) -> None:
        """Both are accepted, the swap and what follows, or both are refused."""
        name = self.draw.choice([*self.folders])
        self.model.to(torch.bfloat16)
        self.was_moved, self.kind = True, replace(self.kind, dtype=torch.bfloat16)
        if self.done("moved: a swap", hotswap_adapter, self.model, self.folders[name], "default"):
            self.was_moved, kind = False, self.kind.of(2, 4)
            if self.done("moved: a batch", call, self.model, kind.inputs()):
                expected = call(load(kind, self.folders[name]).to(torch.bfloat16), kind.inputs())
                self.same("moved: a batch", self.result.double(), expected.double(), 0.1)

    # ---- operations

    def draw_wanted(self) -> tuple[Row, str | dict[str, float]]:
        names = [*self.members]
        if self.structure != "plain" or self.draw.random() < 0.75:
            names = [self.draw.choice(names)]
            return Row(((self.members[names[0]], 1.0),)), names[0]
        mix = {each: self.draw.choice([0.7, 0.3, -1.0, 2.0]) for each in names[: self.draw.randint(1, len(names))]}
        return Row(tuple((self.members[each], weight) for each, weight in mix.items())), mix

    def draw_rows(self, count: int) -> tuple[Now, list]:
        drawn = [self.draw_wanted() if self.draw.random() < 0.8 else (Row(), None) for _ in range(count)]
        drawn = drawn[:1] * count if self.draw.random() < 0.25 else drawn
        return Now(tuple(row for row, _ in drawn), assigned=True), [each for _, each in drawn]

    def draw_strength(self) -> float:
        return self.draw.choice([1.0, 1.0, 0.5, -2.0]) if self.structure == "plain" else 1.0

    def swap(self) -> None:
        (row, wanted), strength = self.draw_wanted(), self.draw_strength()
        if self.done("swap", self.pool.swap, wanted, strength):
            self.now = Now((row,), strength)

    def strength(self) -> None:
        strength = self.draw.choice([0.5, 1.0, -2.0, 0.0])
        if self.done("strength", setattr, self.pool, "strength", strength):
            self.now = replace(self.now, strength=strength)

    def off(self) -> None:
        if self.done("off", self.pool.off):
            self.now = replace(self.now, strength=0.0)

    def update(self) -> None:
        """New weights, mostly of one that is in use."""
        names, label = [*self.members], self.draw.choice([*self.folders])
        used = [name for name in names if self.members[name] in self.now.members]
        name = self.draw.choice(used if used and self.draw.random() < 0.7 else names)
        new = Adapter.load(self.folders[label])
        if self.done("update", self.pool.update, name, new.tensors, new.config):
            self.members[name].label = label

    def assign(self) -> None:
        now, wanted = self.draw_rows(self.draw.randint(1, ROWS))
        strengths = [self.draw_strength()] * len(wanted)
        if now.differs:
            strengths = [self.draw_strength() for _ in wanted]
        if self.done("assign", self.pool.assign, wanted, strengths):
            rows = tuple(replace(row, strength=by) for row, by in zip(now.rows, strengths, strict=True))
            self.now = replace(now, rows=rows)

    def using(self) -> None:
        (row, wanted), strength = self.draw_wanted(), self.draw_strength()
        self.done("using", self.in_a_block, partial(self.pool.using, wanted, strength), Now((row,), strength))

    def assigned(self) -> None:
        now, wanted = self.draw_rows(self.draw.randint(1, ROWS))
        self.done("assigned", self.in_a_block, partial(self.pool.assigned, wanted), now)

    def in_a_block(self, block: Callable, now: Now) -> None:
        with block():
            before, self.now = self.now, now
            self.compare("in a block")
            self.now = before

    def remove(self) -> None:
        name = self.draw.choice([*self.members])
        self.removed = self.members[name]
        if len(self.members) > 1 and self.done("remove", self.pool.remove, name):
            del self.members[name]
            if self.removed in self.now.members:
                self.wrong("remove: the adapter in use is removed")

    def add(self) -> None:
        name, label = self.draw.choice("abce"), self.draw.choice([*self.folders])
        if name not in self.members and self.done("add", self.pool.add, name, self.folders[label]):
            self.members[name] = Member(label)

    def hotswap(self) -> None:
        """A swap that the pool knows nothing of."""
        label, self.foreign = self.draw.choice([*self.folders]), self.foreign + 1
        if self.foreign < 4 and self.done("hotswap", hotswap_adapter, self.model, self.folders[label], "default"):
            self.now = Now((Row(((Member(label), 1.0),)),))


@contextlib.contextmanager
def forked(action: Callable[[], torch.Tensor]) -> Iterator[Callable[[], torch.Tensor]]:
    """Lets a copy of this process, as it is now, do something later."""
    processes = get_context("fork")
    ours, theirs = processes.Pipe()

    def later() -> None:
        theirs.send(action().tolist() if theirs.recv() else None)

    def compute() -> torch.Tensor:
        ours.send(True)
        assert ours.poll(60)
        return torch.tensor(ours.recv(), dtype=torch.float64)

    process = processes.Process(target=later)
    process.start()
    try:
        yield compute
    finally:
        process.kill()
        process.join()


CHECKS: dict[str, Callable[[Case], None]] = {
    each.__name__: each
    for each in (Case.swaps, Case.prepared, Case.half, Case.shared, Case.pools, Case.rows, Case.generate, Case.tasks)
} | {"ahead": compiled_ahead.ahead}


def main() -> None:
    parser = argparse.ArgumentParser(description="Random adapters on many architectures, against fresh loads.")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--cases", type=int, help="how many, instead of minutes")
    parser.add_argument("--seed", type=int, default=0, help="the first case's; each further one's is one more")
    parser.add_argument("--only", nargs="+", choices=ARCHITECTURES, default=[*ARCHITECTURES], metavar="ARCHITECTURE")
    parser.add_argument("--checks", nargs="+", choices=CHECKS, default=[*CHECKS])
    parser.add_argument("--once", action="store_true", help="each architecture once by each check, with this seed")
    parser.add_argument("--compiled", action="store_true", help="ahead of time: with AOTInductor, a minute for each")
    arguments = parser.parse_args()
    compiled_ahead.COMPILED = arguments.compiled
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    # a run that is interrupted or out of time prints what it found; a shell makes its background jobs ignore the first
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    report, start, minutes = Report(), time.monotonic(), 0.0
    with contextlib.suppress(KeyboardInterrupt):
        for name, check in itertools.product(arguments.only, arguments.checks) if arguments.once else ():
            before = report.failures.keys() | set()
            Case(name, check, arguments.seed, report).run()
            found = "; ".join(report.failures.keys() - before) or "no new failure"
            print(f"{(time.monotonic() - start) / 60:5.1f} min  {name}, {check}: {found}", flush=True)
        for seed in () if arguments.once else itertools.count(arguments.seed):
            if minutes > arguments.minutes if arguments.cases is None else seed == arguments.seed + arguments.cases:
                break
            draw = random.Random(seed)
            Case(draw.choice(arguments.only), draw.choice(arguments.checks), seed, report).run()
            minutes = (time.monotonic() - start) / 60
    print(f"{report}\n{(time.monotonic() - start) / 60:.1f} minutes")
    sys.exit(bool(report.failures))


if __name__ == "__main__":
    main()
