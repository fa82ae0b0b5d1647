"""What differs from one PEFT method to the next: one module each, all with the same functions.

``layer_class``, ``malformed``, ``unsupported``, ``unsupported_layer``, ``has_adapter``, ``tensors_of``, ``rank_step``,
``settings_for``, ``targets``, ``resolved_config``, ``scalars``, ``SCALAR_TABLES`` and ``dropout_for``:
``lora.py`` says what each of them means.
"""

from __future__ import annotations

from types import ModuleType

from peft import PeftType

from . import lora

METHODS: dict[PeftType, ModuleType] = {PeftType.LORA: lora}
