"""The file of a compiled model: PyTorch's archive with a description, a few tensors, and a checksum of everything.

Tests: ``tests/ahead/test_ahead_checks.py``.
"""

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

#: records added to PyTorch's: the description, and tensors that are not in the model (constants, example inputs)
NOTES, VALUES = "hotswap_lab/notes.json", "hotswap_lab/values.safetensors"
#: the checksum is the archive's comment, which ends the file
DIGITS = 64
Tensors = dict[str, torch.Tensor]


def add(path: str, notes: Mapping[str, Any], values: Tensors) -> None:
    """Add a description and tensors to PyTorch's archive, and seal it."""
    with zipfile.ZipFile(path, "a") as archive:
        root = archive.namelist()[0].partition("/")[0]
        archive.writestr(f"{root}/{NOTES}", json.dumps(notes))
        archive.writestr(f"{root}/{VALUES}", safetensors.torch.save(values))
    seal(path)


def seal(path: str | os.PathLike[str]) -> None:
    """Add a checksum, because one wrong byte may crash the process or change an output."""
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"0" * DIGITS
    content = Path(path).read_bytes()[:-DIGITS]
    Path(path).write_bytes(content + _checksum(content))


def _checksum(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], Tensors]:
    """Read the description and tensors of a file. Refuse one that is corrupt or can't run here."""
    try:
        content = Path(path).read_bytes()
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            records = {name.partition("/")[2]: name for name in archive.namelist()}
            if content[-DIGITS:] != _checksum(content[:-DIGITS]):
                raise ValueError("its checksum is not that of its content")
            notes, values = json.loads(archive.read(records[NOTES])), archive.read(records[VALUES])
            metadata = next(record for record in records.values() if record.endswith("_metadata.json"))
            built = json.loads(archive.read(metadata))
    except (OSError, zipfile.BadZipFile, KeyError, ValueError, StopIteration) as error:
        raise refused("ahead_no_package", path=os.fspath(path), error=error) from error
    if notes["torch"] != torch.__version__:
        raise refused("ahead_versions", found=f"torch {notes['torch']}", expected=f"torch {torch.__version__}")
    features = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    needs = built.get("AOTI_CPU_ISA", "").lower().replace("avx512 ", "avx512_f ").split()
    if lacking := [feature for feature in needs if features.get(feature) is False]:
        raise refused(
            "ahead_versions", found=f"code that uses {listing(lacking)}", expected="features of this processor"
        )
    return notes, safetensors.torch.load(values)


# ---- the example inputs, to repeat the call where the file is loaded


def describe_inputs(given: Mapping[str, Any]) -> tuple[Any, Tensors]:
    """Turn inputs into an entry of the description, and tensors; None if they can't be written, such as a cache."""
    leaves, spec = compat.tree_flatten(dict(given))
    values = {f"given:{n}": leaf for n, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)}
    # a tensor is described by its device; its values are saved under its position
    plain = [leaf.device.type if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    try:
        note = json.loads(json.dumps([compat.treespec_dumps(spec), plain]))
    except Exception:  # inputs may contain any class, so this may be any error
        return None, {}
    return note, {key: value.detach().clone(memory_format=torch.contiguous_format) for key, value in values.items()}


def inputs_in(note: Any, values: Tensors) -> dict[str, Any] | None:
    """The inputs of :func:`describe_inputs`."""
    if note is None:
        return None
    form, leaves = note
    tensors = {n: values[key] for n in range(len(leaves)) if (key := f"given:{n}") in values}
    filled = [tensors[n].to(leaf) if n in tensors else leaf for n, leaf in enumerate(leaves)]
    return compat.tree_unflatten(filled, compat.treespec_loads(form))
