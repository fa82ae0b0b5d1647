"""All or nothing: an error leaves the model exactly the old adapter or exactly the new one.

Faults and Ctrl-C at every step are in ``robustness/test_faults.py``, swaps from other threads in ``test_threads.py``.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from adapters import save_random_adapter_of
from models import ARCHITECTURES, KINDS, load, save_family
from oracle import assert_equals_fresh_load, untouched
from peft import LoraConfig
from refusals import refused

from hotswap_lab import commit, hotswap_adapter, plan_hotswap, prepare_model_for_compiled_hotswap
from hotswap_lab.core.journal import Journal

LINEAR = KINDS["linear"]


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="timers as Unix has them")
def test_a_regular_expression_that_takes_for_ever_can_be_ended(tmp_path):
    """It holds the interpreter, so that no other thread could press anything; the signal comes all the same."""
    old, new = save_family(KINDS["llama"], tmp_path, dict(r=4), dict(r=4))
    config = json.loads(Path(new, "adapter_config.json").read_text())
    Path(new, "adapter_config.json").write_text(json.dumps({**config, "rank_pattern": {r"([\w.]+)+!": 2}}))
    model = load(KINDS["llama"], old)
    handler = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        with untouched(model), pytest.raises(KeyboardInterrupt):
            hotswap_adapter(model, new, "default")
    finally:
        signal.signal(signal.SIGALRM, handler)


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


def train(model) -> None:
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1)
    model(LINEAR.inputs()).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def merge(model) -> None:
    model.merge_adapter()


def convert_where_it_is_prepared(model) -> None:
    model.to(torch.bfloat16)


@pytest.mark.parametrize("change", [train, merge, convert_where_it_is_prepared])
def test_a_kept_plan_notices_what_was_done_since(tmp_path, change):
    folders = save_family(LINEAR, tmp_path, dict(r=4), dict(r=4))
    model = load(LINEAR, folders[0], is_trainable=True)
    if change is convert_where_it_is_prepared:
        prepare_model_for_compiled_hotswap(model, target_rank=8)
    plan = plan_hotswap(model, folders[1])
    change(model)
    refused("has changed since this swap was planned", commit, plan)
    if change is train:
        commit(plan_hotswap(model, folders[1]))
        assert_equals_fresh_load(model, LINEAR, folders[1], is_trainable=True)


def test_a_plan_that_was_refused_can_not_be_committed(tmp_path):
    old, new = save_family(LINEAR, tmp_path, dict(r=4, target_modules=["first"]), dict(r=6))
    plan = plan_hotswap(load(LINEAR, old), new)
    assert not plan.ok
    refused("unexpected keys", commit, plan)


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
