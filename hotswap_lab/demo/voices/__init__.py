"""Voices for SmolLM2-135M-Instruct: small LoRA adapters that change how the model answers, not what it knows.

Each is an ordinary PEFT folder in ``assets/voices`` with a model card. They differ in rank, scaling and target modules,
so swapping them takes more than copying weights.
The base model's weights don't ship with this package: see :mod:`hotswap_lab.demo.smollm2`.

>>> from hotswap_lab.demo import voices
>>> "pirate" in voices.names()
True
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .. import ASSETS_DIR, Tokenizer, folder_in, names_in, smollm2
from .scores import score

__all__ = ["QUESTIONS", "VOICES_DIR", "ask", "ask_all", "load", "names", "path", "score"]

VOICES_DIR = ASSETS_DIR / "voices"
#: held-out questions: none of them shares its topic with a training question
QUESTIONS = (ASSETS_DIR / "held_out_questions.txt").read_text(encoding="utf-8").splitlines()
MAX_NEW_TOKENS = 80
BATCH_SIZE = 12


def names() -> list[str]:
    """The names of the voices, sorted."""
    return names_in(VOICES_DIR)


def path(name: str) -> str:
    """The folder of a voice, to pass to PEFT or :func:`hotswap_lab.hotswap_adapter`.

    Raises
    ------
    ValueError
        If there is no such voice.
    """
    return folder_in(VOICES_DIR, name)


def load(name: str) -> tuple[torch.nn.Module, object]:
    """SmolLM2 wrapped in a ``PeftModel`` with one voice, and its tokenizer.

    Raises
    ------
    ValueError
        If there is no such voice.
    HotswapError
        If the base model is not found.
    """
    from peft import PeftModel

    folder = path(name)
    return PeftModel.from_pretrained(smollm2.load_base(), folder), smollm2.load_tokenizer()


def ask(model: Any, tokenizer: Tokenizer, question: str, max_new_tokens: int = MAX_NEW_TOKENS) -> str:
    """The model's answer to a question, decoded greedily, so that it is the same every time.

    Parameters
    ----------
    question:
        The user's message in the model's chat template.
    max_new_tokens:
        The limit of an answer's length. The voices usually end long before.
    """
    return ask_all(model, tokenizer, [question], max_new_tokens)[0]


@torch.inference_mode()
def ask_all(
    model: Any, tokenizer: Tokenizer, questions: Sequence[str], max_new_tokens: int = MAX_NEW_TOKENS
) -> list[str]:
    """The answers to many questions, in batches. Because of rounding they may differ from those of :func:`ask`."""
    answers = []
    for start in range(0, len(questions), BATCH_SIZE):
        inputs = _prompt(tokenizer, list(questions[start : start + BATCH_SIZE]))
        ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        answers += tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in answers]


def _prompt(tokenizer, questions: list[str]) -> dict[str, torch.Tensor]:
    """Token ids of each question in the chat template, padded on the left, as generation needs it."""
    conversations = [[{"role": "user", "content": question}] for question in questions]
    how = dict(add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True)
    return dict(tokenizer.apply_chat_template(conversations, **how, tokenizer_kwargs={"padding_side": "left"}))
