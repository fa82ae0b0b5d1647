"""The ways of swapping, and the table of how long each takes."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from peft import PeftModel
from peft.utils.hotswap import hotswap_adapter as peft_hotswap
from peft.utils.hotswap import hotswap_adapter_from_state_dict as peft_hotswap_from_state_dict

from ..core.hotswap import hotswap_adapter, hotswap_adapter_from_state_dict
from .rounds import Way, in_rounds
from .rows import MEMCPY, PEFT_STATE_DICT, Row
from .scene import Scene


def make_ways(scene: Scene) -> list[Way]:
    """All ways of swapping, each on a model of its own."""
    return [
        peft_load_way(scene),
        peft_hotswap_way(scene),
        peft_state_dict_way(scene),
        disk_way(scene, "hotswap_lab, disk", scene.load()),
        disk_way(scene, "hotswap_lab, disk, prepared", scene.load_prepared()),
        state_dict_way(scene),
        adapter_way(scene),
        pool_way(scene),
        memcpy_way(scene),
    ]


def peft_load_way(scene: Scene) -> Way:
    """Without hotswapping: load under a new name, activate it, delete the old one."""
    model = scene.load()
    return scene.way("PEFT load + set + delete", model, peft_load(scene, model))


def peft_load(scene: Scene, model: PeftModel) -> Callable[[int], None]:
    names = (f"adapter{number}" for number in itertools.count())

    def swap(number: int) -> None:
        old, new = model.active_adapter, next(names)
        model.load_adapter(scene.folders[number], new, torch_device=scene.settings.device, autocast_adapter_dtype=False)
        model.set_adapter(new)
        model.delete_adapter(old)

    return swap


def peft_hotswap_way(scene: Scene) -> Way:
    model = scene.load()
    device = scene.settings.device
    return scene.way(
        "PEFT hotswap, disk",
        model,
        lambda number: peft_hotswap(model, scene.folders[number], adapter_name="default", torch_device=device),
    )


def peft_state_dict_way(scene: Scene) -> Way:
    model = scene.load()
    # PEFT wants the adapter's name in the keys
    named = [
        {key.removesuffix(".weight") + ".default.weight": tensor for key, tensor in adapter.tensors.items()}
        for adapter in scene.adapters
    ]
    return scene.way(
        PEFT_STATE_DICT,
        model,
        lambda number: peft_hotswap_from_state_dict(model, named[number], "default", scene.adapters[number].config),
    )


def disk_way(scene: Scene, name: str, model: PeftModel) -> Way:
    return scene.way(name, model, lambda number: hotswap_adapter(model, scene.folders[number], "default"))


def state_dict_way(scene: Scene) -> Way:
    model, adapters = scene.load_prepared(), scene.adapters
    return scene.way(
        "hotswap_lab, state dict, prepared",
        model,
        lambda number: hotswap_adapter_from_state_dict(
            model, adapters[number].tensors, "default", adapters[number].config
        ),
    )


def adapter_way(scene: Scene) -> Way:
    model = scene.load_prepared()
    return scene.way(
        "hotswap_lab, Adapter, prepared",
        model,
        lambda number: hotswap_adapter(model, scene.adapters[number], "default"),
    )


def pool_way(scene: Scene) -> Way:
    pool = scene.pool()
    return scene.way("hotswap_lab, pool", pool.model, lambda number: pool.swap(str(number)))


def memcpy_way(scene: Scene) -> Way:
    """The bytes of the adapter, as a pool packs them, from one piece of memory to another: nothing can be faster."""
    device, dtype = torch.device(scene.settings.device), getattr(torch, scene.settings.dtype)
    target = torch.zeros(scene.size.packed_nbytes // dtype.itemsize, dtype=dtype, device=device)
    # not zeros, which may be one page of memory shown many times; pinned for a GPU, as a pool's are
    sources = [torch.full(target.shape, number + 1.0, dtype=dtype) for number in (0, 1)]
    sources = [source.pin_memory() if device.type == "cuda" else source for source in sources]
    return Way(
        MEMCPY,
        lambda number: target.copy_(sources[number], non_blocking=True),
        lambda number: torch.equal(target.cpu(), sources[number]),
    )


def measure_ways(scene: Scene) -> list[Row]:
    """The table for one rank."""
    ways = {way.name: way for way in make_ways(scene)}
    checks = {name: way.check() for name, way in ways.items()}
    runs = {name: way.alternating(scene.settings.device) for name, way in ways.items() if checks[name][0] != "refused"}
    timings = in_rounds(runs, scene.settings.n)
    theirs, floor = timings.get(PEFT_STATE_DICT), timings.get(MEMCPY)
    rows = []
    for name, (state, note) in checks.items():
        timing = timings.get(name)
        as_fast = theirs.median / timing.median if timing and theirs else None
        times_memcpy = timing.median / floor.median if timing and floor else None
        rows.append(Row(scene.rank, name, state, timing, as_fast, times_memcpy, note))
    return rows
