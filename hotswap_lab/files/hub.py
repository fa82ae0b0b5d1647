"""Downloading an adapter from the Hugging Face Hub.

Only the config and one file of weights are downloaded, by huggingface_hub into its cache. Cached files are used where
the Hub can't be reached. The weights are those of the commit that the config was read from, even if a new commit is
pushed to the repository in between.
"""

import contextlib
import inspect
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, OfflineModeIsEnabled
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

from ..core.errors import first_line, refused
from .sources import Folder, instead

UNKNOWN = f"the cache alone doesn't show whether the repository has {SAFETENSORS_WEIGHTS_NAME}, which is preferred"


@dataclass
class Repository(Folder):
    """A repository on the Hub; its ``revision`` is the commit that the config was read from."""

    arguments: Mapping[str, object] = field(default_factory=dict)

    def folder_with_config(self) -> str:
        try:
            folder = os.path.dirname(fetch(self.name, CONFIG_NAME, self.arguments))
        except Exception as error:  # of many types: no such repository, no access, no network, no space, ...
            next_step = _advice(error) or "check the path, the id, `subfolder`, `revision` and `token`"
            description, next_step = instead(self.name, next_step=next_step)
            description += f"; and the Hub: {first_line(_cause(error))}"
            raise refused("no_config_file", source=self.name, error=description, next_step=next_step) from error
        self.revision: str | None = commit_of(folder) or self._recorded_commit()
        return folder

    def _recorded_commit(self) -> str | None:
        """The commit that huggingface_hub recorded when it downloaded the config to ``local_dir``."""
        names = filter(None, (self.arguments.get("subfolder"), CONFIG_NAME + ".metadata"))
        record = Path(str(self.arguments.get("local_dir")), ".cache", "huggingface", "download", *map(str, names))
        commit = record.read_text().partition("\n")[0] if record.is_file() else ""
        return commit if re.fullmatch("[0-9a-f]{40}", commit) else None

    def folder_with_weights(self) -> str:
        hub = {**self.arguments, "revision": self.revision or self.arguments.get("revision")}
        next_step = "check the repository, and get a complete copy of it"
        try:
            try:
                return os.path.dirname(fetch(self.name, SAFETENSORS_WEIGHTS_NAME, hub))
            except (EntryNotFoundError, OfflineModeIsEnabled) as error:
                is_unknown = isinstance(error, LocalEntryNotFoundError) and not constants.HF_HUB_OFFLINE
                if is_unknown and in_cache(self.name, SAFETENSORS_WEIGHTS_NAME, hub) is None:
                    # a fresh load asks the Hub, even with local_files_only, and takes no .bin if there is a safetensors
                    next_step = f"leave out local_files_only, or get a complete copy of it: {UNKNOWN}"
                    raise
                return os.path.dirname(fetch(self.name, WEIGHTS_NAME, hub))
        except Exception as error:
            next_step = _advice(error) or next_step
            raise refused("no_weights_file", source=self.name, error=_cause(error), next_step=next_step) from error


def find_repository(name: str, arguments: Mapping[str, object]) -> Repository:
    """Return the repository of this name, without a request to the Hub. Unknown arguments raise a TypeError."""
    arguments = dict(arguments)
    if "use_auth_token" in arguments:  # the older name, which PEFT accepts, too
        arguments.setdefault("token", arguments.pop("use_auth_token"))
    inspect.signature(hf_hub_download).bind("repository", "file", **arguments)
    return Repository(name, arguments=arguments)


def _cause(error: Exception) -> Exception:
    """The cause of an error: huggingface_hub's own message is only about its cache."""
    return error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error


def _advice(error: Exception) -> str | None:
    if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        return "check `subfolder`; the LoRA of a diffusers pipeline is read by hotswap_lab.hotswap_pipeline"
    if constants.HF_HUB_OFFLINE and isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
        return "unset HF_HUB_OFFLINE and restart, so that it can be downloaded, or pass a folder that has it"
    return None


def commit_of(folder: str) -> str | None:
    """Return the commit of a folder in huggingface_hub's cache; None for any other folder.

    >>> commit_of("/cache/models--team--adapter/snapshots/" + 40 * "a" + "/inner")
    'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa'
    >>> commit_of("/home/me/adapter")
    """
    match = re.search(r"[\\/]snapshots[\\/]([0-9a-f]{40})\b", folder)
    return match and match[1]


def in_cache(repository: str, name: str, hub: Mapping[str, object]) -> object:
    """Return the path of a file in huggingface_hub's cache; None if it isn't there.

    If the cache has recorded that the repository doesn't have this file, the result is a different object.
    """
    where = {key: hub.get(key) for key in ("cache_dir", "revision", "repo_type")}
    return try_to_load_from_cache(repository, _path(name, hub), **where)


def _path(name: str, hub: Mapping[str, object]) -> str:
    return f"{hub['subfolder']}/{name}" if hub.get("subfolder") else name


def fetch(repository: str, name: str, hub: Mapping[str, object]) -> str:
    """Return the path of a file of a repository.

    If the Hub can't be reached and the file isn't in the cache, this raises an error soon.
    """
    is_cached = isinstance(in_cache(repository, name, hub), str)
    if not (is_cached or hub.get("local_files_only") or hub.get("local_dir")):
        # If the Hub doesn't answer, the download would retry for minutes. With one request before it, a user who waits
        # in a notebook gets an error soon.
        where = {key: hub.get(key) for key in ("endpoint", "revision", "repo_type")}
        timeout = hub.get("etag_timeout") or constants.HF_HUB_ETAG_TIMEOUT
        with contextlib.suppress(EntryNotFoundError):  # the download raises it again, and records it in the cache
            url = hf_hub_url(repository, _path(name, hub), **where)
            get_hf_file_metadata(url, token=hub.get("token"), headers=hub.get("headers"), timeout=timeout)
    return hf_hub_download(repository, name, **hub)
