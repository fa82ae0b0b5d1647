"""What a swap can write: one tensor of one adapter, and the scalars of one layer."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class SlotTensor:
    """Where one tensor of an adapter lives in a model.

    Parameters
    ----------
    key:
        The tensor's name in an adapter file, relative to its layer: ``lora_A.weight``.
    named_key:
        The same with the adapter's name, as in ``model.state_dict()``: ``lora_A.default.weight``.
    owner, name:
        The module that holds the parameter, and the parameter's name there.
    rank_axis:
        The axis along which rank components are stacked, or None.
    groups:
        How many blocks of equal size the rank axis is split into, each block in a grouped convolution seeing
        only its own (for ``lora_B``, whose axis holds only ``rank / groups`` entries).
    size_attribute:
        The attribute of ``owner`` that repeats the rank (``out_features`` of a ``lora_A``), or None.
    """

    key: str
    named_key: str
    owner: torch.nn.Module
    name: str
    rank_axis: int | None
    groups: int = 1
    size_attribute: str | None = None

    @property
    def parameter(self) -> torch.nn.Parameter:
        return self.owner._parameters[self.name]

    def rank_of(self, shape: torch.Size) -> int | None:
        """The rank that a tensor of this shape would have here."""
        return None if self.rank_axis is None else shape[self.rank_axis] * self.groups

    def fits(self, shape: torch.Size) -> bool:
        """Whether ``shape`` differs from the tensor's at most in its rank."""
        own = list(self.parameter.shape)
        other = list(shape)
        if len(own) != len(other):
            return False
        if self.rank_axis is not None:
            own[self.rank_axis] = other[self.rank_axis]
        return own == other


@dataclass(frozen=True)
class LayerSettings:
    """The scalars of one LoRA layer, as its config gives them.

    >>> LayerSettings(rank=4, alpha=8, use_rslora=False, dropout=0.0).scaling
    2.0
    >>> LayerSettings(rank=4, alpha=8, use_rslora=True, dropout=0.0).scaling
    4.0
    """

    rank: int
    alpha: float
    use_rslora: bool
    dropout: float

    @property
    def scaling(self) -> float:
        """The factor of ``B @ A``: alpha / rank, or alpha / sqrt(rank) for rsLoRA (arXiv 2312.03732)."""
        return self.alpha / math.sqrt(self.rank) if self.use_rslora else self.alpha / self.rank
