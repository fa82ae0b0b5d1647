"""Sources of adapters: local folders, and reading a config. :mod:`~hotswap_lab.files.hub` has the source on the Hub."""

import glob
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

from ..core.errors import HotswapError, listing, refused

#: the file that a save locks while it replaces the files of a folder
LOCK = ".hotswap-save.lock"


@dataclass
class Folder:
    """A local folder with an adapter's files, and the base class of other sources."""

    #: for messages, and to read the adapter again
    name: str
    subfolder: str = ""
    #: the version that the files are pinned to; None if they aren't
    revision: str | None = None

    def folder_with_config(self) -> str:
        """The local folder that has the config."""
        return self._with("no_config_file", CONFIG_NAME)

    def folder_with_weights(self) -> str:
        """The local folder that has the weights, of the same version as the config."""
        return self._with("no_weights_file", SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)

    @property
    def state(self) -> list[object]:
        """The inode, size and time of each file, None for a missing one. The last is the lock of a save."""
        files: list[object] = []
        for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, LOCK):
            try:
                status = os.stat(os.path.join(self.name, self.subfolder, name))
                files.append((status.st_ino, status.st_size, status.st_mtime_ns))
            except (OSError, ValueError):
                files.append(None)
        return files

    def _with(self, lacking: str, *names: str) -> str:
        folder = os.path.join(self.name, self.subfolder) if self.subfolder else self.name
        if not any(os.path.exists(os.path.join(folder, name)) for name in names):
            description, next_step = instead(folder, names)
            raise refused(lacking, source=self.name, error=description, next_step=next_step)
        return folder


def instead(path: str, names: Sequence[str] = (), next_step: str = "check the path") -> tuple[str, str]:
    """Describe a path without an adapter's files, and the next step, for a refusal."""
    description, folder = f"no folder {path!r} here", os.path.dirname(os.path.normpath(path))
    if is_file := os.path.isfile(path):
        description, next_step = f"the file {path!r}", "pass its folder"
    elif os.path.isdir(path):
        description, folder = f"no {' and no '.join(names)} in the folder {path}", path
        next_step = "check the path, or get a complete copy of the adapter"
    within = os.path.join(glob.escape(folder), "")
    if glob.glob(f"{within}pytorch_lora_weights.*") or (is_file and not glob.glob(within + CONFIG_NAME)):
        next_step += "; the LoRA of a diffusers pipeline is read by hotswap_lab.hotswap_pipeline"
    if not is_file and (folders := sorted(map(os.path.dirname, glob.glob(f"{within}*/{CONFIG_NAME}")))):
        names = [repr(os.path.basename(path)) for path in folders]
        description += f"; {folder or 'this folder'} has the adapters {listing(names)}"
        next_step = f"pass one of them, such as {folders[0]!r}; all: AdapterPool(model, adapters={{name: folder}})"
    return description, next_step


#: tensors by name; and pieces that together cover the memory of all of them, or None
Tensors = tuple[dict[str, torch.Tensor], Sequence[torch.Tensor] | None]


# ---- reading the files


def check_file(path: str) -> tuple[str, int, int, int]:
    """Refuse a path that is not a regular file: opening a pipe may wait forever, and a device may have no end.

    Returns the absolute path, and the file's inode, size and time, which identify this version of it.

    Raises
    ------
    OSError
        If ``path`` is not a regular file, or doesn't exist.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(f"{os.path.basename(path)} is a folder, a pipe or a device, not a file")
    return os.path.abspath(path), status.st_ino, status.st_size, status.st_mtime_ns


def read_config(folder: Folder) -> PeftConfig:
    """Read the config of an adapter."""
    path = os.path.join(folder.folder_with_config(), CONFIG_NAME)
    try:
        check_file(path)
        attributes = PeftConfig.from_json_file(path)
        if (peft_type := attributes["peft_type"]) not in PEFT_TYPE_TO_CONFIG_MAPPING:
            raise refused("unknown_peft_type", source=folder.name, peft_type=peft_type)
        config_class = PEFT_TYPE_TO_CONFIG_MAPPING[peft_type]
        return config_class.from_peft_type(**config_class.check_kwargs(**attributes))
    except HotswapError:
        raise
    except Exception as error:  # of any type, because PEFT doesn't check a config that it reads from a file
        raise refused("config_unreadable", source=folder.name, error=error) from error
