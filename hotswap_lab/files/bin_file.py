"""``adapter_model.bin``, PEFT's older format: a pickle of tensors, of which nothing else is taken."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping

import torch
from peft.utils import WEIGHTS_NAME
from peft.utils.save_and_load import load_peft_weights


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


def read_bin(
    folder: str, device: str, key_mapping: dict[str, str] | None, for_one_swap: bool
) -> tuple[dict[str, torch.Tensor], None]:
    """The tensors of ``adapter_model.bin`` by name, read with ``weights_only=True``."""
    path = os.path.join(folder, WEIGHTS_NAME)
    check_archive(path)
    tensors = load_peft_weights(folder, device=device, key_mapping=key_mapping)
    if not isinstance(tensors, Mapping):
        raise TypeError(f"a {type(tensors).__name__}, and no table of tensors")
    size = os.path.getsize(path)
    for key, tensor in tensors.items():
        # a tensor may say that its few bytes are repeated, as often as it likes
        if isinstance(tensor, torch.Tensor) and tensor.numel() * tensor.itemsize > size:
            raise ValueError(f"{key!r} of shape {tuple(tensor.shape)} in a file of {size:,} bytes")
    return dict(tensors), None
