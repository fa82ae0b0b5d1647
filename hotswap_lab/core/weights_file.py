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

import torch
from safetensors import SafetensorError, safe_open

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def check_file(path: str | os.PathLike) -> None:
    """Refuses what is no file: opening a pipe would wait for ever, and a device has no end.

    Raises
    ------
    OSError
        If ``path`` leads to anything but a regular file, or to nothing.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(f"{os.path.basename(path)} is a folder, a pipe or a device, and no file")


def check_archive(path: str | os.PathLike) -> None:
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


def read_weights(path: str | os.PathLike, *, mapped: bool = False) -> dict[str, torch.Tensor] | None:
    """The tensors of a safetensors file by name, on the CPU, in the order of the file.

    Returns None for a file that is fine but can't be read this way: with other dtypes, or badly aligned.

    Parameters
    ----------
    path:
        A regular file.
    mapped:
        Whether the tensors are the file itself, mapped into memory: faster, since it is read where it is needed. But
        when somebody shortens the file, whoever looks at them is ended by the operating system. So only for tensors
        that are let go of at once.

    Raises
    ------
    safetensors.SafetensorError, OSError
        If the file is damaged or can't be read.

    Examples
    --------
    >>> from hotswap_lab import demo
    >>> tensors = read_weights(demo.adapter_path("double") + "/adapter_model.safetensors")
    >>> len(tensors), len({tensor.untyped_storage().data_ptr() for tensor in tensors.values()})
    (32, 1)
    """
    with safe_open(path, framework="pt"):
        pass  # raises if the header is not in order: sizes, offsets, overlaps, what lies beyond the end
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        header_size = int.from_bytes(start, "little")
        if header_size > size:
            raise SafetensorError("the file was changed while it was read")
        header_text = file.read(header_size)
        header = json.loads(header_text)
        storage = None if mapped else _rest_of(file, start + header_text, size)
    header.pop("__metadata__", None)
    start = 8 + header_size
    entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    if size == start or any(
        entry["dtype"] not in DTYPES or (start + entry["data_offsets"][0]) % DTYPES[entry["dtype"]].itemsize
        for _, entry in entries
    ):
        return None
    if storage is None:
        storage = torch.UntypedStorage.from_file(os.fspath(path), shared=False, nbytes=size)
    empty = {dtype: torch.empty(0, dtype=dtype) for dtype in {DTYPES[entry["dtype"]] for _, entry in entries}}
    tensors = {}
    for name, entry in entries:
        dtype = DTYPES[entry["dtype"]]
        first, last = entry["data_offsets"]
        if last - first != math.prod(entry["shape"]) * dtype.itemsize or not 0 <= first <= last <= size - start:
            raise SafetensorError("the file was changed while it was read")
        offset = (start + first) // dtype.itemsize
        tensors[name] = empty[dtype].new().set_(storage, offset, entry["shape"])
    return tensors


def _rest_of(file, read: bytes, size: int) -> torch.UntypedStorage:
    """The whole file in memory, of which a part has been read."""
    memory = torch.empty(size, dtype=torch.uint8)
    buffer = memoryview(memory.numpy())
    buffer[: len(read)] = read
    done = len(read)
    while done < size:
        if not (count := file.readinto(buffer[done:])):
            raise SafetensorError("the file was shortened while it was read")
        done += count
    return memory.untyped_storage()


def in_one_piece(tensors: list[torch.Tensor]) -> torch.Tensor | None:
    """One flat tensor over the memory of all ``tensors``, if they lie side by side in it and fill it."""
    first = tensors[0]
    storage = first.untyped_storage()
    address, dtype = storage.data_ptr(), first.dtype
    start, stop, total = first.storage_offset(), 0, 0
    for tensor in tensors:
        if tensor.dtype != dtype or not tensor.is_contiguous() or tensor.untyped_storage().data_ptr() != address:
            return None
        offset, size = tensor.storage_offset(), tensor.numel()
        start, stop, total = min(start, offset), max(stop, offset + size), total + size
    # as many elements as there is room for: with nothing in between that is no part of any of them
    return first.new().set_(storage, start, (stop - start,)) if stop - start == total else None
