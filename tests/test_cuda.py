"""On a GPU: addresses stay, so CUDA graphs go on with the new adapter. Runs where there is one."""

from __future__ import annotations

import pytest
import torch
from models import KINDS, load, save_random_adapter

from hotswap_lab import (
    AdapterPool,
    RecompileWatch,
    hotswap_adapter,
    prepare_model_for_compiled_hotswap,
    resolve_slot,
    set_strength,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

LLAMA = KINDS["llama"]


@pytest.fixture
def folders(tmp_path):
    return [
        save_random_adapter(LLAMA, tmp_path / "a", seed=1, r=4, lora_alpha=16),
        save_random_adapter(LLAMA, tmp_path / "b", seed=2, r=8, lora_alpha=20),
        save_random_adapter(LLAMA, tmp_path / "c", seed=3, r=2, target_modules=["q_proj", "up_proj"], lora_alpha=30),
    ]


def on_gpu(folder):
    return load(LLAMA, folder).cuda()


def inputs():
    return {key: value.cuda() for key, value in LLAMA.inputs().items()}


@torch.no_grad()
def outputs(model):
    return model(**inputs()).logits.clone()


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
def test_compiled_swaps_at_the_same_addresses(folders, mode):
    torch.compiler.reset()
    model = on_gpu(folders[0])
    prepare_model_for_compiled_hotswap(model, adapters=folders)
    compiled = torch.compile(model, mode=mode)
    for _ in range(3):  # CUDA graphs warm up, record, replay
        outputs(compiled)
    addresses = resolve_slot(model, "default").data_ptrs()
    with RecompileWatch(allow=0):
        for number in (1, 2, 0, 2, 1):
            hotswap_adapter(compiled, folders[number], "default")
            torch.testing.assert_close(outputs(compiled), outputs(on_gpu(folders[number])), rtol=1e-3, atol=1e-3)
        set_strength(compiled, 0)
        torch.testing.assert_close(outputs(compiled), outputs(LLAMA.base().cuda()), rtol=1e-3, atol=1e-3)
    assert resolve_slot(model, "default").data_ptrs() == addresses


def test_a_graph_that_the_user_captured(folders):
    model = on_gpu(folders[0])
    prepare_model_for_compiled_hotswap(model, adapters=folders)
    static = inputs()
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            model(**static)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = model(**static).logits
    for number in (1, 2, 0):
        hotswap_adapter(model, folders[number], "default")
        graph.replay()
        torch.testing.assert_close(logits, outputs(on_gpu(folders[number])), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pool_swaps_from_pinned_memory(folders, dtype):
    model = on_gpu(folders[0]).to(dtype)
    pool = AdapterPool(model, adapters=dict(enumerate_names(folders)), progress=False)
    assert all(part.is_pinned() for entry in pool._members.values() for part in entry.packed.parts if part.numel())
    addresses = resolve_slot(model, "default").data_ptrs()
    for name in ("1", "2", "0", "2", "1") * 20:
        pool.swap(name)
        tolerance = 1e-3 if dtype == torch.float32 else 5e-2
        fresh = on_gpu(folders[int(name)]).to(dtype)
        torch.testing.assert_close(outputs(model), outputs(fresh), rtol=tolerance, atol=tolerance)
    assert resolve_slot(model, "default").data_ptrs() == addresses


def test_a_pool_and_cuda_graphs(folders):
    torch.compiler.reset()
    model = on_gpu(folders[0])
    pool = AdapterPool(model, adapters=dict(enumerate_names(folders)), progress=False)
    compiled = torch.compile(model, mode="reduce-overhead")
    for _ in range(3):
        outputs(compiled)
    with RecompileWatch(allow=0):
        for name in ("1", "2", "0", "2"):
            pool.swap(name)
            expected = outputs(on_gpu(folders[int(name)]))
            torch.testing.assert_close(outputs(compiled), expected, rtol=1e-3, atol=1e-3)


def enumerate_names(folders):
    return ((str(number), folder) for number, folder in enumerate(folders))


def test_scalings_follow_the_model(folders):
    model = load(LLAMA, folders[0])
    prepare_model_for_compiled_hotswap(model, adapters=folders)
    model.cuda()
    scaling = model.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"]
    assert scaling.device.type == "cuda"
    assert float(scaling) == 4.0
