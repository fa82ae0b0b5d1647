"""Tries damaged adapters, each in a process of its own, and judges what came of it.

There is a model, and a pool, for each seed. Each trial is a fork: a crash, a hang, a blow-up or something that is
executed is seen, harms nobody else, and the next trial finds good models.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shutil
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
from adapters import CONFIGS, kind_for, save_random_adapter_of
from lora_kinds import FAMILIES
from models import KINDS, Kind, call, load
from mutations import BIN, CANARY, CONFIG, WEIGHTS, Mutation
from oracle import (
    TOLERANCE,
    assert_same,
    assert_same_outputs,
    assert_same_tables,
    assert_same_tensors,
    assert_untouched,
    config_of,
    rounding,
    snapshot,
)
from peft import LoraConfig, PeftConfig
from peft.utils import get_peft_model_state_dict
from peft.utils.save_and_load import load_peft_weights
from safetensors.torch import load_file

from hotswap_lab import (
    AdapterPool,
    HotswapError,
    commit,
    hotswap_adapter,
    plan_hotswap,
    prepare_model_for_compiled_hotswap,
)

#: seconds of a processor's time for this package, and for PEFT; and after how many any process is ended
OURS, PEFTS, PATIENCE = 10, 2, 120
#: what a process may take beyond what it has at the start, in bytes; and what reading an adapter may take beyond a few
#: times the size of its files
MORE_MEMORY, ALLOWANCE = 2 * 2**30, 64 * 2**20
#: the longest text that anybody would read
LONGEST = 4000

#: where PEFT loads a folder and this package refuses it: what the refusal says, and why it is right
STRICTER = {
    "NaN or infinity in": "a model that computes NaN is of no use; allow_nonfinite=True lets it through",
    "unexpected keys found": "a fresh load ignores tensors that it can't place, and so works with half an adapter",
    "The adapter is incomplete": "a fresh load leaves what is missing at random or zero values",
    "no tensors at all": "as above",
    "nothing for any layer of the loaded one": "as above",
    "a floating point tensor under each key": "a fresh load casts whatever numbers there are, and copies meta tensors",
    "two different values for one tensor": "a fresh load takes one of them",
    "does not target .*, but its tensors do": "a fresh load ignores these tensors",
    "in a file of": "a fresh load ignores a tensor that is larger than its file where the config doesn't target it",
    "Incompatible PEFT types found": "an adapter of one method can't take the place of another's",
    "config is damaged at": "a fresh load takes numbers of other types where it happens to need none",
    "an invalid regular expression": "a fresh load does not look at it if there is nothing to match",
    "lists or tables within one another": "a fresh load keeps them, and can't copy or save the config",
    "changes the base model's own weights": "a swap leaves the base model alone",
    "is an Arrow router": "it depends on the model's other adapters",
    "names a model to read": "nothing is read that an adapter names",
    "asks for a module to be imported": "an adapter must not cause other imports",
    "asks for too many tensors": "a fresh load takes the memory, and throws it away",
    "for another task than the model was loaded for": "another class of model would be needed",
    "far too large for the layer": "room for such a rank would take more memory than the model",
    "higher than the model was prepared for": "a prepared model has fixed room",
    "pass add_layers=True": "layers are added only where a swap is asked to add them",
    "can't be done in a prepared model": "a prepared model has fixed room",
}


# ---- the good adapters that are damaged


class Seed(NamedTuple):
    """The adapter that is in the model, and the one to damage."""

    kind: Kind
    loaded: PeftConfig
    new: PeftConfig

    @property
    def ways(self) -> tuple[str, ...]:
        """How it can be swapped in: also into a prepared model, and so into a pool, if it is plain LoRA."""
        is_plain = type(self.new) is LoraConfig and not self.new.use_dora and not self.new.modules_to_save
        return ("hotswap", "plan", *(("pool", "prepare") if is_plain else ()))


LINEAR, FEW = list(KINDS["linear"].modules), ["q_proj", "down_proj"]
PATTERNS = dict(rank_pattern={"blocks.0": 5, "^last": 2}, alpha_pattern={r"blocks\.[01]": 12}, use_rslora=True)
PLAIN = Seed(KINDS["linear"], LoraConfig(r=4, target_modules=LINEAR), LoraConfig(r=6, target_modules=LINEAR))
SEEDS = {
    "linear": PLAIN,
    "bin": PLAIN,
    "patterns": PLAIN._replace(new=LoraConfig(r=3, target_modules=r"first|blocks\.\d|last", **PATTERNS)),
    "llama": Seed(
        KINDS["llama"], *(LoraConfig(r=rank, lora_alpha=5 * rank - 7, target_modules=FEW) for rank in (2, 3))
    ),
    **{name: Seed(KINDS["llama"], *FAMILIES[name][1][:2]) for name in ("DoRA", "modules_to_save")},
    **{name: Seed(kind_for(name), *CONFIGS[name][:2]) for name in ("IA3", "LoHa", "PromptTuning")},
}


def make_seeds(root: Path) -> None:
    """Saves all of them with PEFT alone: ``<root>/<name>/new`` and ``<root>/<name>/loaded``."""
    for name, seed in SEEDS.items():
        for part, number in (("loaded", 1), ("new", 2)):
            folder = save_random_adapter_of(getattr(seed, part), root / name / part, number, seed.kind)
            if name == "bin":
                torch.save(load_file(f"{folder}/{WEIGHTS}"), f"{folder}/{BIN}")
                os.remove(f"{folder}/{WEIGHTS}")


# ---- in the process


class LateError(BaseException):
    """Nothing may take this for an error that it knows."""


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    def too_late(*_: object) -> None:
        raise LateError

    # of a processor's time, because others may want it, too; a process that only waits is ended from outside
    signal.signal(signal.SIGPROF, too_late)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def memory(entry: str) -> int:
    """``VmRSS``, ``VmHWM`` (its peak) or ``VmSize``, in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"^{entry}:\s+(\d+)", status, re.MULTILINE)[1])


def examine(target: torch.nn.Module | AdapterPool, request: dict, root: Path, give: Connection) -> None:
    """Give two answers: what this package did, then what PEFT's own fresh load did."""
    warnings.simplefilter("ignore")
    size = memory("VmSize") + MORE_MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    ours = try_out(target, **request)
    give.send(ours)
    give.send(compare(target, root, ours["outcome"] == "accepted", **request))


def try_out(target: torch.nn.Module | AdapterPool, seed: str, way: str, folder: Path, change: str) -> dict:
    """What this package makes of a folder."""
    model = target.model if way == "pool" else target
    before, answer = snapshot(model), {"outcome": "accepted"}
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak
    start = memory("VmRSS")
    try:
        with limited(OURS):
            swap_in(target, way, folder, change)
    except HotswapError as error:
        answer = {"outcome": "refused", "text": str(error)}
    except LateError:
        answer = {"outcome": "hung"}
    except BaseException as error:
        answer = {"outcome": "raised", "text": "".join(traceback.format_exception(error)[-12:])[-4000:]}
    answer["memory"] = memory("VmHWM") - start
    answer["executed"] = os.path.lexists(folder / CANARY) or any(CANARY in name for name in sys.modules)
    if answer["outcome"] != "accepted":
        try:
            assert_untouched(model, before)
            assert way != "pool" or list(target) == ["good"]
        except Exception as error:  # also what a snapshot of a torn model raises
            answer["touched"] = f"{type(error).__name__}: {str(error)[:300]}"
    return answer


def swap_in(target: torch.nn.Module | AdapterPool, way: str, folder: Path, change: str) -> None:
    if way == "pool":
        target.add("bad", folder)
        target.swap("bad")
    elif way == "prepare":
        prepare_model_for_compiled_hotswap(target, adapters=[folder])
    elif way == "plan":
        plan = plan_hotswap(target, folder)
        plan.raise_if_refused()
        with changed(folder, change):
            commit(plan)
    else:
        hotswap_adapter(target, folder, "default")


CHANGES = ("cut", "zeros", "remove", "config")


@contextlib.contextmanager
def changed(folder: Path, change: str) -> Iterator[None]:
    """Somebody writes to an adapter's files between plan and commit."""
    paths = [folder / CONFIG] if change == "config" else [folder / WEIGHTS, folder / BIN]
    contents = {path: path.read_bytes() for path in paths if path.is_file()}
    for path, content in contents.items():
        if change == "remove":
            path.unlink()
        elif change == "config":
            path.write_text("{}")
        else:
            os.truncate(path, 0 if change == "cut" else len(content) // 2)
            os.truncate(path, len(content) if change == "zeros" else 0)
    try:
        yield
    finally:
        for path, content in contents.items():
            path.write_bytes(content)


def compare(
    target: torch.nn.Module | AdapterPool, root: Path, accepted: bool, seed: str, way: str, folder: Path, **_: object
) -> dict:
    """What PEFT makes of it, and whether that is what is in the model now."""
    kind = SEEDS[seed].kind
    try:
        if accepted and way == "prepare":  # which changes nothing that the model computes
            assert_same_outputs(target, load(kind, str(root / seed / "loaded")), kind)
            return {"peft": "loads"}
        if any(path.exists() and not path.is_file() for path in (folder / WEIGHTS, folder / BIN)):
            raise OSError("a pipe or a device, which PEFT would wait for")
        with limited(PEFTS):
            fresh = load(kind, str(folder))
            expected = call(fresh, kind.inputs())
        if accepted:
            lacking = set(get_peft_model_state_dict(fresh, save_embedding_layers=False))
            lacking -= set(load_peft_weights(str(folder), device="cpu"))
            assert_like(target, fresh, kind, expected, way, bool(lacking))
        return {"peft": "loads"}
    except AssertionError as error:
        return {"peft": "loads", "differs": str(error)[:400]}
    except LateError:
        return {"peft": "hangs"}
    except Exception as error:
        return {"peft": f"{type(error).__name__}: {str(error)[:100]} {str(error)[-200:]}"}


def assert_like(target, fresh, kind, expected: torch.Tensor, way: str, is_partial: bool) -> None:
    """The live model is like a fresh load. NaN equals NaN: a fresh load has such numbers, too.

    Where a file has nothing for a layer (``is_partial``), a fresh load draws tensors that do nothing and a swap turns
    the layer off: there the outputs and the config are all that can be compared.
    """
    model = target.model if way == "pool" else target
    finite = expected[expected.isfinite()]
    scale = finite.abs().max().item() if len(finite) else 1.0
    limit = scale * (TOLERANCE if expected.dtype == torch.float64 else rounding(fresh, kind.inputs()))
    torch.testing.assert_close(call(model, kind.inputs()), expected, rtol=0, atol=limit, equal_nan=True)
    assert_same(*(config_of(each.peft_config["default"]) for each in (model, fresh)))
    if not is_partial:
        assert_same_tables(model, fresh, "default", prepared=way == "pool")
        assert_same_tensors(*(get_peft_model_state_dict(each, save_embedding_layers=False) for each in (model, fresh)))


# ---- from outside


@dataclass
class Trial:
    """One damaged folder and what was made of it."""

    folder: Path
    way: str
    mutations: list[str]
    ours: dict = field(default_factory=dict)
    fresh: dict = field(default_factory=dict)
    size: int = 0

    @property
    def problems(self) -> list[str]:
        return list(self._problems())

    def __str__(self) -> str:
        return f"{self.folder}, by {self.way}, {self.mutations}: {self.problems}"

    def _problems(self) -> Iterator[str]:
        """Whatever is not as promised."""
        ours, outcome, text = self.ours, self.ours["outcome"], self.ours.get("text", "")
        peft = self.fresh.get("peft", "crashes")
        if outcome not in ("accepted", "refused"):
            yield f"{outcome}: {text}"
        if "touched" in ours:
            yield f"the model was changed: {ours['touched']}"
        if ours.get("executed"):
            yield "something was executed"
        if ours.get("memory", 0) > ALLOWANCE + 4 * self.size:
            yield f"{ours['memory']:,} bytes for files of {self.size:,}"
        if outcome == "accepted" and self.fresh.get("differs"):
            yield f"differs from a fresh load: {self.fresh['differs']}"
        if outcome == "accepted" and peft != "loads":
            yield f"PEFT refuses it: {peft}"
        if outcome == "refused":
            if not all(re.search(rf"^ +{part}: +\S", text, re.MULTILINE) for part in ("found", "expected", "next")):
                yield f"no found, expected and next: {text[:500]}"
            if len(text) > LONGEST:
                yield f"a text of {len(text)} characters: {text[:200]}"
            if re.search(r"allocate|MemoryError", text):
                yield f"refused only for want of memory: {text}"
            if self.way != "prepare" and peft == "loads" and not any(re.search(each, text) for each in STRICTER):
                yield f"PEFT loads it: {text}"


class Laboratory:
    """A folder with the seeds, which has to be empty, and for each way in a model, or a pool, to fork with."""

    def __init__(self, root: Path):
        self.root, self.count, self.targets = root, 0, {}
        make_seeds(root / "seeds")
        for name, seed in SEEDS.items():
            loaded, new = (root / "seeds" / name / part for part in ("loaded", "new"))
            # what is imported at the first use does not count as an adapter's memory
            hotswap_adapter(load(seed.kind, str(loaded)), new, "default")
            for way in seed.ways:
                model = load(seed.kind, str(loaded))
                is_pool = way == "pool"
                target = AdapterPool(model, adapters={"good": new}, progress=False) if is_pool else model
                self.targets[name, way] = target

    def attempt(self, seed: str, mutations: list[tuple[Mutation, Random]], way: str = "hotswap") -> Trial:
        """Damages a copy of a seed's folder and tries to swap it in."""
        self.count += 1
        folder = self.root / f"{seed} {self.count}"
        shutil.copytree(self.root / "seeds" / seed / "new", folder)
        trial = Trial(folder, way, [mutation.__name__ for mutation, _ in mutations])
        for mutation, pick in mutations:
            with contextlib.suppress(Exception):  # an earlier one has left nothing to damage in this way
                mutation(folder, pick)
        trial.size = sum(path.lstat().st_size for path in folder.iterdir())
        change = mutations[0][1].choice(CHANGES)
        trial.ours, trial.fresh = self._answers(dict(seed=seed, way=way, folder=folder, change=change))
        if not trial.problems:
            shutil.rmtree(folder)
        return trial

    def _answers(self, request: dict) -> list[dict]:
        processes, found = get_context("fork"), []
        answers, give = processes.Pipe(duplex=False)
        target = self.targets[request["seed"], request["way"]]
        process = processes.Process(target=examine, args=(target, request, self.root / "seeds", give))
        process.start()
        give.close()
        for _ in range(2):
            try:
                found.append(answers.recv() if answers.poll(PATIENCE) else {"outcome": "hung"})
            except EOFError:
                found.append({"outcome": "died"})
        process.kill()
        process.join(PATIENCE)
        answers.close()
        return found
