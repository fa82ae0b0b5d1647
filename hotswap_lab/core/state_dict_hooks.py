"""Hooks that make ``state_dict`` and ``load_state_dict`` handle the adapter only, without its padding.

A layer that the new adapter lacks stays in the model as zeros, so that a later adapter can use it and a compiled graph
stays valid. An adapter of a lower rank than was prepared for is padded with zeros. A fresh load has neither. So
``state_dict`` (and with it ``save_pretrained``, checkpoints, ``get_peft_model_state_dict``) leaves both out, and
``load_state_dict`` does not miss them.
"""

import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

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
#: functions of PEFT that look up a file's keys among those of the model; weights without a key there are dropped
PEFT_LOADS_BY_KEY = {
    "_remap_adapter_state_dict_for_load",
    "_find_mismatched_keys",
    "hotswap_adapter_from_state_dict",
}


def look_after(slot: Slot, config: Config, journal: Journal) -> None:
    """Register the hooks on a base model. It is called before the first swap or preparing marks its layers."""
    base = slot.host.base
    if not any(map(_is_ours, base._state_dict_hooks.values())):
        journal.record(lambda: forget_hooks(base))
        base.register_state_dict_post_hook(partial(_show_own, slot.methods))
        base.register_load_state_dict_pre_hook(partial(_fit_to_model, slot.methods))


def _is_ours(hook: Any) -> bool:
    return getattr(getattr(hook, "hook", hook), "func", None) in (_show_own, _fit_to_model)


def forget_hooks(module: torch.nn.Module) -> None:
    """Remove the hooks from a base model, or from a copy of one."""
    for hooks in (module._state_dict_hooks, module._load_state_dict_pre_hooks):
        for number, hook in list(hooks.items()):
            if _is_ours(hook):
                del hooks[number]


class _Marked(NamedTuple):
    """A tensor of an adapter that may be padded, or whose layer is off."""

    #: its key in a state dict
    key: str
    layer: Any
    adapter_name: str
    tensor: SlotTensor
    #: whether the adapter is off on the layer
    is_off: bool
    #: all tensors of the adapter on the layer if its method is LoRA
    of_lora: Sequence[SlotTensor]

    @property
    def rank(self) -> int | None:
        """The adapter's own rank, without padding."""
        return own_rank(self.layer, self.adapter_name, self.tensor)


def _marked(methods: Sequence[Method], base: torch.nn.Module, prefix: str) -> Iterator[_Marked]:
    """All tensors of adapters that may be padded, or whose layer is off; ``prefix`` is that of the base's keys."""
    for path, layer in base.named_modules(remove_duplicate=False):
        names = {*layer.__dict__.get(OFF_ATTRIBUTE, ()), *layer.__dict__.get(PREPARED_ATTRIBUTE, ())}
        for name in sorted(names):
            for method in methods:
                if (tensors := method.tensors_of(layer, name)) is not None:
                    off, of_lora = is_off(layer, name, tensors), tensors if method.is_lora else ()
                    for tensor in tensors:
                        yield _Marked(f"{prefix}{path}.{tensor.named_key}", layer, name, tensor, off, of_lora)
                    break


def _is_for_loading() -> bool:
    """Whether PEFT reads the state dict to load a file. Then it has to see the layers that are off, to fill them.

    PEFT calls ``model.state_dict()`` for saving, too: only the call stack shows the difference.
    """
    frame = sys._getframe()
    while frame := frame.f_back:
        is_of_peft = frame.f_globals.get("__name__", "").startswith("peft.")
        if is_of_peft and frame.f_code.co_name in PEFT_LOADS_BY_KEY:
            return True
    return False


def _show_own(methods: Sequence[Method], base: torch.nn.Module, state_dict: dict, prefix: str, metadata: dict) -> None:
    kept, hides_off = base.__dict__.get(SLOTS, {}).items(), not _is_for_loading()
    if names := [name for name, slot in kept if slot and slot.room and slot.room.assigned]:
        text = "may have different adapters, which are not what is saved: swap to one first"
        warnings.warn(f"The rows of {listing(names)} {text}", stacklevel=2)
    for marked in _marked(methods, base, prefix):
        key, tensor = marked.key, marked.tensor
        if (value := state_dict.get(key)) is None:
            continue
        if reason := strange_padding(marked.layer, marked.adapter_name, tensor, marked.of_lora):
            warnings.warn(reason, stacklevel=2)
        if marked.is_off and hides_off:
            del state_dict[key]
            continue
        rank, keep_vars = marked.rank, isinstance(value, torch.nn.Parameter)
        is_trimmed = rank != tensor.capacity
        if is_trimmed:
            value = tensor.own(value, rank).reshape(tensor.shape_for(rank))
        if not keep_vars:  # with keep_vars, the caller wants the model's own memory
            # safetensors requires contiguous tensors; a view is cloned, because torch.save writes the memory around it
            value = value.clone(memory_format=torch.contiguous_format) if is_trimmed else value.contiguous()
        state_dict[key] = value


def _fit_to_model(methods: Sequence[Method], base: torch.nn.Module, state_dict: dict, prefix: str, *_: object) -> None:
    """Before a load: refuse tensors that don't fit, pad the others, and add those of layers that are off."""
    all_marked = list(_marked(methods, base, prefix))
    for marked in all_marked:  # all of them, before the first is written
        key, name = marked.key, marked.adapter_name
        if (value := state_dict.get(key)) is None or not is_prepared(marked.layer, name):
            continue
        expected = marked.tensor.shape_for(marked.rank)
        if marked.is_off:
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
    for marked in all_marked:
        key, tensor = marked.key, marked.tensor
        if marked.is_off and key not in state_dict:
            value = tensor.parameter.detach()
            if value.is_meta:  # it may be replaced by this one, with `assign=True`, so it gets the device of the others
                device = next((other.device for other in state_dict.values()), value.device)
                value = torch.zeros_like(value, device=device)
            state_dict[key] = value
        elif not marked.is_off and key in state_dict and marked.rank != tensor.capacity:
            state_dict[key] = tensor.padded(state_dict[key].detach(), tensor.capacity)


# ---- does the live model compute the same as the saved adapter?


def strange_padding(layer: Any, adapter_name: str, tensor: SlotTensor, of_lora: Sequence[SlotTensor]) -> str | None:
    """Return a warning if the live model differs from the saved one: padding isn't zero, or a layer isn't quite off.

    ``of_lora`` has all tensors of the layer if its method is LoRA.
    """
    if is_marked_off(layer, adapter_name):
        return _trained_while_off(adapter_name, tensor, of_lora)
    rank, parameter = own_rank(layer, adapter_name, tensor), tensor.parameter
    if rank == tensor.capacity or tensor.is_shard or parameter.is_meta or not tensor.padding(parameter, rank).any():
        return None
    fault = f"has rank {rank}, but the padding of its {tensor.key} is not zero, {DIFFERS}"
    advice = "Make a new optimizer after a swap, because one with the state of an earlier adapter writes there."
    return f"The adapter {adapter_name!r} {fault}. {advice}"


def _trained_while_off(adapter_name: str, tensor: SlotTensor, of_lora: Sequence[SlotTensor]) -> str | None:
    """Return a warning if a magnitude or bias was trained while off: PEFT's ``set_adapter`` unfreezes it."""
    if tensor.rank_axis is not None or not of_lora or tensor.is_shard or tensor.is_zero:
        return None
    if not all(other.is_zero for other in of_lora if other.rank_axis is not None):
        return None
    fault = f"is off on a layer, but its {tensor.key} there was written to, {DIFFERS}"
    cause = "PEFT's set_adapter lets it be trained: call that before a swap, not after."
    return f"The adapter {adapter_name!r} {fault}. {cause}"
