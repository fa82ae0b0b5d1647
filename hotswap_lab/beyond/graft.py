"""Graft: what has to be written to a live model so that an adapter in it becomes a freshly loaded one."""

from __future__ import annotations

import enum
from collections.abc import MutableMapping
from dataclasses import dataclass, field

import torch

from ..core.change import Step
from ..core.errors import Refusal


class Extent(enum.IntEnum):
    """The largest change to one wrapper, from values only to a new module."""

    NONE = 0
    VALUES = 1
    SHAPES = 2
    REMOVED = 3
    ADDED = 4


@dataclass(frozen=True)
class WrapperChange:
    """What happens to one module that carries the adapter."""

    path: str
    module: torch.nn.Module
    change: Extent
    rank_before: int | None
    rank_after: int | None
    scaling: float | None


@dataclass
class Graft:
    """Everything to write: values in place, parameters of other shapes, and changes of tables and attributes."""

    #: pairs of a live tensor and what it gets
    copies: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    #: pairs of a live parameter and a tensor of another shape
    resizes: list[tuple[torch.nn.Parameter, torch.Tensor]] = field(default_factory=list)
    #: all else, undoable
    steps: list[Step] = field(default_factory=list)
    #: changes that no compiled graph depends on
    silent_steps: list[Step] = field(default_factory=list)
    changes: list[WrapperChange] = field(default_factory=list)
    obstacles: list[Refusal] = field(default_factory=list)
    #: paths of modules that would have to be given a tuner layer
    added: list[str] = field(default_factory=list)
    #: and of modules that lose theirs
    unwrapped: list[str] = field(default_factory=list)
    #: in words, what differs beyond values of tensors
    differences: list[str] = field(default_factory=list)
    #: live parameters of the adapter
    parameters: list[torch.nn.Parameter] = field(default_factory=list)

    #: by ids of the donor's tensors: the table, the key and the live tensor that gets their values
    in_place: dict[int, tuple[MutableMapping, str, torch.Tensor]] = field(default_factory=dict)
    #: what DoRA has computed from weights and kept
    caches: list[dict] = field(default_factory=list)

    @property
    def writes_values_only(self) -> bool:
        """Whether shapes, tables and attributes all stay, so that a compiled graph stays valid."""
        return not (self.resizes or self.steps)
