"""Hooks that make ``state_dict`` and ``load_state_dict`` handle the adapter only, without its padding.

A layer that the new adapter lacks stays in the model as zeros, so that a later adapter can use it and a compiled graph
stays valid. An adapter of a lower rank than was prepared for is padded with zeros. A fresh load has neither. So
``state_dict`` (and with it ``save_pretrained``, checkpoints, ``get_peft_model_state_dict``) leaves both out, and
``load_state_dict`` does not miss them.
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from .errors import listing, refused
from .host import Config
from .journal import Journal
from .method import Method
from .prepared import is_marked_off, is_off, own_rank
from .slot import SLOTS, Slot
from .tensors import OFF_ATTRIBUTE, PREPARED_ATTRIBUTE, SlotTensor, is_prepared

#: ends the first sentence of a warning
DIFFERS = "so what is saved is not what the model computes"


def look_after(slot: Slot, config: Config, journal: Journal) -> None:
    """Register the hooks on a base model. It is called before the first swap or preparing marks its layers."""
    base = slot.host.base
    if not any(map(_is_ours, base._state_dict_hooks.values())):
        journal.record(lambda: forget_hooks(base))
        base.register_state_dict_post_hook(partial(_show_own, slot.methods))
        base.register_load_state_dict_pre_hook(partial(_fill_up, slot.methods))


def _is_ours(hook: Any) -> bool:
    return getattr(getattr(hook, "hook", hook), "func", None) in (_show_own, _fill_up)


def forget_hooks(module: torch.nn.Module) -> None:
    """Remove the hooks from a base model, or from a copy of one."""
    for hooks in (module._state_dict_hooks, module._load_state_dict_pre_hooks):
        for number, hook in list(hooks.items()):
            if _is_ours(hook):
                del hooks[number]


def _marked(methods: Sequence[Method], base: torch.nn.Module, prefix: str) -> Iterator[tuple]:
    """The tensors of adapters that may be padded, or whose layer is off, each with its name in a state dict before it,
    its layer and the adapter's name, and after it whether the layer is off, and a warning or None."""
    for path, layer in base.named_modules(remove_duplicate=False):
        names = {*layer.__dict__.get(OFF_ATTRIBUTE, ()), *layer.__dict__.get(PREPARED_ATTRIBUTE, ())}
        for name in sorted(names):
            known = ((method, method.tensors_of(layer, name)) for method in methods)
            method, tensors = next((each for each in known if each[1] is not None), (None, None))
            if tensors is not None:
                off = is_off(layer, name, tensors)
                for tensor in tensors:
                    reason = strange_padding(layer, name, tensor, tensors if method and method.is_lora else ())
                    yield f"{prefix}{path}.{tensor.named_key}", layer, name, tensor, off, reason


def _show_own(methods: Sequence[Method], base: torch.nn.Module, state_dict: dict, prefix: str, metadata: dict) -> None:
    kept = base.__dict__.get(SLOTS, {}).items()
    if names := [name for name, slot in kept if slot and slot.room and slot.room.assigned]:
        text = "may have different adapters, which are not what is saved: swap to one first"
        warnings.warn(f"The rows of {listing(names)} {text}", stacklevel=2)
    for key, layer, name, tensor, off, reason in _marked(methods, base, prefix):
        if (value := state_dict.get(key)) is None:
            continue
        if reason:
            warnings.warn(reason, stacklevel=2)
        if off:
            del state_dict[key]
            continue
        rank, keep_vars = own_rank(layer, name, tensor), isinstance(value, torch.nn.Parameter)
        is_trimmed = rank != tensor.capacity
        if is_trimmed:
            value = tensor.own(value, rank).reshape(tensor.shape_for(rank))
        if not keep_vars:  # with keep_vars, the caller wants the model's own memory
            # safetensors requires contiguous tensors; a view is cloned, because torch.save writes the memory around it
            value = value.clone(memory_format=torch.contiguous_format) if is_trimmed else value.contiguous()
        state_dict[key] = value


def _fill_up(methods: Sequence[Method], base: torch.nn.Module, state_dict: dict, prefix: str, *_: object) -> None:
    marked = list(_marked(methods, base, prefix))
    for key, layer, name, tensor, off, _reason in marked:  # all of them, before the first is written
        if (value := state_dict.get(key)) is None or not is_prepared(layer, name):
            continue
        expected = tensor.shape_for(own_rank(layer, name, tensor))
        if off:
            fits, text = not value.any(), "nothing for a layer that is turned off"
        else:
            # a tensor of the padded size could be loaded, but components above the adapter's rank would not be saved
            fits, text = tuple(value.shape) == expected, f"shape {expected}, the adapter's own rank"
        if not fits:
            raise refused("state_dict_of_another", key=key, shape=tuple(value.shape), expected=text, adapter_name=name)
    for slot in base.__dict__.get(SLOTS, {}).values():
        if slot and slot.room and slot.is_inference:
            # inference tensors have no version counter that would show this write
            slot.room.state = replace(slot.room.state, owner=None)
    for key, layer, name, tensor, off, _reason in marked:
        if off:
            value = tensor.parameter.detach()
            # a parameter without values may be replaced by this one, with `assign=True`
            device = next((each.device for each in state_dict.values() if value.is_meta), value.device)
            state_dict.setdefault(key, torch.zeros_like(value, device=device) if value.is_meta else value)
        elif key in state_dict and own_rank(layer, name, tensor) != tensor.capacity:
            state_dict[key] = tensor.padded(state_dict[key].detach(), tensor.capacity)


# ---- does the live model compute the same as the saved adapter?


def strange_padding(layer: Any, adapter_name: str, tensor: SlotTensor, of_lora: Sequence[SlotTensor]) -> str | None:
    """A warning if the live model differs from the saved one: its padding isn't zero, or a layer isn't quite off.

    ``of_lora`` has all tensors of the layer if its method is LoRA.
    """
    if is_marked_off(layer, adapter_name):
        return _trained_while_off(adapter_name, tensor, of_lora)
    rank, parameter = own_rank(layer, adapter_name, tensor), tensor.parameter
    if rank == tensor.capacity or tensor.is_shard or parameter.is_meta or not tensor.padding(parameter, rank).any():
        return None
    found = f"has rank {rank}, but the padding of its {tensor.key} is not zero, {DIFFERS}"
    advice = "Make a new optimizer after a swap, because one with the state of an earlier adapter writes there."
    return f"The adapter {adapter_name!r} {found}. {advice}"


def _trained_while_off(adapter_name: str, tensor: SlotTensor, of_lora: Sequence[SlotTensor]) -> str | None:
    """A warning if the magnitude or bias of a layer that is off was trained: PEFT's ``set_adapter`` unfreezes them."""
    if tensor.rank_axis is not None or not of_lora or tensor.is_shard or tensor.is_zero:
        return None
    if not all(each.is_zero for each in of_lora if each.rank_axis is not None):
        return None
    found = f"is off on a layer, but its {tensor.key} there was written to, {DIFFERS}"
    cause = "PEFT's set_adapter lets it be trained: call that before a swap, not after."
    return f"The adapter {adapter_name!r} {found}. {cause}"
