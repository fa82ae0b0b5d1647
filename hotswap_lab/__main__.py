"""Swaps through the embedded adapters in a terminal, and shows that it works and how long it takes.

python -m hotswap_lab
python -m hotswap_lab --word banana --repeats 50

More commands: python -m hotswap_lab.bench (a full measurement), python -m hotswap_lab.serving (OpenAI's API in front).
"""

from __future__ import annotations

import argparse
import sys

import torch

from . import demo
from .bench.compare import compare
from .bench.timing import machine


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m hotswap_lab", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--word", default="hotswap", help="the word that the model is asked, 1 to 10 letters")
    parser.add_argument("--repeats", type=int, default=15, help="swaps per figure")
    parser.add_argument("--threads", type=int, default=1, help="threads that torch may use")
    options = parser.parse_args(arguments)
    if not (options.word.isascii() and options.word.isalpha() and options.word.islower() and len(options.word) <= 10):
        parser.error("--word must be 1 to 10 letters from a to z: the embedded model was trained on no others")
    torch.set_num_threads(options.threads)

    width = max(len(options.word) * 2, 12) + 2
    print(f"One live model, {len(demo.adapter_names())} adapters. Each takes the place of the loaded one.\n")
    print(
        f"{'adapter':11}{'answer':{width}}{'equals a fresh load':22}{'hotswap_lab':14}{'PEFT hotswap':20}"
        "PEFT load+delete"
    )
    print(f"{'(base)':11}{demo.ask(demo.load_base(), demo.load_tokenizer(), options.word):{width}}")
    right, wrong = True, False
    refusals = {}
    for name in demo.adapter_names():
        answer, rows = compare(name, options.word, options.repeats)
        ours, hotswap, load_delete = rows
        equal = ours.state == "right"
        right &= equal
        wrong |= "wrong" in [row.state for row in rows]
        if hotswap.note:
            refusals[name] = hotswap.note
        print(f"{name:11}{answer:{width}}{equal!s:22}{ours!s:14}{hotswap!s:20}{load_delete}", flush=True)
    print("\nTimes: from reverse to this adapter, from disk, median of", options.repeats)
    if wrong:
        print("wrong: no error, but other outputs than a fresh load")
    for name, refusal in refusals.items():
        print(f"PEFT hotswap refuses {name}: {refusal}")
    print(machine())
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
