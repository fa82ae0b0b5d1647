"""The training loop for all models and adapters of ``hotswap_lab.demo``.

An adapter's rank, scaling and layers are in its ``adapter_config.json``, as for any other adapter. Training replaces
the weights next to it. The seed is fixed.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file


@dataclass(frozen=True)
class Recipe:
    """The settings of a training that are not in the adapter's config.

    Parameters
    ----------
    steps, lr:
        The number of steps, and the highest learning rate.
    dtype:
        The dtype of the stored weights.
    grid:
        The precision of the stored weights, see :func:`coarse`. 0: they aren't rounded.
    """

    steps: int
    lr: float = 4e-3
    dtype: torch.dtype = torch.float32
    grid: int = 0


def fit(model: torch.nn.Module, losses: Iterable[torch.Tensor], *, steps: int, lr: float) -> None:
    """Train the parameters of ``model`` that require gradients. Each loss is computed after the previous step."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    print(f"{sum(parameter.numel() for parameter in trainable):,} parameters", flush=True)
    model.train()
    start = time.perf_counter()
    for step, loss in zip(range(1, steps + 1), losses, strict=False):
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 20 == 0:
            print(f"  step {step:5d}  loss {loss.item():.4f}  {time.perf_counter() - start:5.0f} s", flush=True)
    model.eval()


def coarse(weight: torch.Tensor, grid: int) -> torch.Tensor:
    """Round a weight to multiples of a power of two, with a root mean square of ``grid`` to twice ``grid``.

    The zeros that this leaves at the end of each number take no space in the compressed wheel.
    """
    size = weight.float().square().mean().sqrt().item()
    if not grid or not size:
        return weight
    step = 2.0 ** math.floor(math.log2(size / grid))
    return (torch.round(weight.float() / step) * step).to(weight.dtype)


def train_adapter(
    source: Path,
    load_base: Callable[[], torch.nn.Module],
    losses_of: Callable[[torch.nn.Module], Iterator[torch.Tensor]],
    recipe: Recipe,
    seed: int,
    folder: Path | None = None,
) -> PeftModel:
    """Train an adapter with the config in ``source``, and save its weights there or in another folder.

    Parameters
    ----------
    load_base:
        Returns the base model. It is called after the seed is set, because it may draw random numbers.
    losses_of:
        Returns an iterator of a model's losses, one for each step, as :func:`fit` takes them.
    """
    print(source.name, flush=True)
    torch.manual_seed(seed)
    base = load_base()
    config = LoraConfig.from_pretrained(source)
    config.inference_mode = False
    model = get_peft_model(base, config)
    fit(model, losses_of(model), steps=recipe.steps, lr=recipe.lr)
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    stored = {key: coarse(tensor.to(recipe.dtype), recipe.grid).contiguous() for key, tensor in tensors.items()}
    save_file(stored, (folder or source) / "adapter_model.safetensors", metadata={"format": "pt"})
    return model


def main(
    description: str, train: Callable[[str, int], None], names: Sequence[str], arguments: Sequence[str] | None = None
) -> None:
    """Run the training command of a family: train the given names, or everything, one after the other."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"default: all of {', '.join(names)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    for name in options.names or names:
        train(name, options.seed)
