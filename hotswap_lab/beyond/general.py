"""The tensors of every PEFT method but LoRA, found by the layers' own list of them, ``adapter_layer_names``.

These swaps copy from a freshly loaded adapter, so this module needs to know only where a method keeps its tensors.

Tests: ``tests/beyond/test_every_method.py``.
"""

from collections.abc import Callable
from operator import attrgetter
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from ..core.tensors import SlotTensor
from .lora import Beyond
from .prepare import prepare_in_place
from .shards import spread

#: the axis of the rank components, for methods whose update of a weight is a sum over rank components
RANK_AXES = {
    **{"hada_w1_a": 1, "hada_w1_b": 0, "hada_w2_a": 1, "hada_w2_b": 0},
    **{"lokr_w1_a": 1, "lokr_w1_b": 0, "lokr_w2_a": 1, "lokr_w2_b": 0},
    **{"hira_A": 0, "hira_B": 1, "hira_embedding_A": 0, "hira_embedding_B": 1},
    **{"lora_A": 0, "lora_E": 0, "lora_B": 1, "lora_embedding_A": 0, "lora_embedding_B": 1},  # AdaLoRA's
}
#: tables of tensors with two axes of rank components (convolutions in Tucker form); such layers keep their rank
TUCKER = ("hada_t1", "lokr_t2")


class General(Beyond):
    """All of PEFT's methods but LoRA."""

    def tensors_of(self, layer: torch.nn.Module, adapter_name: str) -> list[SlotTensor] | None:
        """The parameters of one adapter on one layer, in PEFT's order."""
        if not isinstance(layer, BaseTunerLayer):
            return None
        tables = [(name, attrgetter(name)(layer)) for name in layer.adapter_layer_names]
        tables = [(name, table) for name, table in tables if adapter_name in table]
        tensors = []
        is_tucker = any(adapter_name in getattr(layer, table, ()) for table in TUCKER)
        for name, table in tables:
            named_key = f"{name}.{adapter_name}"
            if isinstance(entry := table[adapter_name], torch.nn.Module):
                for inner, _ in entry.named_parameters():
                    path, _, last = inner.rpartition(".")
                    owner = entry.get_submodule(path)
                    tensors.append(SlotTensor(f"{name}.{inner}", f"{named_key}.{inner}", owner, last))
            elif isinstance(table, torch.nn.ParameterDict):
                axis = None if is_tucker else RANK_AXES.get(name)
                tensors.append(SlotTensor(name, named_key, table, adapter_name, axis))
        return spread(tensors) if tables else None

    prepare_in_place: ClassVar[Callable[..., Any]] = staticmethod(prepare_in_place)
