"""Prints the score of each voice on questions that it was not trained on, next to the base model's.

python training/measure_voices.py                # all of them
python training/measure_voices.py haiku --show 3 # one, with three of its answers as they are
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from voice_scores import score

from hotswap_lab import hotswap_adapter
from hotswap_lab.demo import smollm2
from hotswap_lab.demo.voices import MAX_NEW_TOKENS, QUESTIONS, load, names, path

BATCH_SIZE = 12


@torch.inference_mode()
def ask_all(model: Any, tokenizer: Any, questions: Sequence[str]) -> list[str]:
    """The answers to many questions, in batches. Because of rounding they may differ from those of ``voices.ask``."""
    answers = []
    for start in range(0, len(questions), BATCH_SIZE):
        asked = [[{"role": "user", "content": question}] for question in questions[start : start + BATCH_SIZE]]
        inputs = tokenizer.apply_chat_template(
            asked,
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
            padding=True,
            tokenizer_kwargs={"padding_side": "left"},
        )
        ids = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        answers += tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in answers]


def main(arguments: Sequence[str] | None = None) -> None:
    """Load one model, swap every voice into it, and print the scores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"default: all of {', '.join(names())}")
    parser.add_argument("--show", type=int, default=0, help="how many answers to print for each")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    chosen = options.names or names()
    model, tokenizer = load(chosen[0])
    with model.disable_adapter():
        of_base = ask_all(model, tokenizer, QUESTIONS)
    print(f"{len(QUESTIONS)} held-out questions; base model from {smollm2.find()}")
    print(f"{'voice':12}{'score':>8}{'base':>8}")
    for name in chosen:
        hotswap_adapter(model, path(name), adapter_name="default", add_layers=True)
        answers = ask_all(model, tokenizer, QUESTIONS)
        print(f"{name:12}{score(name, answers):8.1%}{score(name, of_base):8.1%}", flush=True)
        for question, answer in list(zip(QUESTIONS, answers, strict=True))[: options.show]:
            print(f"\n{question}\n{answer}\n")


if __name__ == "__main__":
    main()
