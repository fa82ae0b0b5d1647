"""Chapters 04 and 08: a model with as many tensors as a real one, and adapters for it.

Tests: ``tests/lessons/test_exercises.py`` and ``tests/lessons/test_lessons.py``.
"""

import copy
import os
from collections.abc import Sequence

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from ..bench import Settings, make_base
from ..swap import resolve_slot, save_adapter


def smol(blocks: int = 30, own: bool = False) -> PeftModel:
    """Return a model with the blocks of SmolLM2-135M, and a LoRA adapter on all of them, in little memory.

    A swap doesn't read the base weights, so they are random, and all blocks share those of the first one. For timing
    calls, which read them, ``own`` gives each block a copy. Every layer has its own adapter of the real size.

    >>> model = smol(blocks=2)
    >>> [tuple(tensor.parameter.shape) for tensor in resolve_slot(model, "default").layers[-1].tensors]
    [(8, 1536), (576, 8)]
    """
    base = make_base(Settings(model="smollm2", layers=1))
    first = base.model.layers[0]
    for number in range(1, blocks):
        shared = {} if own else {id(parameter): parameter for parameter in first.parameters()}
        layer = copy.deepcopy(first, memo=shared)
        layer.self_attn.layer_idx = number
        base.model.layers.append(layer)
    base.config.num_hidden_layers = blocks
    return get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")).eval()


def random_adapters(model: torch.nn.Module, names: Sequence[str], folder: str) -> dict[str, str]:
    """Save adapters with random values and the shapes of the one in ``model``. Return their folders by name.

    The model then has the last adapter.
    """
    folders = {name: os.path.join(folder, name) for name in names}
    for number, path in enumerate(folders.values()):
        generator = torch.Generator().manual_seed(number)
        for tensor in resolve_slot(model, "default").tensors:
            tensor.parameter.data.normal_(std=0.02, generator=generator)
        save_adapter(model, path)
    return folders
