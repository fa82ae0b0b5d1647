"""A model in shared memory: a swap in one process is seen by the others."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.multiprocessing
from models import KINDS, Kind, call, load, save_random_adapter
from peft import LoHaConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file

from hotswap_lab import AdapterPool, HotswapError, hotswap_adapter, prepare_model_for_compiled_hotswap, set_strength

LLAMA = KINDS["llama"]
CONFIGS: dict[str, dict] = {
    "LoRA": dict(make=dict(lora_alpha=3)),
    "LoHa": dict(config=LoHaConfig, make=dict(alpha=3)),
}


def answer(model: torch.nn.Module, connection) -> None:
    """What the other process does: computes whenever it is asked to."""
    torch.set_num_threads(1)
    compiled = None
    while (way := connection.recv()) is not None:
        if way == "compiled" and compiled is None:
            compiled = torch.compile(model, backend="aot_eager")
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


def save_family(folder, kind: Kind, method: str) -> list[str]:
    given = CONFIGS[method]
    folders = []
    for rank in (2, 5, 3):
        made = dict(r=rank, target_modules=["q_proj", "up_proj"], **given["make"])
        config = {"config": given["config"](**made)} if "config" in given else made
        folders.append(save_random_adapter(kind, folder / f"{method}-{rank}", seed=rank, **config))
    return folders


def shared_parts(model: torch.nn.Module) -> set[bool]:
    return {tensor.is_shared() for tensor in (*model.parameters(), *model.buffers())}


@pytest.mark.parametrize("shared", ["before", "after"])
@pytest.mark.parametrize("method", CONFIGS)
def test_a_swap_is_seen_by_a_process_that_was_forked(tmp_path, method, shared):
    folders = save_family(tmp_path, LLAMA, method)
    model = load(LLAMA, folders[0])
    if shared == "before":
        model.share_memory()
    prepare_model_for_compiled_hotswap(model, target_rank=6)
    if shared == "after":
        model.share_memory()
    assert shared_parts(model) == {True}
    with other_process(model, "fork") as ask:
        for folder in (folders[1], folders[2], folders[0]):
            hotswap_adapter(model, folder, "default")
            torch.testing.assert_close(ask(), call(load(LLAMA, folder), LLAMA.inputs()), rtol=0, atol=1e-5)
        if method == "LoRA":
            set_strength(model, 0)
            assert torch.equal(ask(), call(LLAMA.base(), LLAMA.inputs()))


def test_a_pool_goes_on_when_its_memory_is_shared_and_once_for_all_views(model, pool, sources):
    pool.swap("b")
    model.share_memory()
    assert pool.active == "b"
    assert len({tensor.untyped_storage().data_ptr() for tensor in pool._room._parameters}) == len(pool._room.bands)
    with other_process(model, "fork") as ask:
        for name in ("c", "b", "d"):
            pool.swap(name)
            assert pool.active == name
            torch.testing.assert_close(ask(), call(load(LLAMA, sources[name]), LLAMA.inputs()), rtol=0, atol=1e-5)
        new = {key: value + 0.1 for key, value in pool_tensors(sources["d"]).items()}
        pool.update("d", new)
        assert not torch.allclose(ask(), call(load(LLAMA, sources["d"]), LLAMA.inputs()), atol=1e-3)
        assert torch.equal(ask(), call(model, LLAMA.inputs()))


def pool_tensors(folder: str) -> dict[str, torch.Tensor]:

    return load_file(f"{folder}/adapter_model.safetensors")


def test_a_swap_is_seen_by_a_process_that_was_spawned_and_has_compiled(model, sources):
    pool = AdapterPool(model, adapters=sources, progress=False)
    with other_process(model, "spawn") as ask:
        for name in ("b", "c", "e"):
            pool.swap(name)
            fresh = call(load(LLAMA, sources[name]), LLAMA.inputs())
            for way in ("eager", "compiled"):
                torch.testing.assert_close(ask(way), fresh, rtol=0, atol=1e-5)


def test_a_copy_of_a_shared_model_is_its_own(model, sources):
    model.share_memory()
    prepare_model_for_compiled_hotswap(model, adapters=list(sources.values()))
    copied = copy.deepcopy(model)
    hotswap_adapter(model, sources["b"], "default")
    torch.testing.assert_close(
        call(copied, LLAMA.inputs()), call(load(LLAMA, sources["a"]), LLAMA.inputs()), rtol=0, atol=1e-5
    )


def test_rows_are_of_one_process(model, sources):
    model.share_memory()
    with pytest.raises(HotswapError, match="rows"):
        AdapterPool(model, adapters=sources, rows=2, progress=False)
    alone = load(LLAMA, sources["a"])
    AdapterPool(alone, adapters=sources, rows=2, progress=False)
    with pytest.raises(HotswapError, match="rows"):
        alone.share_memory()


def learn(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """A step of training; the adapter as it is now."""
    model(**LLAMA.inputs()).logits.square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return get_peft_model_state_dict(model)


def test_a_training_loop_and_a_compiled_model_in_shared_memory(model, sources):
    pool = AdapterPool(model, adapters=sources, progress=False)
    pool.swap("a")
    trained = load(LLAMA, sources["a"], is_trainable=True)
    optimizer = torch.optim.SGD(trained.parameters(), lr=5.0)
    with other_process(model, "spawn") as ask:
        before = ask("compiled")
        for _ in range(3):
            pool.update("a", learn(trained, optimizer))
            after = ask("compiled")
            torch.testing.assert_close(after, call(trained, LLAMA.inputs()), rtol=0, atol=1e-5)
            assert (after - before).abs().max() > 1e-3
            before = after


def serve_updates(folder: str, connection) -> None:
    """What another machine does: it has the files of the first adapter, and gets new weights by a queue."""
    torch.set_num_threads(1)
    model = load(LLAMA, folder)
    pool = AdapterPool(model, adapters={"mine": folder}, progress=False)
    pool.swap("mine")
    compiled = torch.compile(model, backend="aot_eager")
    while (new := connection.recv()) is not None:
        pool.update("mine", {key: torch.from_numpy(value) for key, value in new.items()})
        connection.send((pool.version("mine"), call(compiled, LLAMA.inputs()).numpy()))


def test_a_training_loop_whose_weights_are_sent(sources):
    context = torch.multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=serve_updates, args=(sources["a"], there), daemon=True)
    process.start()
    trained = load(LLAMA, sources["a"], is_trainable=True)
    optimizer = torch.optim.SGD(trained.parameters(), lr=5.0)
    for step in range(3):
        here.send({key: value.numpy() for key, value in learn(trained, optimizer).items()})
        assert here.poll(120)
        version, output = here.recv()
        assert version == step + 2
        torch.testing.assert_close(torch.from_numpy(output), call(trained, LLAMA.inputs()), rtol=0, atol=1e-5)
    here.send(None)
    process.join(60)
