"""Sources: where an adapter's files are, and its config. A folder is one; :mod:`~hotswap_lab.files.hub` has another."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from ..core.errors import HotswapError, refuse


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
        return self._with(no_weights, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)

    def _with(self, lacking: Callable[[str, Exception], HotswapError], *names: str) -> str:
        folder = os.path.join(self.name, self.subfolder)
        if not any(os.path.exists(os.path.join(folder, name)) for name in names):
            raise lacking(self.name, FileNotFoundError(f"no {' and no '.join(names)} in the folder {folder}"))
        return folder


#: tensors by name, and the pieces of memory in which all of them are, where these are fewer
Tensors = tuple[dict[str, torch.Tensor], Sequence[torch.Tensor] | None]


def no_config(name: str, error: object, next_step: str | None = None) -> HotswapError:
    """Why an adapter's config can't be had."""
    next_step = _what_reads(name) or next_step or "check the path, the id, `subfolder`, `revision` and `token`"
    return refuse("no_config_file", source=name, error=error, next_step=next_step)


def no_weights(name: str, error: object, next_step: str | None = None) -> HotswapError:
    """Why an adapter's weights can't be had."""
    next_step = next_step or "check the folder or repository, and get a complete copy of it"
    return refuse("no_weights_file", source=name, error=error, next_step=next_step)


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


# ---- files of pipelines

#: how the names of tensors begin in the files of pipelines: diffusers', kohya's, those of single files
HEADS = ("unet.", "text_encoder", "transformer.", "lora_unet_", "lora_te", "diffusion_model.")


def _what_reads(name: str) -> str | None:
    """What to do with the file, or the folder, of a pipeline's LoRA that was given as an adapter of a single model."""
    files = [name] if os.path.isfile(name) else []
    if os.path.isdir(name):
        files = [os.path.join(name, file) for file in sorted(os.listdir(name))]
    for file in files:
        if os.path.basename(file).startswith("pytorch_lora_weights.") or _has_heads(file):
            return f"this is the LoRA of a diffusers pipeline: call hotswap_lab.hotswap_pipeline(pipe, {file!r}, name)"
    return None


def _has_heads(file: str) -> bool:
    if not file.endswith(".safetensors"):
        return False
    try:
        with safe_open(file, framework="pt") as tensors:
            return any(key.startswith(HEADS) for key in tensors.keys())  # noqa: SIM118 - it is no dict
    except (OSError, SafetensorError):
        return False
