"""Retrains the model that draws digits, and its adapters, with a fixed seed. Needs scikit-learn.

    python training/train_digits.py             # everything
    python training/train_digits.py only_3 bold # only these adapters, on the present base model

The weights are saved in ``assets/digits`` of ``hotswap_lab/demo``, next to the configs that they are made from.
``measure_digits.py`` scores them. The model cards are written by hand.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import fitting
import torch
import torch.nn.functional as F
from diffusers import DDIMPipeline, UNet2DModel
from fitting import Recipe

from hotswap_lab.demo.digits import ADAPTERS_DIR, BASE_DIR, load_base, load_scheduler
from hotswap_lab.demo.digits.data import read, slanted

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


def bold(images: torch.Tensor) -> torch.Tensor:
    """Make strokes thicker: the mean of the picture and of one drawn with a brush of 3 x 3 pixels.

    >>> dot = torch.ones(1, 16, 16)
    >>> dot[0, 8, 8] = 0
    >>> (1 - bold(dot)).sum().item()  # a pixel of ink, and its eight neighbors in gray
    5.0
    """
    ink = 1 - images
    return 1 - (ink + F.max_pool2d(ink[:, None], 3, stride=1, padding=1)[:, 0]) / 2


def inverted(images: torch.Tensor) -> torch.Tensor:
    """Exchange ink and paper.

    >>> inverted(torch.zeros(1, 16, 16)).min().item()
    1.0
    """
    return 1 - images


#: the styles that adapters are trained on
STYLES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"bold": bold, "slanted": slanted, "inverted": inverted}


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
    fitting.fit(model, losses(model, read("model")[0], seed), steps=steps, lr=BASE.lr)
    DDIMPipeline(unet=model.half(), scheduler=load_scheduler()).save_pretrained(folder)


def train_adapter(name: str, seed: int, folder: Path | None = None, steps: int | None = None) -> None:
    recipe = RECIPES[name]
    recipe = dataclasses.replace(recipe, steps=steps or recipe.steps)
    images = pictures(name)
    fitting.train_adapter(
        ADAPTERS_DIR / name, load_base, lambda model: losses(model, images, seed), recipe, seed, folder
    )


def train(name: str, seed: int) -> None:
    """Train ``"base"`` or an adapter."""
    train_base(seed) if name == "base" else train_adapter(name, seed)


if __name__ == "__main__":
    fitting.main(__doc__, train, ["base", *RECIPES])
