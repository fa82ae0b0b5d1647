"""Retrains the model that draws digits, and its adapters, with a fixed seed. Needs scikit-learn.

    python -m hotswap_lab.demo.digits.train             # everything
    python -m hotswap_lab.demo.digits.train only_3 bold # only these adapters, on the base model that is there

The weights are saved in ``assets/digits/base`` and ``assets/digits/adapters/<name>``, next to the configs that they are
made from. ``python -m hotswap_lab.demo.digits.measure`` scores them. The model cards are written by hand.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDIMPipeline, UNet2DModel

from .. import training
from ..training import Recipe
from . import ADAPTERS_DIR, BASE_DIR, load_base, load_scheduler
from .data import STYLES, read

BASE = Recipe(2400, lr=2e-3)
RECIPES = {
    "only_0": Recipe(200, dtype=torch.float16),
    "only_3": Recipe(200, dtype=torch.float16),
    "only_7": Recipe(200),
    "bold": Recipe(200, dtype=torch.bfloat16),
    "slanted": Recipe(300, dtype=torch.float16),
    "inverted": Recipe(500, lr=1e-2, dtype=torch.float16),
}
BATCH_SIZE = 64


def build_base() -> UNet2DModel:
    """A UNet with 0.7 million parameters and random weights: pictures of 16 x 16, 8 x 8 and, with attention, 4 x 4."""
    return UNet2DModel.from_config(UNet2DModel.load_config(BASE_DIR, subfolder="unet"))


def losses(model: torch.nn.Module, images: torch.Tensor, seed: int) -> Iterator[torch.Tensor]:
    """Yield losses on batches of pictures of shape ``(count, 16, 16)`` in 0 to 1, without end.

    This is the usual training of a diffusion model: a picture is mixed with noise, and the model predicts "v", a
    mixture of both (T. Salimans and J. Ho, arXiv:2202.00512, section 4).
    """
    scheduler, generator = load_scheduler(), torch.Generator().manual_seed(seed)
    clean = 2 * images[:, None] - 1
    while True:
        batch = clean[torch.randint(len(clean), (BATCH_SIZE,), generator=generator)]
        noise = torch.randn(batch.shape, generator=generator)
        when = torch.randint(scheduler.config.num_train_timesteps, (BATCH_SIZE,), generator=generator)
        guess = model(scheduler.add_noise(batch, noise, when), when).sample
        yield F.mse_loss(guess, scheduler.get_velocity(batch, noise, when))


def pictures(name: str) -> torch.Tensor:
    """The pictures that an adapter is trained on, of shape ``(count, 16, 16)``: one digit, or all in its style."""
    images, labels = read("model")
    if name.startswith("only_"):
        return images[labels == int(name.removeprefix("only_"))]
    return STYLES[name](images)


def train_base(seed: int, folder: Path = BASE_DIR, steps: int = BASE.steps) -> None:
    torch.manual_seed(seed)
    model = build_base()
    training.fit(model, losses(model, read("model")[0], seed), steps=steps, lr=BASE.lr)
    DDIMPipeline(unet=model.half(), scheduler=load_scheduler()).save_pretrained(folder)


def train_adapter(name: str, seed: int, folder: Path | None = None, steps: int | None = None) -> None:
    recipe = RECIPES[name]
    recipe = dataclasses.replace(recipe, steps=steps or recipe.steps)
    images = pictures(name)
    training.train_adapter(
        ADAPTERS_DIR / name, load_base, lambda model: losses(model, images, seed), recipe, seed, folder
    )


def train(name: str, seed: int) -> None:
    """Train ``"base"`` or an adapter."""
    train_base(seed) if name == "base" else train_adapter(name, seed)


if __name__ == "__main__":
    training.main(__doc__, train, ["base", *RECIPES])
