"""Adapter: a config and named tensors, read and checked once, independent of any model.

Tests: ``tests/core/test_swap.py`` and ``tests/core/test_plan.py``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from peft import PeftConfig, PeftType

from .errors import HotswapError, listing, refused
from .host import Config, kind_of
from .report import escaped
from .tensors import is_finite

#: attributes of a config in a model: its adapter's source, revision and file; when a swap put it in; and the base model
#: that the config of the first adapter names, before any swap
ORIGIN, WHEN, BASE = "_hotswap_origin", "_hotswap_when", "_hotswap_base"
#: attribute of a config that a swap put into a model: the names of base weights whose originals are lost, as
#: ``beyond.base_values`` knows them. A config that PEFT put there lacks it: the file may have overwritten any weight
LOST_ORIGINALS = "_hotswap_lost"


@dataclass(frozen=True, eq=False, repr=False)
class Adapter:
    """One adapter in memory: its config and its tensors by the names of its file.

    Make one with :meth:`from_state_dict`, or with ``hotswap_lab.Adapter.load``; both check it.

    Parameters
    ----------
    config:
        The contents of ``adapter_config.json``.
    tensors:
        Keys as in the file, such as ``base_model.model.<layer>.lora_A.weight`` of shape ``(rank, in_features)``.
    source:
        The place that it was read from, for messages.
    revision:
        The commit of the Hub repository that it was read from. None if it came from elsewhere.
    is_folder:
        Whether it was read from a local folder.
    file:
        The path of its weights, and the file's inode, size and time when it was read. None if it came from memory.

    Examples
    --------
    See :meth:`from_state_dict`.
    """

    config: Config
    tensors: Mapping[str, torch.Tensor]
    source: str
    revision: str | None = None
    is_folder: bool = False
    file: tuple[str, int, int, int] | None = None

    @classmethod
    def from_state_dict(
        cls, state_dict: Mapping[str, torch.Tensor], config: Config, *, allow_nonfinite: bool = False
    ) -> Adapter:
        """Make an adapter from tensors in memory. They are only read: never changed, and never kept in the model.

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
            raise refused("no_config", config=config)
        if not isinstance(state_dict, Mapping):
            raise refused("no_state_dict", kind=type(state_dict).__name__)
        adapter = cls(config, dict(state_dict), "a state dict")
        adapter.check_tensors(allow_nonfinite)
        return adapter

    def __repr__(self) -> str:
        return f"<{kind_of(self.config)} from {self.source}: {len(self.tensors)} tensors, {self.nbytes:,} bytes>"

    @property
    def label(self) -> str:
        """A short name for tables: the last part of a folder's path, a Hub id as it is."""
        return escaped(os.path.basename(os.path.normpath(self.source)) if self.is_folder else self.source)

    @property
    def nbytes(self) -> int:
        """The total size of the tensors in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def check_tensors(self, allow_nonfinite: bool) -> None:
        """Refuse an adapter with no tensors, with something else in their place, or with NaN and infinity."""
        # other methods may save indices, too, which are integers
        only_weights = self.config.peft_type == PeftType.LORA
        for key, tensor in self.tensors.items():
            if not isinstance(key, str):
                raise self._damaged(f"a {type(key).__name__} as the name of a tensor", "names of tensors")
            if other := _other_value(tensor, only_weights and ".lora_" in key):
                raise self._damaged(f"{other} under {key!r}", "a floating point tensor under each key")
        if not self.tensors:
            raise self._damaged("no tensors at all", "at least one lora_A and one lora_B")
        if not allow_nonfinite and (keys := [key for key, tensor in self.tensors.items() if not is_finite(tensor)]):
            next_step = "get an undamaged copy, or pass allow_nonfinite=True to Adapter.load if it is meant to be so"
            raise self._damaged(f"NaN or infinity in {listing(map(repr, keys))}", "finite weights", next_step)

    def _damaged(self, found: str, expected: str, next_step: str = "get an undamaged copy of it") -> HotswapError:
        return refused("adapter_damaged", source=self.source, found=found, expected=expected, next_step=next_step)


def _other_value(tensor: object, only_weights: bool) -> str | None:
    """Describe a value that is not a plain tensor of numbers, or not one of weights; None if it is one."""
    if not isinstance(tensor, torch.Tensor):
        return type(tensor).__name__
    is_plain = tensor.layout == torch.strided and not (tensor.is_nested or tensor.is_quantized or tensor.is_meta)
    if not is_plain or (only_weights and not tensor.is_floating_point()):
        return f"a tensor of {tensor.dtype}, {tensor.layout}, on the device {tensor.device}"
    return None
