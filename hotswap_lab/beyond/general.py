"""Every other PEFT method, by what PEFT itself says of its layers: ``adapter_layer_names`` and ``other_param_names``.

Swaps of these go by a freshly loaded donor, so that nothing of the methods has to be known here but where their tensors
are.
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter

import torch
from peft import PeftType
from peft.tuners.tuners_utils import BaseTunerLayer

from ..core.parts import SlotTensor, with_kinds

layer_class = BaseTunerLayer

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


def has_adapter(layer: BaseTunerLayer, adapter_name: str) -> bool:
    return any(True for _ in _tables(layer, adapter_name))


def _tables(layer: BaseTunerLayer, adapter_name: str) -> Iterator[tuple[str, object]]:
    for name in layer.adapter_layer_names:
        table = attrgetter(name)(layer)
        if hasattr(table, "keys") and adapter_name in table:
            yield name, table


def tensors_of(layer: BaseTunerLayer, adapter_name: str) -> list[SlotTensor]:
    """The parameters of one adapter on one layer, in PEFT's order."""
    tensors = []
    is_tucker = any(adapter_name in getattr(layer, table, ()) for table in TUCKER)
    for name, table in _tables(layer, adapter_name):
        named_key = f"{name}.{adapter_name}"
        if isinstance(entry := table[adapter_name], torch.nn.Module):
            for inner, _ in entry.named_parameters():
                path, _, last = inner.rpartition(".")
                owner = entry.get_submodule(path)
                tensors.append(SlotTensor(f"{name}.{inner}", f"{named_key}.{inner}", owner, last))
        elif isinstance(table, torch.nn.ParameterDict):
            axis = None if is_tucker else RANK_AXES.get(name)
            tensors.append(SlotTensor(name, named_key, table, adapter_name, axis))
    return with_kinds(layer, adapter_name, tensors)
