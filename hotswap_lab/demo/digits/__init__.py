"""A small diffusion model that draws digits, and adapters for it. They ship with the package and run offline.

The model is a ``UNet2DModel`` of diffusers with 0.7 million parameters, trained on scikit-learn's digits. It draws all
ten of them from noise. Each adapter is an ordinary PEFT folder: one digit only, thick strokes, slanted strokes, white
on black. The module needs diffusers; ``classify`` needs scikit-learn as well.

>>> from hotswap_lab.demo import digits
>>> model = digits.load("only_3")
>>> digits.classify(digits.draw(model, count=3)).tolist()
[3, 3, 3]

Tests: ``tests/demo/test_digits.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .. import ASSETS_DIR, folder_in, names_in
from .data import SIZE
from .judge import background as background
from .judge import classify as classify
from .judge import held_out_accuracy as held_out_accuracy
from .judge import ink as ink
from .judge import slant as slant

if TYPE_CHECKING:
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
    from peft import PeftModel

BASE_DIR = ASSETS_DIR / "digits" / "base"
ADAPTERS_DIR = ASSETS_DIR / "digits" / "adapters"
#: the default number of denoising steps
STEPS = 10


def names() -> list[str]:
    """Return the names of the adapters, sorted.

    >>> names()
    ['bold', 'inverted', 'only_0', 'only_3', 'only_7', 'slanted']
    """
    return names_in(ADAPTERS_DIR)


def path(name: str) -> str:
    """Return the folder of an adapter, to pass to PEFT or :func:`hotswap_lab.hotswap_adapter`.

    Raises
    ------
    ValueError
        If the package has no such adapter.
    """
    return folder_in(ADAPTERS_DIR, name)


def load_base() -> UNet2DModel:
    """Load a fresh copy of the model without adapters, in float32 and in eval mode."""
    from diffusers import UNet2DModel

    # the fast way to load needs accelerate, and diffusers warns at each load if it is missing
    return UNet2DModel.from_pretrained(BASE_DIR, subfolder="unet", low_cpu_mem_usage=False).float().eval()


def load_scheduler() -> DDIMScheduler:
    """Load the noise schedule of the training, with the DDIM sampler (J. Song, C. Meng, S. Ermon, arXiv:2010.02502)."""
    from diffusers import DDIMScheduler

    return DDIMScheduler.from_pretrained(BASE_DIR, subfolder="scheduler")


def load(name: str) -> PeftModel:
    """Load the model wrapped in a ``PeftModel`` with one of the adapters."""
    from peft import PeftModel

    return PeftModel.from_pretrained(load_base(), path(name))


def pipeline(model: torch.nn.Module) -> DDIMPipeline:
    """Return a diffusers pipeline around a model from :func:`load` or :func:`load_base`, with the same modules.

    >>> model = load("only_7")
    >>> pipe = pipeline(model)
    >>> pipe.unet is model.get_base_model()
    True
    >>> pipe(num_inference_steps=10, generator=torch.Generator().manual_seed(0)).images[0].size
    (16, 16)
    """
    from diffusers import DDIMPipeline

    pipe = DDIMPipeline(unet=getattr(model, "get_base_model", lambda: model)(), scheduler=load_scheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise(count: int = 1, seed: int = 0) -> torch.Tensor:
    """Return noise to draw pictures from, of shape ``(count, 1, 16, 16)``. The same seed gives the same noise."""
    return torch.randn(count, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(seed), device="cpu")


def inputs(count: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return inputs for one call of a model, for :func:`hotswap_lab.verify_hotswap`: noise, and a middle timestep."""
    return {"sample": noise(count, seed), "timestep": torch.tensor(500, device="cpu")}


@torch.no_grad()
def draw(model: torch.nn.Module, count: int = 8, seed: int = 0, steps: int = STEPS, *, first: int = 0) -> torch.Tensor:
    """Draw the same pictures as :func:`pipeline`. A compiled wrapper works, too, because only ``model(...)`` is called.

    Parameters
    ----------
    model:
        A model from :func:`load` or :func:`load_base`, compiled or not.
    count, seed:
        The number of pictures, and the seed of their noise. With the same noise, the pictures of two adapters can be
        compared one by one.
    steps:
        The number of denoising steps; each calls the model once.
    first:
        The number of the first picture, so that a picture can be drawn without those before it.

    Returns
    -------
    torch.Tensor
        Pictures of shape ``(count, 16, 16)``, from 0 for black to 1 for white.

    Examples
    --------
    >>> images = draw(load("inverted"), count=2, steps=10)
    >>> images.shape, bool(background(images).max() < 0.1)
    (torch.Size([2, 16, 16]), True)
    """
    scheduler = load_scheduler()
    scheduler.set_timesteps(steps)
    picture = noise(first + count, seed)[first:]
    for when in scheduler.timesteps:
        picture = scheduler.step(model(picture, when).sample, when, picture).prev_sample
    return (picture[:, 0] / 2 + 0.5).clamp(0, 1)
