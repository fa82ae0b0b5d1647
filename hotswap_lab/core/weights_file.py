"""Files of weights: what may be opened at all, and a fast way to read safetensors.

A safetensors file becomes one piece of memory that all of its tensors are views of. ``safetensors.torch.load_file``
makes a storage for each tensor, which for hundreds of small ones takes longer than reading the file. The safetensors
library still judges the file: its own reader checks the header first.

Follows the format's description at https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import math
import os
import stat
import zipfile
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def check_file(path: str | os.PathLike[str]) -> None:
    """Refuses what is no file: opening a pipe would wait for ever, and a device has no end.

    Raises
    ------
    OSError
        If ``path`` leads to anything but a regular file, or to nothing.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(f"{os.path.basename(path)} is a folder, a pipe or a device, and no file")


def check_archive(path: str | os.PathLike[str]) -> None:
    """Refuses a ``.bin`` that would take more memory than its file: ``torch.save`` compresses nothing.

    Raises
    ------
    zipfile.BadZipFile
        If what is in the archive is larger than the archive. Files in PyTorch's format before 1.6 are no archives.
    """
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return
    with zipfile.ZipFile(path) as archive:
        inside = sum(entry.file_size for entry in archive.infolist())
    if inside > (size := os.path.getsize(path)):
        raise zipfile.BadZipFile(f"{inside:,} bytes compressed, or named twice, in a file of {size:,}")


@dataclass(frozen=True)
class Mapped:
    """A file's tensors by name, which lie side by side in ``whole``."""

    tensors: dict[str, torch.Tensor]
    whole: torch.Tensor


def map_weights(path: str | os.PathLike[str]) -> Mapped | None:
    """The tensors of a safetensors file, on the CPU, in the order of the file.

    Returns None for a file that is fine but can't be read this way: with several dtypes, other ones, or badly aligned.

    They are the file itself, mapped into memory, and are read where they are needed. When somebody shortens the file
    meanwhile, whoever looks at them is ended by the operating system. So only for tensors that are let go of at once.

    Raises
    ------
    safetensors.SafetensorError, OSError
        If the file is damaged or can't be read.

    Examples
    --------
    >>> from hotswap_lab import demo
    >>> mapped = map_weights(demo.adapter_path("double") + "/adapter_model.safetensors")
    >>> len(mapped.tensors), mapped.whole.shape
    (32, torch.Size([8192]))
    """
    with safe_open(path, framework="pt"):
        pass  # raises if the header is not in order: sizes, offsets, overlaps, what lies beyond the end
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        header_size = int.from_bytes(file.read(8), "little")
        if header_size > size:
            raise SafetensorError("the file was changed while it was read")
        header = json.loads(file.read(header_size))
    header.pop("__metadata__", None)
    start = 8 + header_size
    entries = sorted(header.items(), key=_offsets)
    dtypes = {entry["dtype"] for _, entry in entries}
    dtype = DTYPES.get(dtypes.pop()) if len(dtypes) == 1 else None
    if dtype is None or size == start or start % dtype.itemsize:
        return None
    storage: Any = torch.UntypedStorage.from_file(os.fspath(path), shared=False, nbytes=size)
    empty: Any = torch.empty(0, dtype=dtype)
    whole: torch.Tensor = empty.set_(storage, start // dtype.itemsize, ((size - start) // dtype.itemsize,))
    parts = whole.split([math.prod(entry["shape"]) for _, entry in entries])
    tensors = {name: part.view(entry["shape"]) for (name, entry), part in zip(entries, parts, strict=True)}
    return Mapped(tensors, whole)


def _offsets(item: tuple[str, dict]) -> list[int]:
    return item[1]["data_offsets"]
