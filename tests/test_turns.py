"""Who waits for whom, and who is refused."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import dataclasses
import inspect
import itertools
import os
import pickle
import random
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from adapters import save_random_adapter_of
from models import ARCHITECTURES, KINDS, call, load, save_random_adapter
from oracle import assert_equals_fresh_load, assert_same_outputs, assert_untouched, snapshot
from peft import LoraConfig, OFTConfig

from hotswap_lab import (
    Adapter,
    AdapterPool,
    HotswapError,
    ModelInUseError,
    hotswap_adapter,
    in_use,
    plan_hotswap,
    prepare_model_for_compiled_hotswap,
    save_adapter,
    set_strength,
    verify_hotswap,
    waiting_at_most,
)
from hotswap_lab.core.engine import NoLock
from hotswap_lab.engine import ENGINE
from hotswap_lab.threads import bases_of, held, turns_of

KIND = KINDS["linear"]
#: long enough for a thread to get to where it has to wait
MOMENT = 0.1


@pytest.fixture
def folders(tmp_path):
    return {
        name: save_random_adapter(KIND, tmp_path / name, seed=number, r=2 + number)
        for number, name in enumerate(("old", "new", "third"))
    }


@pytest.fixture
def model(folders):
    return load(KIND, folders["old"])


@pytest.fixture
def inside(model):
    """A thread that is inside ``in_use`` until it is told to leave."""
    entered, leave = threading.Event(), threading.Event()

    def compute() -> None:
        with in_use(model):
            entered.set()
            leave.wait(30)

    thread = threading.Thread(target=compute, name="the reader")
    thread.start()
    assert entered.wait(30)
    yield leave
    leave.set()
    thread.join()


def start(function, *arguments) -> threading.Thread:
    thread = threading.Thread(target=function, args=arguments)
    thread.start()
    time.sleep(MOMENT)
    return thread


OPERATIONS = {
    "hotswap_adapter": lambda model, folders: hotswap_adapter(model, folders["new"], "default"),
    "set_strength": lambda model, folders: set_strength(model, 0.5),
    "prepare": lambda model, folders: prepare_model_for_compiled_hotswap(model, target_rank=8),
    "a new pool": lambda model, folders: AdapterPool(model, adapters=folders, progress=False),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_whatever_changes_an_adapter_waits_for_those_inside(model, folders, inside, operation):
    before = snapshot(model)
    thread = start(OPERATIONS[operation], model, folders)
    assert thread.is_alive()
    assert_untouched(model, before)
    inside.set()
    thread.join(30)
    assert not thread.is_alive()
    if operation == "hotswap_adapter":
        assert_equals_fresh_load(model, KIND, folders["new"])
    with pytest.raises(AssertionError):
        assert_untouched(model, before)


def test_a_model_that_was_compiled_inside_is_still_the_same_model(model, folders, request):
    pool = AdapterPool(model, adapters=folders, progress=False)
    model.base_model.model = torch.compile(model.base_model.model, backend="eager")
    inside = request.getfixturevalue("inside")
    with waiting_at_most(MOMENT), pytest.raises(ModelInUseError):
        pool.swap("new")
    inside.set()
    pool.swap("new")
    assert verify_hotswap(model, folders["new"], inputs=KIND.inputs())
    plan = plan_hotswap(model, folders["third"])
    assert plan.compiled
    assert plan.slot.room is not None


EXPERTS = "mlp.experts.gate_up_proj"
#: by what a forward changes meanwhile: the model, and two adapters for it
CHANGED_BY_COMPUTING = {
    "weights of the adapter": (
        KINDS["llama"],
        [OFTConfig(oft_block_size=size, coft=True, eps=1.0, target_modules=["q_proj"]) for size in (4, 8)],
    ),
    "modules of the base": (
        ARCHITECTURES["mixtral"],
        [LoraConfig(r=rank, target_modules=["q_proj"], target_parameters=[EXPERTS]) for rank in (4, 2)],
    ),
}


@pytest.mark.parametrize("what", CHANGED_BY_COMPUTING)
def test_a_swap_during_a_forward_that_changes_what_it_is_planned_by(tmp_path, what):
    kind, configs = CHANGED_BY_COMPUTING[what]
    old, new = (save_random_adapter_of(each, tmp_path / str(n), n, kind) for n, each in enumerate(configs))
    model = load(kind, old)
    entered, leave = threading.Event(), threading.Event()

    def hold(*_: object) -> None:
        entered.set()
        leave.wait(30)

    def compute() -> None:
        with in_use(model):
            call(model, kind.inputs())

    mlp = model.get_base_model().model.layers[0].mlp
    inside = mlp.experts.get_base_layer() if hasattr(mlp, "experts") else mlp
    handle = inside.register_forward_pre_hook(hold)
    computing = start(compute)
    assert entered.wait(30)
    with ThreadPoolExecutor(1) as swapping:
        swap = swapping.submit(hotswap_adapter, model, new, "default")
        time.sleep(MOMENT)
        leave.set()
        swap.result(30)
    computing.join(30)
    handle.remove()
    assert_equals_fresh_load(model, kind, new, margin=10)


#: by where PEFT draws random numbers: the new adapter, and what gets there
DRAWING = {
    "a donor": (dict(use_dora=True), lambda model, new: hotswap_adapter(model, new, "default")),
    "layers to add": (dict(r=4), lambda model, new: hotswap_adapter(model, new, "default", add_layers=True)),
}


@pytest.mark.parametrize("where", DRAWING)
def test_who_samples_inside_gets_no_random_number_twice(tmp_path, monkeypatch, where):
    config, operation = DRAWING[where]
    targets = ["first"] if where == "layers to add" else list(KIND.modules)
    model = load(KIND, save_random_adapter(KIND, tmp_path / "old", seed=0, target_modules=targets))
    new = save_random_adapter(KIND, tmp_path / "new", seed=1, **config)
    torch.manual_seed(3)
    expected = torch.rand(1000).tolist()
    torch.manual_seed(3)
    numbers: list[float] = []
    threads: list[threading.Thread] = []
    original = torch.nn.init.calculate_gain

    def sample() -> None:
        with in_use(model):
            numbers.append(torch.rand(1).item())

    def sample_while_others_do(*arguments, **more):
        threads.append(start(sample))
        return original(*arguments, **more)

    monkeypatch.setattr(torch.nn.init, "calculate_gain", sample_while_others_do)
    operation(model, new)
    for thread in threads:
        thread.join(30)
    assert threads
    numbers.append(torch.rand(1).item())
    assert sorted(numbers) == sorted(expected[: len(numbers)])


POOL_OPERATIONS = {
    "swap": lambda pool: pool.swap("new"),
    "strength": lambda pool: setattr(pool, "strength", 0.5),
    "off": lambda pool: pool.off(),
    "undo": lambda pool: pool.undo(),
    "update of the one in use": lambda pool: pool.update("old", *pool.twice),
}


@pytest.mark.parametrize("operation", POOL_OPERATIONS)
def test_a_pool_waits_for_those_inside(model, folders, operation):
    from safetensors.torch import load_file

    pool = AdapterPool(model, adapters=folders, progress=False)
    pool.swap("third")
    pool.swap("old")
    tensors = load_file(f"{folders['old']}/adapter_model.safetensors")
    pool.twice = ({key: 2 * value for key, value in tensors.items()},)
    before = call(model, KIND.inputs())
    entered, leave = threading.Event(), threading.Event()

    def compute() -> None:
        with in_use(pool):
            entered.set()
            leave.wait(30)

    reader = threading.Thread(target=compute)
    reader.start()
    entered.wait(30)
    thread = start(POOL_OPERATIONS[operation], pool)
    assert thread.is_alive()
    assert torch.equal(call(model, KIND.inputs()), before)
    # what doesn't touch the model is not held up by a swap that waits
    str(pool)
    pool.add("fourth", folders["third"])
    pool.remove("fourth")
    leave.set()
    thread.join(30)
    reader.join(30)
    assert not torch.equal(call(model, KIND.inputs()), before)


def test_those_who_come_while_a_swap_waits_let_it_pass(model, folders, inside):
    """Otherwise threads that compute all the time would keep a swap out for ever."""
    swap = start(hotswap_adapter, model, folders["new"], "default")
    outputs = []

    def compute() -> None:
        with in_use(model):
            outputs.append(call(model, KIND.inputs()))

    late = start(compute)
    assert swap.is_alive()
    assert late.is_alive()
    assert not outputs
    inside.set()
    swap.join(30)
    late.join(30)
    assert torch.equal(outputs[0], call(load(KIND, folders["new"]), KIND.inputs()))


def test_threads_compute_side_by_side_and_may_nest(model):
    meeting = threading.Barrier(3, timeout=30)

    def compute() -> None:
        with in_use(model), in_use(model.base_model):
            meeting.wait()

    threads = [start(compute) for _ in range(2)]
    with in_use(torch.compile(model, backend="eager")):
        meeting.wait()
    for thread in threads:
        thread.join(30)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_thread_that_computes_can_not_swap(model, folders, operation):
    before = snapshot(model)
    with in_use(model), pytest.raises(HotswapError, match="This thread is computing with the model"):
        OPERATIONS[operation](model, folders)
    assert_untouched(model, before)
    OPERATIONS[operation](model, folders)


def test_a_swap_that_would_wait_too_long_is_refused(model, folders, inside):
    before = snapshot(model)
    began = time.monotonic()
    with waiting_at_most(0), pytest.raises(ModelInUseError, match="computes with it: the reader"):
        hotswap_adapter(model, folders["new"], "default")
    assert time.monotonic() - began < 10
    with waiting_at_most(MOMENT), pytest.raises(HotswapError, match="The model is in use"):
        set_strength(model, 0.5)
    assert_untouched(model, before)
    inside.set()
    with waiting_at_most(30):
        hotswap_adapter(model, folders["new"], "default")
    assert_equals_fresh_load(model, KIND, folders["new"])


@pytest.mark.parametrize("seconds", [-1, float("nan"), "soon", True, None])
def test_what_is_no_time(seconds):
    with pytest.raises(HotswapError, match="not a time to wait"), waiting_at_most(seconds):
        pass


def test_using_keeps_other_swaps_out_and_lets_others_compute(model, folders):
    pool = AdapterPool(model, adapters=folders, progress=False)
    pool.swap("old")
    with pool.using("new"):
        swap = start(pool.swap, "third")
        with ThreadPoolExecutor() as others, in_use(pool):
            output = others.submit(_compute_inside, pool).result(30)
        assert torch.allclose(output, call(load(KIND, folders["new"]), KIND.inputs()), atol=1e-5)
        assert swap.is_alive()
        assert pool.active == "new"
    swap.join(30)
    assert pool.active == "third"


def _compute_inside(pool: AdapterPool) -> torch.Tensor:
    with in_use(pool):
        return call(pool.model, KIND.inputs())


def test_using_puts_back_even_if_that_has_to_wait(model, folders):
    pool = AdapterPool(model, adapters=folders, progress=False)
    pool.swap("old")
    leave = threading.Event()
    with waiting_at_most(0), pool.using("new"):
        reader = start(lambda: _stay(pool, leave))
        threading.Timer(MOMENT, leave.set).start()
    reader.join(30)
    assert pool.active == "old"


@pytest.mark.usefixtures("python_sigint")
@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_while_using_waits_to_put_back(model, folders, presses):
    """The first one has it wait on, and says so; the second one ends it."""
    pool = AdapterPool(model, adapters=folders, progress=False)
    pool.swap("old")
    leave = threading.Event()

    def press_and_leave() -> None:
        (turn,) = turns_of(bases_of(pool))
        for _ in range(presses):
            while turn.gate.acquire(blocking=False):  # till the end of the block waits
                turn.gate.release()
                time.sleep(MOMENT / 10)
            time.sleep(MOMENT)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5 * MOMENT)
        leave.set()

    def block() -> None:
        with pool.using("new"):
            threads.extend((start(_stay, pool, leave), start(press_and_leave)))

    threads: list[threading.Thread] = []
    with pytest.warns(UserWarning, match="Ctrl-C once more"), pytest.raises(KeyboardInterrupt):
        block()
    for thread in threads:
        thread.join(30)
    assert pool.active == ("old" if presses == 1 else "new")
    pool.swap("third")
    assert_equals_fresh_load(model, KIND, folders["third"], prepared=True)


def _stay(model, leave: threading.Event) -> None:
    with in_use(model):
        leave.wait(30)


@pytest.mark.usefixtures("python_sigint")
def test_ctrl_c_ends_the_waiting(model, folders, inside):
    before = snapshot(model)
    threading.Timer(MOMENT, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        hotswap_adapter(model, folders["new"], "default")
    assert_untouched(model, before)
    inside.set()
    # nothing of it is left: all threads can swap and compute
    for name in ("new", "third"):
        thread = start(hotswap_adapter, model, folders[name], "default")
        thread.join(30)
        assert not thread.is_alive()
        assert_equals_fresh_load(model, KIND, folders[name])


@pytest.mark.usefixtures("python_sigint")
def test_a_handler_that_goes_on_lets_the_swap_wait_on(model, folders, inside):
    heard = []
    signal.signal(signal.SIGINT, lambda *_: heard.append(1))
    threading.Timer(MOMENT, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    threading.Timer(3 * MOMENT, inside.set).start()
    hotswap_adapter(model, folders["new"], "default")
    assert heard == [1]
    assert_equals_fresh_load(model, KIND, folders["new"])


def test_an_error_inside_lets_go(model, folders):
    with pytest.raises(ZeroDivisionError), in_use(model):
        raise ZeroDivisionError
    start(hotswap_adapter, model, folders["new"], "default").join(30)
    assert_equals_fresh_load(model, KIND, folders["new"])


def test_a_writer_inside_a_writer_keeps_everybody_out(model):
    """A thread that is new, and that an outer writer knew nothing of, must not slip in when an inner one is done."""
    base, entered = bases_of(model)[0], threading.Event()

    def compute() -> None:
        with in_use(model):
            entered.set()

    with held(base):
        with held(base):
            pass
        thread = start(compute)
        assert not entered.is_set()
    thread.join(30)
    assert entered.is_set()


def test_two_models_are_taken_in_one_order(folders):
    """Two threads that want the same two models, named in different orders, don't wait for each other."""
    bases = [bases_of(load(KIND, folders["old"]))[0] for _ in range(2)]

    def take(order) -> None:
        for _ in range(200):
            with held(*order, computing=True), held(*order):
                pass

    threads = [threading.Thread(target=take, args=(order,)) for order in (bases, bases[::-1])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


def test_an_engine_without_a_lock_does_not_wait(model, folders, inside):
    dataclasses.replace(ENGINE, lock=NoLock()).hotswap_adapter(model, folders["new"], "default")
    assert_equals_fresh_load(model, KIND, folders["new"])


def test_other_models_are_not_held_up(model, folders, inside):
    other = load(KIND, folders["old"])
    hotswap_adapter(other, folders["new"], "default")
    assert_equals_fresh_load(other, KIND, folders["new"])


def test_reading_does_not_wait_for_those_inside(model, folders, inside, tmp_path):
    assert plan_hotswap(model, folders["new"]).ok
    save_adapter(model, tmp_path / "saved")
    assert verify_hotswap(model, folders["old"], inputs=KIND.inputs())


def test_saving_and_verifying_hold_swaps_back(model, folders, tmp_path):
    """What is saved, and what is compared, is one adapter, however many swaps there are meanwhile."""
    done = threading.Event()

    def swap() -> None:
        while not done.is_set():
            for name in folders:
                hotswap_adapter(model, folders[name], "default")

    thread = threading.Thread(target=swap)
    thread.start()
    expected = [call(load(KIND, folder), KIND.inputs()) for folder in folders.values()]
    try:
        for number in range(10):
            save_adapter(model, tmp_path / str(number))
            output = call(load(KIND, str(tmp_path / str(number))), KIND.inputs())
            assert any(torch.allclose(output, each, atol=1e-5) for each in expected)
    finally:
        done.set()
        thread.join(60)


def test_without_an_adapter_there_is_nothing_to_hold_back():
    with pytest.raises(HotswapError, match="without any adapter"):
        in_use(KIND.base())


def test_a_pipeline(folders):
    class Pipeline:
        def __init__(self):
            self.components = {"one": load(KIND, folders["old"]), "two": load(KIND, folders["old"]), "other": object()}

    pipe, leave = Pipeline(), threading.Event()
    reader = start(_stay, pipe, leave)
    for name in ("one", "two"):
        with waiting_at_most(0), pytest.raises(HotswapError, match="in use"):
            hotswap_adapter(pipe.components[name], folders["new"], "default")
    leave.set()
    reader.join(30)
    for name in ("one", "two"):
        hotswap_adapter(pipe.components[name], folders["new"], "default")


def test_models_can_still_be_copied_and_are_forgotten(model, folders):
    with in_use(model):
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for each in copies:
        hotswap_adapter(each, folders["new"], "default")
        assert_equals_fresh_load(each, KIND, folders["new"])
    for _ in range(50):
        start_and_wait(lambda: _stay(model, _set()))
    (turn,) = turns_of(bases_of(model))
    assert len(turn.locks) < 25  # threads that are gone leave theirs to others


def start_and_wait(function) -> None:
    thread = threading.Thread(target=function)
    thread.start()
    thread.join(30)


def _set() -> threading.Event:
    event = threading.Event()
    event.set()
    return event


def test_asyncio(model, folders):
    """Tasks share a thread: what swaps goes to another one and waits there; in the thread itself it is refused."""
    expected = {name: call(load(KIND, folder), KIND.inputs()) for name, folder in folders.items()}
    pool = AdapterPool(model, adapters=folders, progress=False)
    at_work = 0

    def compute() -> torch.Tensor:
        with in_use(pool):
            return call(model, KIND.inputs())

    async def serve() -> list[torch.Tensor]:
        nonlocal at_work
        outputs = []
        for _ in range(30):
            outputs.append(await asyncio.to_thread(compute))
            at_work += 1
        return outputs

    async def change() -> None:
        for number in range(60):
            await asyncio.to_thread(pool.swap, ("old", "new", "third")[number % 3])

    async def everything():
        _, _, *results = await asyncio.gather(change(), change(), serve(), serve(), serve())
        with in_use(pool):
            await asyncio.sleep(0)
            with pytest.raises(HotswapError, match=r"This thread is computing(.|\n)*with pool.using\(name\)"):
                pool.swap("old")
        return [output for outputs in results for output in outputs]

    outputs = asyncio.run(everything())
    assert at_work == len(outputs) == 90
    for output in outputs:
        assert any(torch.allclose(output, each, atol=1e-5) for each in expected.values())


@pytest.fixture
def pool(model, folders):
    pool = AdapterPool(model, adapters=folders, progress=False)
    pool.swap("old")
    return pool


#: what another task of the thread must not do while one is inside of ``using``
REFUSED = {
    "using": lambda pool, folders: pool.using("third").__enter__(),
    "swap": lambda pool, folders: pool.swap("third"),
    "update": lambda pool, folders: pool.update("new", Adapter.load(folders["new"]).tensors),
    "hotswap_adapter": lambda pool, folders: hotswap_adapter(pool.model, folders["third"], "default"),
}


@pytest.mark.parametrize("way", ["with", "async with"])
@pytest.mark.parametrize("operation", REFUSED)
def test_another_task_of_the_thread_is_refused(pool, folders, operation, way):
    expected = call(load(KIND, folders["new"]), KIND.inputs())

    async def compute() -> torch.Tensor:
        if way == "async with":
            async with pool.using("new"):
                await asyncio.sleep(MOMENT)
                return call(pool.model, KIND.inputs())
        with pool.using("new"):
            await asyncio.sleep(MOMENT)
            return call(pool.model, KIND.inputs())

    async def everything() -> torch.Tensor:
        computing = asyncio.create_task(compute())
        await asyncio.sleep(MOMENT / 2)
        with pytest.raises(HotswapError, match=r"Another task of this thread(.|\n)*async with"):
            REFUSED[operation](pool, folders)
        if way == "with":  # whose end could not wait for this
            with pytest.raises(HotswapError, match="Another task of this thread"):
                in_use(pool)
        else:
            with in_use(pool):
                await asyncio.sleep(2 * MOMENT)
                assert not computing.done()
        return await computing

    assert torch.allclose(asyncio.run(everything()), expected, atol=1e-5)
    assert pool.active == "old"


def test_tasks_wait_for_tasks_and_threads(pool, folders):
    expected = {name: call(load(KIND, folder), KIND.inputs()) for name, folder in folders.items()}
    order = []

    async def compute(name: str) -> None:
        async with pool.using(name) as entered:
            assert entered is pool
            order.append(name)
            await asyncio.sleep(MOMENT / 10)
            output = await asyncio.to_thread(_compute_inside, pool)
            assert torch.allclose(output, expected[name], atol=1e-5)
            async with pool.using("third"):  # its own, at once
                await asyncio.sleep(0)
                assert torch.allclose(call(pool.model, KIND.inputs()), expected["third"], atol=1e-5)
            assert pool.active == name

    async def compute_without_waiting() -> None:
        with pool.using("new"):
            await asyncio.sleep(MOMENT)
            assert torch.allclose(call(pool.model, KIND.inputs()), expected["new"], atol=1e-5)

    async def everything(names) -> None:
        with waiting_at_most(30):
            await asyncio.gather(compute_without_waiting(), *map(compute, names))

    def compute_in_a_thread() -> None:
        for number in range(10):
            with pool.using(name := ("new", "third")[number % 2]):
                assert torch.allclose(call(pool.model, KIND.inputs()), expected[name], atol=1e-5)
            with in_use(pool):
                time.sleep(MOMENT / 2)

    names = ["new", "old", "third"] * 3
    with ThreadPoolExecutor(1) as others:
        computing = others.submit(compute_in_a_thread)
        asyncio.run(everything(names))
        computing.result(30)
    assert order == names  # first come, first served
    assert pool.active == "old"


@pytest.mark.parametrize("when", ["in the queue", "waiting for a thread", "inside", "while it puts back"])
def test_a_task_that_is_cancelled_leaves_nothing_behind(pool, folders, request, when):
    async def stay() -> None:
        async with pool.using("new"):
            entered.set()
            await (asyncio.sleep(0) if when == "while it puts back" else asyncio.sleep(30))

    async def everything() -> None:
        inside = request.getfixturevalue("inside") if when == "waiting for a thread" else None
        first = asyncio.create_task(stay())
        if inside is None:
            await entered.wait()
        tasks = [first]
        if when == "in the queue":
            tasks.append(asyncio.create_task(stay()))
        if when == "while it puts back":
            with in_use(pool):
                await asyncio.sleep(MOMENT)
                first.cancel()
                await asyncio.sleep(MOMENT)
                assert not first.done()
        await asyncio.sleep(MOMENT)
        tasks[-1].cancel()
        with pytest.raises(asyncio.CancelledError):
            await tasks[-1]
        assert pool.active == ("new" if when == "in the queue" else "old")
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        if inside is not None:
            inside.set()

    entered = asyncio.Event()
    asyncio.run(everything())
    assert pool.active == "old"
    with waiting_at_most(5):
        start_and_wait(lambda: pool.swap("third"))
    assert pool.active == "third"


def test_a_task_waits_no_longer_than_it_is_let(pool, inside):
    """For a thread, and behind another task; inside of ``in_use`` it would wait for itself."""

    async def use() -> None:
        async with pool.using("new"):
            pass

    async def wait(seconds: float) -> None:
        with waiting_at_most(seconds):
            await use()

    async def everything() -> None:
        first, second = asyncio.create_task(wait(3 * MOMENT)), asyncio.create_task(wait(MOMENT))
        await asyncio.wait([second])
        assert not first.done()
        for task in (first, second):
            with pytest.raises(ModelInUseError):
                await task
        with in_use(pool), pytest.raises(HotswapError, match="This thread is computing"):
            await use()

    asyncio.run(everything())


def test_a_stream_that_is_dropped_puts_back(pool):
    """The event loop closes what is left of an async generator, in a task of its own."""

    async def stream():
        async with pool.using("new"):
            yield 1

    async def take_one() -> None:
        async for _ in stream():
            break

    async def everything() -> None:
        await asyncio.create_task(take_one())
        await asyncio.sleep(MOMENT)
        assert pool.active == "old"
        pool.swap("third")

    asyncio.run(everything())


def test_a_storm_of_tasks_and_threads(pool, folders):
    """Two event loops and a thread: whatever waits, is refused, late or cancelled, an output is that of its adapter."""
    expected = {name: call(load(KIND, folder), KIND.inputs()) for name, folder in folders.items()}
    end, done = time.monotonic() + 2, []

    def check(name: str) -> None:
        assert torch.allclose(call(pool.model, KIND.inputs()), expected[name], atol=1e-5)

    async def once(draw: random.Random) -> None:
        name, way = draw.choice(list(folders)), draw.randrange(5)
        with contextlib.suppress(HotswapError), waiting_at_most(draw.choice([0, 0.05, 30])):
            if way < 3:
                async with pool.using(name):
                    await asyncio.sleep(draw.random() / 500)
                    await asyncio.to_thread(check, name)
            elif way == 3:
                with pool.using(name):
                    await asyncio.sleep(draw.random() / 500)
                    check(name)
            else:
                with in_use(pool):
                    await asyncio.sleep(draw.random() / 500)
            done.append(way)

    async def tasks(draw: random.Random) -> None:
        while time.monotonic() < end:
            started = [asyncio.create_task(once(draw)) for _ in range(6)]
            await asyncio.sleep(draw.random() / 200)
            started[0].cancel()
            results = await asyncio.gather(*started, return_exceptions=True)
            assert not [each for each in results if isinstance(each, Exception)], results

    def threads() -> None:
        while time.monotonic() < end:
            with pool.using("third"):
                check("third")
            with in_use(pool):
                time.sleep(0.001)

    with ThreadPoolExecutor(3) as pools:
        loops = [pools.submit(asyncio.run, tasks(random.Random(seed))) for seed in range(2)]
        for each in (pools.submit(threads), *loops):
            each.result(60)
    assert done
    assert pool.active == "old"


def test_rows_for_a_task(model, folders):
    pool = AdapterPool(model, adapters=folders, rows=2, progress=False)

    async def compute(names) -> None:
        async with pool.assigned(names):
            await asyncio.sleep(MOMENT / 10)
            assert [row.adapter for row in pool.rows] == names

    async def everything() -> None:
        await asyncio.gather(*(compute(names) for names in (["old", "new"], ["third", None], ["new", "old"])))

    asyncio.run(everything())
    assert pool.rows == []


def test_generate_is_one_adapter_from_first_to_last_token(tmp_path):
    """Asked for in the middle of a generation, a swap comes after it."""
    kind = KINDS["llama"]
    folders = [save_random_adapter(kind, tmp_path / str(seed), seed=seed, r=4) for seed in range(2)]
    model = load(kind, folders[0])
    settings = dict(max_new_tokens=20, min_new_tokens=20, do_sample=False, pad_token_id=0)
    expected = [load(kind, folder).generate(**kind.inputs(), **settings) for folder in folders]
    assert not torch.equal(*expected)
    in_the_middle = threading.Event()

    class Streamer:
        tokens = 0

        def put(self, _) -> None:
            self.tokens += 1
            if self.tokens == 5:
                in_the_middle.set()
            time.sleep(0.01)

        def end(self) -> None:
            pass

    inputs = {name: tensor[:1] for name, tensor in kind.inputs().items()}
    expected = [load(kind, folder).generate(**inputs, **settings) for folder in folders]
    results = []

    def generate() -> None:
        with in_use(model):
            results.append(model.generate(**inputs, streamer=Streamer(), **settings))

    thread = threading.Thread(target=generate)
    thread.start()
    assert in_the_middle.wait(60)
    with waiting_at_most(0), pytest.raises(HotswapError, match="in use"):
        hotswap_adapter(model, folders[1], "default")
    hotswap_adapter(model, folders[1], "default")
    thread.join(60)
    assert torch.equal(results[0], expected[0])
    generate()
    assert torch.equal(results[1], expected[1])


def test_what_is_saved_is_what_is_there_when_the_saver_gets_in(tmp_path):
    """A swap that adds layers is waiting, and the saver comes after it: the new layers are saved, too."""
    few = save_random_adapter(KIND, tmp_path / "few", seed=1, r=4, target_modules=["first"])
    other = save_random_adapter(KIND, tmp_path / "other", seed=2, r=4, target_modules=["last"])
    model, leave = load(KIND, few), threading.Event()
    reader = start(_stay, model, leave)
    swap = start(lambda: hotswap_adapter(model, other, "default", add_layers=True))
    saver = start(save_adapter, model, tmp_path / "saved")
    leave.set()
    for thread in (reader, swap, saver):
        thread.join(30)
    saved, expected = load(KIND, str(tmp_path / "saved")), [load(KIND, folder) for folder in (few, other)]
    assert any(torch.equal(call(saved, KIND.inputs()), call(each, KIND.inputs())) for each in expected)


def test_a_merge_while_a_swap_waits(model, folders):
    entered, merge, leave = threading.Event(), threading.Event(), threading.Event()

    def compute() -> None:
        with in_use(model):
            entered.set()
            merge.wait(30)
            model.merge_adapter()
            leave.wait(30)

    reader = start(compute)
    refused = []

    def swap() -> None:
        try:
            hotswap_adapter(model, folders["new"], "default")
        except HotswapError as error:
            refused.append(error)

    swapper = start(swap)
    merge.set()
    time.sleep(MOMENT)
    leave.set()
    reader.join(30)
    swapper.join(30)
    assert refused
    model.unmerge_adapter()
    assert_same_outputs(model, load(KIND, folders["old"]), KIND)  # merging rounds the base weights


def test_adding_to_a_pool_holds_nobody_up(model, folders, monkeypatch):
    """However long it takes to read an adapter."""
    pool = AdapterPool(model, adapters={"old": folders["old"]}, target_rank=8, progress=False)
    reading, go_on, read = threading.Event(), threading.Event(), Adapter.load

    def slowly(*arguments):
        reading.set()
        go_on.wait(30)
        return read(*arguments)

    monkeypatch.setattr(Adapter, "load", slowly)
    adding = start(pool.add, "new", folders["new"])
    assert reading.wait(30)
    with waiting_at_most(5):
        pool.swap("old")
        pool.off()
        pool.undo()
    with in_use(pool):
        call(model, KIND.inputs())
    go_on.set()
    adding.join(30)
    assert pool.names == ["old", "new"]


def test_an_adapter_that_is_removed_while_a_swap_to_it_waits(model, folders):
    pool = AdapterPool(model, adapters=folders, progress=False)
    pool.swap("old")
    leave, refused = threading.Event(), []
    reader = start(_stay, model, leave)

    def swap() -> None:
        try:
            pool.swap("new")
        except HotswapError as error:
            refused.append(error)

    swapper = start(swap)
    pool.remove("new")
    leave.set()
    reader.join(30)
    swapper.join(30)
    assert refused
    assert pool.active == "old"


def test_another_adapter_under_the_name_that_a_swap_waits_for(model, folders):
    pool = AdapterPool(model, adapters=folders, progress=False)
    pool.swap("old")
    leave = threading.Event()
    reader = start(_stay, model, leave)
    swapper = start(pool.swap, "new")
    pool.remove("new")
    pool.add("new", folders["third"])
    leave.set()
    reader.join(30)
    swapper.join(30)
    assert_equals_fresh_load(model, KIND, folders["third"], prepared=True)


def test_no_file_is_in_use_while_a_swap_waits(model, folders, inside):
    """Somebody writes over the file meanwhile; what was read and checked is what is swapped in."""
    path = f"{folders['new']}/adapter_model.safetensors"
    expected = call(load(KIND, folders["new"]), KIND.inputs())
    swap = start(hotswap_adapter, model, folders["new"], "default")
    with open(path, "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(size - 64)
        file.write(b"\xff" * 64)
    inside.set()
    swap.join(30)
    assert torch.equal(call(model, KIND.inputs()), expected)


def _enter_while_another_begins_to_write(model, step: int) -> bool | None:
    """Whether both were inside at once, if writing begins at this line of entering; None if there are fewer lines."""
    base, lines, both = bases_of(model)[0], itertools.count(1), []
    writing, ends = threading.Event(), threading.Event()

    def write() -> None:
        with held(base):
            writing.set()
            ends.wait(30)
            writing.clear()

    def trace(frame, event, _):
        if event == "line" and frame.f_code.co_filename == inspect.getfile(in_use) and next(lines) == step:
            writer.start()
            writing.wait(MOMENT)
        return trace

    def compute() -> None:
        sys.settrace(trace)
        with in_use(model):
            sys.settrace(None)
            both.append(writing.is_set())

    writer, reader = threading.Thread(target=write), threading.Thread(target=compute)
    reader.start()
    reader.join(MOMENT)
    ends.set()
    reader.join(30)
    return both[0] if writer.ident else None


def test_a_swap_that_begins_at_any_line_of_entering_keeps_the_thread_out_or_waits_for_it(folders):
    tried = (_enter_while_another_begins_to_write(load(KIND, folders["old"]), step) for step in itertools.count(1))
    outcomes = list(itertools.takewhile(lambda both: both is not None, tried))
    assert len(outcomes) > 5
    assert not any(outcomes)
