"""Sources: where adapters come from, and what their files may contain.

A folder is known here. Whoever knows another place, such as the Hub, puts what finds it into :data:`ELSEWHERE`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peft.utils.save_and_load import load_peft_weights

from .errors import HotswapError, refuse
from .weights_file import check_archive, check_file, map_weights

#: how deep a config's values may be nested; PEFT writes three levels at most, and Python can't copy hundreds
MAX_DEPTH = 20


class Source(Protocol):
    """A place with an adapter's files."""

    #: for messages, and to read it again
    name: str

    @property
    def revision(self) -> str | None:
        """What pins the files to one version; None where nothing does."""

    def folder_with_config(self) -> str:
        """The folder on this machine that has the config."""
        ...

    def folder_with_weights(self) -> str:
        """The folder on this machine that has the weights, of the same version as the config."""
        ...


#: finds what is no folder, by its name and the caller's arguments, and judges these; asks nobody yet
Finder = Callable[[str, Mapping[str, object]], Source]
elsewhere: Finder | None = None


@dataclass
class Folder:
    """A folder on this machine."""

    name: str
    subfolder: str = ""
    revision: None = None

    def folder_with_config(self) -> str:
        try:
            return self._with(CONFIG_NAME)
        except FileNotFoundError as error:
            raise no_config(self.name, error) from error

    def folder_with_weights(self) -> str:
        try:
            return self._with(SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)
        except FileNotFoundError as error:
            raise no_weights(self.name, error) from error

    def _with(self, *names: str) -> str:
        folder = os.path.join(self.name, self.subfolder)
        if not any(os.path.exists(os.path.join(folder, name)) for name in names):
            raise FileNotFoundError(f"no {' and no '.join(names)} in the folder {folder}")
        return folder


def no_config(name: str, error: Exception, next_step: str | None = None) -> HotswapError:
    """Why an adapter's config can't be had."""
    next_step = next_step or "check the path, the id, `subfolder`, `revision` and `token`"
    return refuse("no_config_file", source=name, error=error, next_step=next_step)


def no_weights(name: str, error: Exception, next_step: str | None = None) -> HotswapError:
    """Why an adapter's weights can't be had."""
    next_step = next_step or "check the folder or repository, and get a complete copy of it"
    return refuse("no_weights_file", source=name, error=error, next_step=next_step)


def find_source(source: object, arguments: Mapping[str, object]) -> Source:
    """The place that a user means by a path or a name."""
    if not isinstance(source, (str, os.PathLike)):
        raise refuse("no_adapter_to_read", found=f"a {type(source).__name__}: {source!r}"[:200])
    name = os.fspath(source)
    place = elsewhere(name, arguments) if elsewhere is not None else None
    return Folder(name, str(arguments.get("subfolder") or "")) if os.path.isdir(name) or place is None else place


def find_folder(source: str | os.PathLike[str]) -> str:
    """The folder on this machine that has an adapter's config and weights; from the Hub they are downloaded.

    >>> from hotswap_lab import demo
    >>> os.path.samefile(find_folder(demo.adapter_path("double")), demo.adapter_path("double"))
    True
    """
    place = find_source(source, {})
    place.folder_with_config()
    return place.folder_with_weights()


# ---- what is in the files


def read_config(place: Source) -> PeftConfig:
    """The config of an adapter, without its weights."""
    folder = place.folder_with_config()
    try:
        peft_type = PeftConfig._get_peft_type(folder)
        if peft_type not in PEFT_TYPE_TO_CONFIG_MAPPING:
            raise refuse("unknown_peft_type", source=place.name, peft_type=peft_type)
        config = PEFT_TYPE_TO_CONFIG_MAPPING[peft_type].from_pretrained(folder)
        if (depth := _depth(vars(config))) > MAX_DEPTH:
            raise ValueError(f"lists or tables within one another, {depth} deep")
        return config
    except HotswapError:
        raise
    except Exception as error:  # of any kind: PEFT takes a config from a file without looking at it
        raise refuse("config_unreadable", source=place.name, error=error) from error


def _depth(value: object) -> int:
    """How deep lists and tables lie within one another."""
    depth, level = 0, [value]
    while level:
        level = [
            inner
            for each in level
            if isinstance(each, (dict, list, tuple, set))
            for inner in (each.values() if isinstance(each, dict) else each)
        ]
        depth += 1
    return depth


def read_tensors(
    place: Source,
    folder: str,
    device: str | torch.device,
    key_mapping: dict[str, str] | None,
    for_one_swap: bool,
) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
    """The tensors of an adapter by their names in its file. For one swap, they may be the file itself, in one piece."""
    path = os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)
    is_safe, on_cpu = os.path.exists(path), torch.device(device).type == "cpu"
    try:
        if not is_safe:
            return _read_bin(folder, os.path.join(folder, WEIGHTS_NAME), device, key_mapping), None
        check_file(path)
        if for_one_swap and on_cpu and not key_mapping and (mapped := map_weights(path)) is not None:
            return mapped.tensors, mapped.whole
        tensors = load_peft_weights(folder, device=str(device), key_mapping=key_mapping)
        if on_cpu and not for_one_swap:
            tensors = {key: tensor.clone() for key, tensor in tensors.items()}
        return tensors, None
    except Exception as error:  # of any kind: a damaged file leads its readers astray
        raise refuse("weights_unreadable", source=place.name, error=error) from error


def _read_bin(folder: str, path: str, device: str | torch.device, key_mapping) -> dict[str, torch.Tensor]:
    check_file(path)
    check_archive(path)
    tensors = load_peft_weights(folder, device=str(device), key_mapping=key_mapping)
    if not isinstance(tensors, Mapping):
        raise TypeError(f"a {type(tensors).__name__}, and no table of tensors")
    size = os.path.getsize(path)
    for key, tensor in tensors.items():
        # a tensor may say that its few bytes are repeated, as often as it likes
        if isinstance(tensor, torch.Tensor) and tensor.numel() * tensor.itemsize > size:
            raise ValueError(f"{key!r} of shape {tuple(tensor.shape)} in a file of {size:,} bytes")
    return dict(tensors)


def path_of(source: object) -> str | None:
    """What an adapter can be read from again: a folder or a Hub id. None for what is in memory."""
    return os.fspath(source) if isinstance(source, (str, os.PathLike)) else None


def stamp_of(source: object) -> tuple[object, ...] | None:
    """What changes when an adapter's folder is written to. None for what is not a folder."""
    path = path_of(source)
    if path is None or not os.path.isdir(path):
        return None
    files = [os.path.join(path, name) for name in sorted(os.listdir(path)) if name.startswith("adapter_")]
    return tuple((file, os.stat(file).st_mtime_ns, os.stat(file).st_size) for file in files if os.path.exists(file))
