"""``pool.update(name, learner)``: the oracle is a fresh load of the adapter that the learner saves."""

from __future__ import annotations

import copy
import gc
import weakref
from dataclasses import replace

import pytest
import torch
from lengths import long
from models import KINDS, Kind, call, load, lora_layers, save_random_adapter
from oracle import assert_close, assert_equals_fresh_load, untouched
from peft.utils import get_peft_model_state_dict
from pool_sources import LLAMA
from refusals import refused
from test_long_runs import Use

from hotswap_lab import Adapter, AdapterPool, hotswap_adapter, prepare_model_for_compiled_hotswap, save_adapter
from hotswap_lab.pools import adapter_pool


def step(learner, seed):
    """As an optimizer does it: in place, and far."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for each in learner.parameters():
            if each.requires_grad:
                each.add_(torch.randn(each.shape, generator=generator), alpha=0.1)


def learner_of(source, kind=LLAMA):
    learner = load(kind, source, is_trainable=True)
    step(learner, 0)
    return learner


def with_alpha(learner, alpha):
    config = copy.deepcopy(learner.peft_config["default"])
    config.lora_alpha = alpha
    return config


@pytest.fixture
def plans(monkeypatch):
    """How often an adapter is planned."""
    made, plan = [], adapter_pool.make_plan
    monkeypatch.setattr(adapter_pool, "make_plan", lambda *args, **named: made.append(1) or plan(*args, **named))
    return made


def assert_is_of(model, learner, folder, kind=LLAMA):
    save_adapter(learner, folder)
    assert_equals_fresh_load(model, kind, folder, prepared=True)


@pytest.mark.parametrize("name", ["b", "conv", "embedding", *map(long, (*"cead", "gpt2", "shared"))])
def test_each_update_is_a_fresh_load_of_what_the_learner_saves(sources, tmp_path, plans, name):
    """All but the first are copies, for other ranks, patterns and kinds of layers too."""
    kind = KINDS.get(name, LLAMA)
    if kind is not LLAMA:
        sources = {name: save_random_adapter(kind, tmp_path / "source", seed=1, r=4)}
    learner = learner_of(sources[name], kind)
    pool = AdapterPool(load(kind, next(iter(sources.values()))), adapters=sources, progress=False)
    pool.swap(name)
    plans.clear()
    for number in range(3):
        step(learner, number)
        pool.update(name, learner)
        assert_is_of(pool.model, learner, tmp_path / str(number), kind)
    assert pool.version(name) == 4
    assert len(plans) == 1 or name == "conv"  # grouped convolutions are planned each time


def test_the_adapter_of_this_name_is_taken_before_any_other(model, pool, sources, tmp_path):
    learner = load(LLAMA, sources["a"], "b", is_trainable=True)
    learner.load_adapter(sources["e"], "default")
    pool.swap("b")
    pool.update("b", learner)
    assert_equals_fresh_load(model, LLAMA, sources["a"], prepared=True)
    learner.load_adapter(sources["c"], "other")
    learner.delete_adapter("b")  # it is not said which of the others is meant
    refused("(?s)several and none of that name.*default, other", pool.update, "b", learner)
    assert_equals_fresh_load(model, LLAMA, sources["a"], prepared=True)
    tensors = get_peft_model_state_dict(learner, adapter_name="other")  # as is advised
    pool.update("b", Adapter.from_state_dict(tensors, learner.peft_config["other"]))
    assert_equals_fresh_load(model, LLAMA, sources["c"], prepared=True)


@pytest.mark.long
def test_what_has_changed_in_the_learner_is_planned_anew(model, pool, sources, tmp_path):
    """Another rank and other layers by a swap, another scaling in its config, another learner, a state dict between."""
    learner = learner_of(sources["b"])
    pool.swap("b")
    pool.update("b", learner)
    changes = {
        "swapped to fewer layers": lambda: hotswap_adapter(learner, sources["c"], "default"),
        "swapped to other ranks": lambda: hotswap_adapter(learner, sources["e"], "default"),
        "a config of its own": lambda: pool.update("b", learner, with_alpha(learner, 77)),
        "trained again": lambda: step(learner, 1),
        "alpha": lambda: learner.peft_config.update(default=with_alpha(learner, 99)),
        "state dict": lambda: pool.update("b", Adapter.load(sources["a"]).tensors, Adapter.load(sources["a"]).config),
    }
    for number, change in enumerate(changes.values()):
        change()
        pool.update("b", learner)
        assert_is_of(model, learner, tmp_path / str(number))
    learner = learner_of(sources["b"])
    pool.update("b", learner)
    assert_is_of(model, learner, tmp_path / "other")


def doubled(module, state, prefix, _) -> None:
    state[f"{prefix}weight"] = 2 * state[f"{prefix}weight"]


@pytest.mark.long
@pytest.mark.parametrize("what", ["a field that can't be compared", "a hook that changes what is saved"])
def test_what_can_not_be_copied_is_planned_each_time(model, pool, sources, tmp_path, what):
    learner = learner_of(sources["b"])
    if what.startswith("a hook"):
        lora_layers(learner)[0].lora_A["default"]._register_state_dict_hook(doubled)
    else:
        learner.peft_config["default"].note = lambda: None
    pool.swap("b")
    for number, alpha in enumerate((5, 5, 99)):
        step(learner, number)
        learner.peft_config["default"].lora_alpha = alpha
        pool.update("b", learner)
        assert_is_of(model, learner, tmp_path / str(number))


def blocks(names: str, count: int) -> Kind:
    """So many blocks of one layer, each of which has one of these names, or several."""
    made = lambda: [torch.nn.Sequential(torch.nn.Linear(8, 8)) for _ in range(count)] * len(names)  # noqa: E731
    return Kind(lambda: torch.nn.ModuleDict(dict(zip(names, made(), strict=False))), lambda: None, ("0",))


@pytest.mark.parametrize(("mine", "theirs", "count"), [("ab", "ba", 2), ("ab", "b", 1)])
def test_a_learner_with_other_paths(tmp_path, mine, theirs, count):
    """Its layers are in another order, or a block that is shared has one of its names only."""
    folders = [save_random_adapter(blocks(each, count), tmp_path / each, seed=1, r=4) for each in (mine, theirs)]
    model, learner = load(blocks(mine, count), folders[0]), learner_of(folders[1], blocks(theirs, count))
    pool = AdapterPool(model, adapters={"a": folders[0]}, progress=False)
    pool.swap("a")
    for each in (learner_of(folders[0], blocks(mine, count)), learner, learner):
        step(each, 3)
        pool.update("a", each)
    for name in theirs:
        one, other = (each.get_base_model()[name][0].lora_B["default"].weight for each in (model, learner))
        assert torch.equal(one, other)


def test_a_learner_with_numbers_above_half_precision(tmp_path):
    """They are infinite, as after a fresh load, and those of the next update are what they are."""
    kind, half = KINDS["linear"], replace(KINDS["linear"], make_random=lambda: KINDS["linear"].make_random().half())
    folder = save_random_adapter(kind, tmp_path / "made", seed=1, r=4)
    model, learner = load(half, folder, autocast_adapter_dtype=False), learner_of(folder, kind)
    pool = AdapterPool(model, adapters={"a": folder}, progress=False)
    pool.swap("a")
    for value in (1e6, 0.5):
        lora_layers(learner)[0].lora_B["default"].weight.data.fill_(value)
        pool.update("a", learner)
        assert lora_layers(model)[0].lora_B["default"].weight.eq(torch.inf if value > 1 else value).all()


def test_a_learner_that_does_not_fit_changes_nothing(model, pool, sources, tmp_path):
    """Checked dry: too high a rank, NaN after an update that was right, no adapter at all."""
    learner = learner_of(sources["b"])
    pool.swap("b")
    pool.update("b", learner)
    large = learner_of(save_random_adapter(LLAMA, tmp_path / "large", seed=9, r=16))
    before = call(model, LLAMA.inputs())
    refused("target_rank=16", pool.update, "b", large)
    refused("without any adapter", pool.update, "b", torch.nn.Linear(2, 2))
    next(each for each in learner.parameters() if each.requires_grad).data[0, 0] = float("nan")
    refused("NaN", pool.update, "b", learner)
    pool.swap("a")
    pool.swap("b")
    assert_close(call(model, LLAMA.inputs()), before)
    assert pool.version("b") == 2


def test_a_block_puts_back_the_newest_weights(model, pool, sources, tmp_path):
    """Two updates in a block: the memory that it found in use is written again by the second."""
    learner = learner_of(sources["b"])
    pool.update("b", learner)
    pool.swap("b")
    with pool.using("a"):
        for number in range(2):
            step(learner, number)
            pool.update("b", learner)
        assert_equals_fresh_load(model, LLAMA, sources["a"], prepared=True)
    assert_is_of(model, learner, tmp_path / "last")


def test_rows_follow(sources, tmp_path):
    model = load(LLAMA, sources["a"])
    pool, learner = AdapterPool(model, adapters=sources, rows=2, progress=False), learner_of(sources["b"])
    inputs = {key: value[:1].repeat(2, 1) for key, value in LLAMA.inputs().items()}
    pool.assign(["b", "c"])
    for number in range(3):
        step(learner, number)
        pool.update("b", learner)
        save_adapter(learner, tmp_path / str(number))
        for row, source in enumerate((tmp_path / str(number), sources["c"])):
            assert_close(call(model, inputs)[row], call(load(LLAMA, source), inputs)[row])


@pytest.mark.long
def test_rows_and_written_padding_are_no_learner(sources):
    """Neither has one adapter to take, before an update that was right or after it."""
    model, prepared = load(LLAMA, sources["a"]), learner_of(sources["c"])
    pool = AdapterPool(model, adapters=sources, rows=2, progress=False)
    for _ in range(2):
        pool.assign([None, "b"])
        with untouched(model):
            refused("rows of 'default' may have different adapters", pool.update, "c", model)
        pool.swap("b")
        pool.update("c", model)
    prepare_model_for_compiled_hotswap(prepared, target_rank=4)
    lora_layers(prepared)[0].lora_B["default"].weight.data += 1
    refused("padding", pool.update, "c", prepared)


def test_the_pool_does_not_keep_a_learner(pool, sources):
    learner = learner_of(sources["b"])
    pool.update("b", learner)
    alive = weakref.ref(learner)
    del learner
    gc.collect()
    assert alive() is None


@pytest.mark.long
def test_updates_and_adapters_that_come_and_go_leave_memory_as_it_was(model, pool, sources):
    """Servers add an adapter for each step and remove it later."""
    learner, passing, count = learner_of(sources["b"]), Adapter.load(sources["c"]), 40_000
    pool.swap("b")
    uses = []
    for half in (range(count // 2), range(count // 2, count)):
        for number in half:
            pool.update("b", learner)
            pool.add(f"step {number}", passing)
            pool.remove(f"step {number}")
        uses.append(Use.now())
    warm, use = uses
    assert (use[2:], pool.version("b")) == (warm[2:], 1 + count)
    assert use.memory - warm.memory < 8, uses
    assert use.tensors <= warm.tensors + 20, uses
