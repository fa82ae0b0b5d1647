"""Reading an adapter from a folder, from the Hub, or from tensors in memory.

Tests: ``tests/files/test_sources.py``, ``tests/core/test_swap.py`` and ``tests/robustness/test_bad_files.py``.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from typing import Any, NamedTuple

import torch
from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

from ..core import adapter as core
from ..core.errors import HotswapError, refused
from ..core.host import canonical_path
from ..core.slot import Slot
from ..core.tensors import have_same_values, is_finite
from .bin_file import read_bin
from .hub import find_repository
from .saving import LoadedAlone, check_saved, saved_tensors
from .sources import Folder, Tensors, check_file, read_config
from .weights_file import read_safetensors

#: an id on the Hub; all else is a path
REPOSITORY = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
#: how often a folder is read again, a hundredth of a second later, if its files were replaced while they were read
TRIES = 50


class Adapter(core.Adapter):
    __doc__ = core.Adapter.__doc__

    @classmethod
    def load(
        cls,
        source: str | os.PathLike[str],
        *,
        torch_device: str | torch.device | None = None,
        key_mapping: dict[str, str] | None = None,
        allow_nonfinite: bool = False,
        for_one_swap: bool = False,
        **hub: Any,
    ) -> Adapter:
        """Read an adapter from a folder or from the Hugging Face Hub.

        ``adapter_model.safetensors`` is preferred; ``adapter_model.bin`` is read with ``weights_only=True``, so
        nothing in it is executed. The tensors are copies, so later changes of the files don't affect them.

        Parameters
        ----------
        source:
            A folder with ``adapter_config.json``, or the id of a Hub repository.
        torch_device:
            The device to read the tensors to. Default: CPU.
        key_mapping:
            Regular expressions and replacements for keys, as in ``PeftModel.from_pretrained``.
        allow_nonfinite:
            Whether weights may contain NaN and infinity.
        for_one_swap:
            Whether the tensors may be the file itself, mapped into memory, which is faster. Don't keep them: a process
            that reads them after the file was shortened is ended.
        **hub:
            ``subfolder``, ``revision``, ``token``, ``cache_dir`` and other arguments of ``hf_hub_download``.

        Raises
        ------
        HotswapError
            If the files can't be found or read, or are damaged.

        Examples
        --------
        >>> from hotswap_lab import demo
        >>> adapter = Adapter.load(demo.adapter_path("double"))
        >>> adapter.config.r, len(adapter.tensors)
        (2, 32)
        """
        folder = find_source(source, hub)
        config, (file, (tensors, pieces)) = read_files(folder, torch_device or "cpu", key_mapping, for_one_swap)
        adapter = cls(config, tensors, folder.name, folder.revision, os.path.isdir(folder.name), file)
        if pieces is None or not all(map(is_finite, pieces)):
            adapter.check_tensors(allow_nonfinite)
        return adapter


class File(NamedTuple):
    """The file of an adapter's weights when it was read: its inode, size and time identify this version."""

    path: str
    inode: int
    size: int
    time: int
    #: the patterns and replacements that renamed its keys
    key_mapping: dict[str, str] | None = None

    def is_in(self, slot: Slot) -> bool:
        """Whether the model has the weights that are in the file now, and no others; False if that can't be seen."""
        if any(hasattr(parameter, "full_tensor") for parameter in slot.host.base.parameters()):
            return False  # gathering a whole tensor takes a call in every process
        try:
            _, (tensors, _) = read_tensors(Folder(os.path.dirname(self.path)), "cpu", self.key_mapping, True)
            check_saved(slot, live := saved_tensors(slot, embeddings=True))
            in_model, in_file = by_own_keys(slot, live), by_own_keys(slot, tensors)
            if not in_model.keys() <= in_file.keys():
                return False
            # a file may have base weights, too
            in_model = by_own_keys(slot, LoadedAlone(slot).state_dict()) | in_model
            return all(have_same_values(in_model[key], tensor) for key, tensor in in_file.items())
        except Exception:  # of any type: the file is gone, or the weights are elsewhere
            return False


def by_own_keys(slot: Slot, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors by their keys in the base model, whatever form of the keys a file has."""
    paths = {canonical_path(key): tensor for key, tensor in tensors.items()}
    return {slot.own_keys.get(path, path): tensor for path, tensor in paths.items()}


def digest_of(adapter: core.Adapter) -> str:
    """Return a hash of an adapter's config and its tensors."""
    config = json.dumps(adapter.config.to_dict(), sort_keys=True, default=sorted)
    digest = hashlib.sha256(config.encode())
    for key, tensor in sorted(adapter.tensors.items()):
        digest.update(f"{key} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def find_source(source: object, arguments: dict[str, Any]) -> Folder:
    """Return the folder or repository for a path or a name that a user passed."""
    if not isinstance(source, (str, os.PathLike)):
        raise refused("no_adapter_to_read", found=f"a {type(source).__name__}: {source!r}"[:200])
    name = os.fspath(source)
    is_path = os.path.exists(name) or not isinstance(source, str) or not REPOSITORY.fullmatch(name)
    if is_path and not arguments:
        return Folder(name)
    repository = find_repository(name, arguments)  # also for a folder, because it checks the arguments
    return Folder(name, str(arguments.get("subfolder") or "")) if is_path else repository


def read_files(folder: Folder, *options: Any) -> tuple[PeftConfig, tuple[File, Tensors]]:
    """Read the config and the tensors of an adapter, again if a save replaced the files in between.

    ``options`` are those of :func:`read_tensors`.
    """
    for is_last in (*[False] * TRIES, True):
        before = folder.state
        try:
            config_and_tensors = read_config(folder), read_tensors(folder, *options)
            if before == folder.state:
                return config_and_tensors
        except HotswapError:
            if is_last or (before == folder.state and before[-1] is None):
                raise
        time.sleep(0.01)
    raise refused("changes_while_read", source=folder.name)


def read_tensors(
    folder: Folder, device: str | torch.device, key_mapping: dict[str, str] | None, for_one_swap: bool
) -> tuple[File, Tensors]:
    """Read an adapter's tensors, by its keys, and describe its file.

    With ``for_one_swap``, the tensors may be the file itself.
    """
    path = folder.folder_with_weights()
    is_bin = not os.path.exists(os.path.join(path, SAFETENSORS_WEIGHTS_NAME))
    try:
        name = WEIGHTS_NAME if is_bin else SAFETENSORS_WEIGHTS_NAME
        file = File(*check_file(os.path.join(path, name)), key_mapping)
        if is_bin:
            return file, (read_bin(path, str(device), key_mapping), None)
        return file, read_safetensors(path, str(device), key_mapping, for_one_swap)
    except Exception as error:  # a damaged file may cause an error of any type
        raise refused("weights_unreadable", source=folder.name, error=error) from error


def read(source: Any, *, only_config: bool = False, **arguments: Any) -> core.Adapter:
    """Turn any form of adapter that a user may pass into an :class:`Adapter`.

    Parameters
    ----------
    source:
        An adapter, a pair of a state dict and a config, a folder, or a Hub id; with ``only_config`` also a config.
    only_config:
        Whether only the config is needed. The file of weights isn't read then.
    **arguments:
        As for :meth:`Adapter.load`.
    """
    if isinstance(source, core.Adapter):
        return source
    if isinstance(source, tuple):
        return Adapter.from_state_dict(*source)
    if not only_config:
        return Adapter.load(source, **arguments)
    if isinstance(source, PeftConfig):
        return Adapter(source, {}, "a config")
    folder = find_source(source, arguments)
    return Adapter(read_config(folder), {}, folder.name, is_folder=os.path.isdir(folder.name))
