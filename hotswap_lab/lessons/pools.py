"""Chapter 04: many adapters in memory, and from a loop over all tensors to one copy."""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from .. import demo
from ..bench import Settings, Timing, in_rounds, make_base
from ..pools.adapter_pool import AdapterPool
from ..swap import resolve_slot, save_adapter
from .exercise import Exercise, compare
from .padding import padded

# --- a model with as many tensors as a real one ------------------------------------------------------------------


def smol(layers: int = 30, rank: int = 8) -> PeftModel:
    """A model with the layers of SmolLM2-135M, and a LoRA adapter on all of them, in little memory.

    A swap doesn't look at the base weights, so they are random, and all layers share those of the first one. The
    adapter's tensors have the sizes of the real model's, and every layer has its own.

    >>> model = smol(layers=2)
    >>> [tuple(tensor.parameter.shape) for tensor in resolve_slot(model, "default").layers[-1].tensors]
    [(8, 1536), (576, 8)]
    """
    base = make_base(Settings(model="smollm2", layers=1))
    first = base.model.layers[0]
    for number in range(1, layers):
        layer = copy.deepcopy(first, memo={id(parameter): parameter for parameter in first.parameters()})
        layer.self_attn.layer_idx = number
        base.model.layers.append(layer)
    base.config.num_hidden_layers = layers
    return get_peft_model(base, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")).eval()


def random_adapters(model: torch.nn.Module, names: Sequence[str], folder: str) -> dict[str, str]:
    """Saves adapters with the shapes of the one in ``model`` and random values; returns their folders by name.

    The model ends up with the last of them.
    """
    folders = {name: os.path.join(folder, name) for name in names}
    for number, path in enumerate(folders.values()):
        generator = torch.Generator().manual_seed(number)
        for tensor in resolve_slot(model, "default").tensors:
            tensor.parameter.data.normal_(std=0.02, generator=generator)
        save_adapter(model, path)
    return folders


def measure_steps(
    steps: Mapping[str, tuple[Callable[..., object], Iterable[object]]], n: int = 15
) -> dict[str, Timing]:
    """Times every step; each is a function and the arguments that it is called with in turn. They take turns."""
    runs = {}
    for label, (function, arguments) in steps.items():
        following = itertools.cycle(arguments)
        runs[label] = lambda function=function, following=following: function(next(following))
    return in_rounds(runs, n)


# --- exercises ---------------------------------------------------------------------------------------------------


@Exercise
def pack(solution):
    """Return the rows of a whole adapter, rank-major, from the `(A, B)` of its layers. About 5 lines."""
    # inputs, outputs and rank of each layer
    for what, layers in (("one layer", [(3, 2, 2)]), ("two layers", [(3, 2, 1), (2, 4, 3)])):
        pairs, highest = [], max(rank for _, _, rank in layers)
        for inputs, outputs, rank in layers:
            a, b = torch.arange(1, rank * inputs + 1), torch.arange(-outputs * rank, 0)
            pairs.append((a.view(rank, inputs), b.view(outputs, rank)))
        full = [padded(a, b, highest) for a, b in pairs]
        expected = torch.cat([share for a, b in full for share in (a, b.T)], dim=1)
        yours = solution([(a.clone(), b.clone()) for a, b in pairs])
        yield from compare(f"the shape for {what}", f"the rows of {what}", yours, expected)


def written(pool: AdapterPool, old: str, new: str) -> tuple[int, int]:
    """The bytes of the model's memory that a swap from ``old`` to ``new`` fills with weights and with zeros.

    Found out by marking all of the memory, which is one matrix: rows that aren't marked afterwards were written.

    >>> written(_demo_pool(), "pig_latin", "double")
    (32896, 493440)
    """
    pool.swap(old)
    a = resolve_slot(pool.model, "default").tensors[0].parameter.detach()
    rows = a.as_strided((len(a), a.stride(0)), (a.stride(0), 1), 0).fill_(torch.nan)
    pool.swap(new)
    filled = ~rows.isnan().any(dim=1)
    copied = filled & rows.any(dim=1)
    return int(rows[copied].nbytes), int(rows[filled & ~copied].nbytes)


def _demo_pool() -> AdapterPool:
    # both adapt the attention only, so all layers have room for rank 32
    adapters = {name: demo.adapter_path(name) for name in ("double", "pig_latin")}
    return AdapterPool(demo.load("double")[0], adapters=adapters, progress=False)


@Exercise
def swap_bytes(solution):
    """Return the bytes that a swap from rank `old` to rank `new` copies, and those it zeroes. About 2 lines."""
    pool, ranks = _demo_pool(), {"double": 2, "pig_latin": 32}
    a = resolve_slot(pool.model, "default").tensors[0].parameter
    row = a.stride(0) * a.element_size()
    for old, new in itertools.permutations(ranks):
        yield f"bytes from {old} to {new}", solution(row, ranks[new], ranks[old]), written(pool, old, new)
