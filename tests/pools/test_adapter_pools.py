"""AdapterPool: what only some pools need: undo, a limit of memory, reading ahead."""

from __future__ import annotations

import copy
import random
import shutil
import threading
from pathlib import Path

import pytest
import torch
from models import KINDS, Kind, call, load, randomize, save_random_adapter
from oracle import assert_equals_fresh_load, assert_same_outputs
from peft import LoraConfig, get_peft_model
from refusals import refused

from hotswap_lab import Adapter, AdapterPool, hotswap_adapter, save_adapter, verify_hotswap

LLAMA = KINDS["llama"]


def assert_is(model, folder, kind=LLAMA):
    assert_equals_fresh_load(model, kind, folder, prepared=True)


# ---- undo


def test_undo_goes_one_step_back(model, pool, sources):
    refused("nothing to undo", pool.undo)
    original = call(model, LLAMA.inputs())
    pool.swap("b")
    pool.undo()
    assert torch.equal(call(model, LLAMA.inputs()), original)
    refused("nothing to undo", pool.undo)
    pool.swap("c")
    pool.strength = 0.5
    pool.off()
    assert pool.active is None
    pool.undo()
    assert (pool.active, pool.strength) == ("c", 0.5)
    refused("nothing to undo", pool.undo)
    pool.swap("b")
    with pool.using("c"):
        pool.off()
    assert_is(model, sources["b"])
    pool.undo()  # the block left nothing to take back
    assert (pool.active, pool.strength) == ("c", 0.5)


def test_undo_after_removing_and_adding(model, pool, sources):
    pool.swap("b")
    pool.swap("c")
    pool.remove("b")
    pool.add("b", sources["e"])
    pool.undo()
    assert_same_outputs(model, load(LLAMA, sources["b"]), LLAMA)


def test_undo_to_an_adapter_that_is_in_no_pool(model, pool, sources):
    pool.swap("b")
    hotswap_adapter(model, sources["c"], "default")
    pool.swap("d")
    pool.undo()
    assert_same_outputs(model, load(LLAMA, sources["c"]), LLAMA)


# ---- memory limit, prefetching


def packed_sizes(model, sources) -> dict[str, int]:
    pool = AdapterPool(model, adapters=sources, progress=False)
    return {name: entry.packed.nbytes for name, entry in pool._members.items()}


def small_pool(model, sources) -> tuple[AdapterPool, str]:
    """A pool with room for two of the adapters, and one that is in its files."""
    sizes = packed_sizes(model, sources)
    pool = AdapterPool(model, adapters=sources, max_bytes=sizes["b"] + sizes["e"], progress=False)
    pool.swap("b")
    return pool, next(name for name, entry in pool._members.items() if entry.packed is None)


def test_the_least_recently_used_adapter_is_dropped_and_read_again(model, sources):
    sizes = packed_sizes(model, sources)
    limit = sizes["b"] + sizes["a"] + sizes["c"]
    pool = AdapterPool(model, adapters=sources, max_bytes=limit, progress=False)
    generator = random.Random(2)
    seen, used = set(), []
    for _ in range(40):
        name = generator.choice(list(sources))
        used.append(name)
        pool.swap(name)
        assert_same_outputs(model, load(LLAMA, sources[name]), LLAMA)
        assert pool.nbytes <= limit
        dropped = {row[0] for row in pool.table if row[4] == "in its files"}
        assert dropped.isdisjoint(used[-2:]) or sum(map(sizes.get, set(used[-2:]))) > limit
        seen |= dropped
    assert seen == set(sources)
    assert pool._members[name].packed is not None


def test_a_file_that_changed_since_is_refused(model, sources, tmp_path):
    pool, dropped = small_pool(model, sources)
    shutil.rmtree(sources[dropped])
    save_random_adapter(LLAMA, Path(sources[dropped]), seed=99, r=2)
    refused("have changed since it was added", pool.swap, dropped)
    assert pool.active == "b"


def test_using_holds_on_to_the_former_adapter(model, sources):
    pool, _ = small_pool(model, sources)
    pool.swap("e")
    others = [name for name in sources if name != "e"]
    with pool.using(others[0]):
        for name in others:
            pool.swap(name)  # "e" is dropped on the way
        shutil.rmtree(sources["e"])
        save_random_adapter(LLAMA, Path(sources["e"]), seed=99, r=2)
    assert pool.active == "e"
    assert model.peft_config["default"].r == 4


def test_adapters_from_memory_are_never_dropped(model, sources):
    sizes = packed_sizes(model, sources)
    pool = AdapterPool(model, adapters=sources, max_bytes=sizes["b"] + sizes["e"] + sizes["a"], progress=False)
    pool.add("kept", Adapter.load(sources["a"]))
    for name in ("b", "e", "c", "d", "kept"):
        pool.swap(name)
        assert pool._members["kept"].packed is not None
    refused("does not fit into the pool's memory", pool.add, "too much", Adapter.load(sources["b"]))
    assert "too much" not in pool


def test_prefetching(model, sources):
    pool, dropped = small_pool(model, sources)
    pool.prefetch(dropped)
    pool._members[dropped].loading.result()
    pool.swap(dropped)
    assert_same_outputs(model, load(LLAMA, sources[dropped]), LLAMA)
    for _ in range(5):  # waits for it, behind the others in the queue
        pool.prefetch(*sources)
        name = [name for name, entry in pool._members.items() if entry.packed is None][-1]
        pool.swap(name)
        assert_same_outputs(model, load(LLAMA, sources[name]), LLAMA)


def thrice(folder: str) -> Adapter:
    adapter = Adapter.load(folder)
    return Adapter.from_state_dict({key: tensor * 3 for key, tensor in adapter.tensors.items()}, adapter.config)


@pytest.mark.parametrize("first", ["dropped", "prefetched"])
def test_an_update_counts_whatever_was_read_before(model, sources, first):
    pool, dropped = small_pool(model, sources)
    pool.swap(dropped)
    pool._members[dropped].packed = None  # as if others had taken its place
    if first == "prefetched":
        pool.swap("b")
        pool.prefetch(dropped)
        pool._members[dropped].loading.result()
    new = thrice(sources[dropped])
    pool.update(dropped, new.tensors, new.config)
    assert pool.nbytes > 0
    pool.table  # noqa: B018 - looking must not change it
    if first == "prefetched":
        pool.swap(dropped)
    assert (pool.active, pool.version(dropped)) == (dropped, 2)
    assert verify_hotswap(model, new, inputs=LLAMA.inputs())
    assert not verify_hotswap(model, sources[dropped], inputs=LLAMA.inputs())


def test_an_update_of_the_loaded_adapter_that_was_dropped_while_the_pool_was_filled(model, sources):
    sizes = packed_sizes(model, sources)
    pool = AdapterPool(model, adapters=sources, max_bytes=sizes["b"] + sizes["e"], progress=False)
    assert (pool.active, pool._members["a"].packed) == ("a", None)
    new = thrice(sources["a"])
    pool.update("a", new.tensors, new.config)
    assert verify_hotswap(model, new, inputs=LLAMA.inputs(), base=LLAMA.base)


class WithHead(torch.nn.Module):
    """A layer for LoRA, and a head to be saved as a whole, whose BatchNorm has buffers, one of them of integers."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(12, 16)
        self.head = torch.nn.Sequential(torch.nn.BatchNorm1d(16), torch.nn.Linear(16, 6))
        self.head.register_buffer("not_saved", torch.ones(1), persistent=False)

    def forward(self, x):
        return self.head(torch.tanh(self.first(x)))


NORMED = Kind(WithHead, lambda: torch.randn(5, 12), ("first",))


def save_with_head(folder: Path, seed: int) -> str:
    model = get_peft_model(NORMED.base(), LoraConfig(r=seed, target_modules=["first"], modules_to_save=["head"]))
    randomize(model, "default", seed)
    torch.manual_seed(seed)
    model.train()
    for _ in range(seed):  # the running statistics of other data, and how many batches that were
        model(torch.randn(8, 12) * seed + seed)
    model.save_pretrained(folder)
    return str(folder)


def test_a_head_with_buffers(tmp_path):
    folders = {name: save_with_head(tmp_path / name, seed) for seed, name in enumerate("abc", start=1)}
    model = load(NORMED, folders["a"])
    norm = model.get_base_model().head.modules_to_save["default"][0]
    pool = AdapterPool(model, adapters=folders, progress=False)
    assert pool.active == "a"
    for name, batches in (("b", 2), ("c", 3), ("a", 1), ("b", 2)):
        pool.swap(name)
        assert_is(model, folders[name], NORMED)
        assert norm.num_batches_tracked == batches
    pool.undo()
    assert_is(model, folders["a"], NORMED)
    save_adapter(model, tmp_path / "saved")
    assert_is(model, str(tmp_path / "saved"), NORMED)
    pool.update("a", Adapter.load(folders["c"]).tensors, Adapter.load(folders["c"]).config)
    norm.train()(torch.ones(8, 16))  # what was trained since comes back after a block
    norm.eval()
    trained = norm.running_mean.clone()
    with pool.using("b"):
        assert_is(model, folders["b"], NORMED)
    assert torch.equal(norm.running_mean, trained)
    assert norm.num_batches_tracked == 4
    pool.swap("a")
    assert_is(model, folders["c"], NORMED)
    assert verify_hotswap(model, folders["c"], inputs=NORMED.inputs(), base=NORMED.base)


@pytest.mark.parametrize("table", ["_buffers", "_parameters"])
def test_a_tensor_of_a_head_that_was_replaced_is_noticed(tmp_path, table):
    folders = {name: save_with_head(tmp_path / name, seed) for seed, name in enumerate("ab", start=1)}
    model = load(NORMED, folders["a"])
    pool = AdapterPool(model, adapters=folders, progress=False)
    owner = model.get_base_model().head.modules_to_save["default"][0]
    name = next(iter(getattr(owner, table)))
    setattr(owner, name, copy.deepcopy(getattr(owner, name)))
    refused("pool", pool.swap, "b")


def test_what_is_removed_while_it_is_read_comes_back_on_undo(model, sources):
    pool, dropped = small_pool(model, sources)
    pool.swap(dropped)
    pool.swap("b")
    pool._members[dropped].packed = None
    is_free = threading.Event()
    other = next(name for name, each in pool._members.items() if each.packed is None and name != dropped)
    pool.prefetch(other)
    pool._members._background.submit(is_free.wait)  # the one thread in the background is busy
    pool.prefetch(dropped)
    pool.remove(dropped)
    is_free.set()
    pool.undo()
    assert_is(model, sources[dropped])


def test_an_adapter_that_was_deleted_is_missed_whatever_is_asked_for(model, pool, sources):
    model.load_adapter(sources["c"], "other")
    model.set_adapter("other")
    model.delete_adapter("default")
    for action, *arguments in (
        (setattr, pool, "strength", 0.5),
        (pool.off,),
        (pool.swap, "b", 0.5),
        (pool.swap, {"b": 0.5, "c": 0.5}),
    ):
        refused("no longer where the pool put it", action, *arguments)


def test_an_error_while_prefetching_is_told_by_the_swap(model, sources):
    pool, dropped = small_pool(model, sources)
    shutil.rmtree(sources[dropped])
    pool.prefetch(dropped)
    refused(r"changed|Can't find", pool.swap, dropped)


def test_adapters_that_just_fit_stay(model, sources):
    limit = sum(packed_sizes(model, sources).values())
    pool = AdapterPool(model, adapters=sources, max_bytes=limit, progress=False)
    assert pool.nbytes == limit
    memory = {name: Adapter.load(source) for name, source in sources.items()}
    assert AdapterPool(model, adapters=memory, max_bytes=limit, progress=False).nbytes == limit


def test_a_file_that_changed_while_it_was_read_is_refused_later(model, sources, monkeypatch):
    """It is not known what was read: when it has to be read again, it may be another adapter."""
    load_adapter, limit = Adapter.load, max(packed_sizes(model, sources).values())

    def and_overwritten(source, **arguments):
        adapter = load_adapter(source, **arguments)
        save_random_adapter(LLAMA, Path(source), seed=99, r=2)
        return adapter

    pool = AdapterPool(model, max_bytes=limit, target_rank=8, progress=False)
    with monkeypatch.context() as patched:
        patched.setattr(Adapter, "load", and_overwritten)
        pool.add("c", sources["c"])
    pool.add("b", sources["b"])
    pool.swap("b")
    refused("have changed since it was added", pool.swap, "c")
