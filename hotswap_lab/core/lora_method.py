"""Plain LoRA as a method: its tensors on a layer, and the configs and layers that need more than it knows.

What it refuses, ``hotswap_lab.beyond`` takes up.

Tests: ``tests/core/test_lora_alone.py``.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from peft import PeftType
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper

from . import settings
from .errors import Refusal, refusal
from .host import Config, TunerLayer
from .lora import HEADS
from .method import Method
from .state_dict_hooks import look_after
from .tensors import ROOM_ATTRIBUTE, SlotTensor


class Lora(Method):
    """LoRA on plain layers."""

    is_lora: ClassVar[bool] = True
    #: variants of a layer whose tensors are all known here
    variants: ClassVar[tuple[type, ...]] = (type(None),)
    follow: ClassVar[Callable[..., Any]] = staticmethod(look_after)

    def takes(self, config: Config) -> bool:
        return config.peft_type == PeftType.LORA

    def tensors_of(self, layer: torch.nn.Module, adapter_name: str) -> list[SlotTensor] | None:
        """The tensors of one adapter on one layer, A before B.

        Shapes, with rank r: Linear and GPT-2's Conv1D ``(r, in)`` and ``(out, r)``; Embedding ``(r, vocabulary)``
        and ``(dimension, r)``; convolutions ``(r, in, *kernel)`` and ``(out, r / groups, 1, ...)``.
        """
        if not isinstance(layer, LoraLayer):
            return None
        # attribute access on a module is slow
        tables: dict[str, Any] = layer._modules
        tensors: list[SlotTensor] = []
        if adapter_name in tables["lora_embedding_A"]:
            for axis, table in enumerate(("lora_embedding_A", "lora_embedding_B")):
                tensors.append(SlotTensor(table, f"{table}.{adapter_name}", tables[table], adapter_name, axis))
        elif adapter_name not in tables["lora_A"]:
            return None
        for axis, table in enumerate(("lora_A", "lora_B")) if adapter_name in tables["lora_A"] else ():
            owner = tables[table][adapter_name]
            size = f"{'in' if axis else 'out'}_{'channels' if 'kernel_size' in owner.__dict__ else 'features'}"
            for name, parameter in owner._parameters.items():
                if parameter is not None:
                    key, named_key, is_weight = f"{table}.{name}", f"{table}.{adapter_name}.{name}", name == "weight"
                    along, repeated = (axis, size) if is_weight else (None, None)
                    tensors.append(SlotTensor(key, named_key, owner, name, along, repeated))
        return tensors

    def judge(self, config: Config, role: str, loaded: Config = None) -> Iterator[Refusal]:
        damaged = [] if role == "loaded" else settings.damages(config)
        yield from damaged
        if not damaged and (strange := self.unknown(config)):
            yield refusal("more_than_core", role=role, fields=", ".join(strange))

    def unknown(self, config: Config) -> Sequence[str]:
        # a PeftModel for such a task has a head of its own, which is saved with the adapter
        return [*settings.unusual(config), *(["task_type"] if config.task_type in HEADS else [])]

    def is_special(self, layer: TunerLayer, adapter_name: str) -> bool:
        """Whether a layer of LoRA has state that this method doesn't handle."""
        is_known = isinstance(layer.lora_variant.get(adapter_name), self.variants)
        is_known = is_known or adapter_name in layer.__dict__.get(ROOM_ATTRIBUTE, ())
        return isinstance(layer, (MultiheadAttention, ParamWrapper)) or not is_known

    def obstacle(self, layer: TunerLayer, adapter_name: str, tensors: Sequence[SlotTensor]) -> str | None:
        if self.is_special(layer, adapter_name):
            return f"a {type(layer.lora_variant.get(adapter_name, layer)).__name__}"
        if not tensors:
            return "a lora_A and a lora_B that aren't parameters, as FullyShardedDataParallel (FSDP1) leaves them"
        return next(filter(None, map(_obstacle_at, tensors)), None)


def _obstacle_at(tensor: SlotTensor) -> str | None:
    """The reason why a tensor can't be written to, or None."""
    parameter = tensor.owner._parameters.get(tensor.name)
    if parameter is None:
        return f"a parametrized or replaced {tensor.named_key}"
    if parameter.is_meta:
        if hasattr(tensor.owner, "_hf_hook"):
            # the weight is in the hook's own store; a write to it there would not be noticed
            next_step = "swap after accelerate.hooks.remove_hook_from_submodules(model), then offload the model again"
            return f"a {tensor.named_key} that accelerate keeps elsewhere between calls: {next_step}"
        return f"a {tensor.named_key} without data (on the meta device)"
    if reason := tensor.obstacle():
        return f"a {tensor.named_key} {reason}"
    if type(parameter) is not torch.nn.Parameter and not tensor.is_shard:
        return f"a {tensor.named_key} of type {type(parameter).__name__}"
    axes = zip(tensor.memory.shape, tensor.memory.stride(), strict=True)
    if not parameter.is_contiguous() and any(size > 1 and stride == 0 for size, stride in axes):
        return f"an expanded {tensor.named_key}, whose values share memory"
    if not (parameter.is_floating_point() or parameter.is_complex()):
        return f"a {tensor.named_key} of {parameter.dtype}, which would round all values"
    return None
