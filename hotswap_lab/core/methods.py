"""What differs from one PEFT method to the next.

``lora.py`` knows LoRA by heart: its tensors are written where they lie, and padded, packed and compiled. What of LoRA
is beyond that, its ``needs_donor``, ``is_special`` and ``form_of`` say. ``general.py`` stands for all other methods,
with the few functions that any method needs: ``layer_class``, ``malformed``, ``unsupported``, ``unsupported_layer``,
``has_adapter`` and ``tensors_of``.
"""

from __future__ import annotations

from types import ModuleType

import torch
from peft import PeftType
from peft.tuners.adalora import AdaLoraLayer

from ..beyond import general
from . import lora

METHODS: dict[PeftType, ModuleType] = {PeftType.LORA: lora}


def method_for(peft_type: PeftType) -> ModuleType:
    """The method of adapters of this type."""
    return METHODS.get(peft_type, general)


def method_of(layer: torch.nn.Module) -> ModuleType:
    """The method that a tuner layer belongs to."""
    if isinstance(layer, AdaLoraLayer):
        return general  # LoRA by its class, but with other tensors
    return next((method for method in METHODS.values() if isinstance(layer, method.layer_class)), general)
