"""The files of an adapter, wherever they are: a folder on this machine, or a repository on the Hugging Face Hub.

From the Hub come the config and one file of weights, nothing else, through huggingface_hub and into its cache. What the
cache has is used where the Hub can't be asked. The weights are those of the commit that the config was read from, even
if somebody pushes to the repository in between.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import re
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
)
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

from .. import __version__
from .paths import is_file, is_folder

#: what a caller may pass on to huggingface_hub; the first two arguments, repository and file name, are ours
HUB_ARGUMENTS = (*list(inspect.signature(hf_hub_download).parameters)[2:], "use_auth_token")
#: those of them that say how the Hub is asked, rather than where the files go
_FOR_ASKING = ("token", "library_name", "library_version", "user_agent", "headers", "endpoint")


def hub_arguments(function: str, arguments: Mapping[str, object]) -> dict[str, object]:
    """The arguments that were given, ready to be passed on. Unknown ones are a TypeError, as for any function."""
    if unknown := sorted(set(arguments) - (set(HUB_ARGUMENTS) - {"dry_run"})):
        raise TypeError(f"{function}() got unexpected keyword arguments: {', '.join(unknown)}")
    given = {key: value for key, value in arguments.items() if value is not None}
    if "use_auth_token" in given:  # the older name
        given.setdefault("token", given.pop("use_auth_token"))
        given.pop("use_auth_token", None)
    return given


def folder_with_config(source: str, hub: Mapping[str, object]) -> str:
    """The folder on this machine that has the config, which is downloaded if it must be.

    Raises
    ------
    Exception
        Whatever huggingface_hub raises, or FileNotFoundError for a folder without a config.
    """
    if not is_folder(source):
        return os.path.dirname(_fetch(source, CONFIG_NAME, hub))
    return _folder_with(source, (CONFIG_NAME,), hub)


def folder_with_weights(source: str, folder: str, hub: Mapping[str, object]) -> str:
    """The folder that has the weights, safetensors if there are any, which are downloaded if they must be.

    ``folder`` is what :func:`folder_with_config` gave. Raises what that raises.
    """
    if is_folder(source):
        return _folder_with(source, (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME), hub)
    hub = {**hub, "revision": commit_of(folder, hub) or hub.get("revision")}
    try:
        return os.path.dirname(_fetch(source, SAFETENSORS_WEIGHTS_NAME, hub))
    except (RemoteEntryNotFoundError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        # where the Hub could not be asked there is no use in asking again, unless the cache is all there is
        cache_only = hub.get("local_files_only") or constants.HF_HUB_OFFLINE
        if not (isinstance(error, RemoteEntryNotFoundError) or cache_only):
            raise
        return os.path.dirname(_fetch(source, WEIGHTS_NAME, hub))


def commit_of(folder: str, hub: Mapping[str, object]) -> str | None:
    """The commit that a folder in huggingface_hub's cache is of. None for any other folder.

    >>> commit_of("/cache/models--team--adapter/snapshots/" + 40 * "a" + "/inner", {"subfolder": "inner"})
    'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa'
    >>> commit_of("/home/me/adapter", {})
    """
    depth = len([part for part in str(hub.get("subfolder") or "").split("/") if part])
    above = [Path(folder), *Path(folder).parents][depth:]
    is_snapshot = len(above) > 1 and above[1].name == "snapshots" and re.fullmatch("[0-9a-f]{40}", above[0].name)
    return above[0].name if is_snapshot else None


def _folder_with(source: str, names: tuple[str, ...], hub: Mapping[str, object]) -> str:
    folder = os.path.join(source, str(hub.get("subfolder") or ""))
    if not any(is_file(os.path.join(folder, name)) for name in names):
        raise FileNotFoundError(f"no {' and no '.join(names)} in the folder {folder}")
    return folder


def _fetch(repository: str, name: str, hub: Mapping[str, object]) -> str:
    hub = {"library_name": "hotswap_lab", "library_version": __version__, **hub}
    if not (hub.get("local_files_only") or hub.get("local_dir")):
        _ask_first(repository, name, hub)
    return hf_hub_download(repository, name, **hub)


def _ask_first(repository: str, name: str, hub: Mapping[str, object]) -> None:
    """Whether the Hub can be reached at all, for a file that the cache lacks.

    huggingface_hub asks again and again then, a minute each time. A user who waits in a notebook had better be told.
    """
    where = {key: hub[key] for key in ("revision", "repo_type") if key in hub}
    name = f"{hub['subfolder']}/{name}" if hub.get("subfolder") else name
    cached = try_to_load_from_cache(repository, name, cache_dir=hub.get("cache_dir"), **where)
    if isinstance(cached, str):
        return
    url = hf_hub_url(repository, name, endpoint=hub.get("endpoint"), **where)
    timeout = hub.get("etag_timeout", constants.HF_HUB_ETAG_TIMEOUT)
    # an answer will do, even a bad one: the download will get the same, or a better one after a while
    with contextlib.suppress(HfHubHTTPError):
        get_hf_file_metadata(url, timeout=timeout, **{key: hub[key] for key in _FOR_ASKING if key in hub})
