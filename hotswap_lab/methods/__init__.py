"""What differs from one PEFT method to the next.

``lora.py`` knows LoRA by heart: its tensors are written where they lie, and padded, packed and compiled. Its functions
(``layer_class``, ``malformed``, ``unsupported``, ``unsupported_layer``, ``has_adapter``, ``tensors_of``, ``rank_step``,
``settings_for``, ``targets``, ``fingerprint``, ``resolved_config``, ``scalars``, ``SCALAR_TABLES``, ``write_dropout``,
``changes_constants`` and ``write_prepared``) say there what each of them means. ``general.py`` stands for all others.
"""

from __future__ import annotations

from types import ModuleType

import torch
from peft import PeftType
from peft.tuners.adalora import AdaLoraLayer

from . import general, lora

METHODS: dict[PeftType, ModuleType] = {PeftType.LORA: lora}


def method_for(peft_type: PeftType) -> ModuleType:
    """The method of adapters of this type."""
    return METHODS.get(peft_type, general)


def method_of(layer: torch.nn.Module) -> ModuleType:
    """The method that a tuner layer belongs to."""
    if isinstance(layer, AdaLoraLayer):
        return general  # LoRA by its class, but with other tensors
    return next((method for method in METHODS.values() if isinstance(layer, method.layer_class)), general)
