"""What the adapters of a pool are read from: folders, the Hub, adapters that are read already, or state dicts."""

from __future__ import annotations

import os
from collections.abc import Mapping

from ..files.paths import ABSENT, is_folder
from .adapter import Adapter, load_config
from .errors import refuse
from .interrupts import interruptible


def check_named(adapters: object) -> None:
    """Refuses adapters without names: a list of folders, or a single one.

    >>> check_named({"style": "folder"})
    """
    if adapters is not None and not isinstance(adapters, Mapping):
        raise refuse(
            "The adapters have no names.",
            found=f"adapters as a {type(adapters).__name__}",
            expected="a dict, adapters={name: folder, ...}",
            next_step="choose a name for each: that is what swaps them in",
        )


def path_of(source: object) -> str | None:
    """What an adapter can be read from again: a folder or a Hub id. None for what is in memory."""
    return os.fspath(source) if isinstance(source, (str, os.PathLike)) else None


def stamp_of(source: object) -> tuple | None:
    """What changes when an adapter's folder is written to. None for what is not a folder."""
    path = path_of(source)
    try:
        if path is None or not is_folder(path):
            return None
        with os.scandir(path) as files:
            return tuple(sorted((file.name, *_state(file)) for file in files if file.name.startswith("adapter_")))
    except OSError as error:
        raise refuse(
            f"The folder {path} can't be read.",
            found=f"{type(error).__name__}: {error}",
            expected="a folder with an adapter",
            next_step="see that this process may read it, and that the disk is all right",
        ) from error


def _state(file: os.DirEntry) -> tuple[int, int]:
    try:
        state = file.stat()
    except OSError as error:
        if error.errno not in ABSENT:
            raise
        return 0, 0  # a link that leads nowhere; whoever reads it says so
    return state.st_mtime_ns, state.st_size


def read(source: object, hub: Mapping[str, object]) -> Adapter:
    """The adapter. Where it is read from files, Ctrl-C comes at once."""
    if isinstance(source, Adapter):
        return source
    if isinstance(source, tuple):
        return Adapter.from_state_dict(*source)
    with interruptible():
        return Adapter.load(source, **hub)


def family_member(source: object, hub: Mapping[str, object]) -> Adapter:
    """What preparing needs to know of an adapter: of files, the config alone."""
    if isinstance(source, (Adapter, tuple)):
        return read(source, hub)
    if path_of(source) is None:
        raise refuse(
            "The pool can't read this adapter.",
            found=f"a {type(source).__name__}",
            expected="a folder, a Hub id, an Adapter, or a pair (state_dict, config)",
            next_step="pass one of these",
        )
    return Adapter(load_config(source, **hub), {}, path_of(source))
