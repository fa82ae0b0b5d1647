"""A process that bad adapters are tried in, so that a crash, a hang or a blow-up is seen and harms nobody else.

Reads one request a line (JSON) and answers with two: what this package did, then what PEFT's own fresh load did.
"""

from __future__ import annotations

import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import contextlib
import json
import resource
import shutil
import signal
import traceback
import warnings
from pathlib import Path

import torch
from models import KINDS, call, load
from mutations import CANARY
from oracle import assert_same, assert_same_tables, assert_same_tensors, assert_untouched, config_of, snapshot
from peft.utils import get_peft_model_state_dict
from peft.utils.save_and_load import load_peft_weights
from seeds import BIN, CONFIG, SEEDS, WEIGHTS

from hotswap_lab import (
    AdapterPool,
    HotswapError,
    commit,
    hotswap_adapter,
    plan_hotswap,
    prepare_model_for_compiled_hotswap,
)

#: seconds of a processor's time for this package, and for PEFT
OURS, PEFTS = 10, 2
#: what the process may take beyond what it has at the start, in bytes
MORE_MEMORY = 2 * 2**30


class Late(BaseException):
    """Nothing may take this for an error that it knows."""


@contextlib.contextmanager
def limited(seconds: float):
    def too_late(*_):
        raise Late

    # of a processor's time, since others may want it, too; whoever waits without using any is ended from outside
    signal.signal(signal.SIGPROF, too_late)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def memory(field: str) -> int:
    """``VmRSS``, ``VmHWM`` (its peak) or ``VmSize``, in bytes."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith(field + ":"))
    return 1024 * int(line.split()[1])


def reset_peak() -> None:
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


class Bench:
    """The models that adapters are swapped into, made when they are needed and made anew when they were changed."""

    def __init__(self, root: Path):
        self.root = root
        self.models: dict = {}

    def get(self, seed: str, way: str) -> dict:
        way = way if way == "pool" else "model"
        if (seed, way) not in self.models:
            model = load(KINDS[SEEDS[seed].kind], str(self.root / seed / "loaded"))
            made = {"model": model}
            if way == "pool":
                made["pool"] = AdapterPool(model, adapters={"good": str(self.root / seed / "new")})
            made["before"] = snapshot(model)
            self.models[seed, way] = made
        return self.models[seed, way]

    def drop(self, seed: str, way: str) -> None:
        self.models.pop((seed, way if way == "pool" else "model"), None)

    def warm_up(self) -> None:
        """So that what is imported at the first use does not count as an adapter's."""
        for seed in SEEDS:
            hotswap_adapter(self.get(seed, "model")["model"], self.root / seed / "new", "default")
            self.drop(seed, "model")


def try_one(bench: Bench, request: dict) -> dict:
    """What this package makes of a folder."""
    seed, way, folder = request["seed"], request["way"], request["folder"]
    here = bench.get(seed, way)
    reset_peak()
    start = memory("VmRSS")
    answer = {"outcome": "accepted"}
    try:
        with limited(OURS):
            swap_in(here, way, folder, request.get("change"))
    except HotswapError as error:
        answer = {"outcome": "refused", "text": str(error), "refusals": len(error.refusals)}
    except Late:
        answer = {"outcome": "hung"}
    except BaseException as error:
        answer = {"outcome": "raised", "text": f"{type(error).__name__}: {str(error)[:300]}"}
        answer["traceback"] = "".join(traceback.format_exception(error)[-12:])[-4000:]
    answer["memory"] = memory("VmHWM") - start
    answer["executed"] = os.path.lexists(os.path.join(folder, CANARY)) or any(CANARY in name for name in sys.modules)
    with contextlib.suppress(OSError):
        shutil.rmtree(os.path.join(folder, CANARY))
    with contextlib.suppress(OSError):
        os.remove(os.path.join(folder, CANARY))
    if answer["outcome"] != "accepted":
        try:
            assert_untouched(here["model"], here["before"])
            if way == "pool":
                assert list(here["pool"]) == ["good"]
        except Exception as error:  # also what a snapshot of a torn model raises
            answer["touched"] = f"{type(error).__name__}: {str(error)[:300]}"
            bench.drop(seed, way)
    return answer


def swap_in(here: dict, way: str, folder: str, change: str | None) -> None:
    model = here["model"]
    if way == "pool":
        here["pool"].add("bad", folder)
        here["pool"].swap("bad")
    elif way == "prepare":
        prepare_model_for_compiled_hotswap(model, adapters=[folder])
    elif way == "plan":
        plan = plan_hotswap(model, folder)
        plan.raise_if_refused()
        change_files(Path(folder), change)
        commit(plan)
    else:
        hotswap_adapter(model, folder, "default")


def change_files(folder: Path, change: str | None) -> None:
    """Somebody writes to an adapter's files between plan and commit."""
    for path in (folder / WEIGHTS, folder / BIN):
        if path.is_file() and change in ("cut", "zeros", "remove"):
            size = path.stat().st_size
            if change == "remove":
                path.unlink()
            else:
                with path.open("r+b") as file:
                    file.truncate(0 if change == "cut" else size // 2)
                    if change == "zeros":
                        file.truncate(size)
    if change == "config":
        (folder / CONFIG).write_text("{}")


def compare(bench: Bench, request: dict, ours: dict) -> dict:
    """What PEFT makes of it, and whether that is what is in the model now."""
    seed, way = request["seed"], request["way"]
    kind, answer = KINDS[SEEDS[seed].kind], {}
    accepted = ours["outcome"] == "accepted"
    if not accepted and not request["by_peft"]:
        return answer
    try:
        files = [path for path in map(Path(request["pristine"]).joinpath, (WEIGHTS, BIN)) if path.exists()]
        if files and not files[0].is_file():
            raise OSError("a pipe or a device, which PEFT would wait for")
        with limited(PEFTS):
            fresh = load(kind, request["pristine"])
            expected = call(fresh, kind.inputs())
        answer["peft"] = "loads"
        if accepted and way != "prepare":
            lacking = set(get_peft_model_state_dict(fresh, save_embedding_layers=False))
            lacking -= set(load_peft_weights(request["pristine"], device="cpu"))
            answer["differs"] = difference(bench.get(seed, way)["model"], fresh, expected, kind, way, bool(lacking))
    except Late:
        answer["peft"] = "hangs"
    except Exception as error:
        answer["peft"] = f"{type(error).__name__}: {str(error)[:100]} {str(error)[-200:]}"
    if accepted and way == "prepare":
        answer["differs"] = changed_outputs(bench, seed)
    if accepted:
        bench.drop(seed, way)
    return answer


def changed_outputs(bench: Bench, seed: str) -> str | None:
    """Preparing a model changes nothing that it computes."""
    kind = KINDS[SEEDS[seed].kind]
    expected = call(load(kind, str(bench.root / seed / "loaded")), kind.inputs())
    got = call(bench.get(seed, "model")["model"], kind.inputs())
    return None if torch.allclose(got, expected, rtol=0, atol=1e-5 * expected.abs().max().item()) else "outputs"


def difference(model, fresh, expected, kind, way: str, is_partial: bool) -> str | None:
    """How the live model differs from a fresh load. NaN equals NaN: whoever loads such numbers gets them.

    Where a file has nothing for a layer (``is_partial``), a fresh load draws tensors that do nothing and a swap turns
    the layer off: there the outputs and the config are all that can be compared.
    """
    try:
        got = call(model, kind.inputs())
        finite = expected[expected.isfinite()]
        scale = finite.abs().max().item() if len(finite) else 1.0
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * scale, equal_nan=True)
        assert_same(*(config_of(each.peft_config["default"]) for each in (model, fresh)))
        if is_partial:
            return None
        assert_same_tables(model, fresh, "default", prepared=way == "pool")
        assert_same_tensors(*(get_peft_model_state_dict(each, save_embedding_layers=False) for each in (model, fresh)))
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:400]}"
    return None


def serve(bench: Bench, answers) -> None:
    print(f"ready {os.getpid()}", file=answers, flush=True)
    size = memory("VmSize") + MORE_MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    for line in sys.stdin:
        request = json.loads(line)
        ours = try_one(bench, request)
        print(json.dumps(ours), file=answers, flush=True)
        print(json.dumps(compare(bench, request, ours)), file=answers, flush=True)


def main(root: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print does not get among the answers
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    bench = Bench(Path(root))
    bench.warm_up()
    # adapters are tried in a copy of this process; when one of them has ended it, the next copy is quickly made
    while True:
        worker = os.fork()
        if not worker:
            with contextlib.suppress(BrokenPipeError):  # nobody listens any more
                serve(bench, answers)
            os._exit(0)
        _, status = os.waitpid(worker, 0)
        if status == 0:
            os._exit(0)  # nothing to clean up, and quicker


if __name__ == "__main__":
    main(sys.argv[1])
