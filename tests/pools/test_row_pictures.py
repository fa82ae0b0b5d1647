"""Several pictures with another adapter each, in one call of a UNet and of a whole pipeline."""

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

from hotswap_lab import AdapterPool, RecompileWatch

ROWS = 6
WANTED = ["a", "b", "c", None, "b", "a"]


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


def inputs(rows: int) -> tuple:
    generator = torch.Generator().manual_seed(1)
    sample, states = torch.randn(rows, 4, 8, 8, generator=generator), torch.randn(rows, 5, 16, generator=generator)
    return sample, torch.tensor(3), states


@torch.no_grad()
def draw(unet, given: tuple, **options) -> torch.Tensor:
    return unet(*given, **options).sample


def expected(given: tuple, wanted: list[str | None], **options) -> torch.Tensor:
    fresh = {name: draw(with_adapter(SD().unet, name), given, **options) for name in {*wanted}}
    base = draw(SD().unet, given)
    for name in fresh.keys() - {None}:
        assert ((fresh[name] - base).abs().amax((1, 2, 3)) > 0.01 * base.abs().max()).all()
    return torch.stack([fresh[name][number] for number, name in enumerate(wanted)])


@pytest.fixture
def pool():
    return AdapterPool(with_adapter(SD().unet, "a"), adapters=family(), rows=ROWS, progress=False)


def test_six_pictures_in_one_call(pool):
    given = inputs(ROWS)
    pool.assign(WANTED)
    assert_close(draw(pool.model, given), expected(given, WANTED), 1e-4)
    for scale in (0.25, 1.0):
        options = dict(cross_attention_kwargs={"scale": scale})
        assert_close(draw(pool.model, given, **options), expected(given, WANTED, **options), 1e-4)


@pytest.mark.long
def test_compiled(pool, fresh_compiler):
    compiled = torch.compile(pool.model, fullgraph=True)
    given = inputs(6)
    pool.assign(WANTED)
    draw(compiled, given)
    with RecompileWatch(allow=0):
        for wanted in (WANTED, WANTED[::-1], ["c"] * 6):
            pool.assign(wanted)
            assert_close(draw(compiled, given), expected(given, wanted), 1e-4)


def test_a_pipeline_with_guidance():
    """As six calls with one adapter each; the text encoder is left as it is."""
    prompts = ["a cat", "a dog", "a cow", "an owl"]
    wanted = ["a", "b", None, "c"]

    def latents(pipe):
        pipe.set_progress_bar_config(disable=True)
        generators = [torch.Generator().manual_seed(number) for number in range(len(prompts))]
        options = dict(height=64, width=64, num_inference_steps=2, output_type="latent", guidance_scale=4.0)
        return pipe(prompts, generator=generators, **options).images

    fresh = {}
    for name in wanted:
        pipe = SD()
        with_adapter(pipe.unet, name)
        fresh[name] = latents(pipe)
    pipe = SD()
    pool = AdapterPool(with_adapter(pipe.unet, "a"), adapters=family(), rows=4, progress=False)
    pool.assign(wanted)
    actual = latents(pipe)
    assert_close(actual, torch.stack([fresh[name][number] for number, name in enumerate(wanted)]), 1e-4)
    assert all((fresh[name][n] - fresh[None][n]).abs().max() > 0.05 for n, name in enumerate(wanted) if name)
