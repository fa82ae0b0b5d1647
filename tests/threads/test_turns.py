"""Who waits for whom, and who is refused."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import copy
import gc
import inspect
import itertools
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from operator import attrgetter
from types import SimpleNamespace

import pytest
import torch
from lengths import eventually, long
from models import ARCHITECTURES, KINDS, call, load, save_random_adapter
from oracle import assert_equals_fresh_load, assert_same_outputs, assert_untouched, snapshot
from peft import OFTConfig, get_peft_model
from refusals import refused

from hotswap_lab import (
    Adapter,
    AdapterPool,
    HotswapError,
    ModelInUseError,
    commit,
    hotswap_adapter,
    in_use,
    loaded,
    plan_hotswap,
    prepare_model_for_compiled_hotswap,
    save_adapter,
    set_strength,
    verify_hotswap,
    waiting_at_most,
)
from hotswap_lab.threads import Block, bases_of, in_use_now, is_shared, locked, share_turn, turns, turns_of

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
def pool(model, folders):
    pool = AdapterPool(model, adapters=folders, progress=False)
    pool.swap("third")
    pool.swap("old")
    return pool


def start(function: Callable, *arguments: object) -> Future:
    """Begins this in another thread, which gets to where it has to wait."""
    done: Future = Future()

    def run() -> None:
        try:
            done.set_result(function(*arguments))
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    time.sleep(MOMENT)
    return done


def in_a_worker(workers: ThreadPoolExecutor, function: Callable, *arguments: object) -> Future:
    """As Starlette runs what is not ``async``: in any of its threads, in a copy of the context."""
    return workers.submit(contextvars.copy_context().run, function, *arguments)


@contextlib.contextmanager
def reading(model: object) -> Iterator[threading.Event]:
    """A thread is inside ``in_use`` until the event that this gives is set, or the block is left."""
    entered, leave = threading.Event(), threading.Event()

    def compute() -> None:
        with in_use(model):
            entered.set()
            leave.wait(30)

    thread = threading.Thread(target=compute, name="the reader")
    thread.start()
    assert entered.wait(30)
    try:
        yield leave
    finally:
        leave.set()
        thread.join(30)


def outputs_of(folder: str) -> torch.Tensor:
    return call(load(KIND, folder), KIND.inputs())


def computes(model, folder: str) -> bool:
    return torch.allclose(call(model, KIND.inputs()), outputs_of(folder), rtol=0, atol=1e-9)


def compute_inside(model: object, folder: str) -> bool:
    with in_use(model):
        return computes(getattr(model, "model", model), folder)


def enter(model: object) -> None:
    with in_use(model):
        pass


async def enter_in_a_task(model: object) -> None:
    enter(model)


def twice(folder: str) -> dict[str, torch.Tensor]:
    return {key: 2 * value for key, value in Adapter.load(folder).tensors.items()}


# ---- threads

#: all that changes an adapter, and the fixtures of what it is done with
OPERATIONS = {
    "hotswap_adapter": lambda model, folders: hotswap_adapter(model, folders["new"], "default"),
    "set_strength": lambda model, folders: set_strength(model, 0.5),
    "prepare": lambda model, folders: prepare_model_for_compiled_hotswap(model, target_rank=8),
    "a new pool": lambda model, folders: AdapterPool(model, adapters=folders, progress=False),
    "swap": lambda pool, folders: pool.swap("new"),
    "strength": lambda pool, folders: setattr(pool, "strength", 0.5),
    "off": lambda pool, folders: pool.off(),
    "update of the one in use": lambda pool, folders: pool.update("old", twice(folders["old"])),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_whatever_changes_an_adapter_waits_for_those_inside(model, folders, request, operation):
    action = OPERATIONS[operation]
    used = request.getfixturevalue(inspect.getfullargspec(action).args[0])
    before = snapshot(model)
    with in_use(used), pytest.raises(HotswapError, match="This thread is computing with the model"):
        action(used, folders)
    with reading(used):
        changing = start(action, used, folders)
        assert not changing.done()
        if used is not model:  # what doesn't touch the model is not held up by a swap that waits
            str(used)
            used.add("fourth", folders["third"])
            used.remove("fourth")
        assert_untouched(model, before)
    changing.result(30)
    if operation in ("hotswap_adapter", "swap"):
        assert_equals_fresh_load(model, KIND, folders["new"], prepared=used is not model)
    with pytest.raises(AssertionError):
        assert_untouched(model, before)


def test_a_model_that_was_compiled_inside_is_still_the_same_model(model, folders, pool):
    model.base_model.model = torch.compile(model.base_model.model, backend="eager")
    with reading(model), waiting_at_most(MOMENT), pytest.raises(ModelInUseError):
        pool.swap("new")
    pool.swap("new")
    assert verify_hotswap(model, folders["new"], inputs=KIND.inputs())
    plan = plan_hotswap(model, folders["third"])
    assert plan.compiled
    assert plan.slot.room is not None


@pytest.mark.parametrize("operation", [hotswap_adapter, lambda *given: commit(plan_hotswap(*given))])
def test_a_swap_during_a_forward_that_changes_what_it_is_planned_by(tmp_path, operation):
    """LoRA on a parameter takes modules of the base away while it computes."""
    kind = ARCHITECTURES["mixtral"]
    targets = dict(target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"])
    old, new = (save_random_adapter(kind, tmp_path / str(rank), rank, r=rank, **targets) for rank in (4, 2))
    model, entered, leave = load(kind, old), threading.Event(), threading.Event()

    def hold(*_: object) -> None:
        entered.set()
        leave.wait(30)

    def compute() -> None:
        with in_use(model):
            call(model, kind.inputs())

    experts = model.get_base_model().model.layers[0].mlp.experts
    with experts.get_base_layer().register_forward_pre_hook(hold):
        computing = start(compute)
        assert entered.wait(30)
        swap = start(operation, model, new, "default")
        leave.set()
        for each in (computing, swap):
            each.result(30)
    assert_equals_fresh_load(model, kind, new, margin=10)


def test_a_plan_waits_for_a_forward_that_writes_to_weights(tmp_path):
    """As that of OFT with ``coft`` does."""
    config = OFTConfig(oft_block_size=4, coft=True, target_modules=["first"])
    model = get_peft_model(KIND.base(), config)
    model.save_pretrained(tmp_path)
    with reading(model), waiting_at_most(MOMENT), pytest.raises(ModelInUseError):
        plan_hotswap(model, str(tmp_path))
    assert plan_hotswap(model, str(tmp_path)).ok


@pytest.mark.parametrize(("old", "new"), [({}, dict(use_dora=True)), (dict(target_modules=["first"]), dict(r=4))])
def test_who_samples_inside_gets_no_random_number_twice(tmp_path, monkeypatch, old, new):
    """PEFT draws some where it makes an adapter of another kind, or layers to add."""
    model = load(KIND, save_random_adapter(KIND, tmp_path / "old", seed=0, **old))
    new = save_random_adapter(KIND, tmp_path / "new", seed=1, **new)
    torch.manual_seed(3)
    expected = torch.rand(1000).tolist()
    torch.manual_seed(3)
    sampling: list[Future] = []
    original = torch.nn.init.calculate_gain

    def sample() -> float:
        with in_use(model):
            return torch.rand(1).item()

    def sample_while_others_do(*arguments, **more):
        if len(sampling) < 3:
            sampling.append(start(sample))
        return original(*arguments, **more)

    monkeypatch.setattr(torch.nn.init, "calculate_gain", sample_while_others_do)
    hotswap_adapter(model, new, "default", add_layers=True)
    assert sampling
    numbers = [*(each.result(30) for each in sampling), torch.rand(1).item()]
    assert sorted(numbers) == sorted(expected[: len(numbers)])


def test_those_who_come_while_a_swap_waits_let_it_pass(model, folders):
    """Otherwise threads that compute all the time would keep a swap out for ever."""
    with reading(model):
        swap = start(hotswap_adapter, model, folders["new"], "default")
        late = start(compute_inside, model, folders["new"])
        assert not swap.done()
        assert not late.done()
    swap.result(30)
    assert late.result(30)


def test_threads_compute_side_by_side_and_may_nest(model):
    meeting = threading.Barrier(3, timeout=30)

    def compute() -> None:
        with in_use(model), in_use(model.base_model):
            meeting.wait()

    threads = [start(compute) for _ in range(2)]
    with in_use(torch.compile(model, backend="eager")):
        meeting.wait()
    for each in threads:
        each.result(30)


def test_a_swap_that_would_wait_too_long_is_refused_and_nothing_else_is_held_up(model, folders, pool, tmp_path):
    began, other = time.monotonic(), load(KIND, folders["old"])
    with reading(model), waiting_at_most(0):
        assert plan_hotswap(model, folders["third"]).ok
        save_adapter(model, tmp_path / "saved")
        assert verify_hotswap(model, folders["old"], inputs=KIND.inputs())
        hotswap_adapter(other, folders["third"], "default")
        refused("The model is in use", lambda: pool.using("new").__enter__())  # and has nothing to put back
        error = refused("computes with it: the reader", hotswap_adapter, model, folders["new"], "default")
        assert isinstance(error, ModelInUseError)
        with waiting_at_most(MOMENT):
            refused("The model is in use", set_strength, model, 0.5)
    assert time.monotonic() - began < 10
    with waiting_at_most(30):
        hotswap_adapter(model, folders["new"], "default")
    assert_equals_fresh_load(model, KIND, folders["new"], prepared=True)


def test_the_limit_of_a_block_that_failed_is_over(model, folders):
    inside = threading.Event()

    def compute() -> None:
        with in_use(model):
            inside.set()
            time.sleep(3 * MOMENT)

    with pytest.raises(ZeroDivisionError), waiting_at_most(0):
        1 / 0  # noqa: B018
    computing = start(compute)
    assert inside.wait(30)
    hotswap_adapter(model, folders["third"], "default")  # it waits
    assert computing.done()


def test_a_thread_that_computes_waits_for_a_swap_as_long_as_it_takes(model):
    inside = threading.Event()

    def swap() -> None:
        with locked(*bases_of(model)):
            inside.set()
            time.sleep(3 * MOMENT)

    swapping = start(swap)
    assert inside.wait(30)
    with waiting_at_most(0), in_use(model):  # which limits swaps
        assert swapping.result(30) is None


@pytest.mark.parametrize("seconds", [-1, float("nan"), "soon", True, None])
def test_what_is_no_time(seconds):
    with pytest.raises(HotswapError, match="not a valid number of seconds"), waiting_at_most(seconds):
        pass


def use(pool: AdapterPool, name: str) -> None:
    """Puts an adapter in for a block: what is back afterwards is what the block found."""
    with pool.using(name):
        assert pool.active == name


@pytest.mark.usefixtures("python_sigint")
@pytest.mark.parametrize("presses", [1, long(2)])
def test_using_waits_to_put_back(model, folders, pool, presses):
    """However long it may wait otherwise. The first Ctrl-C has it wait on, and says so; the second one ends it."""
    (turn,), leaving = turns_of(bases_of(pool)), []

    def press_and_leave(leave: threading.Event) -> None:
        assert eventually(lambda: turn.queue, 30)  # till the end of the block waits
        for _ in range(presses):
            time.sleep(MOMENT)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(2 * MOMENT)
        leave.set()

    with contextlib.ExitStack() as readers:
        said = pytest.warns(UserWarning, match="Ctrl-C once more")
        with said, pytest.raises(KeyboardInterrupt), waiting_at_most(0), pool.using("new"):
            leaving.append(start(press_and_leave, readers.enter_context(reading(pool))))
    leaving[0].result(30)
    assert pool.active == ("new" if presses == 2 else "old")
    pool.swap("third")
    assert_equals_fresh_load(model, KIND, folders["third"], prepared=True)


@pytest.mark.long
@pytest.mark.usefixtures("python_sigint")
@pytest.mark.parametrize("goes_on", [False, True])
def test_ctrl_c_ends_the_waiting_unless_a_handler_goes_on(model, folders, goes_on):
    before, heard = snapshot(model), []
    if goes_on:
        signal.signal(signal.SIGINT, lambda *_: heard.append(1))
    with reading(model) as leave:
        threading.Timer(MOMENT, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        threading.Timer(3 * MOMENT, leave.set).start()
        with contextlib.nullcontext() if goes_on else pytest.raises(KeyboardInterrupt):
            hotswap_adapter(model, folders["new"], "default")
    if goes_on:
        assert heard == [1]
        assert_equals_fresh_load(model, KIND, folders["new"])
    else:
        assert_untouched(model, before)
    start(hotswap_adapter, model, folders["third"], "default").result(30)  # nothing of it is left
    assert_equals_fresh_load(model, KIND, folders["third"])


def test_a_writer_inside_a_writer_keeps_everybody_out(model):
    """A thread that is new, and that an outer writer knew nothing of, must not slip in when an inner one is done."""
    base = bases_of(model)[0]
    with locked(base):
        with locked(base):
            pass
        computing = start(enter, model)
        assert not computing.done()
    computing.result(30)


@pytest.mark.long
def test_a_swap_that_begins_at_any_line_of_entering_keeps_the_thread_out_or_waits_for_it(folders):
    tried = (enter_while_another_begins_to_write(load(KIND, folders["old"]), step) for step in itertools.count(1))
    outcomes = list(itertools.takewhile(lambda both: both is not None, tried))
    assert len(outcomes) > 5
    assert not any(outcomes)


def enter_while_another_begins_to_write(model, step: int) -> bool | None:
    """Whether both were inside at once, if writing begins at this line of entering; None if there are fewer lines."""
    base, lines, both = bases_of(model)[0], itertools.count(1), []
    writing, ends = threading.Event(), threading.Event()

    def write() -> None:
        with locked(base):
            writing.set()
            ends.wait(30)
            writing.clear()

    def trace(frame, event, _):
        if event == "line" and frame.f_code.co_filename == inspect.getfile(in_use) and next(lines) == step:
            writer.start()
            writing.wait(MOMENT / 4)
        return trace

    def compute() -> None:
        sys.settrace(trace)
        with in_use(model):
            sys.settrace(None)
            both.append(writing.is_set())

    writer, reader = threading.Thread(target=write), threading.Thread(target=compute)
    reader.start()
    reader.join(MOMENT / 4)
    ends.set()
    reader.join(30)
    return both[0] if writer.ident else None


@pytest.mark.parametrize("verifies", [False, True])
def test_saving_and_verifying_hold_swaps_back(model, folders, tmp_path, verifies):
    """What is saved, and what is compared, is one adapter, however many swaps there are meanwhile."""
    layer, leave = model.get_base_model().first, threading.Event()
    register = layer.register_forward_pre_hook if verifies else layer.register_state_dict_pre_hook
    register(lambda *_: leave.wait(30) and None)
    if verifies:
        reading = start(lambda: verify_hotswap(model, folders["old"], inputs=KIND.inputs()))
    else:
        reading = start(save_adapter, model, tmp_path / "saved")
    assert not reading.done()
    with waiting_at_most(0), pytest.raises(ModelInUseError):
        hotswap_adapter(model, folders["new"], "default")
    leave.set()
    reading.result(30)


def test_what_is_saved_is_what_is_there_when_the_saver_gets_in(tmp_path):
    """A swap that adds layers is waiting, and the saver comes after it: the new layers are saved, too."""
    few = save_random_adapter(KIND, tmp_path / "few", seed=1, r=4, target_modules=["first"])
    other = save_random_adapter(KIND, tmp_path / "other", seed=2, r=4, target_modules=["last"])
    model = load(KIND, few)
    with reading(model):
        swap = start(lambda: hotswap_adapter(model, other, "default", add_layers=True))
        saver = start(save_adapter, model, tmp_path / "saved")
    for each in (swap, saver):
        each.result(30)
    assert computes(load(KIND, str(tmp_path / "saved")), other)


@pytest.mark.parametrize("names", [("one", "two"), ("model", "other"), ("other", "model")])
def test_a_pipeline(folders, names):
    models = [load(KIND, folders["old"]), load(KIND, folders["old"])]
    pipeline = SimpleNamespace(**dict(zip(names, models, strict=True)), another=object())
    assert len(loaded(pipeline)) == 2
    with reading(pipeline), waiting_at_most(0):
        for each in models:
            refused("in use", hotswap_adapter, each, folders["new"], "default")
    for each in models:
        hotswap_adapter(each, folders["new"], "default")


@pytest.mark.long
def test_those_who_wait_while_models_get_one_turn_wait_for_all_of_them(folders):
    """And code that found a model's previous turn before, such as a block that it enters later."""
    models = [load(KIND, folders["old"]) for _ in range(2)]
    bases, last = [bases_of(each)[0] for each in models], models[1]
    early = in_use(last)
    with locked(*bases):
        waiting = [start(hotswap_adapter, last, folders["new"], "default"), *(start(enter, each) for each in models)]
        share_turn(bases)
    for each in waiting:
        each.result(60)
    for block, other in ((locked(bases[0]), last), (early, models[0])):
        with block:
            swap = start(hotswap_adapter, other, folders["old"], "default")
            assert not swap.done()
        swap.result(60)
    assert computes(last, folders["old"])


def test_models_can_still_be_copied_and_are_forgotten(model, folders):
    with in_use(model):
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for each in copies:
        hotswap_adapter(each, folders["new"], "default")
        assert_equals_fresh_load(each, KIND, folders["new"])
    for _ in range(50):
        with reading(model):
            pass
    (turn,) = turns_of(bases_of(model))
    assert len(turn.threads) < 25  # threads that are gone leave their numbers to others
    assert not {*turn.open, *turn.queue}


def test_what_must_not_wait_is_let_in_where_its_own_thread_computes(model, folders):
    """As a panel's refresh; the swap waits for that thread, and so would the refresh for the swap."""
    for block, is_let_in in ((in_use, True), (reading, False)):
        with block(model):
            swap = start(hotswap_adapter, model, folders["new"], "default")
            with in_use_now(model) as is_mine:
                assert (is_mine, swap.done()) == (is_let_in, False)
        swap.result(30)
    with locked(*bases_of(model)), in_use_now(model) as is_mine:  # in the middle of a swap of its own
        assert not is_mine


# ---- what changes while a swap waits


def test_a_merge(model, folders):
    def merge() -> None:
        with in_use(model):
            time.sleep(3 * MOMENT)
            model.merge_adapter()

    merging, swap = start(merge), start(hotswap_adapter, model, folders["new"], "default")
    merging.result(30)
    with pytest.raises(HotswapError):
        swap.result(30)
    model.unmerge_adapter()
    assert_same_outputs(model, load(KIND, folders["old"]), KIND)  # merging rounds the base weights


@pytest.mark.parametrize("is_there", [False, True])
def test_an_adapter_is_removed_or_another_has_its_name(pool, folders, is_there):
    with reading(pool):
        swap = start(pool.swap, "new")
        pool.remove("new")
        if is_there:
            pool.add("new", folders["third"])
    with contextlib.nullcontext() if is_there else pytest.raises(HotswapError):
        swap.result(30)
    assert pool.active == ("new" if is_there else "old")
    assert_equals_fresh_load(pool.model, KIND, folders["third" if is_there else "old"], prepared=True)


def test_a_file_is_written_over(model, folders):
    """What was read and checked is what is swapped in."""
    expected = outputs_of(folders["new"])
    compute_inside(model, folders["old"])
    assert not any(map(is_shared, bases_of(model)))  # then nothing would be copied
    with reading(model):
        swap = start(hotswap_adapter, model, folders["new"], "default")
        with open(f"{folders['new']}/adapter_model.safetensors", "r+b") as file:
            file.seek(-64, os.SEEK_END)
            file.write(b"\xff" * 64)
    swap.result(30)
    assert torch.equal(call(model, KIND.inputs()), expected)


def test_adding_to_a_pool_holds_nobody_up(model, folders, monkeypatch):
    """However long it takes to read an adapter."""
    pool = AdapterPool(model, adapters={"old": folders["old"]}, target_rank=8, progress=False)
    go_on, read = threading.Event(), Adapter.load
    monkeypatch.setattr(Adapter, "load", lambda *given, **named: go_on.wait(30) and read(*given, **named))
    adding = start(pool.add, "new", folders["new"])
    assert not adding.done()
    with waiting_at_most(5):
        pool.swap("old")
        pool.off()
    with in_use(pool):
        call(model, KIND.inputs())
    go_on.set()
    adding.result(30)
    assert pool.names == ["old", "new"]


def test_reading_an_adapter_again_holds_nobody_up(model, folders, monkeypatch):
    """One that a pool had dropped."""
    whole = AdapterPool(model, adapters=folders, target_rank=8, progress=False).nbytes
    pool = AdapterPool(model, adapters=folders, target_rank=8, max_bytes=0.7 * whole, progress=False)
    dropped, *_ = (row[0] for row in pool.table if row[4] == "in its files")
    go_on, read = threading.Event(), Adapter.load
    monkeypatch.setattr(Adapter, "load", lambda *given, **named: go_on.wait(30) and read(*given, **named))
    swap = start(pool.swap, dropped)
    start(enter, model).result(10)
    assert not swap.done()
    go_on.set()
    swap.result(30)
    assert computes(model, folders[dropped])


# ---- tasks of an event loop

#: what another task of the thread must not do while one is inside of ``using``
REFUSED = (
    lambda pool, folders: pool.using("third").__enter__(),
    lambda pool, folders: pool.swap("third"),
    lambda pool, folders: pool.update("new", Adapter.load(folders["new"]).tensors),
    lambda pool, folders: hotswap_adapter(pool.model, folders["third"], "default"),
)


@pytest.mark.parametrize("way", ["with", "async with"])
def test_another_task_of_the_thread_is_refused(pool, folders, way):
    async def compute() -> bool:
        async with contextlib.AsyncExitStack() as stack:
            if way == "async with":
                await stack.enter_async_context(pool.using("new"))
            else:
                stack.enter_context(pool.using("new"))
            await asyncio.sleep(2 * MOMENT)
            return computes(pool.model, folders["new"])

    async def everything() -> bool:
        computing = asyncio.create_task(compute())
        await asyncio.sleep(MOMENT / 2)
        for operation in REFUSED:
            with pytest.raises(HotswapError, match=r"Another task of this thread(.|\n)*async with"):
                operation(pool, folders)
        if way == "with":  # whose end could not wait for this
            with pytest.raises(HotswapError, match="Another task of this thread"):
                enter(pool)
        else:
            with in_use(pool):
                await asyncio.sleep(3 * MOMENT)
                assert not computing.done()
        return await computing

    assert asyncio.run(everything())
    assert pool.active == "old"


@pytest.mark.long
@pytest.mark.parametrize("when", ["in the queue", "waiting for a thread", "inside", "while it puts back"])
def test_a_task_that_is_cancelled_leaves_nothing_behind(pool, when, monkeypatch):
    monkeypatch.setattr(turns, "STREAM_LIMIT", MOMENT / 2)  # of no task

    async def stay() -> None:
        async with pool.using("new"):
            entered.set()
            await (asyncio.sleep(0) if when == "while it puts back" else asyncio.sleep(30))

    async def everything() -> None:
        with reading(pool) if when == "waiting for a thread" else contextlib.nullcontext():
            first = asyncio.create_task(stay())
            if when != "waiting for a thread":
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

    entered = asyncio.Event()
    asyncio.run(asyncio.wait_for(everything(), 60))
    assert pool.active == "old"
    with waiting_at_most(5):
        start(pool.swap, "third").result(30)
    assert pool.active == "third"


def test_a_task_waits_no_longer_than_it_is_let(pool):
    """For a thread, and behind another task; inside of ``in_use`` it would wait for itself."""

    async def wait(seconds: float) -> None:
        with waiting_at_most(seconds):
            async with pool.using("new"):
                pass

    async def everything() -> None:
        first, second = asyncio.create_task(wait(3 * MOMENT)), asyncio.create_task(wait(MOMENT))
        await asyncio.wait([second])
        assert not first.done()
        enter(pool)  # that task can only go on after this one
        for task in (first, second):
            with pytest.raises(ModelInUseError):
                await task
        with in_use(pool), pytest.raises(HotswapError, match=r"This thread is computing(.|\n)*with pool.using\(name\)"):
            await wait(30)

    with reading(pool):
        asyncio.run(everything())


def test_a_stream_that_is_dropped_puts_back(pool):
    """The event loop closes what is left of an async generator, in a task of its own."""

    async def take_one() -> None:
        async for _ in stream_awaiting(pool, "new"):
            break

    async def everything() -> None:
        await asyncio.create_task(take_one())
        await asyncio.sleep(MOMENT)
        assert pool.active == "old"
        pool.swap("third")

    asyncio.run(everything())


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


# ---- blocks that end in another order than they began


def stream(pool: AdapterPool, name: str, steps: int = 3) -> Iterator[bool]:
    """Whether the model computes with the adapter, at each step."""
    with pool.using(name):
        for _ in range(steps):
            yield pool.active == name


async def stream_awaiting(pool: AdapterPool, name: str, steps: int = 3):
    async with pool.using(name):
        for _ in range(steps):
            await asyncio.sleep(0)
            yield pool.active == name


@contextlib.contextmanager
def wrapped(pool: AdapterPool, name: str):
    with pool.using(name) as entered:
        yield entered


@contextlib.contextmanager
def stacked(pool: AdapterPool, name: str):
    """Entered by a helper that returns."""
    with contextlib.ExitStack() as stack:
        enter_on = lambda: stack.enter_context(pool.using(name))  # noqa: E731
        yield enter_on()


WAYS = {"using": AdapterPool.using, "contextmanager": wrapped, "ExitStack": stacked}


@pytest.mark.parametrize("outer", WAYS)
@pytest.mark.parametrize("inner", WAYS)
def test_nested_blocks_however_they_are_wrapped(pool, outer, inner):
    def nested() -> Iterator[str | None]:
        with waiting_at_most(0), WAYS[outer](pool, "new"):
            with WAYS[inner](pool, "third"), in_use(pool):
                yield pool.active
            with pytest.raises(KeyError), WAYS[inner](pool, "old"):
                raise KeyError
            pool.swap("third")
            yield pool.active

    with WAYS[outer](pool, "third"):
        assert list(nested()) == ["third", "third"]
    assert pool.active == "old"
    assert list(nested()) == ["third", "third"]
    assert pool.active == "old"


def test_two_generators_in_one_thread(pool, folders):
    """The second one is refused at once; the first one goes on with its own adapter.

    Nothing shows whether code between its steps is nested in it, as a test is in a fixture that yields.
    """
    first, second = stream(pool, "new"), stream(pool, "third")
    assert next(first)
    with pytest.raises(HotswapError, match="open block around this code, or in a generator"):
        next(second)
    refused("finish or close its generator; in a pytest fixture", pool.swap, "third")
    with in_use(pool):  # computing is not a swap
        assert computes(pool.model, folders["new"])
    assert list(first) == [True, True]
    assert pool.active == "old"
    assert list(stream(pool, "third")) == [True] * 3
    assert pool.active == "old"


def test_a_block_that_is_entered_and_left_in_threads_of_a_pool(pool):
    """As FastAPI does with a dependency that yields: the thread may get another request before the block ends."""
    with ThreadPoolExecutor(1) as worker, ThreadPoolExecutor(1) as other:
        first, second = wrapped(pool, "new"), wrapped(pool, "third")
        in_a_worker(worker, first.__enter__).result(30)
        entering = in_a_worker(worker, second.__enter__)
        time.sleep(MOMENT)
        assert not entering.done()
        assert pool.active == "new"
        other.submit(first.__exit__, None, None, None).result(30)
        entering.result(30)
        assert pool.active == "third"
        asyncio.run(enter_in_a_task(pool))  # which that thread, another one, does not keep from going on
        other.submit(second.__exit__, None, None, None).result(30)
    assert pool.active == "old"


def test_a_swap_does_not_wait_for_a_block_that_its_own_thread_has_to_end(pool, monkeypatch):
    """A dependency of FastAPI's is entered in a thread of the server's, which the swap would keep from ending it."""
    monkeypatch.setattr(turns, "STREAM_LIMIT", MOMENT)
    with ThreadPoolExecutor(1) as worker:
        block = wrapped(pool, "new")
        in_a_worker(worker, block.__enter__).result(30)
        waiting = in_a_worker(worker, pool.swap, "third")
        try:
            assert isinstance(waiting.exception(20), ModelInUseError)
        finally:
            start(block.__exit__, None, None, None).result(30)


@pytest.mark.long
def test_a_swap_does_not_wait_for_ever_for_a_stream_of_another_thread(pool, monkeypatch):
    monkeypatch.setattr(turns, "STREAM_LIMIT", MOMENT)

    def pieces() -> Iterator[int]:
        with in_use(pool):
            yield 1

    steps = pieces()
    with ThreadPoolExecutor(1) as server, ThreadPoolExecutor(1) as other:
        assert server.submit(next, steps).result(30) == 1
        waiting = other.submit(pool.swap, "third")
        try:
            assert isinstance(waiting.exception(20), ModelInUseError)
            with waiting_at_most(30):
                patient = in_a_worker(other, pool.swap, "new")
            time.sleep(3 * MOMENT)
            assert not patient.done()
        finally:
            server.submit(steps.close).result(30)
        patient.result(30)
    pool.swap("third")


def test_a_block_is_left_in_another_thread(pool, folders):
    block = in_use(pool)
    block.__enter__()
    swap = start(pool.swap, "third")
    assert not swap.done()
    start(block.__exit__, None, None, None).result(30)
    swap.result(30)
    assert computes(pool.model, folders["third"])


@pytest.mark.parametrize("inner", ["a block", "a generator"])
def test_a_block_left_out_of_order_is_an_error_and_the_former_adapter_comes_back(pool, folders, inner):
    outer, block, steps = pool.using("new"), pool.using("third"), stream(pool, "third")
    outer.__enter__()
    block.__enter__() if inner == "a block" else next(steps)
    if inner == "a generator":
        refused("nobody else would end it", pool.swap, "old")
    with pytest.raises(HotswapError, match="left before one that was entered inside"):
        outer.__exit__(None, None, None)
    assert computes(pool.model, folders["third"])
    block.__exit__(None, None, None) if inner == "a block" else steps.close()
    assert computes(pool.model, folders["old"])
    with waiting_at_most(0):
        start(pool.swap, "third").result(30)


# ---- generators that are collected


@pytest.mark.usefixtures("without_garbage")
@pytest.mark.parametrize("after", ["the block", "an entry", "a swap"])
def test_a_generator_collected_while_its_thread_computes_is_put_back_later(pool, folders, after):
    steps = stream(pool, "new")
    next(steps)
    with in_use(pool):
        del steps
        gc.collect()
        assert computes(pool.model, folders["new"])  # what is being computed goes on with it
        if after == "an entry":
            other = start(compute_inside, pool, folders["old"])
            assert not other.done()
    if after == "an entry":
        assert other.result(30)
    if after == "a swap":
        with pool.using("third"):
            assert computes(pool.model, folders["third"])
    assert computes(pool.model, folders["old"])
    assert pool.active == "old"


def test_the_next_entry_puts_back_first_if_the_block_could_not(pool, folders):
    steps = stream(pool, "new")
    next(steps)
    with reading(pool) as leave:
        steps.close()  # without waiting for the reader
        assert pool.active == "new"
        swap = start(use, pool, "third")
        assert not swap.done()
        leave.set()
        swap.result(30)
    assert computes(pool.model, folders["old"])


def test_what_ctrl_c_kept_from_being_put_back_is_put_back_before_the_next_swap(model):
    (base,), to_raise = bases_of(model), [None, KeyboardInterrupt]

    def back() -> None:
        if error := to_raise.pop():
            raise error

    block = Block(base, lambda backs: backs.append(back), "", tuple, contextlib.nullcontext)
    block.__enter__()
    with pytest.raises(KeyboardInterrupt):
        block.__exit__(GeneratorExit)
    with locked(base):
        assert not to_raise


def test_a_task_that_still_computes_at_the_end_of_its_block_gets_the_former_adapter_later(pool, folders):
    async def run() -> None:
        with contextlib.ExitStack() as left_later:
            async with pool.using("new"):
                left_later.enter_context(in_use(pool))
            assert computes(pool.model, folders["new"])  # what is being computed goes on with it
        assert computes(pool.model, folders["old"])

    asyncio.run(run())


def test_a_swap_by_a_finalizer_in_the_middle_of_an_entry_is_refused(pool):
    (turn,) = turns_of(bases_of(pool))
    with turn.lock:
        refused("This thread is computing", pool.swap, "new")
        refused("This thread is computing", lambda: in_use(pool).__enter__())


@pytest.mark.usefixtures("without_garbage")
@pytest.mark.parametrize("line", ["Turn.in_the_way", "Turn._ask", "Turn.let_in_waiting", "Turn.let_in", "_is_left"])
def test_a_generator_collected_in_the_middle_of_an_entry(pool, folders, monkeypatch, line):
    """Wherever the collector runs: nothing waits for itself, no turn is lost, and the previous adapter is back."""
    (turn,) = turns_of(bases_of(pool))
    steps = [stream(pool, "new")]
    next(steps[0])
    waiting = start(use, pool, "third")
    assert not waiting.done()
    original = attrgetter(line)(turns)

    def collecting(*given):
        if line != "_is_left" or turn.lock._is_owned():  # in the middle of what looks through the blocks
            steps.clear()
        try:
            return original(*given)
        finally:
            gc.collect()

    monkeypatch.setattr(f"{turns.__name__}.{line}", collecting)
    enter(pool)
    steps.clear()
    monkeypatch.undo()
    waiting.result(30)
    assert not {*turn.open, *turn.queue}
    assert computes(pool.model, folders["old"])


# ---- event loops


def test_nested_blocks_of_a_task(pool):
    async def enter_and_return(stack: contextlib.AsyncExitStack, name: str) -> None:
        await stack.enter_async_context(pool.using(name))

    async def inner(name: str) -> bool:
        async with pool.using(name):
            pool.swap("old")
            return pool.active == "old"

    async def task() -> list:
        async with pool.using("third"), contextlib.AsyncExitStack() as stack:
            await enter_and_return(stack, "new")
            found = [pool.active, await inner("third"), pool.active]
            with pool.using("third"):
                return [*found, pool.active, [each async for each in stream_awaiting(pool, "new")]]

    async def everything() -> list:
        with waiting_at_most(30):
            return await asyncio.gather(task(), task())

    assert asyncio.run(everything()) == [["new", True, "new", "third", [True] * 3]] * 2
    assert pool.active == "old"
    with pool.using("new"):  # around an event loop
        asyncio.run(everything())
        assert pool.active == "new"
    assert pool.active == "old"


@pytest.mark.long
def test_forty_tasks_and_five_threads(pool, folders):
    """In the order of arrival, and without a thread of the default executor to wait in."""
    inside, overlaps, order = [], [], []

    def compute(name: str) -> None:
        inside.append(name)
        overlaps.append(len(inside) > 1 or pool.active != name)
        time.sleep(0.001)
        inside.remove(name)

    async def task(number: int) -> str:
        name = ("new", "third", "old")[number % 3]
        async with pool.using(name) as entered:
            assert entered is pool
            order.append(number)
            await asyncio.to_thread(compute, name)
            async with pool.using("third"):  # its own, at once
                await asyncio.sleep(0)
                assert pool.active == "third"
            assert await asyncio.to_thread(compute_inside, pool, folders[name])
            return name

    async def without_waiting() -> None:
        with pool.using("new"):
            await asyncio.sleep(MOMENT)
            assert computes(pool.model, folders["new"])

    async def everything() -> list:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))
        tasks = [asyncio.create_task(each) for each in (without_waiting(), *map(task, range(40)))]
        await asyncio.sleep(MOMENT)
        for each in tasks[1::7]:
            each.cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    def thread() -> None:
        for name in ("new", "third") * 5:
            with pool.using(name):
                compute(name)
            enter(pool)

    threads = [start(thread) for _ in range(5)]
    done = asyncio.run(asyncio.wait_for(everything(), 120))
    for each in threads:
        each.result(60)
    errors = [each for each in done if isinstance(each, BaseException)]
    assert {type(each) for each in errors} <= {asyncio.CancelledError}
    assert len(errors) <= 6
    assert order == sorted(order)  # first come, first served
    assert len(overlaps) >= 84
    assert not any(overlaps)
    assert pool.active == "old"


def test_two_async_generators_in_one_task(pool):
    async def alternating() -> None:
        first, second = stream_awaiting(pool, "new"), stream_awaiting(pool, "third")
        assert await anext(first)
        with pytest.raises(HotswapError, match="nobody else would end it"):
            await anext(second)
        assert await anext(first)
        await first.aclose()
        assert pool.active == "old"

    asyncio.run(alternating())


@pytest.mark.parametrize("child", ["a task", "a thread", "a thread that computes"])
def test_what_a_block_waits_for_is_refused_rather_than_waited_for(pool, folders, child):
    def swap() -> None:
        pool.swap("third")

    async def swapping() -> None:
        async with pool.using("third"):
            pass

    async def parent() -> None:
        async with pool.using("new"):
            if child == "a thread that computes":
                assert await asyncio.to_thread(compute_inside, pool, folders["new"])
                return
            with pytest.raises(HotswapError, match="nobody else would end it"):
                await (asyncio.create_task(swapping()) if child == "a task" else asyncio.to_thread(swap))

    asyncio.run(asyncio.wait_for(parent(), 30))
    assert pool.active == "old"


def test_what_runs_in_the_context_of_a_block_or_in_another_one(pool):
    """Code that a block waits for computes with it, and does not swap. So does code that a generator runs in a step."""

    def steps(block, then: Callable, *arguments: object) -> Iterator[None]:
        with block:
            yield
            then(*arguments)
            yield

    async def everything() -> None:
        with pool.using("new"):
            await asyncio.create_task(enter_in_a_task(pool))
        generator = steps(pool.using("new"), enter, pool)
        for _ in range(2):
            contextvars.copy_context().run(next, generator)
        generator.close()

    asyncio.run(everything())
    with ThreadPoolExecutor(1) as worker:
        with in_use(pool):
            swap = start(pool.swap, "third")
            in_a_worker(worker, enter, pool).result(30)
        swap.result(30)
        with pool.using("new"):
            error = in_a_worker(worker, pool.swap, "old").exception(30)
            assert "nobody else would end it" in str(error)
            assert pool.active == "new"
        generator = steps(in_use(pool), pool.swap, "old")
        in_a_worker(worker, next, generator).result(30)
        error = in_a_worker(worker, next, generator).exception(30)
        assert "This thread is computing" in str(error)
    assert pool.active == "third"


def test_a_plain_block_that_would_block_the_loop_that_a_stream_needs(pool):
    """The stream is stepped in other threads, but the event loop asks for each step."""

    async def streaming() -> list[bool]:
        steps, found = stream(pool, "new"), []
        while (step := await asyncio.to_thread(next, steps, None)) is not None:
            found.append(step)
            await asyncio.sleep(MOMENT)
        return found

    async def everything() -> None:
        task = asyncio.create_task(streaming())
        await asyncio.sleep(MOMENT)
        with pytest.raises(HotswapError, match=r"Another task(.|\n)*async with"):
            pool.swap("third")
        async with pool.using("third"):
            assert pool.active == "third"
        assert await task == [True] * 3

    asyncio.run(asyncio.wait_for(everything(), 60))
    assert pool.active == "old"


@pytest.mark.parametrize("way", [long("stream"), "reader"])
def test_forty_one_clients_and_forty_threads(pool, monkeypatch, way):
    """One client's stream needs a thread to go on, and the others wait in all of them: these are refused in time."""
    monkeypatch.setattr(turns, "STREAM_LIMIT", 3 * MOMENT)

    def computing() -> Iterator[bool]:
        with in_use(pool):
            yield True
            yield True

    with ThreadPoolExecutor(40) as workers:
        steps = stream(pool, "new") if way == "stream" else computing()
        assert in_a_worker(workers, next, steps).result(30)
        waiting = [in_a_worker(workers, pool.swap, "third") for _ in range(40)]
        time.sleep(MOMENT)
        step = in_a_worker(workers, next, steps)
        assert not step.done()
        step.result(30)
        assert in_a_worker(workers, list, steps).result(30) == [True] * (way == "stream")
        errors = [each.exception(30) for each in waiting]
    assert {type(each) for each in errors} <= {ModelInUseError, type(None)}
    assert any(errors)
    refused_text = str(next(filter(None, errors)))
    assert "async def" in refused_text
    assert "waiting_at_most" in refused_text
