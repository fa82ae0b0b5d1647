"""The models that are measured: real shapes, random weights."""

from __future__ import annotations

import torch

from .. import demo
from .settings import Settings


def make_base(settings: Settings) -> torch.nn.Module:
    """A base model of that shape with random weights, the same every time.

    >>> base = make_base(Settings(model="tiny", layers=3))
    >>> len(base.model.layers), base.config.hidden_size
    (3, 32)
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    if settings.model == "demo":
        config = LlamaConfig.from_pretrained(demo.BASE_DIR)
    else:
        hidden, intermediate, layers, heads, kv_heads = {
            "smollm2": (576, 1536, 30, 9, 3),
            "tiny": (32, 64, 2, 4, 2),
        }[settings.model]
        config = LlamaConfig(
            vocab_size=1000,  # plays no part in a swap
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
        )
    config.num_hidden_layers = settings.layers or config.num_hidden_layers
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval().to(settings.device, getattr(torch, settings.dtype))


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Random values for A and B alike: PEFT starts with B = 0, and then no output would show a wrong swap."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                values = torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5
                parameter.copy_(values)
