"""Keeps layers that are turned off out of everything that is saved.

A layer that the new adapter lacks stays in the model, with zeros, so that a later adapter can use it and a
compiled graph stays valid. A fresh load would not have it, so ``state_dict`` (and with it
``save_pretrained``, checkpoints, ``get_peft_model_state_dict``) leaves it out, and ``load_state_dict`` does
not miss it.
"""

from __future__ import annotations

import torch

from .journal import Journal

OFF_ATTRIBUTE = "hotswap_off"


def is_off(layer: torch.nn.Module, adapter_name: str) -> bool:
    """Whether the adapter is turned off on this layer."""
    return adapter_name in layer.__dict__.get(OFF_ATTRIBUTE, ())


def set_off(layer: torch.nn.Module, adapter_name: str, off: bool, journal: Journal) -> None:
    """Notes that the adapter is turned off on this layer, or that it isn't any more."""
    before = layer.__dict__.get(OFF_ATTRIBUTE, frozenset())
    after = before | {adapter_name} if off else before - {adapter_name}
    if after == before:
        return
    if OFF_ATTRIBUTE not in layer.__dict__:
        for handle in (
            layer.register_state_dict_post_hook(_leave_out),
            layer.register_load_state_dict_pre_hook(_fill_in),
        ):
            journal.record(handle.remove)
    journal.set_item(layer.__dict__, OFF_ATTRIBUTE, after)


def _off_keys(layer: torch.nn.Module, prefix: str) -> list[tuple[str, torch.Tensor]]:
    keys = []
    for adapter_name in layer.__dict__.get(OFF_ATTRIBUTE, ()):
        for table_name in layer.adapter_layer_names:
            table = getattr(layer, table_name)
            if adapter_name not in table:
                continue
            entry = table[adapter_name]
            key = f"{prefix}{table_name}.{adapter_name}"
            if isinstance(entry, torch.nn.Module):
                keys += [(f"{key}.{name}", tensor) for name, tensor in entry.state_dict(keep_vars=True).items()]
            else:
                keys.append((key, entry))
    return keys


def _leave_out(layer: torch.nn.Module, state_dict: dict, prefix: str, local_metadata: dict) -> None:
    for key, _ in _off_keys(layer, prefix):
        state_dict.pop(key, None)


def _fill_in(layer: torch.nn.Module, state_dict: dict, prefix: str, *_: object) -> None:
    for key, tensor in _off_keys(layer, prefix):
        state_dict.setdefault(key, tensor.detach())
