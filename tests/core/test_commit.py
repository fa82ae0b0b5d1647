"""All or nothing: an error leaves the model exactly the old adapter or exactly the new one.

Faults at every step are in ``robustness/test_faults.py``.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from adapters import save_random_adapter_of
from models import ARCHITECTURES, KINDS, call, load, save_random_adapter
from oracle import assert_equals_fresh_load, assert_untouched, snapshot
from peft import LoraConfig

import hotswap_lab
from hotswap_lab import HotswapError, commit, hotswap_adapter, plan_hotswap
from hotswap_lab.core.journal import Journal


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


@pytest.mark.usefixtures("python_sigint")
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


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="timers as Unix has them")
def test_a_regular_expression_that_takes_for_ever_can_be_ended(tmp_path):
    """It holds the interpreter, so that no other thread could press anything; the signal comes all the same."""
    kind = KINDS["llama"]
    old, new = (save_random_adapter(kind, tmp_path / str(seed), seed=seed, r=4) for seed in (1, 2))
    config = json.loads(Path(new, "adapter_config.json").read_text())
    Path(new, "adapter_config.json").write_text(json.dumps({**config, "rank_pattern": {r"([\w.]+)+!": 2}}))
    model = load(kind, old)
    before, handler = snapshot(model), signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 1)
        with pytest.raises(KeyboardInterrupt):
            hotswap_adapter(model, new, "default")
    finally:
        signal.signal(signal.SIGALRM, handler)
    assert_untouched(model, before)


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


@pytest.mark.usefixtures("python_sigint")
def test_an_interrupted_roll_back_is_completed():
    table = {"a": 1, "b": 2}
    journal = Journal()
    journal.set_item(table, "a", 10)
    journal.record(lambda: signal.raise_signal(signal.SIGINT))
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


def test_a_kept_plan_notices_that_the_adapter_was_trained_since(tmp_path):
    kind = KINDS["linear"]
    folders = [save_random_adapter(kind, tmp_path / str(seed), seed=seed, r=4) for seed in (1, 2)]
    model = load(kind, folders[0], is_trainable=True)
    plan = plan_hotswap(model, folders[1])
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1)
    model(kind.inputs()).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    before = snapshot(model)
    with pytest.raises(HotswapError, match="has changed since this swap was planned"):
        commit(plan)
    assert_untouched(model, before)
    commit(plan_hotswap(model, folders[1]))
    fresh = load(kind, folders[1], is_trainable=True)
    assert torch.equal(call(model, kind.inputs()), call(fresh, kind.inputs()))


def test_a_kept_plan_notices_that_the_adapter_was_merged_since(tmp_path):
    kind = KINDS["linear"]
    folders = [save_random_adapter(kind, tmp_path / str(seed), seed=seed, r=4) for seed in (1, 2)]
    model = load(kind, folders[0])
    plan = plan_hotswap(model, folders[1])
    model.merge_adapter()
    before = snapshot(model)
    with pytest.raises(HotswapError, match="has changed since this swap was planned"):
        commit(plan)
    assert_untouched(model, before)


def test_a_plan_keeps_the_base_weights_that_it_was_given(tmp_path):
    """The loaded adapter has overwritten biases of the base model, whose own ones only the caller has."""
    bert = ARCHITECTURES["bert"]
    configs = (LoraConfig(target_modules=["query"], bias="all"), LoraConfig(target_modules=["query"]))
    biased, plain = (save_random_adapter_of(each, tmp_path / f"{n}", n, bert) for n, each in enumerate(configs))
    model = load(bert, biased)
    commit(plan_hotswap(model, plain, base_weights=bert.base().state_dict()))
    assert_equals_fresh_load(model, bert, plain)


def test_what_is_no_plan_is_named():
    with pytest.raises(TypeError, match="got a str"):
        commit("an/adapter")
