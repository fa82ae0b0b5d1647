"""A fast reader for safetensors files.

It maps a file into memory once, and makes every tensor a view of it. ``safetensors.torch.load_file`` makes a storage
for each tensor, which for hundreds of small ones takes longer than reading the file. Only files exactly as PEFT writes
them are read this way; all others are left to the safetensors library.

The format is described at https://github.com/huggingface/safetensors#format.
"""

import functools
import itertools
import json
import math
import os
from typing import Any, NamedTuple

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.save_and_load import load_peft_weights

from .sources import Tensors

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


#: torch sums up to this many numbers in the calling thread alone
GRAIN = 32768
#: how many headers are cached, and the largest size of one in bytes
MOST_KNOWN, LONGEST = 16, 2**20
#: up to this many numbers are checked in the calling thread alone
FOR_ONE_THREAD = 16 * GRAIN


class Layout(NamedTuple):
    """The contents of a header, for tensors that follow one another without gaps. All numbers count elements."""

    dtype: torch.dtype
    names: list[str]
    shapes: list[list[int]]
    strides: list[tuple[int, ...]]
    #: the first element of each tensor, counted from the beginning of the file; then the end of the last tensor
    firsts: list[int]


class Mapped(NamedTuple):
    """A file's tensors by name. All are views of ``whole``, which has the elements of all of them."""

    tensors: dict[str, torch.Tensor]
    whole: torch.Tensor


def map_weights(path: str | os.PathLike[str]) -> Mapped | None:
    """Map a safetensors file into memory: its tensors, on the CPU, in the order of the file.

    Returns None for a file that can't be read this way: with several or unusual dtypes, badly aligned, or damaged. The
    operating system reads the file when the tensors are used, and ends the process if the file was shortened meanwhile.
    So use this only for tensors that are not kept.

    Raises
    ------
    OSError, ValueError
        If the file can't be read, or has no header.

    Examples
    --------
    >>> from hotswap_lab import demo
    >>> mapped = map_weights(demo.adapter_path("double") + "/adapter_model.safetensors")
    >>> len(mapped.tensors), mapped.whole.shape
    (32, torch.Size([8192]))
    """
    with open(path, "rb", buffering=0) as file:
        size, length = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
        read = layout_of if length <= LONGEST else layout_of.__wrapped__
        layout = read(file.read(length)) if 8 + length < size else None
    if layout is None or layout.firsts[-1] * layout.dtype.itemsize != size:
        return None
    first, end = layout.firsts[0], layout.firsts[-1]
    storage: Any = torch.UntypedStorage.from_file(os.fspath(path), shared=False, nbytes=size)
    empty: Any = torch.empty(0, dtype=layout.dtype, device="cpu")  # whatever the default device is
    whole: torch.Tensor = empty.set_(storage, first, (end - first,))
    views = map(whole.as_strided, layout.shapes, layout.strides, layout.firsts)
    return Mapped(dict(zip(layout.names, views, strict=True)), whole)


@functools.lru_cache(maxsize=MOST_KNOWN)
def layout_of(header: bytes) -> Layout | None:
    """Parse a safetensors header; return None if PEFT would not have written this one.

    Adapters that were trained in the same way have the same header, so it is parsed once for all of them.

    >>> layout_of(b'{"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}}   ').firsts
    [17, 23]
    """
    text = str(header, "utf-8")
    entries = json.loads(text)
    metadata = entries.pop("__metadata__", None)
    # json drops duplicate keys, so colons are counted: each tensor has one after its name and after its three fields
    if metadata not in (None, {"format": "pt"}) or text.count(":") != 4 * len(entries) + 2 * bool(metadata):
        return None
    in_order = sorted([(entry["data_offsets"], entry["shape"], name) for name, entry in entries.items()])
    dtypes, start = {entry["dtype"] for entry in entries.values()}, 8 + len(header)
    dtype = DTYPES.get(dtypes.pop()) if len(dtypes) == 1 else None
    if dtype is None or start % dtype.itemsize:
        return None
    offsets, shapes, names = map(list, zip(*in_order, strict=True))
    numbers = list(itertools.chain.from_iterable((*offsets, *shapes)))
    # types are compared, because 0.0 and False equal 0
    if set(map(type, numbers)) != {int} or min(numbers) < 0:
        return None
    firsts = [*itertools.accumulate(map(math.prod, shapes), initial=start // dtype.itemsize)]
    bounds = [first * dtype.itemsize - start for first in firsts]
    if offsets != list(map(list, itertools.pairwise(bounds))):
        return None
    return Layout(dtype, names, shapes, [strides_of(*shape) for shape in shapes], firsts)


@functools.lru_cache
def strides_of(*shape: int) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor.

    With these, ``as_strided`` makes a view of a file in one call; ``split`` and ``view`` would be two.

    >>> strides_of(2, 3, 4)
    (12, 4, 1)
    """
    return tuple([math.prod(shape[axis + 1 :]) for axis in range(len(shape))])


def read_safetensors(folder: str, device: str, key_mapping: dict[str, str] | None, for_one_swap: bool) -> Tensors:
    """Return the tensors of a safetensors file by name; with ``for_one_swap``, they may be the file itself."""
    is_on_cpu, mapped = torch.device(device).type == "cpu", None
    if is_on_cpu and not key_mapping:
        # not for speed alone: safetensors 0.8 never frees 56 bytes for each tensor that it reads
        mapped = map_weights(os.path.join(folder, SAFETENSORS_WEIGHTS_NAME))
    if mapped is None or not for_one_swap:
        with torch.device("cpu"):  # older safetensors makes tensors on the default device
            tensors = mapped.tensors if mapped else load_peft_weights(folder, device=device, key_mapping=key_mapping)
        if is_on_cpu and not for_one_swap:  # cloned, because they are the file itself
            tensors = {key: tensor.clone() for key, tensor in tensors.items()}
        return tensors, None
    tensors, whole = mapped
    # waking torch's other threads takes longer than a small sum, and milliseconds on a busy machine
    return tensors, whole.split(GRAIN) if whole.numel() <= FOR_ONE_THREAD else [whole]
