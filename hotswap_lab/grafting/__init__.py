"""Swaps for which PEFT itself loads the new adapter, beside the model.

``stand_in`` (the base model's modules once more, around the same memory), ``donor`` (a fresh load onto it),
``difference`` (what the live model lacks to equal it: a ``graft``), ``decide`` (whether that can be written).
``places`` remembers where everything is, for the next adapter with the same config. ``wrappers`` knows what PEFT puts
around modules.
"""

from .decide import Grafting, decide_graft, former_layers
from .difference import difference
from .donor import Donor, load_donor
from .graft import Extent, Graft, WrapperChange
from .stand_in import make_stand_in
from .wrappers import wrappers_in

__all__ = [
    "Donor",
    "Extent",
    "Graft",
    "Grafting",
    "WrapperChange",
    "decide_graft",
    "difference",
    "former_layers",
    "load_donor",
    "make_stand_in",
    "wrappers_in",
]
