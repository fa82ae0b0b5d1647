"""Tries damaged adapters, one at a time, in a process of their own, and judges what came of it."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import re
import select
import shutil
import signal
import stat
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from mutations import Mutation, strange_file, zip_bomb
from seeds import SEEDS, make_seeds

#: seconds after which a process that gives no answer is ended
PATIENCE = 120
#: bytes that reading an adapter may take beyond a few times the size of its files
ALLOWANCE = 64 * 2**20
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
    "Incompatible PEFT types found": "an adapter of one method can't take the place of another's",
    "config is damaged at": "a fresh load takes numbers of other types where it happens to need none",
    "a regular expression that is none": "a fresh load does not look at it if there is nothing to match",
    "lists or tables within one another": "a fresh load keeps them, and can't copy or save the config",
    "changes the base model's own weights": "a swap leaves the base model alone",
    "is an Arrow router": "it depends on the model's other adapters",
    "names a model to read": "nothing is read that an adapter names",
    "asks for a module to be imported": "nothing is imported because an adapter says so",
    "asks for too many tensors": "a fresh load takes the memory, and throws it away",
    "for another task than the model was loaded for": "another class of model would be needed",
    "far larger than the layers": "room for such a rank would take more memory than the model",
    "higher than the model was prepared for": "a prepared model has fixed room",
    "can't be done in a prepared model": "a prepared model has fixed room",
}

#: done after all others: these would unpack gigabytes here, wait for ever at a pipe, and damage what a link leads to
LAST = (zip_bomb, strange_file)


@dataclass
class Trial:
    """One damaged folder and what was made of it."""

    seed: str
    way: str
    done: list[str]
    ours: dict = field(default_factory=dict)
    fresh: dict = field(default_factory=dict)
    size: int = 0

    @property
    def outcome(self) -> str:
        return self.ours["outcome"]

    @property
    def problems(self) -> list[str]:
        """Whatever is not as promised."""
        return list(_problems(self))

    def __str__(self) -> str:
        return f"{self.seed!r}, by {self.way}: {'; '.join(self.done)}"


def _problems(trial: Trial):
    ours, fresh, text = trial.ours, trial.fresh, trial.ours.get("text", "")
    if ours["outcome"] not in ("accepted", "refused"):
        yield f"{ours['outcome']}: {ours.get('traceback', text)}"
    if "touched" in ours:
        yield f"the model was changed: {ours['touched']}"
    if ours.get("executed"):
        yield "something was executed"
    if ours.get("memory", 0) > ALLOWANCE + 4 * trial.size:
        yield f"{ours['memory']:,} bytes for files of {trial.size:,}"
    if ours["outcome"] == "accepted" and fresh.get("differs"):
        yield f"differs from a fresh load: {fresh['differs']}"
    if ours["outcome"] == "refused":
        if not all(re.search(rf"^ +{part}: +\S", text, re.MULTILINE) for part in ("found", "expected", "next")):
            yield f"no found, expected and next: {text[:500]}"
        if len(text) > LONGEST:
            yield f"a text of {len(text)} characters: {text[:200]}"
        if re.search(r"allocate|MemoryError", text):
            yield f"refused only for want of memory: {text}"
    peft = fresh.get("peft", "")
    if trial.way != "prepare":
        # a .bin of the format before 1.6 says how much memory it wants, and PyTorch believes it; none of it is filled
        if ours["outcome"] == "refused" and peft == "loads" and not any(re.search(each, text) for each in STRICTER):
            yield f"PEFT loads it: {text}"
        if ours["outcome"] == "accepted" and peft != "loads":
            yield f"PEFT refuses it: {peft}"


def _pipes(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if stat.S_ISFIFO(os.lstat(os.path.join(folder, name)).st_mode)]


class Laboratory:
    """A folder with the seeds, and a process to try damaged copies of them in.

    Parameters
    ----------
    root:
        An empty folder.
    """

    def __init__(self, root: Path):
        self.root = root
        make_seeds(root / "seeds")
        self.process: subprocess.Popen | None = None
        self.count = 0

    def start(self) -> None:
        here = Path(__file__).parent
        paths = [here, here.parent, here.parent / "beyond", here.parent / "pipelines", here.parents[1]]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "PYTHONFAULTHANDLER": "1"}
        self.errors = (self.root / "stderr").open("a")
        self.process = subprocess.Popen(
            [sys.executable, here / "child.py", self.root / "seeds"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            stderr=self.errors,
            env=environment,
        )
        self._meet_worker()

    def _meet_worker(self) -> None:
        """Waits for the next copy of the process, the one that does the work."""
        answer = self._answer(300)
        assert answer.startswith("ready "), (answer, (self.root / "stderr").read_text()[-2000:])
        self.worker = int(answer.split()[1])

    def close(self) -> None:
        if self.process is not None:
            self.process.stdin.close()  # the worker ends, and then the process
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.worker, signal.SIGKILL)
                self.process.kill()
                self.process.wait()
            self.process.stdout.close()
            self.errors.close()
            self.process = None

    def __enter__(self) -> Laboratory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def attempt(
        self, seed: str, mutations: list[tuple[Mutation, Random]], way: str = "hotswap", *, by_peft: bool = True
    ) -> Trial:
        """Damages a copy of a seed's folder and tries to swap it in. ``by_peft``: whether PEFT is asked, too."""
        self.count += 1
        folder = self.root / f"trial-{self.count}"
        shutil.copytree(self.root / "seeds" / seed / "new", folder)
        trial = Trial(seed, way, [])
        for mutation, pick in sorted(mutations, key=lambda each: LAST.index(each[0]) if each[0] in LAST else -1):
            try:
                trial.done.append(f"{mutation.__name__} ({mutation(folder, pick)})")
            except Exception as error:  # an earlier mutation has left nothing to damage in this way
                trial.done.append(f"{mutation.__name__} (impossible: {type(error).__name__})")
        trial.size = sum(path.lstat().st_size for path in folder.iterdir())
        request = {"seed": seed, "way": way, "folder": str(folder), "pristine": str(folder), "by_peft": by_peft}
        if way == "plan":
            request["pristine"] = str(folder) + "-pristine"
            request["change"] = mutations[0][1].choice(["cut", "zeros", "remove", "config"])
            trial.done.append(f"then {request['change']}")
            shutil.copytree(folder, request["pristine"], symlinks=True, ignore=_pipes)
        self._ask(request, trial)
        for path in (folder, Path(request["pristine"])):
            shutil.rmtree(path, ignore_errors=True)
        return trial

    def _ask(self, request: dict, trial: Trial) -> None:
        if self.process is None:
            self.start()
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self.process.stdin.flush()
        ours = self._answer(PATIENCE)
        if ours == "hung" or ours.startswith("ready"):
            trial.ours = {"outcome": self._next_worker(ours)}
            return
        trial.ours = json.loads(ours)
        fresh = self._answer(PATIENCE)
        if fresh == "hung" or fresh.startswith("ready"):
            trial.fresh = {"peft": {"hung": "hangs", "died": "crashes"}[self._next_worker(fresh)]}
        else:
            trial.fresh = json.loads(fresh)

    def _next_worker(self, answer: str) -> str:
        """What happened to the last one; there is another one afterwards."""
        if answer == "hung":
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.worker, signal.SIGKILL)
            self._meet_worker()
            return "hung"
        self.worker = int(answer.split()[1])
        return "died"

    def _answer(self, seconds: float) -> str:
        """The next line of the process; "hung" if there is none. A worker that died is followed by a "ready"."""
        if not select.select([self.process.stdout], [], [], seconds)[0]:
            return "hung"
        line = self.process.stdout.readline()  # the process writes whole lines
        assert line, (self.root / "stderr").read_text()[-2000:]
        return line.decode().strip()


class Tally:
    """How many trials there were of each kind, and how they ended."""

    def __init__(self):
        self.rows: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
        self.failures: list[tuple[Trial, list[str]]] = []
        self.most_memory = 0

    def add(self, name: str, trial: Trial) -> None:
        problems = trial.problems
        if problems:
            self.failures.append((trial, problems))
        self.most_memory = max(self.most_memory, trial.ours.get("memory", 0) - trial.size)
        peft = trial.fresh.get("peft", "-")
        ended = {"accepted": "equal", "refused": "refused"}.get(trial.outcome, trial.outcome)
        self.rows[name][ended] += 1
        self.rows[name]["PEFT " + (peft if peft in ("loads", "hangs", "crashes", "-") else "refuses")] += 1
        self.rows[name]["wrong"] += bool(problems)

    def __str__(self) -> str:
        columns = ["refused", "equal", "PEFT loads", "PEFT refuses", "PEFT hangs", "PEFT crashes", "wrong"]
        lines = [f"{'mutation':24}" + "".join(f"{column:>14}" for column in columns)]
        total = collections.Counter()
        for name, row in self.rows.items():
            total.update(row)
            lines.append(f"{name:24}" + "".join(f"{row[column]:>14}" for column in columns))
        lines.append(f"{'all':24}" + "".join(f"{total[column]:>14}" for column in columns))
        lines.append(f"most memory beyond an adapter's size: {self.most_memory / 2**20:.1f} MiB")
        return "\n".join(lines)


def seeds_by_name() -> list[str]:
    return list(SEEDS)
