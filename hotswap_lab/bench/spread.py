"""Whether it matters over how many tensors the bytes are spread."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict

from ..core.pool import AdapterPool
from .models import randomize
from .rounds import Way, in_rounds
from .rows import Extra
from .scene import Scene
from .settings import Settings
from .times import described, values_of


class Chain(torch.nn.Module):
    """Square layers in a row. They share one weight, since a swap has nothing to do with it.

    >>> chain = Chain(count=3, width=4)
    >>> chain(torch.ones(2, 4)).shape, len(list(chain.parameters()))
    (torch.Size([2, 4]), 1)
    """

    def __init__(self, count: int, width: int):
        super().__init__()
        first = torch.nn.Linear(width, width, bias=False)
        self.layers = torch.nn.ModuleList([first])
        for _ in range(count - 1):
            layer = torch.nn.Linear(width, width, bias=False, device="meta")
            layer.weight = first.weight
            self.layers.append(layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def chain_pool(settings: Settings, rank: int, count: int, width: int) -> AdapterPool:
    """A pool of two adapters for a :class:`Chain`."""
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=r"layers\.\d+")
    chain = Chain(count, width).to(settings.device, getattr(torch, settings.dtype)).eval()
    model = get_peft_model(chain, config, autocast_adapter_dtype=False)
    adapters = {}
    for number in (0, 1):
        randomize(model, number)
        tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
        adapters[str(number)] = ({key: tensor.clone() for key, tensor in tensors.items()}, config)
    return AdapterPool(model, adapters=adapters, progress=False)


def measure_spread(scene: Scene) -> Extra:
    """A pool's swap of the same bytes in a few wide layers, and in ten times as many of a tenth of the width."""
    count = scene.size.tensors // 2
    per_row = scene.size.nbytes / getattr(torch, scene.settings.dtype).itemsize / scene.rank
    # widths of whole cache lines, so that the packed bytes are the same, too
    width = max(round(per_row / (2 * count) / 10 / 32), 1) * 32
    pools = {
        "few": chain_pool(scene.settings, scene.rank, count, width * 10),
        "many": chain_pool(scene.settings, scene.rank, count * 10, width),
    }
    runs = {}
    for name, pool in pools.items():
        way = Way(name, lambda number, pool=pool: pool.swap(str(number)), lambda number: True)
        way.swap(0)
        runs[name] = way.alternating(scene.settings.device)
    timings = in_rounds(runs, scene.settings.n)
    ratio = timings["many"].median / timings["few"].median
    values = {
        name: {"tensors": tensors, "packed_nbytes": pools[name].nbytes // 2, **values_of(timings[name])}
        for name, tensors in (("few", 2 * count), ("many", 20 * count))
    }
    text = (
        f"spread, {values['many']['packed_nbytes'] / 1e6:.3g} MB packed: pool swap over {20 * count} tensors takes "
        f"{ratio:.2f} times as long as over {2 * count}: {described(timings['many'])}; {described(timings['few'])}"
    )
    return Extra("spread", scene.rank, text, {"ratio": ratio, **values})
