"""Every other PEFT method, by what PEFT itself says of its layers: ``adapter_layer_names`` and ``other_param_names``.

Swaps of these go by a freshly loaded donor (see :mod:`hotswap_lab.grafting`), so that nothing of the methods has to be
known here but where their tensors are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from operator import attrgetter

import torch
from peft import PeftConfig, PeftType
from peft.tuners.tuners_utils import BaseTunerLayer

from ..core.errors import Refusal
from ..core.parts import SlotTensor, slot_tensor
from ..core.words import damaged

layer_class = BaseTunerLayer

#: what can't be swapped, and why
REFUSED = {
    PeftType.XLORA: "X-LoRA, which loads several adapters and routes between them",
}


#: methods whose effect is a sum over rank components, so that zeros beyond an adapter's own rank change nothing
PADDABLE = (PeftType.LOHA, PeftType.LOKR, PeftType.HIRA, PeftType.ADALORA)
#: the axis of the rank components in their tensors
RANK_AXES = {
    **{"hada_w1_a": 1, "hada_w1_b": 0, "hada_w2_a": 1, "hada_w2_b": 0},
    **{"lokr_w1_a": 1, "lokr_w1_b": 0, "lokr_w2_a": 1, "lokr_w2_b": 0},
    **{"hira_A": 0, "hira_B": 1, "hira_embedding_A": 0, "hira_embedding_B": 1},
    **{"lora_A": 0, "lora_E": 0, "lora_B": 1, "lora_embedding_A": 0, "lora_embedding_B": 1},  # AdaLoRA's
}
#: tables of tensors with two axes of rank components (convolutions in Tucker form): these layers keep their rank
TUCKER = ("hada_t1", "lokr_t2")
#: tables of dropouts
DROPOUTS = ("lora_dropout", "hira_dropout")


def malformed(config: PeftConfig) -> Iterator[Refusal]:
    """PEFT judges these configs itself, when it loads the donor; but it multiplies by whatever number is there."""
    for name, value in vars(config).items():
        if isinstance(value, float) and not math.isfinite(value):
            yield damaged(name, value, "a finite number")


def unsupported(config: PeftConfig, role: str) -> Iterator[Refusal]:
    """What in ``config`` can't be swapped; ``role`` says whose config it is ("new" or "loaded")."""
    if reason := REFUSED.get(config.peft_type):
        yield Refusal(
            f"The {role} adapter can't be swapped in place.",
            found=reason,
            expected="an adapter whose state lies in the layers that it is on",
            next_step="load this adapter with PeftModel.from_pretrained on a fresh base model",
        )


def unsupported_layer(layer: BaseTunerLayer, adapter_name: str, tensors: Sequence[SlotTensor]) -> str | None:
    """Why the tensors of this layer can't be swapped, or None."""
    return next(
        (f"a {each.named_key} without data (on the meta device)" for each in tensors if each.parameter.is_meta), None
    )


def has_adapter(layer: BaseTunerLayer, adapter_name: str) -> bool:
    return any(adapter_name in table for _, table in _tables(layer))


def _tables(layer: BaseTunerLayer) -> Iterator[tuple[str, object]]:
    for name in layer.adapter_layer_names:
        table = attrgetter(name)(layer)
        if hasattr(table, "keys"):
            yield name, table


def tensors_of(layer: BaseTunerLayer, adapter_name: str) -> list[SlotTensor]:
    """The parameters of one adapter on one layer, in PEFT's order."""
    tensors = []
    is_tucker = any(adapter_name in getattr(layer, table, ()) for table in TUCKER)
    for table_name, table in _tables(layer):
        if adapter_name not in table:
            continue
        entry = table[adapter_name]
        if isinstance(entry, torch.nn.Module):
            for path, module in entry.named_modules():
                for name, parameter in module._parameters.items():
                    if parameter is not None:
                        inner = f"{path}.{name}" if path else name
                        tensors.append(
                            slot_tensor(
                                f"{table_name}.{inner}", f"{table_name}.{adapter_name}.{inner}", module, name, None
                            )
                        )
        elif isinstance(table, torch.nn.ParameterDict):
            axis = None if is_tucker else RANK_AXES.get(table_name)
            tensors.append(slot_tensor(table_name, f"{table_name}.{adapter_name}", table, adapter_name, axis))
    return tensors
