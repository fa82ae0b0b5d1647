"""Very many operations: no drift, no recompile, no memory, file or thread that is not given back.

With ``TIMES=50``, 30,000 operations on a pool, as many on one with rows, and 20,000 swaps from disk.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from architectures import ROWS, Case
from lengths import TIMES

from hotswap_lab import HotswapError, RecompileWatch, hotswap_adapter

pytestmark = pytest.mark.usefixtures("fresh_compiler")
#: how much memory, in MB, and how many tensors more may be in use than before
MEGABYTES, TENSORS = 8, 400


class Use(NamedTuple):
    """What this process holds: resident memory in MB, Python objects that are tensors, and so on."""

    memory: float
    tensors: int
    files: int = 0
    adapters_mapped: int = 0
    threads: int = 0

    @classmethod
    def now(cls) -> Use:
        gc.collect()
        tensors = sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())
        if sys.platform != "linux":
            return cls(0, tensors, threads=threading.active_count())
        ctypes.CDLL(None).malloc_trim(0)  # what is free is given back, so that the rest is what is in use
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        maps = Path("/proc/self/maps").read_text().count(".safetensors")
        counts = [len(os.listdir(f"/proc/self/{each}")) for each in ("fd", "task")]
        return cls(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, tensors, counts[0], maps, counts[1])


class Marathon(Case):
    """One model with one family of adapters, and operations without end."""

    def refuse(self) -> None:
        with pytest.raises(HotswapError, match="nobody"):
            self.pool.swap("nobody")

    def draw_size(self) -> tuple[int, int]:
        """One size, so that there is one graph."""
        return len(self.now.rows) if self.now.assigned else ROWS, 4

    def compiled_pool(self, count: int) -> None:
        self.computing = torch.compile(self.model, backend="eager")
        self.in_pool(1, count)

    def pool_with_rows(self, count: int) -> None:
        self.in_pool(ROWS, count)

    def in_pool(self, rows: int, count: int) -> None:
        assert self.make_pool(rows)
        operations = [*self.operations(rows), self.refuse]

        def step(number: int) -> None:
            self.draw.choice(operations)()
            if number % 5 == 0:
                self.compare("after many operations")

        self.go(step, count)
        for name in self.members:
            if self.done("a swap", self.pool.swap, name):
                self.equals(self.members[name].label, prepared=True)

    def disk(self, count: int) -> None:
        """Ranks, layers and scalings differ, in an unprepared model."""
        base_weights = self.kind.base().state_dict()

        def step(number: int) -> None:
            name = self.draw.choice([*self.folders])
            hotswap_adapter(self.model, self.folders[name], "default", add_layers=True, base_weights=base_weights)
            if number % 10 == 0:
                self.equals(name, prepared=False)

        self.go(step, count)

    def go(self, step: Callable[[int], None], count: int) -> None:
        """In the second half, nothing may become more: by then, all that is kept was needed once."""
        uses = []
        with RecompileWatch() as watch:
            for half in (range(count // 2), range(count // 2, count)):
                for number in half:
                    step(number)
                self.reference.models.clear()
                uses.append((Use.now(), watch.compiles))
        (warm, compiled), (use, compiled_later) = uses
        assert compiled == compiled_later
        assert use[2:] == warm[2:], uses
        assert use.memory - warm.memory < MEGABYTES, uses
        assert use.tensors <= warm.tensors + TENSORS, uses


@pytest.mark.long
@pytest.mark.parametrize(("way", "count"), [("pool_with_rows", 600), ("compiled_pool", 600), ("disk", 400)])
def test_many_operations(tmp_path, way, count, caplog):
    caplog.set_level(logging.CRITICAL, "hotswap_lab")  # pytest would keep each refusal, with all that its frames have
    case = Marathon("llama", way, seed=3, folder=tmp_path)  # whose pool has max_bytes
    case.load_family(("any",) if way == "disk" else ("plain",), 4)
    getattr(case, way)(count * TIMES)
