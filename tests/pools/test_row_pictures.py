"""Several pictures with another adapter each, in one call of a whole pipeline. Of a UNet: ``test_row_kinds.py``."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel
from models import randomize
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from row_truth import assert_close
from test_pipeline import SD

from hotswap_lab import AdapterPool

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
CONFIGS = {
    "a": LoraConfig(r=4, lora_alpha=6, target_modules=[*ATTENTION, "conv1", "time_emb_proj"]),
    "b": LoraConfig(r=8, lora_alpha=5, target_modules=ATTENTION, use_rslora=True),
    "c": LoraConfig(r=2, lora_alpha=9, target_modules=["conv1", "conv2", "conv_shortcut"]),
}


def with_adapter(unet: UNet2DConditionModel, name: str | None) -> UNet2DConditionModel:
    if name is not None:
        unet.add_adapter(copy.deepcopy(CONFIGS[name]), "default")
        randomize(unet, "default", seed=sorted(CONFIGS).index(name))
    return unet.requires_grad_(False)


def family() -> dict[str, tuple]:
    unets = {name: with_adapter(SD().unet, name) for name in CONFIGS}
    return {name: (get_peft_model_state_dict(unet), unet.peft_config["default"]) for name, unet in unets.items()}


@pytest.mark.long
def test_a_pipeline_with_guidance():
    """As six calls with one adapter each; the text encoder is left as it is."""
    prompts = ["a cat", "a dog", "a cow", "an owl"]
    wanted = ["a", "b", None, "c"]

    def latents(pipe):
        """In full strength, and less of it."""
        pipe.set_progress_bar_config(disable=True)
        options = dict(height=64, width=64, num_inference_steps=2, output_type="latent", guidance_scale=4.0)
        both = []
        for scale in (1.0, 0.25):
            generators = [torch.Generator().manual_seed(number) for number in range(len(prompts))]
            scaled = dict(cross_attention_kwargs={"scale": scale})
            both.append(pipe(prompts, generator=generators, **options, **scaled).images)
        return torch.stack(both, 1)

    fresh = {}
    for name in wanted:
        pipe = SD()
        with_adapter(pipe.unet, name)
        fresh[name] = latents(pipe)
    pipe = SD()
    pool = AdapterPool(with_adapter(pipe.unet, "a"), adapters=family(), rows=4, progress=False)
    pool.assign(wanted)
    actual = latents(pipe)
    assert_close(actual, torch.stack([fresh[name][number] for number, name in enumerate(wanted)]))
    assert all((fresh[name][n] - fresh[None][n])[0].abs().max() > 0.05 for n, name in enumerate(wanted) if name)
