"""The order in which a batch repeats the assigned rows, for batches of more rows than are assigned.

A shape shows a multiple, not its order, and the proof of :mod:`~hotswap_lab.pools.proof` can't show it either, since
the caller makes the batch before the model is called. So the order comes from the caller: from the frame of
``generate``, which holds the batch before and after it was expanded, or from an argument of ``assign``.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch

from .. import compat
from ..core.errors import refused


class Copies(NamedTuple):
    """How a batch repeats its rows: ``tiles`` times the whole of them (``torch.tile``), within these ``repeats`` times
    each row (``torch.repeat_interleave``). Rows A and B are ABAB with ``Copies(2, 1)``, and AABB with ``Copies(1, 2)``.
    """

    tiles: int = 1
    repeats: int = 1

    @property
    def count(self) -> int:
        """The number of times that a batch has each row."""
        return self.tiles * self.repeats

    def __str__(self) -> str:
        orders = (self.repeats, "interleave"), (self.tiles, "tile")
        return "".join([f", {number} times in order {order!r}" for number, order in orders if number > 1])


ONCE = Copies()


def copies_in_generate(base: torch.nn.Module, size: int, total: int) -> Copies | None:
    """How the innermost running ``generate`` of transformers has repeated ``size`` rows to a batch of ``total``.

    None if none is running, or if it calls ``base`` with other rows. Refuses rows that are the beams of one prompt.
    """
    frame: Any = sys._getframe(1)
    generate: dict[str, Any] = {}  # the local variables of the innermost one
    earlier, has_guidance = 1, False
    while frame:
        module = frame.f_globals.get("__name__")
        if frame.f_code.co_name == "generate":
            if not generate and module in compat.GENERATES:
                generate, has_guidance = frame.f_locals, compat.GENERATES[module]
            elif generate and module in compat.REPEATS and frame.f_locals.get("self") is generate["self"]:
                earlier = frame.f_locals.get(compat.REPEATS[module]) or 1
        frame = frame.f_back
    if not generate or not any(module is base for module in generate["self"].modules()):
        return None
    given, expanded = (generate.get(name) for name in compat.EXPANDED)
    if given is None or expanded is None:  # the encoder is called before the batch is expanded
        return Copies(1, earlier) if total == earlier * size else None
    guidance = generate["model_kwargs"].get("guidance_scale") if has_guidance else None
    tiles = 2 if guidance is not None and guidance > 1 else 1
    if len(expanded) * tiles != total:
        return None  # other rows
    if earlier * size == len(given):
        return Copies(tiles, len(expanded) // size)
    if generate["generation_config"].num_beams > 1:  # each has the memory of others
        raise refused("beams_of_rows", size=size, given=len(given))
    return None
