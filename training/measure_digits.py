"""Measures the digits that the model and its adapters draw from fresh noise, with an independent classifier.

python training/measure_digits.py             # a table of all of them
python training/measure_digits.py --count 100 # faster, coarser
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hotswap_lab.demo import digits
from hotswap_lab.demo.digits import STEPS, background, classify, draw, ink, load, load_base, slant

#: how many pictures a score is measured on, and the seed of their noise
COUNT, SEED = 300, 1234


@dataclass(frozen=True)
class Scores:
    """Statistics of a number of pictures.

    Parameters
    ----------
    shares:
        The share of each digit from 0 to 9, according to the classifier.
    ink, slant, background:
        The means of the three statistics: darkness 0 to 1, slant in pixels per row, brightness of the edges 0 to 1.
    """

    shares: tuple[float, ...]
    ink: float
    slant: float
    background: float

    def of(self, name: str) -> float:
        """The score of the adapter of that name.

        >>> Scores((0.0,) * 9 + (1.0,), 0.2, 0.1, 0.9).of("only_9")
        1.0
        """
        if name.startswith("only_"):
            return self.shares[int(name.removeprefix("only_"))]
        return {"bold": self.ink, "slanted": self.slant, "inverted": self.background}[name]


def measure(model: torch.nn.Module, count: int = COUNT, seed: int = SEED, steps: int = STEPS) -> Scores:
    """Draw ``count`` pictures from fresh noise and measure them."""
    images = draw(model, count, seed, steps)
    shares = torch.bincount(classify(images), minlength=10).double() / count
    return Scores(tuple(shares.tolist()), *(statistic(images).mean().item() for statistic in (ink, slant, background)))


def row(label: str, scores: Scores) -> str:
    most = max(range(10), key=scores.shares.__getitem__)
    shares = f"{min(scores.shares):5.1%} {scores.shares[most]:6.1%} ({most})"
    return f"{label:10}{shares:18}{scores.ink:7.3f}{scores.slant:8.2f}{scores.background:12.3f}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    print(f"{options.count} pictures each, from noise that was never trained on, in {STEPS} steps.")
    print(
        f"The classifier reads {digits.held_out_accuracy():.1%} of the real digits that it was not trained on right.\n"
    )
    print("          rarest and commonest   mean    mean        mean")
    print("          digit                   ink   slant  background")
    print(row("base", measure(load_base(), options.count)))
    for name in digits.names():
        print(row(name, measure(load(name), options.count)), flush=True)


if __name__ == "__main__":
    main()
