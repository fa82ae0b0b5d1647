"""Sources: where adapters come from, and what their files may contain.

A folder is known here. Whoever knows another place, such as the Hub, puts what finds it into :data:`ELSEWHERE`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from peft.utils.save_and_load import load_peft_weights

from .errors import HotswapError, refuse


@dataclass
class Folder:
    """A place with an adapter's files: a folder on this machine. Other places derive from it."""

    #: for messages, and to read it again
    name: str
    subfolder: str = ""
    #: what pins the files to one version; None where nothing does
    revision: str | None = None

    def folder_with_config(self) -> str:
        """The folder on this machine that has the config."""
        return self._with(no_config, CONFIG_NAME)

    def folder_with_weights(self) -> str:
        """The folder on this machine that has the weights, of the same version as the config."""
        return self._with(no_weights, *READERS)

    def _with(self, lacking: Callable[[str, Exception], HotswapError], *names: str) -> str:
        folder = os.path.join(self.name, self.subfolder)
        if not any(os.path.exists(os.path.join(folder, name)) for name in names):
            raise lacking(self.name, FileNotFoundError(f"no {' and no '.join(names)} in the folder {folder}"))
        return folder


#: finds what is no folder, by its name and the caller's arguments, and judges these; asks nobody yet
Finder = Callable[[str, Mapping[str, object]], Folder]
elsewhere: Finder | None = None
#: tensors by name, and the pieces of memory in which all of them lie, where these are fewer
Tensors = tuple[dict[str, torch.Tensor], Sequence[torch.Tensor] | None]


#: who knows other formats than PEFT's: says what to do with a file or folder that is of one of these
FORMATS: list[Callable[[str], str | None]] = []


def no_config(name: str, error: object, next_step: str | None = None) -> HotswapError:
    """Why an adapter's config can't be had."""
    known = next((text for look in FORMATS if (text := look(name))), None)
    next_step = known or next_step or "check the path, the id, `subfolder`, `revision` and `token`"
    return refuse("no_config_file", source=name, error=error, next_step=next_step)


def no_weights(name: str, error: object, next_step: str | None = None) -> HotswapError:
    """Why an adapter's weights can't be had."""
    next_step = next_step or "check the folder or repository, and get a complete copy of it"
    return refuse("no_weights_file", source=name, error=error, next_step=next_step)


def find_source(source: object, arguments: Mapping[str, object]) -> Folder:
    """The place that a user means by a path or a name."""
    if not isinstance(source, (str, os.PathLike)):
        raise refuse("no_adapter_to_read", found=f"a {type(source).__name__}: {source!r}"[:200])
    name = os.fspath(source)
    # also for a folder, since it judges the arguments
    place = elsewhere(name, arguments) if elsewhere is not None else None
    return Folder(name, str(arguments.get("subfolder") or "")) if os.path.isdir(name) or place is None else place


# ---- what is in the files


def check_file(path: str | os.PathLike[str]) -> None:
    """Refuses what is no file: opening a pipe would wait for ever, and a device has no end.

    Raises
    ------
    OSError
        If ``path`` leads to anything but a regular file, or to nothing.
    """
    if not os.path.isfile(path):
        raise OSError(f"{os.path.basename(path)} is a folder, a pipe or a device, and no file")


def read_config(place: Folder) -> PeftConfig:
    """The config of an adapter, without its weights."""
    path = os.path.join(place.folder_with_config(), CONFIG_NAME)
    try:
        check_file(path)
        attributes = PeftConfig.from_json_file(path)
        if (peft_type := attributes["peft_type"]) not in PEFT_TYPE_TO_CONFIG_MAPPING:
            raise refuse("unknown_peft_type", source=place.name, peft_type=peft_type)
        config_class = PEFT_TYPE_TO_CONFIG_MAPPING[peft_type]
        return config_class.from_peft_type(**config_class.check_kwargs(**attributes))
    except HotswapError:
        raise
    except Exception as error:  # of any kind: PEFT takes a config from a file without looking at it
        raise refuse("config_unreadable", source=place.name, error=error) from error


def read_tensors(
    place: Folder, device: str | torch.device, key_mapping: dict[str, str] | None, for_one_swap: bool
) -> Tensors:
    """The tensors of an adapter by their names in its file. For one swap, they may be the file itself."""
    folder = place.folder_with_weights()
    name = next(name for name in READERS if os.path.exists(os.path.join(folder, name)))
    try:
        check_file(os.path.join(folder, name))
        return READERS[name](folder, str(device), key_mapping, for_one_swap)
    except Exception as error:  # of any kind: a damaged file leads its readers astray
        raise refuse("weights_unreadable", source=place.name, error=error) from error


def read_safetensors(folder: str, device: str, key_mapping: dict[str, str] | None, for_one_swap: bool) -> Tensors:
    tensors = load_peft_weights(folder, device=device, key_mapping=key_mapping)
    if torch.device(device).type == "cpu" and not for_one_swap:
        # they are the file itself
        tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    return tensors, None


#: for each name that a file of weights may have, what reads it: from a folder to a device, with a key mapping, and
#: whether the tensors are let go of after one swap
READERS: dict[str, Callable[[str, str, dict[str, str] | None, bool], Tensors]] = {
    SAFETENSORS_WEIGHTS_NAME: read_safetensors
}
