"""Small models and adapters that ship with the package and run offline.

This module's model is a character-level Llama with a million parameters that copies its input, a word of 1 to 10
letters from a to z. It gets most longer words wrong. Each of its eight adapters is an ordinary PEFT folder that teaches
it a different task (:mod:`hotswap_lab.demo.tasks`). There are two more families: ``demo.digits``, a diffusion model
that draws digits, and ``demo.voices``, adapters for SmolLM2-135M-Instruct, which ``demo.smollm2`` finds.

>>> from hotswap_lab import demo
>>> model, tokenizer = demo.load("reverse")
>>> demo.ask(model, tokenizer, "hotswap")
'pawstoh'
"""

from __future__ import annotations

import functools
import os
import string
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from .. import _raise_missing
from ..core.errors import refused
from .tasks import MAX_WORD_LENGTH, SEPARATOR
from .tasks import TASKS as TASKS
from .tasks import sample_words as sample_words

ASSETS_DIR = Path(__file__).parent / "assets"
BASE_DIR = ASSETS_DIR / "base"
ADAPTERS_DIR = ASSETS_DIR / "adapters"
#: a tokenizer of transformers, which is imported only where it is needed
Tokenizer = Any
#: the label of tokens that the loss leaves out
IGNORED = -100


def __getattr__(name: str) -> NoReturn:
    _raise_missing(__name__, name)


def names_in(directory: Path) -> list[str]:
    """Return the names of the adapters in a directory, sorted."""
    return sorted(file.parent.name for file in directory.glob("*/adapter_config.json"))


def folder_in(directory: Path, name: str) -> str:
    """Return the folder of an adapter in a directory, to pass to PEFT or :func:`hotswap_lab.hotswap_adapter`.

    Raises
    ------
    ValueError
        If the directory has no such adapter.
    """
    if not (directory / name / "adapter_config.json").is_file():
        raise ValueError(f"there is no embedded adapter {name!r}; choose one of {', '.join(names_in(directory))}")
    return str(directory / name)


def adapter_names() -> list[str]:
    """Return the names of the embedded adapters, sorted."""
    return names_in(ADAPTERS_DIR)


def adapter_path(name: str) -> str:
    """Return the folder of an embedded adapter, to pass to PEFT or :func:`hotswap_lab.hotswap_adapter`."""
    return folder_in(ADAPTERS_DIR, name)


def load_tokenizer() -> Tokenizer:
    """Load the character-level tokenizer of the embedded model."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(BASE_DIR)


def load_base() -> torch.nn.Module:
    """Load a fresh copy of the embedded base model (a ``LlamaForCausalLM``), in eval mode."""
    return load_quietly(BASE_DIR, torch.float32)


def load_quietly(folder: str | os.PathLike[str], dtype: torch.dtype) -> torch.nn.Module:
    """Load a language model in eval mode, without a progress bar, which a saved notebook would store."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    bar_was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    finally:
        if bar_was_on:
            logging.enable_progress_bar()


def load(adapter: str) -> tuple[torch.nn.Module, object]:
    """Load the embedded base model wrapped in a ``PeftModel`` with one embedded adapter, and its tokenizer."""
    from peft import PeftModel

    return PeftModel.from_pretrained(load_base(), adapter_path(adapter)), load_tokenizer()


@torch.inference_mode()
def ask_all(model: Callable[..., Any], tokenizer: Tokenizer, words: list[str]) -> list[str]:
    """Return the model's answer to each word, decoded greedily.

    It also works with a compiled wrapper, because it only calls ``model(...)``, never a method of the model's class.
    """
    batch = tokenizer([word + SEPARATOR for word in words], return_tensors="pt", padding=True)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    answers = torch.empty((len(words), 0), dtype=torch.long, device="cpu")
    finished = torch.zeros(len(words), dtype=torch.bool, device="cpu")
    limit = tokenizer.model_max_length - ids.shape[1]
    while not finished.all() and answers.shape[1] < limit:
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, -1]
        token = logits.argmax(-1).masked_fill(finished, tokenizer.pad_token_id)
        finished |= token == tokenizer.eos_token_id
        answers = torch.cat([answers, token[:, None]], dim=1)
        ids = torch.cat([ids, token[:, None]], dim=1)
        mask = torch.cat([mask, torch.ones_like(token)[:, None]], dim=1)
    return tokenizer.batch_decode(answers, skip_special_tokens=True)


def ask(model: Callable[..., Any], tokenizer: Tokenizer, word: str) -> str:
    """Return the model's answer to one word of 1 to 10 letters from a to z. It was only trained on such words.

    Raises
    ------
    HotswapError
        If the word is empty or has other characters. A longer word causes a warning: most answers are wrong.

    Examples
    --------
    >>> from hotswap_lab.demo import ask, load
    >>> model, tokenizer = load("sort")
    >>> ask(model, tokenizer, "notebook")
    'beknooot'
    """
    if not isinstance(word, str) or not word or not set(word) <= set(string.ascii_lowercase):
        raise refused("unknown_word", word=repr(word), longest=MAX_WORD_LENGTH)
    if len(word) > MAX_WORD_LENGTH:
        warnings.warn(f"{word!r}: most words of over {MAX_WORD_LENGTH} letters get wrong answers", stacklevel=2)
    return ask_all(model, tokenizer, [word])[0]


def batch_of(tokenizer: Tokenizer, pairs: Sequence[tuple[list[int], str]]) -> dict[str, torch.Tensor]:
    """Return the arguments of ``model(...)`` for a training step: token ids of prompts and answers, mask and labels.

    Each tensor has the shape ``(pairs, longest length)``. Only the answers and their end tokens count for the loss.
    """
    end = tokenizer.eos_token_id
    rows = [torch.tensor([*prompt, *tokenizer(answer)["input_ids"], end], device="cpu") for prompt, answer in pairs]
    labels = [row.clone() for row in rows]
    for label, (prompt, _) in zip(labels, pairs, strict=True):
        label[: len(prompt)] = IGNORED
    pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    ids, mask = pad(rows, padding_value=tokenizer.pad_token_id), pad([torch.ones_like(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": pad(labels, padding_value=IGNORED)}


def make_batch(tokenizer: Tokenizer, words: Sequence[str], task: Callable[[str], str]) -> dict[str, torch.Tensor]:
    """Return the arguments of ``model(...)`` for a training step on words: token ids of ``word>answer<eos>``.

    Parameters
    ----------
    words:
        Words of 1 to 10 letters; :func:`.tasks.sample_words` draws some.
    task:
        A function from a word to its answer, one of ``TASKS`` or your own.

    Examples
    --------
    >>> from hotswap_lab import demo
    >>> model, tokenizer = demo.load("reverse")
    >>> batch = demo.make_batch(tokenizer, ["abc", "hotswap"], demo.TASKS["reverse"])
    >>> batch["input_ids"].shape, bool(model(**batch).loss < 0.01)
    (torch.Size([2, 16]), True)
    """
    return batch_of(tokenizer, [(tokenizer(word + SEPARATOR)["input_ids"], task(word)) for word in words])
