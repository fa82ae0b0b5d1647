"""Preparing without a room: for methods other than LoRA.

The updates of these methods (LoHa, LoKr, HiRA, AdaLoRA) are sums over rank components, as LoRA's ``B @ A`` is. So each
tensor gets room for the highest rank of a family, and scalings become tensors. The tensors share no memory: a swap
loads the adapter again, and copies tensor by tensor.

Tests: ``tests/beyond/test_prepared.py``.
"""

import functools

import torch
from peft import PeftType
from peft.utils.other import get_pattern_key

from ..core.adapter import Adapter
from ..core.change import Change
from ..core.errors import Refusal, refusal
from ..core.journal import Journal
from ..core.planner import misfits
from ..core.prepare import PADDABLE
from ..core.prepared import make_prepared, new_scalings, own_rank
from ..core.slot import Slot, begin_change
from ..core.tensors import shared_as
from .configs import pointless_rank


def prepare_in_place(slot: Slot, target_rank: int | None, family: list[Adapter]) -> tuple[Change, list[Refusal]]:
    """Allocate room for the family without changing the model yet. Return the change, and the reasons against it."""
    change, name = begin_change(slot, slot.config), slot.adapter_name
    if (kind := slot.config.peft_type) not in PADDABLE:
        others = ", ".join(sorted(other.value for other in PADDABLE if other != PeftType.LORA))
        return change, [refusal("type_not_preparable", kind=kind.value, adapter_name=name, others=others)]
    if refusals := [reason for adapter in family for reason in misfits(slot, adapter, in_graph=True)]:
        return change, refusals
    with slot.write_mode(), torch.no_grad():
        for layer in slot.layers:
            ranks = [rank_for(adapter.config, layer.path) for adapter in family]
            if reasons := [reason for rank in ranks for reason in pointless_rank(rank, layer.path, layer.module)]:
                return change, reasons
            for tensor in layer.tensors:
                if tensor.rank_axis is None:
                    continue
                least = max([own_rank(layer.module, name, tensor), *ranks])
                if target_rank is not None and target_rank < least:
                    path, label = layer.path, "the loaded adapter, or of one in `adapters`"
                    reason = refusal("target_rank_too_low", target_rank=target_rank, own=least, path=path, label=label)
                    return change, [reason]
                needed = max([tensor.capacity, target_rank or 0, *ranks])
                if needed > tensor.capacity:
                    tensor.resize(tensor.padded(tensor.parameter.detach(), needed), change)
    change.steps.append(functools.partial(_write_prepared, slot))
    return change, []


def rank_for(config: object, path: str) -> int:
    """The rank that a fresh load with this config gives to the layer at ``path``."""
    pattern = getattr(config, "rank_pattern", None) or {}
    return pattern.get(get_pattern_key(pattern.keys(), path), getattr(config, "init_r", None) or config.r)


def _write_prepared(slot: Slot, journal: Journal) -> None:
    """Turn scalings into tensors, because a compiled graph treats a Python number as a constant."""
    name = slot.adapter_name
    for layer in slot.layers:
        scaling, parameter = layer.module.__dict__.get("scaling", {}).get(name), layer.tensors[0].parameter
        if scaling is not None:  # some methods have none
            scaling = shared_as([parameter], new_scalings((1, 1), parameter.device).fill_(float(scaling)))
        make_prepared(layer.module, name, scaling, journal)
