"""Measures what the model and its adapters draw, on fresh noise, with a classifier that knows neither.

python -m hotswap_lab.demo.digits.measure             # a table of all of them
python -m hotswap_lab.demo.digits.measure --count 100 # faster, coarser
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig

from . import ADAPTERS_DIR, STEPS, background, classify, draw, ink, load, load_base, names, slant
from .judge import held_out_accuracy

#: how many pictures a score is measured on, and the seed of their noise, which training doesn't use
COUNT, SEED = 300, 1234


@dataclass(frozen=True)
class Scores:
    """What is on a number of pictures.

    Parameters
    ----------
    shares:
        The share of each digit from 0 to 9, as the classifier reads them.
    ink, slant, background:
        The means of the three statistics (:mod:`.judge`): darkness 0 to 1, lean in pixels per row, brightness of the
        edges 0 to 1.
    """

    shares: tuple[float, ...]
    ink: float
    slant: float
    background: float

    @classmethod
    def of(cls, images: torch.Tensor) -> Scores:
        """Looks at pictures of shape ``(count, 16, 16)``.

        >>> from .data import read
        >>> scores = Scores.of(read("model")[0])
        >>> [round(share, 1) for share in scores.shares] == [0.1] * 10, round(scores.ink, 2)
        (True, 0.18)
        """
        counts = torch.bincount(classify(images), minlength=10).double() / len(images)
        means = (float(statistic(images).mean()) for statistic in (ink, slant, background))
        return cls(tuple(counts.tolist()), *means)

    def value(self, name: str) -> tuple[str, float]:
        """What the adapter of that name is judged by: the statistic in words, and its value.

        >>> Scores((0.0,) * 9 + (1.0,), 0.2, 0.1, 0.9).value("only_9")
        ('share of 9s', 1.0)
        """
        if name.startswith("only_"):
            digit = int(name.removeprefix("only_"))
            return f"share of {digit}s", self.shares[digit]
        return {
            "bold": ("mean ink", self.ink),
            "slanted": ("mean slant, pixels per row", self.slant),
            "inverted": ("mean brightness of the background", self.background),
        }[name]


def measure(model: torch.nn.Module, count: int = COUNT, seed: int = SEED, steps: int = STEPS) -> Scores:
    """Draws ``count`` pictures from fresh noise and looks at them."""
    return Scores.of(draw(model, count, seed, steps))


def targets(config: LoraConfig) -> str:
    """The layers that an adapter is on, in words.

    >>> targets(LoraConfig(target_modules=["conv2", "conv1"]))
    'conv1, conv2'
    """
    return ", ".join(sorted(config.target_modules))


def ranks(config: LoraConfig) -> str:
    """The ranks of an adapter's layers, the lowest first.

    >>> ranks(LoraConfig(r=9, rank_pattern={"conv_out": 1}))
    '1, 9'
    """
    return ", ".join(map(str, sorted({config.r, *config.rank_pattern.values()})))


def row(label: str, scores: Scores, about: str) -> str:
    most = max(range(10), key=scores.shares.__getitem__)
    shares = f"{min(scores.shares):5.1%} {scores.shares[most]:6.1%} ({most})"
    return f"{label:10}{shares:18}{scores.ink:7.3f}{scores.slant:8.2f}{scores.background:12.3f}   {about}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    print(f"{options.count} pictures each, from noise that was never trained on, in {STEPS} steps.")
    print(f"The classifier reads {held_out_accuracy():.1%} of the real digits that it was not trained on right.\n")
    print("          rarest and commonest   mean    mean        mean")
    print("          digit                   ink   slant  background   ranks, size and layers")
    print(row("base", measure(load_base(), options.count), "-"))
    for name in names():
        config, folder = LoraConfig.from_pretrained(ADAPTERS_DIR / name), Path(ADAPTERS_DIR, name)
        size = (folder / "adapter_model.safetensors").stat().st_size
        about = f"{ranks(config)}; {size / 1000:.0f} kB; {targets(config)}"
        print(row(name, measure(load(name), options.count), about), flush=True)


if __name__ == "__main__":
    main()
