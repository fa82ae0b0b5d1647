"""Retrains the embedded base model and its adapters, with a fixed seed.

    python training/train_words.py            # everything (about 25 minutes on two CPU cores)
    python training/train_words.py sort shout # only these adapters, on the present base model

The weights are saved in ``assets/base`` and ``assets/adapters/<name>`` of ``hotswap_lab/demo``, next to the configs
that they are made from. Each score is printed. The model cards are written by hand.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import fitting
import torch
from fitting import Recipe
from transformers import LlamaConfig, LlamaForCausalLM

from hotswap_lab import demo
from hotswap_lab.demo import ADAPTERS_DIR, BASE_DIR, TASKS, Tokenizer, load_base, load_tokenizer, sample_words
from hotswap_lab.demo.tasks import SEPARATOR

rounded: functools.partial[Recipe] = functools.partial(Recipe, grid=128)
BASE = rounded(1800, lr=2e-3)
RECIPES = {
    "reverse": rounded(700),
    "vowels_up": rounded(700),
    "pig_latin": rounded(900, lr=3e-3),
    "caesar": rounded(900),
    "sort": rounded(1100),
    "shout": rounded(900),
    "double": rounded(900),
    "no_vowels": rounded(900, dtype=torch.bfloat16),
}
BATCH_SIZE = 64
#: every character that the tokenizer knows: printable ASCII
ALPHABET = "".join(chr(code) for code in range(32, 127))


def losses(
    model: torch.nn.Module, tokenizer: Tokenizer, words: list[str], task: Callable[[str], str]
) -> Iterator[torch.Tensor]:
    """Yield the loss of each batch of words."""
    for start in range(0, len(words), BATCH_SIZE):
        yield model(**demo.make_batch(tokenizer, words[start : start + BATCH_SIZE], task)).loss


def train_base(seed: int) -> torch.nn.Module:
    """Train a Llama with about a million parameters to copy words. Every second word has any characters."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(BASE_DIR))
    count = BASE.steps * BATCH_SIZE
    words = sample_words(count, seed, held_out=False)
    everything = ALPHABET.replace(SEPARATOR, "")
    words[1::2] = sample_words(count // 2, seed + 1, held_out=False, alphabet=everything)
    fitting.fit(model, losses(model, load_tokenizer(), words, TASKS["copy"]), steps=BASE.steps, lr=BASE.lr)
    for weight in model.parameters():
        weight.data = fitting.coarse(weight.data, BASE.grid)
    model.save_pretrained(BASE_DIR)
    return model


def train_adapter(name: str, seed: int) -> torch.nn.Module:
    recipe = RECIPES[name]
    words = sample_words(recipe.steps * BATCH_SIZE, seed, held_out=False)
    tokenizer = load_tokenizer()
    return fitting.train_adapter(
        ADAPTERS_DIR / name, load_base, lambda model: losses(model, tokenizer, words, TASKS[name]), recipe, seed
    )


def exact_match(model: torch.nn.Module, task: str) -> float:
    """The share of 500 held-out words that the model answers exactly as ``task`` does (0 to 1)."""
    words = sample_words(500, 1234, held_out=True)
    answers = demo.ask_all(model, load_tokenizer(), words)
    return sum(answer == TASKS[task](word) for word, answer in zip(words, answers, strict=True)) / len(words)


def train(name: str, seed: int) -> None:
    """Train ``"base"`` or an adapter, and print its score."""
    model = train_base(seed) if name == "base" else train_adapter(name, seed)
    score = exact_match(model, "copy" if name == "base" else name)
    print(f"{name}: exact match on held-out words {score:.1%}", flush=True)


if __name__ == "__main__":
    fitting.main(__doc__, train, ["base", *RECIPES])
