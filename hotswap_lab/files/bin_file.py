"""Reading ``adapter_model.bin``, PEFT's older format: a pickle, from which only tensors are loaded.

Tests: ``tests/files/test_sources.py`` and ``tests/robustness/test_bad_files.py``.
"""

import os
import zipfile
from collections.abc import Mapping

import torch
from peft.utils import WEIGHTS_NAME
from peft.utils.save_and_load import load_peft_weights


def check_archive(path: str | os.PathLike[str]) -> None:
    """Refuse a ``.bin`` that would need more memory than its file has bytes: ``torch.save`` compresses nothing.

    Raises
    ------
    zipfile.BadZipFile
        If the contents are larger than the archive. Files in the format before PyTorch 1.6 aren't archives.
    """
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return
    with zipfile.ZipFile(path) as archive:
        inside = sum(entry.file_size for entry in archive.infolist())
    if inside > (size := os.path.getsize(path)):
        raise zipfile.BadZipFile(f"{inside:,} bytes compressed, or named twice, in a file of {size:,}")


def read_bin(folder: str, device: str, key_mapping: dict[str, str] | None) -> dict[str, torch.Tensor]:
    """Return the tensors of ``adapter_model.bin`` by name, read with ``weights_only=True``."""
    path = os.path.join(folder, WEIGHTS_NAME)
    check_archive(path)
    tensors = load_peft_weights(folder, device=device, key_mapping=key_mapping)
    if not isinstance(tensors, Mapping):
        raise TypeError(f"a {type(tensors).__name__}, not a table of tensors")
    size = os.path.getsize(path)
    for key, tensor in tensors.items():
        # a pickled tensor may have strides that repeat its few bytes any number of times
        if isinstance(tensor, torch.Tensor) and tensor.numel() * tensor.itemsize > size:
            raise ValueError(f"{key!r} of shape {tuple(tensor.shape)} in a file of {size:,} bytes")
    return dict(tensors)
