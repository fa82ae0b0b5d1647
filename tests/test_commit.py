"""All or nothing: an error at any step leaves the model exactly the old adapter or exactly the new one."""

from __future__ import annotations

import copy
import itertools
import os
import signal
import threading
import time

import pytest
import torch
from faults import count_lines, run_with_fault
from models import KINDS, call, load, save_random_adapter
from oracle import assert_equals_fresh_load, assert_same_outputs, assert_untouched, snapshot
from peft import LoraConfig

import hotswap_lab
from hotswap_lab import (
    Adapter,
    AdapterPool,
    commit,
    get_strength,
    hotswap_adapter,
    plan_hotswap,
    prepare_model_for_compiled_hotswap,
    resolve_slot,
    set_strength,
)
from hotswap_lab.interrupts import interrupts_held
from hotswap_lab.journal import Journal


@pytest.fixture
def _sigint():
    """A process that was started in the background of a shell ignores SIGINT; a notebook's kernel doesn't."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


SWAPS = {
    "copy": (dict(r=4, lora_alpha=8), dict(r=4, lora_alpha=3, lora_dropout=0.1)),
    "resize and off": (dict(r=4), dict(r=6, lora_alpha=3, target_modules=["first", "blocks.0"])),
    "add": (dict(r=4, target_modules=["first"]), dict(r=6)),
    "pad": (dict(r=6, lora_alpha=3), dict(r=4, lora_dropout=0.1, target_modules=["first", "blocks.0"])),
}


@pytest.mark.parametrize("swap", SWAPS)
def test_a_fault_at_every_line_of_a_commit(tmp_path, swap):
    kind = KINDS["linear"]
    old = save_random_adapter(kind, tmp_path / "old", seed=1, **SWAPS[swap][0])
    new = save_random_adapter(kind, tmp_path / "new", seed=2, **SWAPS[swap][1])
    model = load(kind, old, is_trainable=True)
    if swap == "pad":
        prepare_model_for_compiled_hotswap(model, target_rank=8)
    model(kind.inputs()).sum().backward()
    before = snapshot(model)
    step, faults = 1, 0
    while True:
        # the plan is not part of the fault hunt: the next test shows that it writes nothing
        plan = plan_hotswap(model, new, add_layers=True)
        hit = run_with_fault(lambda plan=plan: commit(plan), step)
        if model.peft_config["default"] is plan.config:
            break  # the last write was done before this line
        assert hit
        assert_untouched(model, before)
        faults += 1
        step += 1
    assert faults > 50
    assert_equals_fresh_load(model, kind, new, is_trainable=True, prepared=swap == "pad")


def test_a_fault_at_every_line_of_preparing(tmp_path):
    """Two adapters, one of them on a layer that the other lacks, and a family that adds a third layer."""
    kind = KINDS["linear"]
    first = save_random_adapter(kind, tmp_path / "first", seed=1, r=4, target_modules=["first", "last"])
    second = save_random_adapter(kind, tmp_path / "second", seed=2, r=6, target_modules=["last", "blocks.0"])
    model = load(kind, first, is_trainable=True)
    model.load_adapter(second, "second")
    model(kind.inputs()).sum().backward()
    mine, before, faults = LoraConfig(r=3), snapshot(model), 0
    family = [LoraConfig(r=8, target_modules=["blocks.1"]), LoraConfig.from_pretrained(second)]

    def prepare(model=model, mine=mine):
        prepare_model_for_compiled_hotswap(model, target_rank=9, adapters=family, config=mine)

    lines = count_lines(lambda: prepare(copy.deepcopy(model), copy.deepcopy(mine)))
    # everything that writes is among the last lines; what decides is tried at some of its lines only
    for step in itertools.chain(range(1, lines - 600, 11), itertools.count(lines - 600)):
        if not run_with_fault(prepare, step) or mine.r == 9:
            break  # the last write was done before this line
        assert_untouched(model, before)
        faults += 1
    assert faults > 500
    for name, folder in (("default", first), ("second", second)):
        model.set_adapter(name)
        assert_same_outputs(model, load(kind, folder, name), kind)
        assert {tensor.capacity for tensor in resolve_slot(model, name).tensors} == {9}


def test_a_fault_at_every_line_of_setting_the_strength(tmp_path):
    """One adapter whose scalings are floats, and one whose scalings are tensors."""
    kind = KINDS["linear"]
    folder = save_random_adapter(kind, tmp_path / "a", seed=1, r=4)
    for prepared in (False, True):
        model = load(kind, folder)
        if prepared:
            prepare_model_for_compiled_hotswap(model, target_rank=4)
        before, step = snapshot(model), 1
        while run_with_fault(lambda model=model: set_strength(model, 0.5), step):
            if get_strength(model) == 0.5:
                break
            assert_untouched(model, before)
            step += 1
        assert step > 50
        assert get_strength(model) == 0.5


POOL_OPERATIONS = {
    "swap": lambda pool, new: pool.swap("b"),
    "swap of a dropped adapter": lambda pool, new: pool.swap("dropped"),
    "strength": lambda pool, new: setattr(pool, "strength", 0.5),
    "off": lambda pool, new: pool.off(),
    "undo": lambda pool, new: pool.undo(),
    "add": lambda pool, new: pool.add("new", new),
    "update": lambda pool, new: pool.update("a", {key: 2 * value for key, value in new.tensors.items()}, new.config),
    "remove": lambda pool, new: pool.remove("b"),
}


@pytest.mark.parametrize("operation", POOL_OPERATIONS)
def test_a_fault_at_every_line_of_what_a_pool_does(tmp_path, operation):
    kind = KINDS["linear"]
    sources = {
        "a": save_random_adapter(kind, tmp_path / "a", seed=1, r=4, lora_alpha=3),
        "b": save_random_adapter(kind, tmp_path / "b", seed=2, r=6, target_modules=["first"], lora_dropout=0.1),
        "dropped": save_random_adapter(kind, tmp_path / "dropped", seed=3, r=2, use_rslora=True),
    }
    new = Adapter.load(save_random_adapter(kind, tmp_path / "new", seed=4, r=3))
    model = load(kind, sources["a"])
    pool = AdapterPool(model, adapters=sources, progress=False)
    pool.swap("b")
    pool.swap("a")
    pool._entries["dropped"].packed = None

    def state():
        used = [(name, entry.version, entry.source) for name, entry in pool._entries.items()]
        return pool.active, round(pool.strength, 4), len(pool._history), used

    before, noted = snapshot(model), state()
    faults = 0
    for step in itertools.count(1):
        hit = run_with_fault(lambda: POOL_OPERATIONS[operation](pool, new), step)
        if not hit or state() != noted:
            break
        assert_untouched(model, before)
        faults += 1
    assert faults > 4
    # Whole, whichever side of the last step it was. Right after the copy, the pool has not looked yet at what is now
    # in the memory, and doesn't vouch for it by a name; Ctrl-C can't come in there, a trace function can.
    name = pool.active or pool._room.content.label[1]
    if operation in ("swap", "swap of a dropped adapter", "undo"):
        assert_equals_fresh_load(model, kind, sources[name], prepared=True)
    pool.swap("dropped")
    assert_equals_fresh_load(model, kind, sources["dropped"], prepared=True)


def test_a_fault_at_every_line_of_reading_and_planning(tmp_path):
    kind = KINDS["linear"]
    old = save_random_adapter(kind, tmp_path / "old", seed=1, r=4, target_modules=["first"])
    new = save_random_adapter(kind, tmp_path / "new", seed=2, r=6)
    model = load(kind, old, is_trainable=True)
    before = snapshot(model)
    step = 1
    while run_with_fault(lambda: plan_hotswap(model, new, add_layers=True), step):
        step += 3
    assert step > 500
    assert_untouched(model, before)


def test_out_of_memory_while_staging(tmp_path, monkeypatch):
    kind = KINDS["linear"]
    old = save_random_adapter(kind, tmp_path / "old", seed=1, r=4)
    new = save_random_adapter(kind, tmp_path / "new", seed=2, r=6)
    model = load(kind, old)
    before = snapshot(model)
    plan = plan_hotswap(model, new)
    calls = iter(range(100))
    original = torch.Tensor.contiguous

    def out_of_memory(tensor, *arguments, **kwargs):
        if next(calls) == 5:
            raise torch.OutOfMemoryError("CUDA out of memory (pretended)")
        return original(tensor, *arguments, **kwargs)

    monkeypatch.setattr(torch.Tensor, "contiguous", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        commit(plan)
    monkeypatch.undo()
    assert_untouched(model, before)
    commit(plan)
    assert_equals_fresh_load(model, kind, new)


@pytest.mark.usefixtures("_sigint")
def test_a_real_interrupt_at_random_moments(tmp_path):
    """SIGINT from another thread, over and over: after each one the model is one adapter or the other."""
    kind = KINDS["llama"]
    folders = [
        save_random_adapter(kind, tmp_path / "old", seed=1, r=4),
        save_random_adapter(kind, tmp_path / "new", seed=2, r=6, target_modules=["q_proj", "down_proj"]),
    ]
    expected = [call(load(kind, folder), kind.inputs()) for folder in folders]
    model = load(kind, folders[0])
    interrupts = 0
    for attempt in range(40):
        timer = threading.Timer(0.0005 * (attempt % 20), lambda: os.kill(os.getpid(), signal.SIGINT))
        try:
            timer.start()
            for number in range(1000):
                hotswap_adapter(model, folders[number % 2], "default")
        except KeyboardInterrupt:
            interrupts += 1
        timer.join()
        output = call(model, kind.inputs())
        assert any(torch.equal(output, each) for each in expected)
    assert interrupts == 40


@pytest.mark.usefixtures("_sigint")
def test_interrupts_are_held_and_then_let_through():
    reached = []
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012 - the point is what runs before it is raised
        with interrupts_held():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)
            reached.append("the end of the block")
        reached.append("never")
    assert reached == ["the end of the block"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_swaps_from_another_thread(tmp_path):
    """Signal handlers belong to the main thread; elsewhere a swap just works."""
    kind = KINDS["linear"]
    old = save_random_adapter(kind, tmp_path / "old", seed=1, r=4)
    new = save_random_adapter(kind, tmp_path / "new", seed=2, r=6)
    model = load(kind, old)
    thread = threading.Thread(target=hotswap_adapter, args=(model, new, "default"))
    thread.start()
    thread.join()
    assert_equals_fresh_load(model, kind, new)


def test_an_interrupted_roll_back_is_completed():
    table = {"a": 1, "b": 2}
    journal = Journal()
    journal.set_item(table, "a", 10)
    pending = [KeyboardInterrupt()]

    def interrupted() -> None:
        if pending:
            raise pending.pop()

    journal.record(interrupted)
    journal.set_item(table, "b", 20)
    with pytest.raises(KeyboardInterrupt):
        journal.roll_back()
    assert table == {"a": 1, "b": 2}


def test_a_plan_that_was_refused_can_not_be_committed(tmp_path):
    kind = KINDS["linear"]
    old = save_random_adapter(kind, tmp_path / "old", seed=1, r=4, target_modules=["first"])
    new = save_random_adapter(kind, tmp_path / "new", seed=2, r=6)
    model = load(kind, old)
    before = snapshot(model)
    plan = plan_hotswap(model, new)
    assert not plan.ok
    with pytest.raises(hotswap_lab.HotswapError):
        commit(plan)
    assert_untouched(model, before)
