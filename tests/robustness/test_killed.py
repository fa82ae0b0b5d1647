"""A process that is killed while it saves leaves the old adapter or the new one, or no adapter, never a mixture.

No adapter only between its two files; the old ones lie beside them then, and can be put back. And what a process that
is killed while it fills the cache of converted models leaves there is not taken for a model. With ``TIMES=5``, a kill
at every line and C call of a save.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":
    here = Path(__file__).parent
    sys.path[:0] = [str(here.parent), str(here.parent / "pipelines"), str(here)]
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from faults import list_steps, run_with_fault
from lengths import TIMES
from models import KINDS, call, load, save_random_adapter
from oracle import config_of

from hotswap_lab import resolve_slot, save_adapter
from hotswap_lab.demo import smollm2
from hotswap_lab.files import saving

LINEAR = KINDS["linear"]
#: the weights of the two fit each other's configs, so that a mixture would load, and go unnoticed
ADAPTERS = (dict(r=4, lora_alpha=8), dict(r=4, lora_alpha=3))

unix = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills processes as Unix does")


class Saves:
    """Models with different adapters, one folder that they are saved to, and what a reader finds there."""

    def __init__(self, folder: Path):
        self.target = folder / "target"
        sources = [
            save_random_adapter(LINEAR, folder / str(number), seed=number, **lora)
            for number, lora in enumerate(ADAPTERS)
        ]
        self.models = [load(LINEAR, each) for each in sources]
        self.expected = [self._read(each) for each in sources]
        mixture = shutil.copytree(sources[0], folder / "mixture")
        shutil.copy(f"{sources[1]}/adapter_config.json", mixture)
        assert self._read(mixture) not in self.expected, "a mixture must be told from both"
        self.save(0)

    @staticmethod
    def _read(folder: str | Path) -> tuple[dict, list]:
        """What PEFT makes of the folder."""
        model = load(LINEAR, str(folder))
        return config_of(model.peft_config["default"]), call(model, LINEAR.inputs()).tolist()

    def save(self, number: int) -> None:
        save_adapter(self.models[number], self.target)

    def writing(self, number: int) -> Callable[[], None]:
        """The second half of a save, once all is decided."""
        slot = resolve_slot(self.models[number], "default")
        return functools.partial(saving._save, self.target, saving.saved_config(slot), saving.saved_tensors(slot))

    def found(self, left_over: bool = False) -> int:
        """Which adapter a reader finds; a mixture is no adapter. Puts back what is missing after a kill."""
        litter = list(self.target.glob(f"{saving.PREFIX}*"))
        assert left_over or not litter
        is_whole = all((self.target / name).exists() for name in ("adapter_config.json", "adapter_model.safetensors"))
        for folder in litter:
            for old in [] if is_whole else list((folder / "old").iterdir()):
                old.replace(self.target / old.name)
            shutil.rmtree(folder)
        return self.expected.index(self._read(self.target))


def kill_saves(folder: Path, every: int) -> Counter:
    """Saves in processes that are killed at each line, and at each C call, from where they write on."""
    saves, counts = Saves(folder), Counter()
    write = saves.writing(1)
    for unit in ("line", "call", "deep"):
        for step in range(1, len(list_steps(write, unit)) + 1, every):
            saves.save(0)
            child = os.fork()
            if not child:
                with contextlib.suppress(BaseException):
                    run_with_fault(write, step, lambda: os.kill(os.getpid(), signal.SIGKILL), unit)
                os._exit(0)
            if os.WIFSIGNALED(os.waitpid(child, 0)[1]):
                counts[("old", "new")[saves.found(left_over=True)]] += 1
    saves.save(1)
    assert saves.found() == 1
    return counts


@pytest.mark.long
@unix
def test_killed_while_saving():
    """In a process that has no threads, since it forks."""
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=300 * TIMES)
    assert done.returncode == 0, done.stderr
    assert "'old'" in done.stdout


def test_what_a_killed_conversion_leaves_is_no_model(tmp_path, monkeypatch):
    source, cache = tmp_path / "small.gguf", tmp_path / "cache"
    source.write_bytes(b"GGUF")
    (cache / ".partial").mkdir(parents=True)
    (cache / ".partial" / "half").touch()

    def convert(_: Path, partial: Path) -> None:
        partial.mkdir()
        assert not list(cache.glob("[!.]*")), "a process that is killed here leaves half a model"
        (partial / "config.json").touch()

    monkeypatch.setattr(smollm2, "convert", convert)
    monkeypatch.setattr("huggingface_hub.cached_assets_path", lambda *_, **__: cache)
    for _ in range(2):
        assert [path.name for path in smollm2.dequantized(source).iterdir()] == ["config.json"]


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
    saves.found()


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as temporary:
        print(kill_saves(Path(temporary), max(1, 5 // TIMES)))
