"""What differs from one PEFT method to the next: one module each, all with the same functions.

``layer_class``, ``malformed``, ``unsupported``, ``unsupported_layer``, ``has_adapter``, ``tensors_of``, ``rank_step``,
``settings_for``, ``targets``, ``fingerprint``, ``resolved_config``, ``scalars``, ``SCALAR_TABLES``,
``write_dropout``, ``changes_constants`` and ``write_prepared``: ``lora.py`` says what each of them means.
"""

from __future__ import annotations

from types import ModuleType

import torch
from peft import PeftType

from . import lora

METHODS: dict[PeftType, ModuleType] = {PeftType.LORA: lora}


def method_of(layer: torch.nn.Module) -> ModuleType:
    """The method that a tuner layer belongs to."""
    return next(method for method in METHODS.values() if isinstance(layer, method.layer_class))
