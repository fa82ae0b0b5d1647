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
    configs = (
        dict(r=4, lora_alpha=16),
        dict(r=8, lora_alpha=20),
        dict(r=2, target_modules=["q_proj", "up_proj"], lora_alpha=30),
    )
    return {
        name: save_random_adapter(LLAMA, tmp_path / name, seed=seed, **config)
        for seed, (name, config) in enumerate(zip("abc", configs, strict=True), start=1)
    }


def on_gpu(folder, dtype=torch.float32):
    return load(LLAMA, folder).cuda().to(dtype)


def inputs():
    return {key: value.cuda() for key, value in LLAMA.inputs().items()}


@torch.no_grad()
def outputs(model):
    return model(**inputs()).logits.clone()


def assert_equals(actual, folder, dtype=torch.float32):
    tolerance = 1e-3 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(actual, outputs(on_gpu(folder, dtype)), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
@pytest.mark.parametrize("way", ["prepared", "pool"])
def test_compiled_swaps_at_the_same_addresses(folders, mode, way):
    torch.compiler.reset()
    model = on_gpu(folders["a"])
    if way == "pool":
        swap = AdapterPool(model, adapters=folders, progress=False).swap
    else:
        prepare_model_for_compiled_hotswap(model, adapters=list(folders.values()))
        swap = lambda name: hotswap_adapter(compiled, folders[name], "default")  # noqa: E731
    compiled = torch.compile(model, mode=mode)
    for _ in range(3):  # CUDA graphs warm up, record, replay
        outputs(compiled)
    addresses = resolve_slot(model, "default").data_ptrs()
    with RecompileWatch(allow=0):
        for name in "bcacb":
            swap(name)
            assert_equals(outputs(compiled), folders[name])
        set_strength(compiled, 0)
        torch.testing.assert_close(outputs(compiled), outputs(LLAMA.base().cuda().float()), rtol=1e-3, atol=1e-3)
    assert resolve_slot(model, "default").data_ptrs() == addresses


def test_a_graph_that_the_user_captured(folders):
    model = on_gpu(folders["a"])
    prepare_model_for_compiled_hotswap(model, adapters=list(folders.values()))
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
    for name in "bca":
        hotswap_adapter(model, folders[name], "default")
        graph.replay()
        assert_equals(logits, folders[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pool_swaps_from_pinned_memory(folders, dtype):
    model = on_gpu(folders["a"], dtype)
    pool = AdapterPool(model, adapters=folders, progress=False)
    assert all(part.is_pinned() for entry in pool._members.values() for part in entry.packed.bands if part.numel())
    addresses = resolve_slot(model, "default").data_ptrs()
    for name in "bcacb" * 20:
        pool.swap(name)
        assert_equals(outputs(model), folders[name], dtype)
    assert resolve_slot(model, "default").data_ptrs() == addresses


def test_scalings_follow_the_model(folders):
    model = load(LLAMA, folders["a"])
    prepare_model_for_compiled_hotswap(model, adapters=list(folders.values()))
    model.cuda()
    scaling = model.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"]
    assert scaling.device.type == "cuda"
    assert float(scaling) == 4.0
