"""Trains the model that draws digits, and its adapters, from nothing, with a fixed seed. Needs scikit-learn.

    python -m hotswap_lab.demo.digits.train             # everything
    python -m hotswap_lab.demo.digits.train only_3 bold # only these adapters, on the base model that is there

The results are ordinary folders: ``assets/digits/base`` for ``DDIMPipeline.from_pretrained`` and
``assets/digits/adapters/<name>`` for ``PeftModel.from_pretrained``. Nothing here is needed to use them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from ..train import portable
from . import ADAPTERS_DIR, BASE_DIR, SIZE, load_base
from .data import STYLES, read
from .measure import COUNT, Scores, measure, ranks, targets

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
RESNET = ["conv1", "conv2"]
BATCH_SIZE = 64
BASE_STEPS = 2400


@dataclass(frozen=True)
class Recipe:
    """How one adapter is trained. The recipes differ in everything that a swap has to handle."""

    #: which digits, and in which style
    digits: tuple[int, ...]
    style: str | None
    lora: dict
    #: what it draws, in a sentence
    draws: str
    steps: int = 200
    lr: float = 4e-3
    #: how the weights are stored
    dtype: torch.dtype = torch.float16
    #: what a reader should look at in this adapter
    note: str = field(default="", compare=False)


ALL_DIGITS = tuple(range(10))

RECIPES: dict[str, Recipe] = {
    "only_0": Recipe(
        (0,), None, dict(r=4, lora_alpha=8, target_modules=RESNET), "Draws zeros only.", note="adapts convolutions only"
    ),
    "only_3": Recipe(
        (3,),
        None,
        dict(r=8, lora_alpha=16, target_modules=[*ATTENTION, *RESNET]),
        "Draws threes only.",
        note="adapts attention and convolutions",
    ),
    "only_7": Recipe(
        (7,),
        None,
        dict(r=16, lora_alpha=8, use_rslora=True, target_modules=[*ATTENTION, "time_emb_proj"]),
        "Draws sevens only.",
        dtype=torch.float32,
        note="adapts linear layers only, scaled by alpha / sqrt(rank) (rsLoRA): shares no layer with only_0",
    ),
    "bold": Recipe(
        ALL_DIGITS,
        "bold",
        dict(r=2, lora_alpha=4, target_modules=["conv_in", "conv_out", *RESNET]),
        "Draws all digits with thick strokes.",
        dtype=torch.bfloat16,
        note="adapts convolutions from the first to the last, all with rank 2",
    ),
    "slanted": Recipe(
        ALL_DIGITS,
        "slanted",
        dict(
            r=8,
            lora_alpha=8,
            target_modules=[*ATTENTION, *RESNET, "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"],
            rank_pattern={"conv_shortcut": 4, "conv1": 12},
            alpha_pattern={"conv1": 24},
        ),
        "Draws all digits leaning to the right.",
        steps=300,
        note="ranks and alphas differ by layer, and convolutions of 1 x 1 and with a stride are adapted as well",
    ),
    "inverted": Recipe(
        ALL_DIGITS,
        "inverted",
        dict(r=9, lora_alpha=9, target_modules=["conv_in", "conv_out"], rank_pattern={"conv_out": 1}),
        "Draws all digits white on black.",
        steps=500,
        lr=1e-2,
        note="adapts two layers, the first convolution and the last",
    ),
}


def build_base() -> UNet2DModel:
    """A UNet with 0.7 million parameters and random weights: pictures of 16 x 16, 8 x 8 and, with attention, 4 x 4."""
    return UNet2DModel(
        sample_size=SIZE,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(16, 32, 64),
        norm_num_groups=8,
        attention_head_dim=16,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    )


def build_scheduler() -> DDIMScheduler:
    """How pictures and noise are mixed: after the last of 1,000 steps nothing is left of the picture."""
    return DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", timestep_spacing="trailing")


def fit(model: torch.nn.Module, images: torch.Tensor, *, steps: int, lr: float, seed: int) -> None:
    """Trains whatever of ``model`` requires a gradient, on pictures of shape ``(count, 16, 16)`` in 0 to 1.

    The usual training of a diffusion model: mix a picture with noise, and let the model tell the two apart (as
    "v", a mixture of both; T. Salimans and J. Ho, arXiv:2202.00512, section 4).
    """
    scheduler = build_scheduler()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)
    clean = 2 * images[:, None] - 1
    model.train()
    start = time.perf_counter(), time.process_time()
    for step in range(steps):
        batch = clean[torch.randint(len(clean), (BATCH_SIZE,), generator=generator)]
        noise = torch.randn(batch.shape, generator=generator)
        when = torch.randint(scheduler.config.num_train_timesteps, (BATCH_SIZE,), generator=generator)
        guess = model(scheduler.add_noise(batch, noise, when), when).sample
        loss = F.mse_loss(guess, scheduler.get_velocity(batch, noise, when))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 100 == 0:
            took = f"{time.perf_counter() - start[0]:5.0f} s, {time.process_time() - start[1]:5.0f} s of processor time"
            print(f"  step {step + 1:5d}  loss {loss.item():.4f}  {took}", flush=True)
    model.eval()


def train_base(seed: int, folder: Path = BASE_DIR, steps: int = BASE_STEPS) -> None:
    torch.manual_seed(seed)
    model = build_base()
    print(f"base: {sum(parameter.numel() for parameter in model.parameters()):,} parameters", flush=True)
    images, _ = read("model")
    fit(model, images, steps=steps, lr=2e-3, seed=seed)
    shutil.rmtree(folder, ignore_errors=True)
    DDIMPipeline(unet=model.half(), scheduler=build_scheduler()).save_pretrained(folder)


def pictures(recipe: Recipe) -> torch.Tensor:
    """What an adapter learns from, of shape ``(count, 16, 16)``."""
    images, labels = read("model")
    images = images[torch.isin(labels, torch.tensor(recipe.digits))]
    return STYLES[recipe.style](images) if recipe.style else images


def train_adapter(name: str, seed: int, folder: Path = ADAPTERS_DIR, steps: int | None = None) -> None:
    recipe = RECIPES[name]
    torch.manual_seed(seed)
    model = get_peft_model(load_base(), LoraConfig(**recipe.lora))
    print(f"{name}: {sum(each.numel() for each in model.parameters() if each.requires_grad):,} parameters", flush=True)
    fit(model, pictures(recipe), steps=steps or recipe.steps, lr=recipe.lr, seed=seed)
    save_folder(model, folder / name, recipe)


def save_folder(model: torch.nn.Module, folder: Path, recipe: Recipe) -> None:
    """Writes an ordinary PEFT folder. Its model card comes later, from what was saved."""
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    weights = folder / "adapter_model.safetensors"
    tensors = {key: tensor.to(recipe.dtype) for key, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    config_file = folder / "adapter_config.json"
    config_file.write_text(json.dumps(portable(json.loads(config_file.read_text())), indent=2, sort_keys=True) + "\n")


def write_card(folder: Path, base: Scores, count: int = COUNT) -> None:
    """Measures an adapter beside its base, and writes the model card."""
    name, recipe = folder.name, RECIPES[folder.name]
    what, of_base = base.value(name)
    own = measure(PeftModel.from_pretrained(load_base(), folder), count).value(name)[1]
    config = LoraConfig.from_pretrained(folder)
    print(f"{name}: {what} {own:.3f}, base {of_base:.3f}", flush=True)
    (folder / "README.md").write_text(f"""---
library_name: peft
license: apache-2.0
tags: [lora, diffusers]
---

# {name}

{recipe.draws} {recipe.note[0].upper()}{recipe.note[1:]}.

| on {count} pictures from fresh noise | base | {name} |
| --- | --- | --- |
| {what} | {of_base:.3f} | {own:.3f} |

Rank {ranks(config)}, on {targets(config)}. Made by `python -m hotswap_lab.demo.digits.train {name}`, in
{recipe.steps} steps of {BATCH_SIZE} pictures, for the base model in `hotswap_lab/demo/assets/digits/base`; measured by
`python -m hotswap_lab.demo.digits.measure`, where the classifier is one that was trained on other digits.

The pictures come from two thirds of scikit-learn's `load_digits`: the test part of "Optical Recognition of Handwritten
Digits" by E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, CC BY 4.0. The adapter is licensed under
Apache-2.0.
""")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="adapters to train, or 'base'; default: everything")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    names = options.names or ["base", *RECIPES]
    if "base" in names:
        train_base(options.seed)
    adapters = [name for name in names if name != "base"]
    for name in adapters:
        train_adapter(name, options.seed)
    base = measure(load_base()) if adapters else None
    for name in adapters:
        write_card(ADAPTERS_DIR / name, base)


if __name__ == "__main__":
    main()
