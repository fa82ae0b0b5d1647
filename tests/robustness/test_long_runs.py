"""Very many swaps: no drift of a single bit, no recompile, no memory, file or thread that is not given back.

With ``TIMES=50``, 100,000 operations on a pool and 25,000 swaps from disk.
"""

from __future__ import annotations

import ctypes
import gc
import os
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from lengths import TIMES, long
from models import KINDS, call, load, save_random_adapter
from peft.utils import get_peft_model_state_dict
from row_truth import Truth

from hotswap_lab import Adapter, AdapterPool, HotswapError, RecompileWatch, hotswap_adapter, set_strength

pytestmark = pytest.mark.usefixtures("fresh_compiler")
LLAMA, LINEAR = KINDS["llama"], KINDS["linear"]
STRENGTHS = (0.5, 2.0)


# ---- what must stay flat


@dataclass(frozen=True)
class Use:
    """What this process holds."""

    #: resident memory in MB
    memory: float
    #: Python objects that are tensors
    tensors: int
    files: int
    #: files that are mapped into memory, adapters among them
    maps: int
    threads: int

    @classmethod
    def now(cls) -> Use:
        gc.collect()
        if sys.platform != "linux":
            return cls(0, _count_tensors(), 0, 0, threading.active_count())
        ctypes.CDLL(None).malloc_trim(0)  # what is free is given back, so that the rest is what is in use
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        maps = Path("/proc/self/maps").read_text()
        return cls(
            pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
            _count_tensors(),
            len(os.listdir("/proc/self/fd")),
            maps.count(".safetensors"),
            len(os.listdir("/proc/self/task")),
        )

    def __str__(self) -> str:
        return (
            f"{self.memory:.1f} MB, {self.tensors} tensors, {self.files} files open, {self.maps} adapters mapped, "
            f"{self.threads} threads"
        )


def _count_tensors() -> int:
    return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())


def assert_flat(before: Use, after: Use, megabytes: float) -> None:
    assert after.memory - before.memory < megabytes, f"{before}; then {after}"
    counts = [(each.files, each.maps, each.threads) for each in (before, after)]
    assert counts[0] == counts[1], f"{before}; then {after}"
    assert after.tensors <= before.tensors + 400, f"{before}; then {after}"


# ---- a pool


@dataclass(frozen=True)
class Content:
    """What an adapter of the pool is at some time: a folder, or an update of it."""

    number: int
    version: int = 0

    def tensors(self, adapter: Adapter) -> dict[str, torch.Tensor]:
        return {key: value * (1 + self.version / 8) for key, value in adapter.tensors.items()}


@dataclass
class Member:
    """What the pool should have under one name."""

    content: Content
    #: the same for an adapter and its updates
    lineage: int


class Marathon:
    """Random operations on a pool of 20, and, beside it, what must be in the model after each of them."""

    NAMES = tuple(f"adapter_{number}" for number in range(20))

    def __init__(self, folder: Path, seed: int = 0):
        self.chance = random.Random(seed)
        chance = random.Random(1)
        self.folders = {}
        for number, name in enumerate(self.NAMES):
            lora = dict(
                r=chance.choice((2, 4, 8)),
                lora_alpha=chance.choice((2, 3, 8, 16)),
                target_modules=chance.sample(LLAMA.modules, chance.randint(2, 7)),
                use_rslora=chance.random() < 0.3,
            )
            self.folders[name] = save_random_adapter(LLAMA, folder / name, seed=number, **lora)
        self.adapters = [Adapter.load(each) for each in self.folders.values()]
        self.model = load(LLAMA, self.folders[self.NAMES[0]])
        self.pool = AdapterPool(self.model, adapters=self.folders, progress=False)
        self.compiled = torch.compile(self.model, backend="aot_eager")
        self.inputs = LLAMA.inputs()
        self.outputs: dict[tuple, torch.Tensor] = {}
        self.first: dict[Content, dict[str, torch.Tensor]] = {}
        self.counts: Counter = Counter()
        self.lineages = 0
        self.members = {name: Member(Content(number), self._lineage()) for number, name in enumerate(self.NAMES)}
        self.history: list[tuple[str, Member, float]] = []
        self.pool.swap(self.NAMES[0])
        self.active, self.strength = self.NAMES[0], 1.0
        self.history.append((self.active, self.members[self.active], 1.0))
        self._check_first_loads()
        self.pool.max_bytes = self.pool.nbytes // 2
        self.pool.remove(self.NAMES[5])
        self.pool.add(self.NAMES[5], self.folders[self.NAMES[5]])  # drops what there is no room for
        self.members[self.NAMES[5]].lineage = self._lineage()
        dropped = [row[0] for row in self.pool.table if row[-2] == "in its files"]
        assert len(dropped) > 5
        self.pool.prefetch(dropped[0])  # starts the one thread that it has

    def _lineage(self) -> int:
        self.lineages += 1
        return self.lineages

    def _check_first_loads(self) -> None:
        """Notes the bits of each adapter after its first swap, which must be those of a fresh load."""
        for number, (name, folder) in enumerate(self.folders.items()):
            self._swap(name)
            fresh = load(LLAMA, folder)
            expected = get_peft_model_state_dict(fresh)
            for key, value in self._saved().items():
                assert torch.equal(value, expected[key]), (name, key)
            assert self._saved().keys() == expected.keys()
            self.first[Content(number)] = {key: value.clone() for key, value in expected.items()}
            output, truth = self.output(), call(fresh, self.inputs)
            torch.testing.assert_close(output, truth, rtol=0, atol=1e-5 * truth.abs().max().item())
            self.outputs[self._state()] = output

    def _saved(self) -> dict[str, torch.Tensor]:
        return get_peft_model_state_dict(self.model)

    def _state(self) -> tuple:
        return self.members[self.active].content, self.strength

    def output(self) -> torch.Tensor:
        return call(self.compiled, self.inputs)

    def check_output(self) -> None:
        """Of what is in the model: exactly what it was the first time."""
        output = self.output()
        expected = self.outputs.setdefault(self._state(), output)
        assert torch.equal(output, expected), self._state()
        self.counts["outputs compared"] += 1

    def check_bits(self) -> None:
        """All adapters of the pool, one after the other: not a bit has changed since the first load."""
        for name, member in self.members.items():
            self._swap(name)
            original = self.first[Content(member.content.number)]
            for key, value in self._saved().items():
                expected = original[key] * (1 + member.content.version / 8)
                assert torch.equal(value, expected), (name, key)
            self.check_output()
            self.counts["adapters compared bit by bit"] += 1

    # ---- the operations

    def step(self) -> None:
        kinds = dict(swap=60, strong=8, strength=6, off=3, undo=8, using=6, update=4, remove=2, add=3, set_strength=1)
        kinds |= dict(wrong=1, rows=1, prefetch=1)
        (kind,) = self.chance.choices(list(kinds), kinds.values())
        getattr(self, f"_do_{kind}")()
        self.counts[kind] += 1
        self.counts["operations"] += 1

    def _note(self) -> None:
        self.history = [*self.history[-99:], (self.active, self.members[self.active], self.strength)]

    def _swap(self, name: str, strength: float = 1.0) -> None:
        self._note()
        self.pool.swap(name, strength)
        self.active, self.strength = name, strength

    def _any(self) -> str:
        return self.chance.choice(list(self.members))

    def _do_swap(self) -> None:
        self._swap(self._any())

    def _do_strong(self) -> None:
        self._swap(self._any(), self.chance.choice(STRENGTHS))

    def _do_strength(self) -> None:
        self._note()
        self.pool.strength = self.strength = self.chance.choice(STRENGTHS)

    def _do_set_strength(self) -> None:
        self.strength = self.chance.choice(STRENGTHS)
        set_strength(self.model, self.strength)

    def _do_off(self) -> None:
        self._note()
        self.pool.off()
        self.strength = 0.0

    def _do_undo(self) -> None:
        if len(self.history) < 2:
            return
        name, member, strength = self.history[-1]
        now = self.members.get(name)
        if now is None or now.lineage != member.lineage:
            return  # it was removed since, and would be in the model without being in the pool
        self.pool.undo()
        self.history.pop()
        self.active, self.strength = name, strength

    def _do_using(self) -> None:
        former, strength = self.active, self.strength
        name, fails = self._any(), self.chance.random() < 0.3
        try:
            with self.pool.using(name):
                self.active, self.strength = name, 1.0
                if self.chance.random() < 0.1:
                    self.check_output()
                if fails:
                    raise ZeroDivisionError
        except ZeroDivisionError:
            assert fails
        self.active, self.strength = former, strength

    def _do_update(self) -> None:
        name = self._any()
        member = self.members[name]
        updated = Content(member.content.number, self.chance.choice((1, 2)))
        adapter = self.adapters[updated.number]
        try:
            self.pool.update(name, updated.tensors(adapter), adapter.config)
        except HotswapError:
            self.counts["updates that found no room"] += 1
            return
        member.content = updated

    def _do_remove(self) -> None:
        # one that was updated has no files any more, and takes memory for good
        updated = [name for name, member in self.members.items() if member.content.version]
        name = self.chance.choice(updated) if updated else self._any()
        if name != self.active and len(self.members) > 16:
            self.pool.remove(name)
            del self.members[name]

    def _do_add(self) -> None:
        missing = [name for name in self.NAMES if name not in self.members]
        if missing:
            name = self.chance.choice(missing)
            self.pool.add(name, self.folders[name])
            self.members[name] = Member(Content(self.NAMES.index(name)), self._lineage())

    def _do_wrong(self) -> None:
        with pytest.raises(HotswapError):
            self.pool.swap("nobody")

    def _do_rows(self) -> None:
        assert len(self.pool.table) == len(self.members)

    def _do_prefetch(self) -> None:
        self.pool.prefetch(self._any())

    def restore(self) -> None:
        """All 20 adapters are in the pool, as they were in the beginning."""
        self.pool.max_bytes = None
        self._swap(self._any())
        for name in [*self.NAMES[1:], self.NAMES[0]]:
            if name in self.members and not self.members[name].content.version:
                continue
            if name == self.active:
                self._swap(next(each for each in self.members if each != name))
            if name in self.members:
                self.pool.remove(name)
            self.pool.add(name, self.folders[name])
            self.members[name] = Member(Content(self.NAMES.index(name)), self._lineage())


def run_pool(folder: Path, operations: int, every: int, checkpoints: int, megabytes: float) -> Iterator[str]:
    """Yields a report line now and then; whatever is not as it should be raises."""
    marathon = Marathon(folder)
    start, warm = time.perf_counter(), None
    with RecompileWatch(allow=0) as watch:
        for number in range(1, operations + 1):
            marathon.step()
            if number % every == 0:
                marathon.check_output()
            if number % (operations // checkpoints) == 0:
                marathon.check_bits()
                use = Use.now()
                warm = warm or use
                assert_flat(warm, use, megabytes)
                yield f"{number:,} operations, {time.perf_counter() - start:.0f} s: {use}"
    marathon.restore()
    marathon.check_bits()
    assert len(marathon.members) == 20
    assert watch.recompiles == 0
    assert watch.compiles == 0
    yield f"recompiles {watch.recompiles}; {dict(marathon.counts)}"


# ---- a pool with rows


class RowMarathon:
    """Random arrangements, and beside them what each row has; the first output of each state is the truth for later."""

    BATCH, ROWS = 4, 6

    def __init__(self, folder: Path):
        self.chance = random.Random(0)
        folders = {
            name: save_random_adapter(LINEAR, folder / name, seed=number, r=number + 2)
            for number, name in enumerate("abcd")
        }
        self.adapters = {name: Adapter.load(each) for name, each in folders.items()}
        self.truth = Truth(LINEAR, folders, torch.randn(self.BATCH, 12, generator=torch.Generator().manual_seed(1)))
        self.model = load(LINEAR, folders["a"])
        self.pool = AdapterPool(self.model, adapters=folders, rows=self.ROWS, target_rank=12, progress=False)
        #: by how much the B of an adapter is larger by now than it was
        self.size = dict.fromkeys(folders, 1.0)
        self.history: list[list[tuple]] = []
        self.now = [("a", 1.0)] * self.BATCH
        self.counts: Counter = Counter()

    def _row(self) -> tuple:
        names = self.chance.sample("abcd", 2)
        weights = {name: self.chance.choice((0.5, -1.0)) for name in names}
        return self.chance.choice([names[0], names[1], None, weights]), self.chance.choice((1.0, 1.0, *STRENGTHS))

    def step(self) -> None:
        kinds = dict(assign=40, assigned=8, swap=8, undo=15, strength=4, update=6, wrong=2)
        (kind,) = self.chance.choices(list(kinds), kinds.values())
        self.counts[kind] += 1
        rows = [self._row() for _ in range(self.BATCH)]
        wanted, strengths = map(list, zip(*rows, strict=True))
        former = self.now
        if kind == "assign":
            self.pool.assign(wanted, strengths)
            self.now = rows
        elif kind == "assigned":
            with pytest.raises(ZeroDivisionError), self.pool.assigned(wanted, strengths):
                self._fail_inside(rows)
            self.now = former
        elif kind == "swap":
            name = self.chance.choice("abcd")
            self.pool.swap(name, strengths[0])
            self.now = [(name, strengths[0])] * self.BATCH
        elif kind == "undo" and self.history:
            self.pool.undo()
            self.now = self.history.pop()
        elif kind == "strength":
            self.pool.off()
            self.now = [(None, 1.0)] * self.BATCH
        elif kind == "update":
            name = self.chance.choice("abcd")
            self.size[name] = self.chance.choice((1.0, 2.0))
            adapter = self.adapters[name]
            tensors = {k: v * (self.size[name] if "lora_B" in k else 1) for k, v in adapter.tensors.items()}
            self.pool.update(name, tensors, adapter.config)
        elif kind == "wrong":
            with pytest.raises(HotswapError):
                self.pool.assign([*wanted[1:], "nobody"])
        if kind in ("assign", "swap", "strength"):
            self.history = [*self.history[-99:], former]

    def _fail_inside(self, rows: list[tuple]) -> None:
        self.now = rows
        self.check()
        raise ZeroDivisionError

    def check(self) -> None:
        rows = [(self._sized(wanted), strength) for wanted, strength in self.now]
        wanted, strengths = map(list, zip(*rows, strict=True))
        # adapters several times as strong as they are round several times as far off
        self.truth.check(call(self.model, self.truth.inputs), wanted, strengths, tolerance=1e-4)
        self.counts["outputs compared"] += 1

    def _sized(self, wanted: object) -> object:
        weights = {wanted: 1.0} if isinstance(wanted, str) else wanted
        return weights and {name: weight * self.size[name] for name, weight in weights.items()}


def run_rows(folder: Path, operations: int, every: int, checkpoints: int, megabytes: float) -> Iterator[str]:
    """As :func:`run_pool`, with another adapter in each row."""
    marathon, start, warm = RowMarathon(folder), time.perf_counter(), None
    for number in range(1, operations + 1):
        marathon.step()
        if number % every == 0:
            marathon.check()
        if number % (operations // checkpoints) == 0:
            use = Use.now()
            # fresh loads are kept for comparing, few of them new by the second look
            warm = use if number <= operations // 2 else warm
            assert_flat(warm, use, megabytes)
            yield f"{number:,} operations with rows, {time.perf_counter() - start:.0f} s: {use}"
    yield f"{dict(marathon.counts)}"


# ---- from disk, without a pool


def run_disk(folder: Path, swaps: int, megabytes: float) -> Iterator[str]:
    """``hotswap_adapter`` between files whose ranks, layers and scalings differ, in an unprepared model."""
    chance = random.Random(0)
    settings = [
        dict(r=4, lora_alpha=8),
        dict(r=8, use_rslora=True),
        dict(r=2, target_modules=["first", "last"]),
        dict(r=6, lora_dropout=0.1, target_modules=["blocks.0"]),
        dict(r=4, use_dora=True, target_modules=["first"]),
    ]
    folders = [
        save_random_adapter(LINEAR, folder / f"disk_{number}", seed=number, **lora)
        for number, lora in enumerate(settings)
    ]
    fresh = [load(LINEAR, each) for each in folders]
    expected = [(call(each, LINEAR.inputs()), get_peft_model_state_dict(each)) for each in fresh]
    model, start, warm = load(LINEAR, folders[0]), time.perf_counter(), None
    first: dict[int, torch.Tensor] = {}
    for number in range(1, swaps + 1):
        which = chance.randrange(len(folders))
        hotswap_adapter(model, folders[which], "default")
        if number % 10 == 0:
            output = call(model, LINEAR.inputs())
            torch.testing.assert_close(output, expected[which][0], rtol=0, atol=1e-5)
            assert torch.equal(output, first.setdefault(which, output)), which
        if number % (swaps // 5) == 0:
            saved = get_peft_model_state_dict(model)
            assert saved.keys() == expected[which][1].keys()
            assert all(torch.equal(value, expected[which][1][key]) for key, value in saved.items())
            del saved
            use = Use.now()
            warm = warm or use
            assert_flat(warm, use, megabytes)
            yield f"{number:,} swaps from disk, {time.perf_counter() - start:.0f} s: {use}"


@pytest.mark.parametrize("operations", [120, long(2000)])
def test_many_operations_on_a_pool(tmp_path, operations):
    reports = list(run_pool(tmp_path, operations * TIMES, every=20, checkpoints=min(operations // 100, 4), megabytes=8))
    assert "recompiles 0" in reports[-1]


@pytest.mark.parametrize("operations", [200, long(4000)])
def test_many_operations_with_rows(tmp_path, operations):
    assert len(list(run_rows(tmp_path, operations * TIMES, every=5, checkpoints=4, megabytes=8))) == 5


@pytest.mark.parametrize("swaps", [40, long(500)])
def test_many_swaps_from_disk(tmp_path, swaps):
    assert len(list(run_disk(tmp_path, swaps * TIMES, megabytes=8))) == 5
