"""Whole modules that are saved with an adapter, such as a classifier: they are packed and swapped with it.

Tests: ``tests/pools/test_adapter_pool.py``.
"""

import copy
import dataclasses
from types import SimpleNamespace

import torch
from peft.utils import ModulesToSaveWrapper

from ..core.adapter import Adapter
from ..core.errors import refused
from ..core.host import Config, canonical_path, modules_in
from ..core.room import Room
from ..core.slot import Slot
from ..core.tensors import SlotTensor


def module_tensors(slot: Slot) -> list[SlotTensor]:
    """Return the tensors of the whole modules that an adapter has: their parameters, and the buffers that are saved."""
    tensors: list[SlotTensor] = []
    for path, module in modules_in(slot.host.base):
        if isinstance(module, ModulesToSaveWrapper) and slot.adapter_name in module.modules_to_save:
            whole = module.modules_to_save[slot.adapter_name]
            for table, named in (("_parameters", whole.named_parameters()), ("_buffers", whole.named_buffers())):
                for key, _ in named:
                    owner_path, _, name = key.rpartition(".")
                    owner = whole.get_submodule(owner_path)
                    if name not in owner._non_persistent_buffers_set:  # those are in no file
                        # a buffer, such as a BatchNorm's running mean, is written like a parameter
                        owner = SimpleNamespace(_parameters=getattr(owner, table))
                        tensors.append(SlotTensor(f"{path}.{key}", key, owner, name))
    return tensors


def taken_apart(
    room: Room, adapter: Adapter, member_name: str
) -> tuple[Slot, Adapter, list[tuple[SlotTensor, torch.Tensor]]]:
    """The slot and the adapter as LoRA alone, and the values for the tensors of the whole modules."""
    slot = room.slot
    modules, expected = getattr(adapter.config, "modules_to_save", None) or (), slot.config.modules_to_save
    if set(modules) != set(expected):
        raise refused("other_modules_to_save", name=member_name, found=modules, expected=expected)
    tensors = {canonical_path(key): tensor for key, tensor in adapter.tensors.items()}
    sources = []
    for target in room.spans.keys() - slot.tensors:
        tensor, shape = tensors.pop(target.key, None), target.parameter.shape
        if tensor is None or tensor.shape != shape:
            found = "no such tensor" if tensor is None else f"shape {tuple(tensor.shape)}"
            raise refused("module_differs", key=target.key, found=found, expected=tuple(shape))
        sources.append((target, tensor))
    host = dataclasses.replace(slot.host, configs={slot.adapter_name: _without_modules(slot.config)})
    left = {key: tensor for key, tensor in adapter.tensors.items() if canonical_path(key) in tensors}
    alone = dataclasses.replace(adapter, config=_without_modules(adapter.config), tensors=left)
    return dataclasses.replace(slot, host=host), alone, sources


def _without_modules(config: Config) -> Config:
    config = copy.deepcopy(config)
    # PEFT adds a classifier's names to the config of an adapter for its task
    config.modules_to_save = config.task_type = None
    return config
