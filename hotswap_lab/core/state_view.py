"""Makes what is saved the adapter itself: without the room that was reserved around it.

A layer that the new adapter lacks stays in the model, with zeros, so that a later adapter can use it and a
compiled graph stays valid; and an adapter of a lower rank than was prepared for is followed by rows of zeros. A
fresh load would have neither, so ``state_dict`` (and with it ``save_pretrained``, checkpoints,
``get_peft_model_state_dict``) leaves both out, and ``load_state_dict`` does not miss them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from . import lora
from .errors import refuse
from .journal import Journal
from .methods import method_of
from .parts import LayerSettings, SlotTensor
from .prepared import OFF_ATTRIBUTE, PADDED_ATTRIBUTE
from .slot import SLOTS, Slot, SlotLayer


def is_off(layer: Any, adapter_name: str) -> bool:
    """Whether the adapter is turned off on this layer.

    The mark alone doesn't say so: somebody may have deleted the adapter and loaded another one by the same name,
    or written weights into it. Of a weight that is spread over processes, only the part in this one is looked at:
    for more, all of them would have to be here, and a state dict may be asked for in one of them only.
    """
    return is_marked_off(layer, adapter_name) and not any(
        tensor.off is None and tensor.memory.any() for tensor in method_of(layer).tensors_of(layer, adapter_name)
    )


def is_marked_off(layer: Any, adapter_name: str) -> bool:
    """:func:`is_off` without a look at the weights."""
    return adapter_name in layer.__dict__.get(OFF_ATTRIBUTE, ())


def set_off(layer: Any, adapter_name: str, off: bool, journal: Journal) -> None:
    """Notes that the adapter is turned off on this layer, and so not trained there, or that it isn't any more."""
    _mark(layer, OFF_ATTRIBUTE, adapter_name, off, journal)
    if (method := method_of(layer)) is lora and method.has_adapter(layer, adapter_name):
        if True in method.form_of(layer, adapter_name):
            set_trained(method.tensors_of(layer, adapter_name), not off, journal)
        # PEFT's merging looks for a place to add a bias to, and fails on base layers without one, though it be zero
        journal.set_item(layer.lora_bias, adapter_name, not off and method.form_of(layer, adapter_name)[1])


def write_settings(
    slot: Slot, layers: Iterable[SlotLayer], settings: Iterable[LayerSettings | None], journal: Journal
) -> None:
    """Writes what PEFT keeps of an adapter on each of these layers, and whether it is off there (None)."""
    name, method = slot.adapter_name, slot.method
    on: list[tuple[torch.nn.Module, LayerSettings]] = []
    for layer, each in zip(layers, settings, strict=True):
        if each is None or name in layer.module.__dict__.get(OFF_ATTRIBUTE, ()):
            set_off(layer.module, name, each is None, journal)
        if each is not None:
            on.append((layer.module, each))
            method.write_dropout(layer.module, name, each.dropout, journal)
    for table, field in method.SCALAR_TABLES.items():
        # a scaling that is a tensor is written as such
        chosen = [(module.__dict__[table], each) for module, each in on]
        if table == "scaling":
            chosen = [(tables, each) for tables, each in chosen if not isinstance(tables[name], torch.Tensor)]
        journal.set_items([tables for tables, _ in chosen], name, [getattr(each, field) for _, each in chosen])


def set_trained(tensors: Iterable[SlotTensor], on: bool, journal: Journal) -> None:
    """Lets the tensors of one layer be trained only where it is on, and as its A and B are.

    These two need nothing: while both are zero, neither has a gradient. A magnitude or a bias has.
    """
    tensors = list(tensors)
    trained = on and any(each.parameter.requires_grad for each in tensors if each.rank_axis is not None)
    for parameter in (each.parameter for each in tensors if each.rank_axis is None):
        if parameter.requires_grad != trained:
            journal.set_attribute(parameter, "requires_grad", trained)


def set_padded(layer: Any, adapter_name: str, journal: Journal) -> None:
    """Notes that the adapter's own rank is ``layer.r[adapter_name]``, whatever the size of its tensors."""
    _mark(layer, PADDED_ATTRIBUTE, adapter_name, True, journal)


def is_padded(layer: Any, adapter_name: str) -> bool:
    """Whether the adapter's tensors on this layer may be larger than its own rank."""
    return adapter_name in layer.__dict__.get(PADDED_ATTRIBUTE, ())


def own_rank(layer: Any, adapter_name: str, tensor: SlotTensor) -> int | None:
    """The rank of the adapter on this layer, which is that of its tensors unless these are padded."""
    capacity = tensor.capacity
    if capacity is not None and adapter_name in layer.__dict__.get(PADDED_ATTRIBUTE, ()):
        return min(layer.r[adapter_name], capacity)
    return capacity


def rank_before(layer: Any, adapter_name: str, tensor: SlotTensor) -> int | None:
    """:func:`own_rank`; None where the adapter is turned off."""
    is_off = adapter_name in layer.__dict__.get(OFF_ATTRIBUTE, ())
    return None if is_off else own_rank(layer, adapter_name, tensor)


def own_tensor(layer: Any, adapter_name: str, tensor: SlotTensor) -> torch.Tensor:
    """The adapter's tensor as a fresh load would have it; shares memory with the parameter where that is possible."""
    parameter = tensor.parameter
    rank = own_rank(layer, adapter_name, tensor)
    return parameter if rank == tensor.capacity else tensor.trimmed(parameter, rank)


def _mark(layer: Any, attribute: str, adapter_name: str, value: bool, journal: Journal) -> None:
    before = layer.__dict__.get(attribute, frozenset())
    after = before | {adapter_name} if value else before - {adapter_name}
    if after == before:
        return
    if not {OFF_ATTRIBUTE, PADDED_ATTRIBUTE} & layer.__dict__.keys():
        journal.record(lambda: forget_hooks(layer))
        layer.register_state_dict_post_hook(_show_own)
        layer.register_load_state_dict_pre_hook(_fill_up)
    journal.set_item(layer.__dict__, attribute, after)


def forget_hooks(module: torch.nn.Module) -> None:
    """Takes off a module what this package has put on it; also off a copy, where it would look after the original."""
    for hooks in (module._state_dict_hooks, module._load_state_dict_pre_hooks):
        for number, hook in list(hooks.items()):
            if getattr(hook, "hook", hook) in (_show_own, _fill_up, _check_all):
                del hooks[number]


def check_before_loading(base: torch.nn.Module, journal: Journal) -> None:
    """Lets ``load_state_dict`` look at all layers before the first one is written to."""
    if any(getattr(hook, "hook", hook) is _check_all for hook in base._load_state_dict_pre_hooks.values()):
        return
    journal.record(lambda: forget_hooks(base))
    base.register_load_state_dict_pre_hook(_check_all)


def _check_all(base: torch.nn.Module, state_dict: dict, prefix: str, *_: object) -> None:
    for slot, _ in base.__dict__.get(SLOTS, {}).values():
        if slot.room is not None and slot.is_inference:
            slot.room.was_touched = True  # by values that the room doesn't know of, and no version counter tells
    for path, layer in base.named_modules(remove_duplicate=False):
        if PADDED_ATTRIBUTE in layer.__dict__:
            _check(layer, state_dict, f"{prefix}{path}.")


def _marked(layer: Any) -> Iterator[tuple[str, SlotTensor]]:
    """The tensors of all adapters that may have more room on a layer than they take, or are off there."""
    method = method_of(layer)
    for adapter_name in sorted({*layer.__dict__.get(OFF_ATTRIBUTE, ()), *layer.__dict__.get(PADDED_ATTRIBUTE, ())}):
        if method.has_adapter(layer, adapter_name):
            for tensor in method.tensors_of(layer, adapter_name):
                yield adapter_name, tensor


def _show_own(layer: Any, state_dict: dict, prefix: str, local_metadata: dict) -> None:
    for adapter_name, tensor in _marked(layer):
        key = prefix + tensor.named_key
        if (value := state_dict.get(key)) is None:
            continue
        if reason := strange_padding(layer, adapter_name, tensor):
            warnings.warn(reason, stacklevel=2)
        if is_off(layer, adapter_name):
            del state_dict[key]
            continue
        rank, keep_vars = own_rank(layer, adapter_name, tensor), isinstance(value, torch.nn.Parameter)
        is_trimmed = rank != tensor.capacity
        if is_trimmed:
            value = tensor.trimmed(value, rank)
        if not keep_vars:  # who asks for them wants the memory of the model
            # safetensors takes nothing else; and torch.save writes all memory around a view, contiguous or not
            value = value.clone(memory_format=torch.contiguous_format) if is_trimmed else value.contiguous()
        state_dict[key] = value


def strange_padding(layer: Any, adapter_name: str, tensor: SlotTensor) -> str | None:
    """Says if the padding is not zero, or a layer not quite off: then the live model is not what would be saved."""
    if is_marked_off(layer, adapter_name):
        return _trained_while_off(layer, adapter_name, tensor)
    rank = own_rank(layer, adapter_name, tensor)
    if rank == tensor.capacity or tensor.is_shard:
        return None
    if not tensor.padding(tensor.parameter, rank).any():
        return None
    return (
        f"The adapter {adapter_name!r} has rank {rank}, but the padding of its {tensor.key} is not zero, so what is "
        "saved is not what the model computes. An optimizer that still has the state of an earlier adapter does this: "
        "make a new one after a swap."
    )


def _trained_while_off(layer: Any, adapter_name: str, tensor: SlotTensor) -> str | None:
    """Says if the magnitude or bias of a layer that is off was written to: PEFT's ``set_adapter`` unfreezes them."""
    method = method_of(layer)
    # while an adapter is merged, the base weight is not what the magnitude was made from
    if tensor.rank_axis is not None or method is not lora or tensor.is_shard or layer.merged_adapters:
        return None
    beside = [each for each in method.tensors_of(layer, adapter_name) if each.rank_axis is not None]
    if any(each.memory.any() for each in beside) or _means_off(layer, tensor):
        return None
    return (
        f"The adapter {adapter_name!r} is off on a layer, but its {tensor.key} there was written to, so what is saved "
        "is not what the model computes. PEFT's set_adapter lets it be trained: call that before a swap, not after."
    )


def _means_off(layer: Any, tensor: SlotTensor) -> bool:
    """Whether a magnitude or bias does nothing, up to the rounding of another device or precision."""
    value = tensor.parameter.detach()
    if tensor.off is None:
        return not value.any()
    expected, weight = tensor.off(), layer.get_base_layer().weight
    if expected.is_meta or value.is_meta:
        return True  # nobody can tell
    computed_in = weight.dtype if weight.is_floating_point() else torch.bfloat16
    eps = max(torch.finfo(dtype).eps for dtype in (value.dtype, computed_in))
    return torch.allclose(value, expected, rtol=max(4 * eps, 1e-5), atol=0.0)


def _fill_up(layer: Any, state_dict: dict, prefix: str, *_: object) -> None:
    _check(layer, state_dict, prefix)
    for adapter_name, tensor in _marked(layer):
        key = prefix + tensor.named_key
        if is_off(layer, adapter_name):
            state_dict.setdefault(key, tensor.parameter.detach())
        elif key in state_dict and own_rank(layer, adapter_name, tensor) != tensor.capacity:
            state_dict[key] = tensor.padded(state_dict[key].detach(), tensor.capacity)


def _check(layer: Any, state_dict: dict, prefix: str) -> None:
    for adapter_name, tensor in _marked(layer):
        key = prefix + tensor.named_key
        if (value := state_dict.get(key)) is None or not is_padded(layer, adapter_name):
            continue
        expected = tensor.shape_for(own_rank(layer, adapter_name, tensor))
        if is_marked_off(layer, adapter_name):
            fits, text = not value.any(), "nothing for a layer that is turned off"
        else:
            # a tensor of the padded size would go in, and its upper ranks would never be saved
            fits, text = tuple(value.shape) == expected, f"shape {expected}, the adapter's own rank"
        if not fits:
            shape = tuple(value.shape)
            raise refuse("state_dict_of_another", key=key, shape=shape, expected=text, adapter_name=adapter_name)
