"""A model in shared memory: a swap in one process is seen by the others."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.multiprocessing
from models import KINDS, call, load, save_random_adapter
from oracle import assert_close, assert_same_outputs
from peft import LoHaConfig, LoraConfig
from peft.utils import get_peft_model_state_dict
from refusals import refused

from hotswap_lab import (
    Adapter,
    AdapterPool,
    HotswapError,
    hotswap_adapter,
    prepare_model_for_compiled_hotswap,
    set_strength,
)

LLAMA = KINDS["llama"]


def answer(model: torch.nn.Module, connection) -> None:
    """What the other process does: computes whenever it is asked to."""
    torch.set_num_threads(1)
    compiled = None
    while (way := connection.recv()) is not None:
        if way == "compiled" and compiled is None:
            compiled = torch.compile(model, backend="eager")
        connection.send(call(model if way == "eager" else compiled, LLAMA.inputs()).numpy())


@contextlib.contextmanager
def other_process(model: torch.nn.Module, method: str) -> Iterator[Callable[..., torch.Tensor]]:
    context = torch.multiprocessing.get_context(method)
    here, there = context.Pipe()
    process = context.Process(target=answer, args=(model, there), daemon=True)
    process.start()

    def ask(way: str = "eager") -> torch.Tensor:
        here.send(way)
        assert here.poll(120)
        return torch.from_numpy(here.recv())

    yield ask
    here.send(None)
    process.join(60)


@pytest.mark.parametrize(
    ("method", "shared"),
    [*itertools.product((LoraConfig, LoHaConfig), ("before", "after")), (LoraConfig, "before a pool")],
)
def test_a_swap_is_seen_by_a_process_that_was_forked(tmp_path, method, shared):
    configs = [method(r=rank, target_modules=["q_proj", "up_proj"]) for rank in (2, 5, 3)]
    folders = [save_random_adapter(LLAMA, tmp_path / str(config.r), config.r, config) for config in configs]
    model = load(LLAMA, folders[0])
    if "before" in shared:
        model.share_memory()
    if "pool" in shared:
        AdapterPool(model, adapters={str(each): folder for each, folder in enumerate(folders)}, progress=False)
    else:
        prepare_model_for_compiled_hotswap(model, target_rank=6)
    if shared == "after":
        model.share_memory()
    assert {tensor.is_shared() for tensor in (*model.parameters(), *model.buffers())} == {True}
    with other_process(model, "fork") as ask:
        for folder in (folders[1], folders[2], folders[0]):
            hotswap_adapter(model, folder, "default")
            assert_close(ask(), call(load(LLAMA, folder), LLAMA.inputs()))
        if method is LoraConfig:
            set_strength(model, 0)
            assert torch.equal(ask(), call(LLAMA.base(), LLAMA.inputs()))


@pytest.mark.long
def test_a_pool_goes_on_and_is_seen_by_a_process_that_was_spawned_and_has_compiled(model, pool, sources):
    pool.swap("b")
    model.share_memory()
    assert pool.active == "b"
    lora = [each for name, each in model.named_parameters() if ".lora_" in name]
    assert len({each.untyped_storage().data_ptr() for each in lora}) == 1, "shared once for all views"
    trained = load(LLAMA, sources["a"], is_trainable=True)
    optimizer = torch.optim.SGD(trained.parameters(), lr=5.0)
    with other_process(model, "spawn") as ask:
        for name in ("c", "b", "a"):
            pool.swap(name)
            assert pool.active == name
            before = call(load(LLAMA, sources[name]), LLAMA.inputs())
            for way in ("eager", "compiled"):
                assert_close(ask(way), before)
        for _ in range(2):
            trained(**LLAMA.inputs()).logits.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            pool.update("a", get_peft_model_state_dict(trained))
            after = ask("compiled")
            assert_close(after, call(trained, LLAMA.inputs()))
            assert (after - before).abs().max() > 1e-3
            before = after


def test_a_copy_of_a_shared_model_is_its_own(model, sources):
    model.share_memory()
    prepare_model_for_compiled_hotswap(model, adapters=list(sources.values()))
    copied = copy.deepcopy(model)
    hotswap_adapter(model, sources["b"], "default")
    assert_same_outputs(copied, load(LLAMA, sources["a"]), LLAMA)


@pytest.mark.parametrize("way", ["with", "async with"])
def test_a_block_is_refused_where_other_processes_would_not_wait_for_it(model, pool, sources, way, caplog):
    async def in_a_task(_: torch.nn.Module) -> None:
        async with pool.using("c"):
            pass

    def enter(_: torch.nn.Module) -> None:
        with pool.using("c"):
            pass

    enter(model)
    model.share_memory()
    pool.swap("b")
    enter = enter if way == "with" else lambda model: asyncio.run(in_a_task(model))
    error = refused("memory that other processes see", enter, model)
    assert "under a lock" in error.refusals[0].next_step
    assert [each.error for each in caplog.records][1:] == [error]  # it was asked for twice
    pool.update("b", Adapter.load(sources["b"]).tensors)
    assert_same_outputs(model, load(LLAMA, sources["b"]), LLAMA)


def test_rows_are_of_one_process(model, sources):
    AdapterPool(model, adapters=sources, rows=2, progress=False)
    with pytest.raises(HotswapError, match="rows"):  # some of its tensors are shared by then, which changes no value
        model.share_memory()
    alone = load(LLAMA, sources["a"]).share_memory()
    refused("rows", AdapterPool, alone, adapters=sources, rows=2, progress=False)
