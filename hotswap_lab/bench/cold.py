"""Cold starts: the time from the start of a process to its first and hundredth answer, with a swap before each."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from .. import demo
from ..ahead import aoti_compile, aoti_load
from ..engine import AdapterPool
from ..watch import RecompileWatch
from .report import Start
from .timing import Timing

EAGER = "eager"
EMPTY = "torch.compile, empty cache"
SAVED = "torch.compile, cache from a file"
COPIED = "torch.compile, cache folder copied"
AHEAD = "ahead of time, no compiler"
WAYS = (EAGER, EMPTY, SAVED, COPIED, AHEAD)

#: how many answers a process gives
ANSWERS = 100
#: how far a logit may be from a fresh load's; another adapter changes some of them by more than 1
TOLERANCE = 1e-3
#: files that all processes read: logits of fresh loads, ``torch.compile``'s cache, the model compiled ahead of time
LOGITS, CACHE, PACKAGE = "logits.safetensors", "cache.bin", "demo.pt2"
#: the whole cache folder: the cache file lacks machine code for the CPU, so a compiler runs again after loading it
FOLDER = "cache"
#: the file that a way starts from; the folder is made together with the cache file
FILES = {SAVED: CACHE, COPIED: CACHE, AHEAD: PACKAGE}
#: the code that a process runs; its arguments are those of :func:`main`
CODE = "import sys; from hotswap_lab.bench import cold; cold.main(*sys.argv[1:])"


def measure_starts(rounds: int, say: Callable[[str], object] = lambda text: None) -> list[Start]:
    """Measure cold starts: in each round, start each way once, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        save_logits(folder)
        made: dict[str, dict[str, Any]] = {}
        for file in dict.fromkeys(FILES[way] for way in WAYS if way in FILES):
            say(f"making {file}")
            made[file] = in_process("make", file, folder)
        before = {way: made.get(FILES.get(way, ""), {}) for way in WAYS}
        results: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
        for number, way in itertools.product(range(rounds), WAYS):
            say(f"{way}: start {number + 1} of {rounds}")
            # a way whose file could not be made is refused with that error
            failed = "note" in before[way]
            results[way].append(before[way] if failed else in_process("answer", way, folder))
    return [summarize(way, each, before[way].get("seconds")) for way, each in results.items()]


def summarize(way: str, results: Sequence[Mapping[str, Any]], made: float | None = None) -> Start:
    """Make one line of the table from the results of one way's processes."""
    if notes := [each["note"] for each in results if "note" in each]:
        return Start(way, "refused", note=notes[0])
    state = "right" if all(each["right"] for each in results) else "wrong"
    first, last, importing = (Timing.of(each[key] for each in results) for key in ("first", "last", "importing"))
    return Start(way, state, first, last, importing, max(each["recompiles"] for each in results), made)


def save_logits(folder: str) -> None:
    """Save the logits of a fresh load of each adapter, by PEFT alone."""
    logits = {}
    for name in demo.adapter_names():
        model, tokenizer = demo.load(name)
        with torch.no_grad():
            logits[name] = model(**make_inputs(tokenizer)).logits
    safetensors.torch.save_file(logits, f"{folder}/{LOGITS}")


def make_inputs(tokenizer: demo.Tokenizer) -> dict[str, Any]:
    """The inputs that every answer is computed from."""
    return {**tokenizer("hotswap>", return_tensors="pt"), "use_cache": False}


def in_process(task: str, what: str, folder: str) -> dict[str, Any]:
    """Run :func:`main` in a new process, with an empty folder as the compiler's cache. Returns its result."""
    with tempfile.TemporaryDirectory() as cache:
        threads = str(torch.get_num_threads())
        variables = {**os.environ, "OMP_NUM_THREADS": threads, "TORCHINDUCTOR_CACHE_DIR": cache}
        if (task, what) == ("answer", AHEAD):
            # PyTorch looks for a compiler in these three variables
            variables = {key: value for key, value in variables.items() if key not in ("CC", "CXX")} | {"PATH": ""}
        command = [sys.executable, "-c", CODE, task, what, folder, str(time.time())]
        done = subprocess.run(command, env=variables, capture_output=True, text=True)
    # the result is the last line, since libraries may print, too
    *_, last = done.stdout.splitlines() or [""]
    return json.loads(last) if done.returncode == 0 else {"note": f"the process ended with status {done.returncode}"}


def main(task: str, what: str, folder: str, launched: str) -> None:
    """Make a file, or start in one way and answer. Prints the result as one line of JSON."""
    importing = time.time() - float(launched)
    try:
        result = {"make": make, "answer": answer}[task](what, folder, float(launched))
    except Exception as error:
        # an error is part of the result, so that the other ways are still measured
        result = {"note": (str(error).strip() or type(error).__name__).splitlines()[0]}
    print(json.dumps({**result, "importing": importing}))


def make(file: str, folder: str, launched: float) -> dict[str, Any]:
    """Make the file that a way starts from. Returns the seconds since the launch."""
    pool, inputs = make_pool()
    if file == PACKAGE:
        aoti_compile(pool, f"{folder}/{PACKAGE}", kwargs=inputs, progress=False)
    else:
        with torch.no_grad():
            torch.compile(pool.model)(**inputs)
        saved = torch.compiler.save_cache_artifacts()
        if saved is None:
            raise RuntimeError("torch.compile has cached nothing: its caches are off")
        Path(folder, CACHE).write_bytes(saved[0])
        shutil.copytree(os.environ["TORCHINDUCTOR_CACHE_DIR"], f"{folder}/{FOLDER}")
    return {"seconds": time.time() - launched}


def make_pool() -> tuple[AdapterPool, dict[str, Any]]:
    """A pool of the embedded adapters, and the inputs."""
    names = demo.adapter_names()
    # the last one, so that the first swap changes the adapter
    model, tokenizer = demo.load(names[-1])
    pool = AdapterPool(model, adapters={name: demo.adapter_path(name) for name in names}, progress=False)
    return pool, make_inputs(tokenizer)


def answer(way: str, folder: str, launched: float) -> dict[str, Any]:
    """Answer a hundred times. Returns the seconds to the first and last answer, and whether all were right."""
    pool, inputs = make_pool()
    if way == SAVED:
        torch.compiler.load_cache_artifacts(Path(folder, CACHE).read_bytes())
    if way == COPIED:
        shutil.copytree(f"{folder}/{FOLDER}", os.environ["TORCHINDUCTOR_CACHE_DIR"], dirs_exist_ok=True)
    if way == AHEAD:
        model = aoti_load(f"{folder}/{PACKAGE}", pool)
    else:
        model = pool.model if way == EAGER else torch.compile(pool.model)
    expected = safetensors.torch.load_file(f"{folder}/{LOGITS}")
    names, seconds, right = demo.adapter_names(), [], []
    with RecompileWatch() as watch, torch.no_grad():
        for number in range(ANSWERS):
            name = names[number % len(names)]
            pool.swap(name)
            logits = model(**inputs).logits
            right.append(torch.allclose(logits, expected[name], rtol=0, atol=TOLERANCE))
            seconds.append(time.time() - launched)
    return dict(first=seconds[0], last=seconds[-1], right=all(right), recompiles=watch.recompiles)
