"""Threads that compute while others swap: every output equals one adapter's, whichever thread swaps, and however.

``TIMES=10 pytest -m long tests/robustness/test_threads.py`` makes long storms of every way of swapping.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from lengths import TIMES, eventually, long
from models import KINDS, load
from pool_sources import save_sources

from hotswap_lab import (
    Adapter,
    AdapterPool,
    HotswapError,
    ModelInUseError,
    Plan,
    RecompileWatch,
    commit,
    hotswap_adapter,
    in_use,
    plan_hotswap,
    prepare_model_for_compiled_hotswap,
    set_strength,
    waiting_at_most,
)
from hotswap_lab.threads import locked

OTHER = {"a": "b", "b": "d", "d": "a"}
KIND = KINDS["llama"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Of different ranks, scalings and layers, so that a mixture of any two is far from both."""
    sources = save_sources(tmp_path_factory.mktemp("family"))
    return {name: sources[name] for name in OTHER}


# ---- ways of swapping: each takes the model and the folders, and returns what puts an adapter in by its name


def swapping_in_a_pool(model, folders):
    return AdapterPool(model, adapters=folders, progress=False).swap


def all_of_a_pool(model, folders, rows=1):
    """All that a pool does, ending with the wanted adapter at full strength."""
    pool, draw = AdapterPool(model, adapters=folders, rows=rows, target_rank=10, progress=False), random.Random(1)
    adapters = {name: Adapter.load(folder) for name, folder in folders.items()}
    whole, block = (pool.swap, pool.using) if rows == 1 else (pool.assign, pool.assigned)

    def put(name: str) -> None:
        wanted, other = (name, OTHER[name]) if rows == 1 else ([name] * rows, [OTHER[name]] * rows)
        step = draw.randrange(4)
        if step == 0:
            pool.update(name, adapters[name].tensors, adapters[name].config)
        elif step == 1:
            with block(other):
                pass
        elif step == 2:
            whole(other)
        whole(wanted)

    return put


def all_of_a_pool_with_rows(model, folders):
    """The same in both rows of the batch."""
    return all_of_a_pool(model, folders, rows=2)


def from_disk(model, folders):
    return lambda name: hotswap_adapter(model, folders[name], "default")


def in_a_prepared_model(model, folders):
    prepare_model_for_compiled_hotswap(model, adapters=folders.values())
    return from_disk(model, {name: Adapter.load(folder) for name, folder in folders.items()})


def at_a_strength(model, folders):
    """Off and on: half an adapter's layers at another strength would be torn, too."""
    swap = swapping_in_a_pool(model, folders)
    return lambda name: set_strength(model, 0) if name == "b" else swap(name)


def storm(
    folders: dict[str, str],
    way: Callable,
    swaps: int,
    swapping: int,
    backend: str | None = None,
    use: Callable = in_use,
    until_torn: bool = False,
) -> Counter:
    """Lets four threads compute while others swap; counts the outputs that equal an adapter's bit by bit, or none's."""
    model, inputs = load(KIND, folders["a"]), KIND.inputs()
    put = way(model, folders)
    compiled = model if backend is None else torch.compile(model, backend=backend)

    def call() -> torch.Tensor:
        with torch.inference_mode():
            return compiled(**inputs).logits.clone()

    expected = {}
    for name in folders:
        put(name)
        expected[name] = call()
        call()
    distances = [float((one - two).abs().max()) for one, two in itertools.combinations(expected.values(), 2)]
    assert min(distances) > 0.1, "adapters that give the same outputs prove nothing"
    found: Counter = Counter()
    done, counting = threading.Event(), threading.Lock()

    def compute() -> None:
        while not done.is_set():
            with use(model):
                output = call()
            name = next((name for name in folders if torch.equal(output, expected[name])), "torn")
            with counting:
                found[name] += 1

    def swap(number: int) -> None:
        draw = random.Random(number)
        for _ in range(swaps // swapping):
            put(draw.choice(list(folders)))
            time.sleep(0.0005)  # so that somebody gets to compute with it, on however busy a machine
            if done.is_set() or (until_torn and found["torn"]):
                break

    with RecompileWatch() as watch, ThreadPoolExecutor(4 + swapping) as threads:
        readers = [threads.submit(compute) for _ in range(4)]
        swappers = [threads.submit(swap, number) for number in range(swapping)]
        try:
            for each in swappers:
                each.result(600)
        finally:
            done.set()
        for each in readers:
            each.result(60)
    assert not (backend and watch.recompiles)
    output = call()
    assert any(torch.equal(output, each) for each in expected.values()), "a mixture was left behind"
    return found


STORMS = itertools.product(
    (swapping_in_a_pool, all_of_a_pool, all_of_a_pool_with_rows, from_disk, in_a_prepared_model), (1, 2)
)
SHORT = ((swapping_in_a_pool, 2),)


@pytest.mark.parametrize(
    ("way", "swapping", "backend"),
    [
        *((*each, None) for each in SHORT),
        # not two that set strengths: one would change what the other asks for before a thread has computed with it
        *(long(*each, None) for each in [(at_a_strength, 1), *STORMS] if each not in SHORT),
        *(long(way, 2, "aot_eager") for way in (swapping_in_a_pool, in_a_prepared_model, all_of_a_pool_with_rows)),
        *(long(way, 2, "inductor") for way in (swapping_in_a_pool, in_a_prepared_model)),
    ],
)
def test_no_output_is_torn(folders, way, swapping, backend):
    found = storm(folders, way, TIMES * (60 if way is from_disk else 100), swapping, backend)
    assert not found["torn"]
    assert sum(count > 0 for count in found.values()) > 1, "nobody computed between two swaps"


def test_without_taking_turns_outputs_are_torn(folders):
    """What all of this is for, and the proof that the storm would notice."""
    no_turns = contextlib.nullcontext
    assert storm(folders, swapping_in_a_pool, 100_000, swapping=1, use=no_turns, until_torn=True)["torn"]


# ---- two models at once


def is_waiting(thread: threading.Thread) -> bool:
    frames = traceback.extract_stack(sys._current_frames().get(thread.ident))
    return any(Path(frame.filename).name == "turns.py" for frame in frames)


@pytest.mark.long
def test_two_models_are_taken_in_one_order(folders):
    """Whichever is named first: or two threads would wait for each other, each with one of the models."""
    models = [load(KIND, folders["a"]) for _ in range(2)]
    plans = {model: plan_hotswap(model, Adapter.load(folders["b"])) for model in models}

    def swap_both(*plans: Plan) -> None:
        with contextlib.suppress(HotswapError):  # the second time, the models are no longer as planned
            commit(*plans)

    def is_taken(other: torch.nn.Module, kept: torch.nn.Module, order: list) -> bool:
        """Whether a thread that waits for one model has the other one already."""
        thread = threading.Thread(target=swap_both, args=[plans[model] for model in order])
        with locked(kept.get_base_model(), computing=True):
            thread.start()
            for _ in range(2):  # it is there, and has had the time to take what is free
                assert eventually(lambda: is_waiting(thread), 60)
                time.sleep(0.1)
            try:
                with waiting_at_most(0):
                    set_strength(other, 1.0)
            except ModelInUseError:
                taken = True
            else:
                taken = False
        thread.join(60)
        assert not thread.is_alive()
        return taken

    orders = [models, models[::-1]]
    found = [[is_taken(*pair, order) for pair in orders] for order in orders]
    assert found[0] == found[1]
