"""Files of weights: a fast way to read safetensors.

A safetensors file becomes one piece of memory that all of its tensors are views of. ``safetensors.torch.load_file``
makes a storage for each tensor, which for hundreds of small ones takes longer than reading the file. Only files that
are just as PEFT writes them are read so; whatever else there may be in a file is for the safetensors library to judge.

Follows the format's description at https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

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


#: torch sums up to this many numbers in the thread that asks for it
GRAIN = 32768
#: how many headers are remembered, of at most how many bytes
MOST_KNOWN, LONGEST = 16, 2**20
#: how many numbers are looked at without other threads
FOR_ONE_THREAD = 16 * GRAIN


class Layout(NamedTuple):
    """What a header says of the tensors, which lie side by side; all numbers are of elements, not bytes."""

    dtype: torch.dtype
    names: list[str]
    shapes: list[list[int]]
    strides: list[tuple[int, ...]]
    #: of each tensor, the first element, counted from the beginning of the file; and the end of the last tensor
    firsts: list[int]


class Mapped(NamedTuple):
    """A file's tensors by name, which lie side by side in ``whole``."""

    tensors: dict[str, torch.Tensor]
    whole: torch.Tensor


def map_weights(path: str | os.PathLike[str]) -> Mapped | None:
    """The tensors of a safetensors file, on the CPU, in the order of the file.

    Returns None for a file that can't be read this way: with several dtypes, other ones, badly aligned, or damaged.
    They are the file itself, mapped into memory, and are read where they are needed. If the file is shortened
    meanwhile, the operating system ends the process that reads them. So only for tensors that are not kept.

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
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        read = layout_of if length <= LONGEST else layout_of.__wrapped__
        layout = read(file.read(length)) if 8 + length < size else None
    if layout is None or layout.firsts[-1] * layout.dtype.itemsize != size:
        return None
    first, end = layout.firsts[0], layout.firsts[-1]
    storage: Any = torch.UntypedStorage.from_file(os.fspath(path), shared=False, nbytes=size)
    empty: Any = torch.empty(0, dtype=layout.dtype)
    whole: torch.Tensor = empty.set_(storage, first, (end - first,))
    views = map(whole.as_strided, layout.shapes, layout.strides, layout.firsts)
    return Mapped(dict(zip(layout.names, views, strict=True)), whole)


@functools.lru_cache(maxsize=MOST_KNOWN)
def layout_of(header: bytes) -> Layout | None:
    """What a safetensors header says, if the file is one that PEFT may have written.

    The files of adapters that were trained alike have the same header, so this is worked out once for all of them.

    >>> layout_of(b'{"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}}   ').firsts
    [17, 23]
    """
    text = str(header, "utf-8")
    entries = json.loads(text)
    metadata = entries.pop("__metadata__", None)
    # json drops what is there twice; each tensor has a name and three fields
    if metadata not in (None, {"format": "pt"}) or text.count(":") != 4 * len(entries) + 2 * bool(metadata):
        return None
    in_order = sorted([(entry["data_offsets"], entry["shape"], name) for name, entry in entries.items()])
    dtypes, start = {entry["dtype"] for entry in entries.values()}, 8 + len(header)
    dtype = DTYPES.get(dtypes.pop()) if len(dtypes) == 1 else None
    if dtype is None or start % dtype.itemsize:
        return None
    offsets, shapes, names = map(list, zip(*in_order, strict=True))
    numbers = list(itertools.chain.from_iterable((*offsets, *shapes)))
    # to Python, 0.0 and False are the same as 0
    if set(map(type, numbers)) != {int} or min(numbers) < 0:
        return None
    firsts = [*itertools.accumulate(map(math.prod, shapes), initial=start // dtype.itemsize)]
    places = [each * dtype.itemsize - start for each in firsts]
    if offsets != list(map(list, itertools.pairwise(places))):
        return None
    return Layout(dtype, names, shapes, [strides_of(*shape) for shape in shapes], firsts)


@functools.lru_cache
def strides_of(*shape: int) -> tuple[int, ...]:
    """How far apart the elements of a tensor are that lies in one piece, row after row.

    With these, a view of a file is made in one step; ``split`` and ``view`` are two.

    >>> strides_of(2, 3, 4)
    (12, 4, 1)
    """
    return tuple([math.prod(shape[axis + 1 :]) for axis in range(len(shape))])


def read_safetensors(folder: str, device: str, key_mapping: dict[str, str] | None, for_one_swap: bool) -> Tensors:
    """The tensors of ``adapter_model.safetensors`` by name; for one swap, they may be the file itself."""
    is_on_cpu, mapped = torch.device(device).type == "cpu", None
    if for_one_swap and is_on_cpu and not key_mapping:
        mapped = map_weights(os.path.join(folder, SAFETENSORS_WEIGHTS_NAME))
    if mapped is None:
        tensors = load_peft_weights(folder, device=device, key_mapping=key_mapping)
        if is_on_cpu and not for_one_swap:  # they are the file itself
            tensors = {key: tensor.clone() for key, tensor in tensors.items()}
        return tensors, None
    tensors, whole = mapped
    # waking torch's other threads takes longer than small sums do, and milliseconds where the machine is busy
    return tensors, whole.split(GRAIN) if whole.numel() <= FOR_ONE_THREAD else [whole]
