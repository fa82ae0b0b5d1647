"""Reads a safetensors file as one piece of memory that all of its tensors are views of.

``safetensors.torch.load_file`` makes a storage for each tensor, which for hundreds of small ones takes longer than
reading the file. The safetensors library still judges the file: its own reader checks the header first.

Follows the format's description at https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import os

import torch
from safetensors import safe_open

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_weights(path: str | os.PathLike) -> dict[str, torch.Tensor] | None:
    """The tensors of a safetensors file by name, on the CPU, in the order of the file.

    Returns None for a file that is fine but can't be read this way: with other dtypes, or badly aligned.

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
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        header_size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_size))
    header.pop("__metadata__", None)
    start = 8 + header_size
    entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    if size == start or any(
        entry["dtype"] not in DTYPES or (start + entry["data_offsets"][0]) % DTYPES[entry["dtype"]].itemsize
        for _, entry in entries
    ):
        return None
    storage = torch.UntypedStorage.from_file(os.fspath(path), shared=False, nbytes=size)
    empty = {dtype: torch.empty(0, dtype=dtype) for dtype in {DTYPES[entry["dtype"]] for _, entry in entries}}
    tensors = {}
    for name, entry in entries:
        dtype = DTYPES[entry["dtype"]]
        offset = (start + entry["data_offsets"][0]) // dtype.itemsize
        tensors[name] = empty[dtype].new().set_(storage, offset, entry["shape"])
    return tensors


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
