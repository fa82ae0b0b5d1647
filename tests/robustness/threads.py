"""Threads that compute while others swap: a storm of both, and how many outputs belonged to no adapter at all.

``TIMES=10 pytest -m long tests/robustness/test_threads.py`` makes long ones of every way of swapping.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from models import KINDS, load, save_random_adapter

from hotswap_lab import (
    Adapter,
    AdapterPool,
    RecompileWatch,
    hotswap_adapter,
    in_use,
    prepare_model_for_compiled_hotswap,
    set_strength,
)

#: of different ranks, scalings and layers, so that a mixture of any two is far from both
FAMILY = {
    "a": dict(r=4, lora_alpha=8),
    "b": dict(r=6, lora_alpha=3, target_modules=["q_proj", "down_proj"]),
    "c": dict(r=2, lora_alpha=16, use_rslora=True),
}
KIND = KINDS["llama"]


@dataclass
class Storm:
    """What became of a storm."""

    swaps: int = 0
    #: outputs that equal those of an adapter, bit for bit, by adapter
    whole: dict[str, int] = field(default_factory=dict)
    #: outputs that equal those of none
    torn: int = 0
    errors: list[BaseException] = field(default_factory=list)
    recompiles: int = 0


def make_family(folder: Path) -> dict[str, str]:
    return {
        name: save_random_adapter(KIND, folder / name, seed=number, **settings)
        for number, (name, settings) in enumerate(FAMILY.items())
    }


def ways(folders: dict[str, str]) -> dict[str, Callable]:
    """Ways of swapping: each takes the loaded model, and returns what puts an adapter in by its name."""
    in_memory = {name: Adapter.load(folder) for name, folder in folders.items()}

    def pool(model):
        return AdapterPool(model, adapters=folders, progress=False).swap

    def pool_mixed(model):
        """All that a pool does, ending with the wanted adapter at full strength."""
        pool, draw = AdapterPool(model, adapters=folders, progress=False), random.Random(1)
        other = {"a": "b", "b": "c", "c": "a"}

        def put(name: str) -> None:
            step = draw.randrange(4)
            if step == 0:
                pool.update(name, in_memory[name].tensors, in_memory[name].config)
            elif step == 1:
                with pool.using(other[name]):
                    pass
            elif step == 2:
                pool.swap(other[name])
                pool.undo()
            pool.swap(name)

        return put

    def rows(model):
        """The same in both rows of the batch, and now and then another arrangement on the way."""
        pool, draw = AdapterPool(model, adapters=folders, rows=2, target_rank=10, progress=False), random.Random(1)
        other = {"a": "b", "b": "c", "c": "a"}

        def put(name: str) -> None:
            step = draw.randrange(4)
            if step == 0:
                pool.update(name, in_memory[name].tensors, in_memory[name].config)
            elif step == 1:
                with pool.assigned([other[name]] * 2):
                    pass
            elif step == 2:
                pool.assign([other[name]] * 2)
                pool.undo()
            pool.assign([name, name])

        return put

    def from_disk(model):
        return lambda name: hotswap_adapter(model, folders[name], "default")

    def prepared(model):
        prepare_model_for_compiled_hotswap(model, adapters=folders.values())
        return lambda name: hotswap_adapter(model, in_memory[name], "default")

    def strength(model):
        """Off and on: half an adapter's layers at another strength would be torn, too."""
        swap = pool(model)

        def put(name: str) -> None:
            if name == "base":
                set_strength(model, 0)
            else:
                swap(name)

        put.names = ("a", "base")
        return put

    return {
        "pool": pool,
        "pool_mixed": pool_mixed,
        "rows": rows,
        "from_disk": from_disk,
        "prepared": prepared,
        "strength": strength,
    }


def storm(
    folders: dict[str, str],
    way: str,
    *,
    swaps: int,
    computing: int = 4,
    swapping: int = 1,
    backend: str | None = None,
    guarded: bool = True,
    until_torn: bool = False,
) -> Storm:
    """Lets threads compute and swap at the same time, and compares every output."""
    torch.set_num_threads(1)
    model = load(KIND, folders["a"])
    inputs = KIND.inputs()
    put = ways(folders)[way](model)
    names = getattr(put, "names", tuple(folders))
    compiled = model if backend is None else torch.compile(model, backend=backend)

    def call() -> torch.Tensor:
        with torch.inference_mode():
            return compiled(**inputs).logits.clone()

    expected = {}
    for name in names:
        put(name)
        expected[name] = call()
        call()
    distances = [float((one - two).abs().max()) for one, two in itertools.combinations(expected.values(), 2)]
    assert min(distances) > 0.1, "adapters that give the same outputs prove nothing"
    result, done, counting = Storm(), threading.Event(), threading.Lock()
    result.whole = dict.fromkeys(names, 0)

    def compute() -> None:
        try:
            while not done.is_set():
                with in_use(model) if guarded else contextlib.nullcontext():
                    output = call()
                found = next((name for name in names if torch.equal(output, expected[name])), None)
                with counting:
                    if found is None:
                        result.torn += 1
                    else:
                        result.whole[found] += 1
        except BaseException as error:
            result.errors.append(error)

    def swap(number: int) -> None:
        draw = random.Random(number)
        try:
            for _ in range(swaps // swapping):
                put(draw.choice(names))
                time.sleep(0.0005)  # so that somebody gets to compute with it, on however busy a machine
                with counting:
                    result.swaps += 1
                if result.errors or (until_torn and result.torn):
                    break
        except BaseException as error:
            result.errors.append(error)

    with RecompileWatch() as watch:
        readers = [threading.Thread(target=compute, name=f"compute-{number}") for number in range(computing)]
        swappers = [threading.Thread(target=swap, args=(number,), name=f"swap-{number}") for number in range(swapping)]
        for thread in (*readers, *swappers):
            thread.start()
        for thread in swappers:
            thread.join()
        done.set()
        for thread in readers:
            thread.join()
    result.recompiles = watch.recompiles if backend else 0
    output = call()
    assert any(torch.equal(output, each) for each in expected.values()), "a mixture was left behind"
    return result
