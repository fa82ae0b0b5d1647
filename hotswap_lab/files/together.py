"""Replaces several files of a folder at one moment: whoever is killed on the way leaves all old ones or all new ones.

A rename replaces one file, so between two renames there would be a mixture. Hence, for the moment of the change, the
files are symbolic links that all lead through one more link, and that one is replaced::

    adapter_config.json        ->  .hotswap-save-1f3a/now/adapter_config.json
    adapter_model.safetensors  ->  .hotswap-save-1f3a/now/adapter_model.safetensors
    .hotswap-save-1f3a/now     ->  former, and then, with a single rename, -> new

Whatever leads to the old files before leads to the new ones afterwards; then the files take the places of their links.
What a killed process leaves behind can be read as it is, by anybody, and the next save tidies up.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ..core.interrupts import interrupts_held, let_through
from .paths import is_there

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

#: what the names of our own folders start with
PREFIX = ".hotswap-save-"
FORMER, NEW, NOW = "former", "new", "now"
#: seconds after which nobody works in such a folder any more, where there are no locks to tell
OLD = 3600

#: how long a saver that waits for another one sleeps before it looks again, in seconds
NAP = 0.02

#: for threads that save to one folder; a few locks serve all folders
_in_this_process = [threading.Lock() for _ in range(64)]


def replace_together(folder: str | os.PathLike, write: Callable[[Path], object]) -> None:
    """Puts the files that ``write`` writes in place of those of the same names, all of them or none.

    Parameters
    ----------
    folder:
        Where they go. Made if it isn't there. Its other files are left alone.
    write:
        Is called with an empty folder on the same disk, and writes the files into it.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     replace_together(folder, lambda new: [(new / name).write_text("1") for name in ("a", "b")])
    ...     replace_together(folder, lambda new: (new / "a").write_text("2"))
    ...     [(path.name, path.read_text()) for path in sorted(Path(folder).iterdir())]
    [('a', '2'), ('b', '1')]

    Notes
    -----
    All data is on the disk before anything is replaced. Savers to one folder wait for each other (on Windows and on
    drives without locks only those of one process; two processes must not save to one folder there). A reader that
    opens one file before the change and the other one after it gets one of each: to rule that out is up to the readers.

    Where no symbolic links can be made (Windows without developer mode, FAT), the files are renamed one after the
    other: an error still leaves all old ones, but a process that is killed between two renames leaves a mixture.
    """
    with interrupts_held():
        _replace_together(Path(folder).absolute(), write)


def _replace_together(folder: Path, write: Callable[[Path], object]) -> None:
    made: list[Path] = []
    try:
        for each in reversed([folder, *folder.parents]):
            if not each.is_dir():
                made.append(each)
                each.mkdir(exist_ok=True)
        stage = folder / f"{PREFIX}{secrets.token_hex(4)}"
        with _locked(folder) as alone:
            _settle(folder, stage, alone)  # what a killed process has left
            try:
                _replace(folder, stage, write)
                _settle(folder, stage, alone)
            except BaseException:
                _settle(folder, stage, alone)
                raise
    except BaseException:
        for each in reversed(made):
            with contextlib.suppress(OSError):
                each.rmdir()
        raise


def _replace(folder: Path, stage: Path, write: Callable[[Path], object]) -> None:
    for each in (stage, stage / FORMER, stage / NEW):
        each.mkdir()
    write(stage / NEW)
    let_through()
    names = sorted(path.name for path in (stage / NEW).iterdir())
    for name in names:
        _sync(stage / NEW / name)
        if is_there(folder / name):
            _link_or_copy(folder / name, stage / FORMER / name)
    if not _point(stage / NOW, FORMER, stage):
        _replace_in_turn(folder, stage, names)
        return
    for name in names:
        _point(folder / name, os.path.join(stage.name, NOW, name), stage)
    for each in (stage / FORMER, stage / NEW, stage, folder):
        _sync(each)
    _point(stage / NOW, NEW, stage)
    _sync(stage)


def _point(link: Path, target: str, stage: Path) -> bool:
    """Makes a symbolic link, in place of whatever has that name; False if there are none on this disk."""
    spare = stage / "link"
    try:
        os.symlink(target, spare, target_is_directory=link.name == NOW)
    except (OSError, NotImplementedError):
        if link.name == NOW and target == FORMER:
            return False
        raise
    os.replace(spare, link)
    return True


def _replace_in_turn(folder: Path, stage: Path, names: list[str]) -> None:
    begun = []
    try:
        for name in names:
            begun.append(name)
            os.replace(stage / NEW / name, folder / name)
    except BaseException:
        for name in begun:
            if is_there(stage / FORMER / name):
                os.replace(stage / FORMER / name, folder / name)
            else:
                (folder / name).unlink(missing_ok=True)
        raise
    _sync(folder)


def _is_left_over(stage: Path, own: Path, alone: bool) -> bool:
    """Whether nobody works in a folder of ours any more. Without locks, others may, unless it is old."""
    if alone or stage.name == own.name:
        return True
    with contextlib.suppress(OSError):
        return time.time() - stage.stat().st_mtime > OLD
    return False


def _settle(folder: Path, own: Path, alone: bool) -> None:
    """Puts files in place of the links to them, whichever they lead to, and clears our folders away.

    Every step leaves the contents of every name what they are, so it may end anywhere.
    """
    entries = list(folder.iterdir())
    stages = [path for path in entries if path.name.startswith(PREFIX) and _is_left_over(path, own, alone)]
    if not stages:
        return
    names = {stage.name for stage in stages}
    for link in entries:
        if not link.is_symlink() or names.isdisjoint(Path(os.readlink(link)).parts[:1]):  # "." has no parts
            continue
        if is_there(link):
            os.replace(os.path.realpath(link, strict=True), link)
        else:
            link.unlink()
    _sync(folder)
    for stage in stages * 2:  # whatever stood in the way may do so only once, and isn't worth an error
        shutil.rmtree(stage, ignore_errors=True)


def _link_or_copy(path: Path, twin: Path) -> None:
    try:
        os.link(os.path.realpath(path, strict=True), twin)
    except OSError:
        shutil.copy2(path, twin)


def _sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    if not path.is_dir():
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
        return
    with contextlib.suppress(OSError), _opened(path) as descriptor:  # some file systems don't do this for folders
        os.fsync(descriptor)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Holds other savers to the same folder off. The lock of a process that was killed is free at once.

    Gives False where only the threads of this process can be held off.
    """
    lock = _in_this_process[hash(os.path.realpath(folder, strict=True)) % len(_in_this_process)]
    while not lock.acquire(timeout=NAP):
        let_through()
    try:
        if fcntl is None:
            yield False
            return
        with _opened(folder) as descriptor:
            yield _is_locked(descriptor)
    finally:
        lock.release()


def _is_locked(descriptor: int) -> bool:
    """Waits for the lock of a folder; False if there are no locks."""
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            let_through()
            time.sleep(NAP)
        except OSError:  # a network drive may have none
            return False


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[int]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
