"""An error is no "no": whoever can't tell whether something is there doesn't act as if it weren't."""

from __future__ import annotations

import errno
import itertools
import os

import pytest
from models import KINDS, load, save_random_adapter
from operations import files_in
from oracle import assert_equals_fresh_load

from hotswap_lab import Adapter, AdapterPool, HotswapError, save_adapter
from hotswap_lab.files.paths import ABSENT, is_file, is_folder, is_there

LINEAR = KINDS["linear"]


def test_what_is_there(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    (tmp_path / "link").symlink_to(file)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "broken").symlink_to(tmp_path / "nothing")
    for path, expected in {
        tmp_path: (True, True, False),
        file: (True, False, True),
        tmp_path / "link": (True, False, True),
        **dict.fromkeys(
            [tmp_path / "loop", tmp_path / "broken", tmp_path / "nothing", file / "in a file"], (False,) * 3
        ),
        "a null \0 byte": (False, False, False),
        "team/" + 300 * "a": (False, False, False),
    }.items():
        assert (is_there(path), is_folder(path), is_file(path)) == expected, path


def failing(patch: pytest.MonkeyPatch, name: str, path: str, code: int = errno.EIO, *, at: int = 1) -> None:
    """``os.<name>`` fails once for a path: at the ``at``-th call."""
    original, calls = getattr(os, name), itertools.count(1)

    def call(each, *arguments, **kwargs):
        if isinstance(each, (str, os.PathLike)) and os.fspath(each) == path and next(calls) == at:
            raise OSError(code, os.strerror(code), path)
        return original(each, *arguments, **kwargs)

    patch.setattr(os, name, call)


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.ENOMEM])
def test_errors_are_passed_on(tmp_path, monkeypatch, code):
    assert code not in ABSENT
    for function in (is_there, is_folder, is_file):
        with monkeypatch.context() as patch:
            failing(patch, "stat", str(tmp_path), code)
            with pytest.raises(OSError, match=os.strerror(code)):
                function(tmp_path)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("function", ["stat", "lstat"])
def test_a_disk_that_fails_once_while_saving(tmp_path, monkeypatch, function, name):
    """``os.path.realpath`` takes no notice of errors, and what it returned then was taken for the file itself."""
    old = save_random_adapter(LINEAR, tmp_path / "old", seed=1, r=4)
    new = save_random_adapter(LINEAR, tmp_path / "new", seed=2, r=6)
    model, target = load(LINEAR, new), tmp_path / "target"
    for first in range(1, 12):
        save_adapter(load(LINEAR, old), target)
        with monkeypatch.context() as patch:
            failing(patch, function, str(target / name), at=first)
            try:
                save_adapter(model, target)
                expected = new
            except OSError:
                expected = None
        assert len(files_in(target)) == 2
        found = load(LINEAR, target)
        if expected is None:
            expected = old if Adapter.load(target).config.r == 4 else new
        assert_equals_fresh_load(found, LINEAR, expected)


def test_a_pool_whose_folder_cant_be_looked_at(tmp_path, monkeypatch):
    source = save_random_adapter(LINEAR, tmp_path / "a", seed=1, r=4)
    pool = AdapterPool(load(LINEAR, source), progress=False)
    with monkeypatch.context() as patch:
        failing(patch, "stat", source)
        with pytest.raises(HotswapError, match="can't be read"):
            pool.add("a", source)
    assert pool.names == []
    pool.add("a", source)
