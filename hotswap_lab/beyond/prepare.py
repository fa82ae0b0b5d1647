"""Preparing without a room: other methods than LoRA, and LoRA with more beside it (a classifier, trained tokens).

What these methods add (LoHa, LoKr, HiRA, AdaLoRA) is a sum over rank components, as LoRA's ``B @ A`` is, so each
tensor gets room for the highest rank of a family, and scalings become tensors. There is no common memory: a swap goes
through a donor (see :mod:`hotswap_lab.grafting`), and copies tensor by tensor.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator

import torch
from peft import PeftConfig, PeftType
from peft.utils.other import get_pattern_key

from ..core import lora
from ..core.adapter import Adapter
from ..core.change import Change
from ..core.errors import Refusal
from ..core.expressions import slow_to_match
from ..core.journal import Journal
from ..core.prepared import EvalFreeDropout, ScalingTable, prepared_class, scaling_tensor
from ..core.slot import Slot
from ..core.state_view import own_rank, set_padded
from ..core.words import incompatible_types, too_low
from . import general

#: what LoRA may have beside its layers; where all adapters have the same of it, its values can be swapped in a graph
BESIDE_LORA = {"modules_to_save", "trainable_token_indices"}


def decide_general(slot: Slot, target_rank: int | None, family: Iterable[Adapter]) -> tuple[Change, list[Refusal]]:
    """Allocates what is needed beside the model, or says why it can't be had."""
    change, name = Change(slot), slot.adapter_name
    family = list(family)
    if refusals := list(_check_family(slot, family)):
        return change, refusals
    with slot.write_mode(), torch.no_grad():
        for layer in slot.layers:
            ranks = [rank_for(each.config, layer.path) for each in family]
            if reasons := [each for rank in ranks for each in lora.pointless_rank(rank, layer.path, layer.module)]:
                return change, reasons
            for tensor in layer.tensors:
                if tensor.rank_axis is None:
                    continue
                own = own_rank(layer.module, name, tensor)
                if target_rank is not None and target_rank < max([own, *ranks]):
                    return change, [too_low(target_rank, max([own, *ranks]), layer.path)]
                needed = max([tensor.capacity, target_rank or 0, *ranks])
                if needed > tensor.capacity:
                    padded = tensor.padded(tensor.parameter.detach(), needed)
                    change.resizes.append((tensor.parameter, padded))
                    if tensor.size_attribute:
                        change.sizes.append((tensor.owner, tensor.size_attribute, needed))
    change.steps.append(functools.partial(_write_prepared, slot))
    return change, []


def rank_for(config: object, path: str) -> int:
    """The rank that a fresh load with this config gives to the layer at ``path``."""
    pattern = getattr(config, "rank_pattern", None) or {}
    rank = getattr(config, "init_r", None) or config.r
    return pattern.get(get_pattern_key(pattern.keys(), path), rank)


def _check_family(slot: Slot, family: list[Adapter]) -> Iterator[Refusal]:
    kind = slot.config.peft_type
    if kind == PeftType.LORA:
        yield from lora.unsupported(slot.config, "loaded")
        if strange := set(lora.other_state(slot.config)) - BESIDE_LORA:
            yield Refusal(
                "A model can't be prepared for the loaded adapter.",
                found=f"{', '.join(sorted(strange))}: tensors that can't be padded",
                expected=f"LoRA or DoRA, with nothing beside it but {', '.join(sorted(BESIDE_LORA))}",
                next_step="swap such adapters in a model that is not compiled",
            )
            return
    elif kind not in general.PADDABLE:
        yield Refusal(
            f"A model can't be prepared for adapters of type {kind.value}.",
            found=f"the adapter {slot.adapter_name!r} of type {kind.value}, which is no sum over rank components",
            expected=f"LORA, {', '.join(sorted(each.value for each in general.PADDABLE))}",
            next_step="swap adapters with the same config, which needs no preparation",
        )
        return
    for adapter in family:
        yield from check_member(slot, adapter)


def check_member(slot: Slot, adapter: Adapter) -> Iterator[Refusal]:
    """What speaks against any adapter of a family that a slot is prepared for."""
    if adapter.config.peft_type != slot.config.peft_type:
        next_step = "leave it out of `adapters`"
        yield incompatible_types(slot.config, adapter.config, slot.adapter_name, f"{adapter.label},", next_step)
        return
    yield from slot.method.malformed(adapter.config)
    yield from slow_to_match(adapter.config, slot.host.base)
    if slot.method is lora:
        yield from _other_form(adapter.config, slot.config)


def _other_form(config: PeftConfig, loaded: PeftConfig) -> Iterator[Refusal]:
    """Says so if LoRA layers have other tensors with this config than with the loaded one."""
    if lora.form_for(config) != lora.form_for(loaded):
        names = ("use_dora", "lora_bias")
        yield Refusal(
            "Adapters with and without DoRA, or with and without lora_bias, have no common graph.",
            found=", ".join(f"{name}={getattr(config, name)}" for name in names),
            expected=", ".join(f"{name}={getattr(loaded, name)}" for name in names) + ", as the loaded adapter",
            next_step="prepare one model for each kind, or swap between them in a model that is not compiled",
        )


def _write_prepared(slot: Slot, journal: Journal) -> None:
    """Makes what a graph would take for a constant a tensor."""
    name = slot.adapter_name
    for layer in slot.layers:
        module = layer.module
        set_padded(module, name, journal)
        if slot.method is lora:
            device = layer.tensors[0].parameter.device
            lora.write_prepared(module, name, scaling_tensor(module.scaling[name], device), journal)
            continue
        if (cls := prepared_class(type(module))) is not type(module):
            journal.set_attribute(module, "__class__", cls)
        scaling = module.__dict__.get("scaling")
        if isinstance(scaling, dict) and not isinstance(scaling.get(name), torch.Tensor):
            device = layer.tensors[0].parameter.device
            values = {**scaling, name: scaling_tensor(scaling[name], device)}
            journal.set_item(module.__dict__, "scaling", ScalingTable(values))
        for table_name in general.DROPOUTS:
            table = module._modules.get(table_name)
            if table is not None and name in table and not isinstance(table[name], EvalFreeDropout):
                dropout = EvalFreeDropout(p=getattr(table[name], "p", 0.0))
                journal.set_item(table, name, dropout.train(module.training))
