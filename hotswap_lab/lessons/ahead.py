"""Chapter 10: which swaps reach compiled code, and how long a new process takes to its first answer."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from .. import demo
from ..ahead import aoti_compile, aoti_load
from ..pools.adapter_pool import AdapterPool
from .exercise import Exercise

# --- cold starts -----------------------------------------------------------------------------------------------------

EAGER, EMPTY, SAVED = "eager", "torch.compile, empty cache", "torch.compile, cache from a file"
COPIED, AHEAD = "torch.compile, cache folder copied", "ahead of time, no compiler"
#: what the second way leaves for the others, besides its cache folder: the cache as a file, which lacks machine code,
#: so that a compiler runs after loading it; the model compiled ahead of time
CACHE, PACKAGE = "cache.bin", "demo.pt2"
#: the code that a process runs
CODE = "import sys; from hotswap_lab.lessons import ahead; ahead.start(*sys.argv[1:])"


def measure_starts() -> dict[str, dict[str, float]]:
    """Start each way once, in a new process: the seconds from its launch to the end of its imports and first answer.

    The files are in the system's cache by then, so this is a cold start of the process, not of the machine.

    Raises
    ------
    RuntimeError
        If a process fails, or one of its answers is not that of a fresh load.
    """
    starts = {}
    with tempfile.TemporaryDirectory() as folder:
        caches = {way: tempfile.mkdtemp(dir=folder) for way in (EAGER, EMPTY, SAVED, COPIED, AHEAD)}
        for way, cache in caches.items():
            if way == COPIED:
                shutil.copytree(caches[EMPTY], cache, dirs_exist_ok=True)
            variables = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "TORCHINDUCTOR_CACHE_DIR": cache}
            if way == AHEAD:
                variables |= {"PATH": "", "CC": "", "CXX": ""}  # where PyTorch looks for a compiler
            command = [sys.executable, "-c", CODE, way, folder, str(time.time())]
            done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{way}: its process ended with status {done.returncode}: {done.stderr}")
            starts[way] = json.loads(done.stdout.splitlines()[-1])  # libraries may print, too
    return starts


@torch.no_grad()
def start(way: str, folder: str, launched: str) -> None:
    """Answer with each adapter, and compare it with a fresh load. Prints seconds since the launch as JSON."""
    imports, names = time.time() - float(launched), demo.adapter_names()
    model, tokenizer = demo.load(names[-1])  # the last one, so that the first swap changes the adapter
    pool = AdapterPool(model, adapters={name: demo.adapter_path(name) for name in names}, progress=False)
    inputs = {**tokenizer("hotswap>", return_tensors="pt"), "use_cache": False}
    if way == SAVED:
        torch.compiler.load_cache_artifacts(Path(folder, CACHE).read_bytes())
    if way != EAGER:
        model = aoti_load(Path(folder, PACKAGE), pool) if way == AHEAD else torch.compile(model)
    seconds = []
    for name in names:
        pool.swap(name)
        logits = model(**inputs).logits
        seconds.append(time.time() - float(launched))
        # another adapter changes some of the logits by more than 1
        if not torch.allclose(logits, demo.load(name)[0](**inputs).logits, rtol=0, atol=1e-3):
            raise ValueError(f"another answer than a fresh load of {name} gives")
    if way == EMPTY:
        saved = torch.compiler.save_cache_artifacts()  # None where the caches are off
        Path(folder, CACHE).write_bytes(saved[0] if saved else b"")
        aoti_compile(pool, Path(folder, PACKAGE), kwargs=inputs, progress=False)
    print(json.dumps({"imports": imports, "first": seconds[0]}))


# --- exercise --------------------------------------------------------------------------------------------------------


@Exercise
def unreached(solution):
    """Return the names in `swapped` that code bound to `bound` will not follow, sorted. About 3 lines."""
    a, b, scaling, moved = (torch.zeros(2, 2) for _ in range(4))
    names = {"scaling": scaling, "lora_B": b, "lora_A": a}  # not in the order of the answer
    same = {name: each.view(4).view(2, 2) for name, each in names.items()}  # other objects, the same memory
    for what, constants, bound, swapped, expected in (
        ("all in memory, bound", ["scaling", "weight", "lora_B", "lora_A"], {**names, "weight": moved}, same, []),
        ("a scaling in the code", ["lora_A", "lora_B"], {"lora_A": a, "lora_B": b}, same, ["scaling"]),
        ("a tensor that was moved", list(names), names, {**same, "lora_A": moved}, ["lora_A"]),
        ("both", ["lora_A", "lora_B"], {"lora_A": a, "lora_B": b}, {**same, "lora_B": moved}, ["lora_B", "scaling"]),
    ):
        yield what, solution(constants, dict(bound), dict(swapped)), expected
