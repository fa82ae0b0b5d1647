"""Reading an adapter from a folder, from the Hub, or from tensors in memory."""

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
#: how often a folder is read again, a hundredth of a second later, because its files were exchanged meanwhile
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
        place = find_source(source, hub)
        config, (file, (tensors, pieces)) = read_files(place, torch_device or "cpu", key_mapping, for_one_swap)
        adapter = cls(config, tensors, place.name, place.revision, os.path.isdir(place.name), file)
        if pieces is None or not all(map(is_finite, pieces)):
            adapter.check_tensors(allow_nonfinite)
        return adapter


class File(NamedTuple):
    """The file of an adapter's weights when it was read: its inode, size and time tell it from another version."""

    path: str
    inode: int
    size: int
    time: int
    #: what its keys were renamed by
    key_mapping: dict[str, str] | None = None

    def is_in(self, slot: Slot) -> bool:
        """Whether the model has the weights that are in the file now, and no others; False if that can't be seen."""
        if any(hasattr(each, "full_tensor") for each in slot.host.base.parameters()):
            return False  # reading the whole takes a call in every process
        try:
            _, (tensors, _) = read_tensors(Folder(os.path.dirname(self.path)), "cpu", self.key_mapping, True)
            check_saved(slot, live := saved_tensors(slot, embeddings=True))
            ours, theirs = ({own_key(slot, key): each for key, each in named.items()} for named in (live, tensors))
            if not ours.keys() <= theirs.keys():
                return False
            base = LoadedAlone(slot).state_dict()  # a file may have base weights, too
            ours = {own_key(slot, key): each for key, each in base.items()} | ours
            return all(have_same_values(ours[key], each) for key, each in theirs.items())
        except Exception:  # of any type: the file is gone, or the weights are elsewhere
            return False


def own_key(slot: Slot, key: str) -> str:
    """The key of a tensor in the base model, whatever form of it a file has."""
    return slot.own_keys.get(short := canonical_path(key), short)


def digest_of(adapter: core.Adapter) -> str:
    """A hash of an adapter's config and its tensors."""
    config = json.dumps(adapter.config.to_dict(), sort_keys=True, default=sorted)
    digest = hashlib.sha256(config.encode())
    for key, tensor in sorted(adapter.tensors.items()):
        digest.update(f"{key} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def find_source(source: object, arguments: dict[str, Any]) -> Folder:
    """The folder or repository for a path or a name that a user passed."""
    if not isinstance(source, (str, os.PathLike)):
        raise refused("no_adapter_to_read", found=f"a {type(source).__name__}: {source!r}"[:200])
    name = os.fspath(source)
    is_path = os.path.exists(name) or not isinstance(source, str) or not REPOSITORY.fullmatch(name)
    if is_path and not arguments:
        return Folder(name)
    repository = find_repository(name, arguments)  # also for a folder, because it checks the arguments
    return Folder(name, str(arguments.get("subfolder") or "")) if is_path else repository


def read_files(place: Folder, *how: Any) -> tuple[PeftConfig, tuple[File, Tensors]]:
    """The config and the tensors of an adapter, again if a save exchanged the files in between; ``how`` as below."""
    for last in (*[False] * TRIES, True):
        before = place.state
        try:
            found = read_config(place), read_tensors(place, *how)
            if before == place.state:
                return found
        except HotswapError:
            if last or (before == place.state and before[-1] is None):
                raise
        time.sleep(0.01)
    raise refused("changes_while_read", source=place.name)


def read_tensors(
    place: Folder, device: str | torch.device, key_mapping: dict[str, str] | None, for_one_swap: bool
) -> tuple[File, Tensors]:
    """The file of an adapter's weights, and its tensors by its keys: with ``for_one_swap``, maybe the file itself."""
    folder = place.folder_with_weights()
    path = os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)
    try:
        if os.path.exists(path):
            file = File(*check_file(path), key_mapping)
            return file, read_safetensors(folder, str(device), key_mapping, for_one_swap)
        file = File(*check_file(os.path.join(folder, WEIGHTS_NAME)), key_mapping)
        return file, (read_bin(folder, str(device), key_mapping), None)
    except Exception as error:  # a damaged file may cause an error of any type
        raise refused("weights_unreadable", source=place.name, error=error) from error


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
    place = find_source(source, arguments)
    return Adapter(read_config(place), {}, place.name, is_folder=os.path.isdir(place.name))
