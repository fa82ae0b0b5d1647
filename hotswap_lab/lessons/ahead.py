"""Chapter 10: what of a compiled model is in its code, what is in memory, and which swaps can reach it."""

from __future__ import annotations

import os
import subprocess
import sys

import torch

from .exercise import Exercise

#: what a new process runs
ELSEWHERE = """\
import sys
import warnings

import torch

from hotswap_lab import aoti_load, demo, hotswap_adapter

warnings.simplefilter("ignore")
torch.set_grad_enabled(False)
model, tokenizer = demo.load("reverse")  # not prepared: the file says what it needs
ahead = aoti_load(sys.argv[1], model)
for name in demo.adapter_names():
    hotswap_adapter(model, demo.adapter_path(name), "default")
    text = "hotswap>"
    for _ in range(10):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        letter = ahead(input_ids=ids, use_cache=False).logits[0, -1].argmax()
        if letter == tokenizer.eos_token_id:
            break
        text += tokenizer.decode(letter)
    print(f"{name:10}", text.partition(">")[2])
"""


def elsewhere(path: object) -> None:
    """Runs :data:`ELSEWHERE` in a new process that finds no compiler, since its ``PATH`` is empty."""
    env = {**os.environ, "PATH": "", "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", ELSEWHERE, str(path)], env=env, capture_output=True, text=True)
    print(done.stdout.rstrip() if done.returncode == 0 else done.stderr[-800:])


# --- exercise: does a swap reach it? -----------------------------------------------------------------------------


@Exercise
def unreached(solution):
    """Return the names in `swapped` that code bound to `bound` will not follow, sorted. About 3 lines."""
    a, b, scaling, moved = (torch.zeros(2, 2) for _ in range(4))
    names = {"lora_A": a, "lora_B": b, "scaling": scaling}
    same = {name: each.view(4).view(2, 2) for name, each in names.items()}  # other objects, the same memory
    for what, constants, bound, swapped, expected in (
        ("all in memory, bound", ["scaling", "weight", "lora_B", "lora_A"], {**names, "weight": moved}, same, []),
        ("a scaling in the code", ["lora_A", "lora_B"], {"lora_A": a, "lora_B": b}, same, ["scaling"]),
        ("a tensor that was moved", list(names), names, {**same, "lora_A": moved}, ["lora_A"]),
        ("both", ["lora_A", "lora_B"], {"lora_A": a, "lora_B": b}, {**same, "lora_B": moved}, ["lora_B", "scaling"]),
    ):
        yield what, solution(constants, dict(bound), dict(swapped)), expected
