"""A diffusers model: compiled swaps, and diffusers' own ways to change an adapter's strength."""

from __future__ import annotations

import pytest
import test_pipeline
import torch
from diffusers import UNet2DConditionModel
from models import randomize
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict

from hotswap_lab import (
    RecompileWatch,
    get_strength,
    hotswap_adapter_from_state_dict,
    prepare_model_for_compiled_hotswap,
)

pytestmark = pytest.mark.usefixtures("fresh_compiler")
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
CONFIGS = [
    LoraConfig(r=4, lora_alpha=6, target_modules=[*ATTENTION, "conv1"]),
    LoraConfig(r=8, lora_alpha=5, target_modules=ATTENTION, use_rslora=True),
    LoraConfig(r=2, lora_alpha=9, target_modules=["conv1", "conv2"]),
]


def unet(number: int | None = None, adapter_name: str = "default") -> UNet2DConditionModel:
    """A tiny UNet, with the adapter of this number."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = test_pipeline.unet(cross_attention_dim=8).eval()
    if number is not None:
        model.add_adapter(CONFIGS[number], adapter_name)
        randomize(model, adapter_name, seed=number)
    return model


@torch.no_grad()
def call(model, **kwargs) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    sample, states = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 5, 8, generator=generator)
    return model(sample, torch.tensor([3]), encoder_hidden_states=states, **kwargs).sample


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


def prepared() -> UNet2DConditionModel:
    model = unet(0)
    prepare_model_for_compiled_hotswap(model, adapters=CONFIGS)
    return model


def swap(model, number: int) -> None:
    new = get_peft_model_state_dict(unet(number))
    hotswap_adapter_from_state_dict(model, new, "default", CONFIGS[number])


@pytest.mark.long
def test_adapter_weights_and_the_scale_of_a_call():
    model = prepared()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    call(compiled)
    call(compiled, cross_attention_kwargs={"scale": 0.25})
    addresses = [module.scaling["default"].data_ptr() for module in model.modules() if isinstance(module, LoraLayer)]
    with RecompileWatch(allow=0):
        for number in (1, 2, 0):
            swap(compiled, number)
            fresh = unet(number)
            for weight in (0.5, 0.0, 2.0, 1.0):
                model.set_adapters(["default"], [weight])
                fresh.set_adapters(["default"], [weight])
                assert get_strength(model) == weight
                assert_same(call(compiled), call(fresh))
            assert_same(
                call(compiled, cross_attention_kwargs={"scale": 0.25}),
                call(fresh, cross_attention_kwargs={"scale": 0.25}),
            )
            assert get_strength(model) == 1
            assert_same(call(compiled), call(fresh))
    now = [module.scaling["default"].data_ptr() for module in model.modules() if isinstance(module, LoraLayer)]
    assert now == addresses


@pytest.mark.long
def test_the_way_of_enable_lora_hotswap():
    """diffusers prepares with PEFT's function when it loads the first adapter; later ones are swapped by us."""
    from peft.utils.hotswap import prepare_model_for_compiled_hotswap as pefts

    model = unet(0)
    pefts(model, target_rank=8, config=model.peft_config)
    compiled = torch.compile(model, backend="aot_eager")
    call(compiled)
    with RecompileWatch(allow=0):
        swap(compiled, 1)
        assert_same(call(compiled), call(unet(1)))
