"""The file of a compiled model: PyTorch's archive, with a description, a few values, and a checksum of all of it."""

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from .. import compat
from ..core.errors import listing, refused

#: added to PyTorch's records: the description, and tensors that the code needs but no model has, with those of a call
NOTES, VALUES = "hotswap_lab/notes.json", "hotswap_lab/values.safetensors"
#: the checksum is the archive's comment, which ends the file
DIGITS = 64
Tensors = dict[str, torch.Tensor]


def add(path: str, notes: Mapping[str, Any], values: Tensors) -> None:
    """Add a description and values to PyTorch's archive, and seal it."""
    with zipfile.ZipFile(path, "a") as archive:
        root = archive.namelist()[0].partition("/")[0]
        archive.writestr(f"{root}/{NOTES}", json.dumps(notes))
        archive.writestr(f"{root}/{VALUES}", safetensors.torch.save(values))
    seal(path)


def seal(path: str | os.PathLike[str]) -> None:
    """Add the checksum: one wrong byte in machine code ends the process, one in a constant changes an output."""
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"0" * DIGITS
    content = Path(path).read_bytes()[:-DIGITS]
    Path(path).write_bytes(content + _checksum(content))


def _checksum(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], Tensors]:
    """The description and the values of a file; refuses a damaged one, and one that can't be run here."""
    try:
        content = Path(path).read_bytes()
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            records = {name.partition("/")[2]: name for name in archive.namelist()}
            if content[-DIGITS:] != _checksum(content[:-DIGITS]):
                raise ValueError("its checksum is not that of its content")
            notes, values = json.loads(archive.read(records[NOTES])), archive.read(records[VALUES])
            built = json.loads(archive.read(next(each for each in records.values() if each.endswith("_metadata.json"))))
    except (OSError, zipfile.BadZipFile, KeyError, ValueError, StopIteration) as error:
        raise refused("ahead_no_package", path=os.fspath(path), error=error) from error
    if notes["torch"] != torch.__version__:
        raise refused("ahead_versions", found=f"torch {notes['torch']}", expected=f"torch {torch.__version__}")
    has = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    needs = built.get("AOTI_CPU_ISA", "").lower().replace("avx512 ", "avx512_f ").split()
    if lacking := [each for each in needs if has.get(each) is False]:
        raise refused("ahead_versions", found=f"code that uses {listing(lacking)}", expected="what this processor has")
    return notes, safetensors.torch.load(values)


# ---- the inputs of a call, to repeat it where the file is loaded


def noted(given: Mapping[str, Any]) -> tuple[Any, Tensors]:
    """Inputs as an entry of the description and tensors; None for inputs that can't be written, such as a cache."""
    leaves, form = compat.tree_flatten(dict(given))
    values = {f"given:{n}": each for n, each in enumerate(leaves) if isinstance(each, torch.Tensor)}
    plain = [each.device.type if isinstance(each, torch.Tensor) else each for each in leaves]
    try:
        note = json.loads(json.dumps([compat.treespec_dumps(form), plain]))
    except Exception:  # of many kinds, because any class can be a part of the inputs
        return None, {}
    return note, {key: each.detach().clone(memory_format=torch.contiguous_format) for key, each in values.items()}


def inputs_in(note: Any, values: Tensors) -> dict[str, Any] | None:
    """The inputs of :func:`noted`."""
    if note is None:
        return None
    form, leaves = note
    tensors = {n: values[key] for n in range(len(leaves)) if (key := f"given:{n}") in values}
    filled = [tensors[n].to(each) if n in tensors else each for n, each in enumerate(leaves)]
    return compat.tree_unflatten(filled, compat.treespec_loads(form))
