"""A process that is killed while it saves leaves the old adapter or the new one, or no adapter, never a mixture.

No adapter only between its two files; the old ones lie beside them then, and can be put back. And a process that is
killed while it fills the cache of converted models leaves nothing there that is taken for a model. With ``TIMES=10``,
100 kills at random moments, and one at every line and C call of a save.
"""

from __future__ import annotations

import collections
import functools
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [
        str(Path(__file__).parents[1]),
        str(Path(__file__).parents[1] / "pipelines"),
        str(Path(__file__).parent),
    ]
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

import huggingface_hub
import pytest
import torch
from faults import list_steps, run_with_fault
from lengths import TIMES
from models import KINDS, call, load, save_random_adapter
from peft import PeftModel

from hotswap_lab import resolve_slot, save_adapter
from hotswap_lab.demo import smollm2
from hotswap_lab.files import saving

LINEAR = KINDS["linear"]
#: the weights of the first two fit each other's configs, so that a mixture would load, and go unnoticed
ADAPTERS = (dict(r=4, lora_alpha=8), dict(r=4, lora_alpha=3), dict(r=6, target_modules=["first"]))

unix = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills processes as Unix does")


class Saves:
    """Models with different adapters, one folder that they are saved to, and what a reader finds there."""

    def __init__(self, folder: Path):
        self.target = folder / "target"
        self.models, self.expected = [], []
        for number, lora in enumerate(ADAPTERS):
            source = save_random_adapter(LINEAR, folder / f"source_{number}", seed=number, **lora)
            self.models.append(load(LINEAR, source))
            self.expected.append(self._read(source))
        assert len({output.numpy().tobytes() for _, output in self.expected}) == len(ADAPTERS)
        mixture = folder / "mixture"
        shutil.copytree(folder / "source_0", mixture)
        shutil.copy(folder / "source_1" / "adapter_config.json", mixture)
        assert self._number(mixture) is None, "a mixture must be told from both"
        self.save(0)

    @staticmethod
    def _read(folder: str | Path) -> tuple[dict, torch.Tensor]:
        """What PEFT makes of the folder."""
        model = PeftModel.from_pretrained(LINEAR.base(), folder).eval()
        config = {key: sorted(value) if isinstance(value, set) else value for key, value in _config(model).items()}
        return config, call(model, LINEAR.inputs())

    def _number(self, folder: Path) -> int | None:
        config, output = self._read(folder)
        found = [n for n, (c, o) in enumerate(self.expected) if config == c and torch.equal(output, o)]
        return found[0] if found else None

    def save(self, number: int) -> None:
        save_adapter(self.models[number], self.target)

    def writing(self, number: int) -> Callable[[], None]:
        """The second half of a save, once all is decided."""
        slot = resolve_slot(self.models[number], "default")
        return functools.partial(saving._save, self.target, saving.saved_config(slot), saving.saved_tensors(slot))

    def look(self) -> tuple[int | None, str]:
        """Which adapter a reader finds, None if it is a mixture; and where the save was. Puts back what is missing."""
        litter = list(self.target.glob(f"{saving.PREFIX}*"))
        is_whole = all((self.target / name).exists() for name in ("adapter_config.json", "adapter_model.safetensors"))
        for folder in litter:
            for old in [] if is_whole else list((folder / "old").iterdir()):
                old.replace(self.target / old.name)
            shutil.rmtree(folder)
        where = "in the middle of a save" if is_whole else "between the two files"
        return self._number(self.target), where if litter else "outside of a save"


def _config(model: PeftModel) -> dict:
    return model.peft_config["default"].to_dict()


def _kill(action: Callable[[], object], after: float | None = None) -> bool:
    """Runs the action in a process of its own, and kills that after a while; True if it was killed."""
    child = os.fork()
    if not child:
        try:
            action()
        finally:
            os._exit(0)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def _die() -> BaseException:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("still alive")


def kill_at_random(saves: Saves, kills: int) -> collections.Counter:
    """Kills a process that saves one adapter after the other, over and over, at random moments."""
    counts: collections.Counter = collections.Counter()
    chance = random.Random(0)

    def forever() -> None:
        number = 0
        while True:
            number = (number + 1) % len(ADAPTERS)
            saves.save(number)

    start = time.perf_counter()
    saves.save(1)
    one = time.perf_counter() - start
    while counts["kills"] < kills:
        assert _kill(forever, after=chance.uniform(0.0, 6 * one))
        number, where = saves.look()
        assert number is not None, f"kill {counts['kills']}: a mixture"
        counts.update(("kills", where, f"found {number}"))
    saves.save(0)
    assert saves.look() == (0, "outside of a save")
    return counts


def kill_at_steps(saves: Saves, every: int) -> collections.Counter:
    """Kills a process at each line, and at each C call, of a save, from where it writes on."""
    counts: collections.Counter = collections.Counter()
    for unit in ("line", "call", "deep"):
        write = saves.writing(1)
        steps = len(list_steps(write, unit))
        for step in range(1, steps + 1, every):
            saves.save(0)
            killed = _kill(lambda step=step, unit=unit, write=write: run_with_fault(write, step, _die, unit))
            number, where = saves.look()
            assert number in (0, 1), f"killed at {unit} {step}: a mixture"
            if killed:
                counts.update(("kills", where, "new" if number else "old"))
    saves.save(2)
    assert saves.look() == (2, "outside of a save")
    return counts


def kill_conversions(folder: Path, every: int) -> collections.Counter:
    """Kills a process at each line, and at each C call, of filling the cache, with a small stand-in for the files."""
    counts: collections.Counter = collections.Counter()
    source, parts = folder / "small.gguf", {"config.json": b"{}", "model.safetensors": bytes(1000)}
    source.write_bytes(b"GGUF")
    cache, path_of = folder / "cache", huggingface_hub.cached_assets_path
    huggingface_hub.cached_assets_path = lambda *_, **__: cache

    def stand_in(_: Path, partial: Path) -> None:
        partial.mkdir()
        for name, content in parts.items():
            (partial / name).write_bytes(content)

    smollm2.convert, convert = stand_in, smollm2.convert
    try:
        for unit in ("line", "call", "deep"):
            _empty(cache)
            steps = len(list_steps(lambda: smollm2.dequantised(source), unit))
            for step in range(1, steps + 1, every):
                _empty(cache)
                action = lambda step=step, unit=unit: run_with_fault(  # noqa: E731
                    lambda: smollm2.dequantised(source), step, _die, unit
                )
                counts["kills"] += _kill(action)
                found = list(cache.glob("[!.]*"))
                counts["there" if found else "not there"] += 1
                for _ in range(2):
                    for each in (*found, smollm2.dequantised(source)):
                        assert {path.name: path.read_bytes() for path in each.iterdir()} == parts, (unit, step)
    finally:
        smollm2.convert, huggingface_hub.cached_assets_path = convert, path_of
    return counts


def _empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()


@pytest.mark.long
@unix
def test_killed_while_saving():
    """In a process that has no threads, since it forks."""
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=300 * TIMES)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{{'kills': {10 * TIMES}")


def test_threads_that_save_to_one_folder(tmp_path):
    saves = Saves(tmp_path)

    def some(numbers: tuple[int, ...]) -> None:
        for number in numbers * 5:
            saves.save(number)

    threads = [threading.Thread(target=some, args=(numbers,)) for numbers in ((0, 1), (1, 0))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert saves.look() in ((0, "outside of a save"), (1, "outside of a save"))


def test_an_error_at_each_rename_leaves_the_old_adapter(tmp_path):
    saves = Saves(tmp_path)
    saves.save(1)
    steps = list_steps(saves.writing(1), "call")
    renames = [number for number, place in enumerate(steps, 1) if place.endswith(" replace")]
    assert len(renames) == 4
    for step in renames:
        assert run_with_fault(saves.writing(0), step, lambda: OSError("pretended"), "call").error
        assert saves.look() == (1, "outside of a save")
    saves.save(0)
    assert saves.look() == (0, "outside of a save")


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    every = max(1, 5 // TIMES)
    with tempfile.TemporaryDirectory() as folder:
        saves = Saves(Path(folder))
        counts = kill_at_random(saves, 10 * TIMES), kill_at_steps(saves, every), kill_conversions(Path(folder), every)
        print(*map(dict, counts), sep="\n")


if __name__ == "__main__":
    main()
