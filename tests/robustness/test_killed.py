"""A process that is killed while it saves leaves the old adapter or the new one, or no adapter, never a mixture.

No adapter only between its two files; the old ones lie beside them then, and can be put back. And what a process that
is killed while it fills the cache of converted models leaves there is not taken for a model.
"""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from faults import watch_steps
from models import KINDS, load, save_random_adapter

from hotswap_lab import resolve_slot, save_adapter
from hotswap_lab.demo import smollm2
from hotswap_lab.files import saving

LINEAR = KINDS["linear"]
NAMES = ("adapter_config.json", "adapter_model.safetensors")


def files_in(folder: Path) -> list[bytes | None]:
    return [path.read_bytes() if (path := folder / name).exists() else None for name in NAMES]


@pytest.fixture
def models(tmp_path):
    """The weights of the two fit each other's configs, so that a mixture would load, and go unnoticed."""
    return [load(LINEAR, save_random_adapter(LINEAR, tmp_path / str(n), n, r=4, lora_alpha=n)) for n in (8, 3)]


@pytest.fixture
def expected(models, tmp_path):
    for number, model in enumerate(models):
        save_adapter(model, tmp_path / f"expected {number}")
    expected = [files_in(tmp_path / f"expected {number}") for number in range(2)]
    assert all(old != new for old, new in zip(*expected, strict=True)), "a mixture must be told from both"
    return expected


@pytest.mark.parametrize("unit", ["line", "call", "deep"])
def test_killed_while_saving(models, expected, tmp_path, unit):
    """The files at each step are what a process leaves that is killed there."""
    target, slot, found = tmp_path / "target", resolve_slot(models[1], "default"), []
    save_adapter(models[0], target)

    def look(place: str) -> None:
        files = files_in(target)
        if None in files:  # a reader finds no adapter
            (old,) = target.glob(".hotswap-save-*/old")
            files = [kept or each for kept, each in zip(files_in(old), files, strict=True)]
        found.append(files)

    write = functools.partial(saving.save, target, *saving.files_of(slot))
    watch_steps(write, unit, look)  # from where all is decided
    assert all(each in expected for each in found)
    assert found[0] == expected[0]
    assert files_in(target) == expected[1]


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


@pytest.mark.long
def test_threads_that_save_to_one_folder(models, expected, tmp_path):
    def some(models: list) -> None:
        for model in models * 15:
            save_adapter(model, tmp_path / "target")

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(some, (models, models[::-1]) * 2))
    assert files_in(tmp_path / "target") in expected
    assert {path.name for path in (tmp_path / "target").iterdir()} == {*NAMES}
