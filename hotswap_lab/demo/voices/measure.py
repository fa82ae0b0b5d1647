"""Prints how each voice does on the questions that it was not trained on, beside the base model.

python -m hotswap_lab.demo.voices.measure                # all of them
python -m hotswap_lab.demo.voices.measure haiku --show 3 # one, with three of its answers as they are
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ... import hotswap_adapter
from .. import smollm2
from . import QUESTIONS, ask_all, load, names, path, score


def measure(chosen: list[str], *, questions=QUESTIONS) -> dict[str, dict]:
    """The scores and answers of some voices and of the base model.

    One model is loaded, and every voice is swapped into it.

    Returns
    -------
    dict
        For each voice ``score`` and ``base_score`` (0 to 1), ``answers`` and ``base_answers``.
    """
    model, tokenizer = load(chosen[0])
    with model.disable_adapter():
        base_answers = ask_all(model, tokenizer, questions)
    results = {}
    for name in chosen:
        hotswap_adapter(model, path(name), adapter_name="default", add_layers=True)
        answers = ask_all(model, tokenizer, questions)
        results[name] = {
            "score": score(name, answers),
            "base_score": score(name, base_answers),
            "answers": answers,
            "base_answers": base_answers,
        }
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"default: all of {', '.join(names())}")
    parser.add_argument("--show", type=int, default=0, help="how many answers to print for each")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{len(QUESTIONS)} held-out questions; base model from {smollm2.find()}")
    print(f"{'voice':12}{'score':>8}{'base':>8}{'MB':>8}")
    for name, result in measure(arguments.names or names()).items():
        size = sum(file.stat().st_size for file in Path(path(name)).iterdir()) / 1e6
        print(f"{name:12}{result['score']:8.1%}{result['base_score']:8.1%}{size:8.2f}", flush=True)
        for question, answer in list(zip(QUESTIONS, result["answers"], strict=True))[: arguments.show]:
            print(f"\n{question}\n{answer}\n")


if __name__ == "__main__":
    main()
