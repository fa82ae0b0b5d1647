"""The ways of swapping, and the table of their times."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from importlib.util import find_spec, module_from_spec
from typing import Any

import torch
from peft import PeftModel

from ..engine import hotswap_adapter, hotswap_adapter_from_state_dict
from .report import MEMCPY, PEFT_STATE_DICT, Row
from .scene import Scene, Way
from .timing import in_rounds

# a module of its own, whose functions call one another also while ``patch_peft`` has replaced PEFT's
_SPEC: Any = find_spec("peft.utils.hotswap")
PEFT: Any = module_from_spec(_SPEC)
_SPEC.loader.exec_module(PEFT)


def peft_load_way(scene: Scene) -> Way:
    """Without a hot swap: load the adapter under a new name, activate it, delete the old one."""
    model, names = scene.load(), (f"adapter{number}" for number in itertools.count())

    def swap(number: int) -> None:
        old, new = model.active_adapter, next(names)
        model.load_adapter(scene.folders[number], new, **scene.options)
        model.set_adapter(new)
        model.delete_adapter(old)

    return scene.way("PEFT load + set + delete", model, swap)


def disk_way(
    scene: Scene,
    name: str,
    model: PeftModel,
    swap: Callable[..., object] = hotswap_adapter,
    sources: Sequence[object] = (),
    **options: object,
) -> Way:
    """With ``hotswap_adapter``, ours or PEFT's, from the scene's folders or from other ``sources``."""
    sources = sources or scene.folders
    return scene.way(name, model, lambda number: swap(model, sources[number], "default", **options))


def peft_hotswap_way(scene: Scene, name: str = "PEFT hotswap, disk", model: PeftModel | None = None) -> Way:
    swap, device = PEFT.hotswap_adapter, scene.settings.device
    return disk_way(scene, name, model or scene.load(), swap, torch_device=device)


def state_dict_way(scene: Scene, name: str, model: PeftModel, swap: Callable[..., object]) -> Way:
    """With ``hotswap_adapter_from_state_dict``, ours or PEFT's."""
    # PEFT requires the adapter's name in the keys
    named = [
        {key.removesuffix(".weight") + ".default.weight": tensor for key, tensor in adapter.tensors.items()}
        for adapter in scene.adapters
    ]
    return scene.way(name, model, lambda number: swap(model, named[number], "default", scene.adapters[number].config))


def peft_state_dict_way(scene: Scene) -> Way:
    return state_dict_way(scene, PEFT_STATE_DICT, scene.load(), PEFT.hotswap_adapter_from_state_dict)


def pool_way(scene: Scene) -> Way:
    pool = scene.pool()
    return scene.way("hotswap_lab, pool", pool.model, lambda number: pool.swap(str(number)))


def memcpy_way(scene: Scene) -> Way:
    """A plain copy of the adapter's bytes, as a pool packs them: a lower limit for every way."""
    device, dtype = torch.device(scene.settings.device), getattr(torch, scene.settings.dtype)
    target = torch.zeros(scene.size.packed_nbytes // dtype.itemsize, dtype=dtype, device=device)
    # not zeros, which may all be one page of memory; pinned for a GPU, as a pool's memory is
    pinned = device.type == "cuda"
    sources = [torch.full(target.shape, number + 1.0, dtype=dtype, pin_memory=pinned) for number in (0, 1)]
    return Way(
        MEMCPY,
        lambda number: target.copy_(sources[number], non_blocking=True),
        lambda number: torch.equal(target.cpu(), sources[number]),
    )


def make_ways(scene: Scene) -> list[Way]:
    """Make all ways of swapping, each on a model of its own."""
    return [
        peft_load_way(scene),
        peft_hotswap_way(scene),
        peft_state_dict_way(scene),
        disk_way(scene, "hotswap_lab, disk", scene.load()),
        disk_way(scene, "hotswap_lab, disk, prepared", scene.load_prepared()),
        state_dict_way(
            scene, "hotswap_lab, state dict, prepared", scene.load_prepared(), hotswap_adapter_from_state_dict
        ),
        disk_way(scene, "hotswap_lab, Adapter, prepared", scene.load_prepared(), sources=scene.adapters),
        pool_way(scene),
        memcpy_way(scene),
    ]


def measure_ways(scene: Scene) -> list[Row]:
    """Check and time all ways for one rank. Returns the lines of the table."""
    ways = {way.name: way for way in make_ways(scene)}
    checks = {name: way.check() for name, way in ways.items()}
    runs = {name: way.alternating(scene.settings.device) for name, way in ways.items() if checks[name][0] != "refused"}
    timings = in_rounds(runs, scene.settings.n)
    return [Row(scene.rank, name, state, timings.get(name), note) for name, (state, note) in checks.items()]
