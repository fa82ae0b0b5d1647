"""Voices for SmolLM2-135M-Instruct: small LoRA adapters that change the style of the model's answers.

Each voice is an ordinary PEFT folder in ``assets/voices`` with a model card. They differ in rank, scaling and target
modules, so a swap must do more than copy weights. The base model's weights don't ship with this package: see
:mod:`hotswap_lab.demo.smollm2`.

>>> from hotswap_lab.demo import voices
>>> "pirate" in voices.names()
True
"""

from typing import Any, NoReturn

import torch

from .. import _raise_missing
from . import ASSETS_DIR, Tokenizer, folder_in, names_in, smollm2

__all__ = ["QUESTIONS", "VOICES_DIR", "ask", "load", "names", "path"]


def __getattr__(name: str) -> NoReturn:
    _raise_missing(__name__, name)


VOICES_DIR = ASSETS_DIR / "voices"
#: held-out questions: none of them shares its topic with a training question
QUESTIONS = (ASSETS_DIR / "held_out_questions.txt").read_text(encoding="utf-8").splitlines()
MAX_NEW_TOKENS = 80


def names() -> list[str]:
    """Return the names of the voices, sorted."""
    return names_in(VOICES_DIR)


def path(name: str) -> str:
    """Return the folder of a voice, to pass to PEFT or :func:`hotswap_lab.hotswap_adapter`.

    Raises
    ------
    ValueError
        If the package has no such voice.
    """
    return folder_in(VOICES_DIR, name)


def load(name: str) -> tuple[torch.nn.Module, object]:
    """Load SmolLM2 wrapped in a ``PeftModel`` with one voice, and its tokenizer.

    Raises
    ------
    ValueError
        If the package has no such voice.
    HotswapError
        If the base model is not found.
    """
    from peft import PeftModel

    return PeftModel.from_pretrained(smollm2.load_base(), path(name)), smollm2.load_tokenizer()


@torch.inference_mode()
def ask(model: Any, tokenizer: Tokenizer, question: str, max_new_tokens: int = MAX_NEW_TOKENS) -> str:
    """Return the model's answer to a question, decoded greedily, so that it is the same every time.

    Parameters
    ----------
    question:
        The user's message in the model's chat template.
    max_new_tokens:
        The maximum length of an answer. Most answers of the voices are much shorter.
    """
    messages, options = [{"role": "user", "content": question}], dict(return_dict=True, return_tensors="pt")
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, **options)
    answer = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
