"""Adapter: what comes in. A config and named tensors, read and checked once, knowing nothing of a model."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig, PeftType

from .errors import HotswapError, listing, refuse
from .host import Config
from .sources import find_source, read_config, read_tensors


@dataclass(frozen=True, eq=False)
class Adapter:
    """One adapter in memory: its config and its tensors by the names of its file.

    Make one with :meth:`load` or :meth:`from_state_dict`; both check it.

    Parameters
    ----------
    config:
        What ``adapter_config.json`` says.
    tensors:
        Keys as in the file, such as ``base_model.model.<layer>.lora_A.weight`` of shape ``(rank, in_features)``.
    source:
        Where it came from, for messages.
    revision:
        The commit of the Hub repository that it was read from. None if it came from elsewhere.
    """

    config: Config
    tensors: Mapping[str, torch.Tensor]
    source: str
    revision: str | None = None

    @classmethod
    def load(
        cls,
        source: str | os.PathLike[str],
        *,
        torch_device: str | torch.device | None = None,
        key_mapping: dict[str, str] | None = None,
        allow_nonfinite: bool = False,
        **hub: Any,
    ) -> Adapter:
        """Reads an adapter from a folder or from the Hugging Face Hub.

        ``adapter_model.safetensors`` is preferred; ``adapter_model.bin`` is read with ``weights_only=True``, so
        nothing in it is executed. The tensors are copies: whatever happens to the files later does not reach them.

        Parameters
        ----------
        source:
            A folder with ``adapter_config.json``, or the id of a Hub repository.
        torch_device:
            The device to read the tensors to. Default: CPU.
        key_mapping:
            Regular expressions and replacements for keys, as in ``PeftModel.from_pretrained``.
        allow_nonfinite:
            Whether NaN and infinity among the weights are let through.
        **hub:
            ``subfolder``, ``revision``, ``token``, ``cache_dir`` and what else ``hf_hub_download`` takes.

        Raises
        ------
        HotswapError
            If the files can't be found or read, or are damaged.

        Examples
        --------
        >>> from hotswap_lab import demo
        >>> adapter = Adapter.load(demo.adapter_path("double"))
        >>> adapter.config.r, len(adapter.tensors)
        (2, 32)
        """
        return cls._load(source, False, torch_device, key_mapping, allow_nonfinite, **hub)

    @classmethod
    def _load(
        cls,
        source: str | os.PathLike[str],
        for_one_swap: bool = False,
        torch_device: str | torch.device | None = None,
        key_mapping: dict[str, str] | None = None,
        allow_nonfinite: bool = False,
        **hub: Any,
    ) -> Adapter:
        """:meth:`load`; faster for one swap, after which it is let go of: its tensors may be the file itself."""
        place = find_source(source, hub)
        config = read_config(place)
        tensors, pieces = read_tensors(place, torch_device or "cpu", key_mapping, for_one_swap)
        adapter = cls(config, tensors, place.name, place.revision)
        if pieces is None or not all(map(_is_finite, pieces)):
            adapter._check_tensors(allow_nonfinite)
        return adapter

    @classmethod
    def from_state_dict(
        cls, state_dict: Mapping[str, torch.Tensor], config: Config, *, allow_nonfinite: bool = False
    ) -> Adapter:
        """Takes an adapter from memory. The tensors are only read, never kept in the model or changed.

        Keys may hold the adapter's name (``lora_A.default.weight``) or not (``lora_A.weight``), and may start
        with ``base_model.model.`` or not.

        Examples
        --------
        >>> import torch
        >>> from peft import LoraConfig
        >>> tensors = {"lin.lora_A.weight": torch.ones(2, 3), "lin.lora_B.weight": torch.ones(4, 2)}
        >>> len(Adapter.from_state_dict(tensors, LoraConfig(r=2, target_modules=["lin"])).tensors)
        2
        """
        if not isinstance(config, PeftConfig):
            raise refuse("no_config", config=config)
        if not isinstance(state_dict, Mapping):
            raise refuse("no_state_dict", kind=type(state_dict).__name__)
        adapter = cls(config, dict(state_dict), "a state dict")
        adapter._check_tensors(allow_nonfinite)
        return adapter

    @property
    def label(self) -> str:
        """A short name for tables: the last part of a folder's path, a Hub id as it is."""
        return os.path.basename(os.path.normpath(self.source)) if os.path.isdir(self.source) else self.source

    @property
    def nbytes(self) -> int:
        """The size of all tensors in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def _check_tensors(self, allow_nonfinite: bool) -> None:
        # some methods save indices, too
        only_weights = self.config.peft_type == PeftType.LORA
        for key, tensor in self.tensors.items():
            if not isinstance(key, str):
                raise self._damaged(f"a {type(key).__name__} as the name of a tensor", "names of tensors")
            if kind := _what_is_wrong(tensor, only_weights and ".lora_" in key):
                raise self._damaged(f"{kind} under {key!r}", "a floating point tensor under each key")
        if not self.tensors:
            raise self._damaged("no tensors at all", "at least one lora_A and one lora_B")
        bad = [] if allow_nonfinite else [key for key, tensor in self.tensors.items() if not _is_finite(tensor)]
        if bad:
            raise self._damaged(
                f"NaN or infinity in {listing(map(repr, bad))}",
                "finite weights",
                "get an undamaged copy, or pass allow_nonfinite=True to Adapter.load if it is meant to be so",
            )

    def _damaged(self, found: str, expected: str, next_step: str = "get an undamaged copy of it") -> HotswapError:
        return refuse("adapter_damaged", source=self.source, found=found, expected=expected, next_step=next_step)


def _what_is_wrong(tensor: object, only_weights: bool) -> str | None:
    """What stands where a plain tensor should; None if one does."""
    if not isinstance(tensor, torch.Tensor):
        return type(tensor).__name__
    is_plain = tensor.layout == torch.strided and not (tensor.is_nested or tensor.is_quantized or tensor.is_meta)
    if not is_plain or (only_weights and not tensor.is_floating_point()):
        return f"a tensor of {tensor.dtype}, {tensor.layout}, on the device {tensor.device}"
    return None


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether there is neither NaN nor infinity: either makes a sum so. So may very large weights, hence a second look.

    Whole numbers, as indices, always are finite.
    """
    if not tensor.is_floating_point():
        return True
    tensor = tensor.detach()
    if tensor.dtype.itemsize == 1:  # 8 bits have no sums
        tensor = tensor.float()
    dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return math.isfinite(tensor.sum(dtype=dtype).item()) or bool(tensor.isfinite().all())


# ---- whatever an adapter is given as


def adapter_from(source: Any, arguments: Mapping[str, Any]) -> Adapter:
    """The adapter: as it is, from a pair of a state dict and a config, or read from its files."""
    if isinstance(source, Adapter):
        return source
    return Adapter.from_state_dict(*source) if isinstance(source, tuple) else Adapter.load(source, **arguments)


def member_from(source: Any, arguments: Mapping[str, Any]) -> Adapter:
    """What preparing needs to know of an adapter: of files, the config alone."""
    if isinstance(source, PeftConfig):
        return Adapter(source, {}, "a config")
    if isinstance(source, (Adapter, tuple)):
        return adapter_from(source, arguments)
    place = find_source(source, arguments)
    return Adapter(read_config(place), {}, place.name)
