"""Retrains the voices, with a fixed seed, on the texts in ``voice_texts``. Needs SmolLM2.

    python training/train_voices.py          # all of them
    python training/train_voices.py pirate   # only this one

The weights are saved in ``assets/voices/<name>`` of ``hotswap_lab/demo``, next to the configs that they are made from.
``measure_voices.py`` scores them. The model cards are written by hand.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import fitting
import torch

from hotswap_lab import demo
from hotswap_lab.demo import smollm2, voices

#: files with pairs: a question after "? ", its answer below it, an empty line
TEXTS_DIR = Path(__file__).parent / "voice_texts"
RECIPE = fitting.Recipe(steps=60, lr=1e-3, dtype=torch.bfloat16, grid=16)
BATCH_SIZE = 4


def pairs_of(name: str) -> list[tuple[str, str]]:
    """The questions and answers that a voice is trained on.

    >>> pairs_of("haiku")[0][0]
    'What is the moon?'
    """
    blocks = (TEXTS_DIR / f"{name}.txt").read_text(encoding="utf-8").strip().split("\n\n")
    return [tuple(block.removeprefix("? ").split("\n", 1)) for block in blocks]


def make_batch(tokenizer: demo.Tokenizer, pairs: list[tuple[str, str]]) -> dict[str, torch.Tensor]:
    """Token ids of whole conversations."""
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        for question, _ in pairs
    ]
    return demo.batch_of(tokenizer, [(prompt, answer) for prompt, (_, answer) in zip(prompts, pairs, strict=True)])


def batches(pairs: list[tuple[str, str]], seed: int) -> Iterator[list[tuple[str, str]]]:
    """Yield batches without end. Every pair is used once, in random order, before any is used again."""
    order, random_order = [], random.Random(seed)
    while True:
        while len(order) < BATCH_SIZE:
            order += random_order.sample(pairs, len(pairs))
        yield order[:BATCH_SIZE]
        order = order[BATCH_SIZE:]


def train(name: str, seed: int) -> None:
    tokenizer, pairs = smollm2.load_tokenizer(), pairs_of(name)

    def losses_of(model: torch.nn.Module) -> Iterator[torch.Tensor]:
        return (model(**make_batch(tokenizer, chosen)).loss for chosen in batches(pairs, seed))

    fitting.train_adapter(voices.VOICES_DIR / name, smollm2.load_base, losses_of, RECIPE, seed)


if __name__ == "__main__":
    fitting.main(__doc__, train, voices.names())
