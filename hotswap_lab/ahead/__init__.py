"""Compiles a prepared model ahead of time, to a file that follows swaps in the process that loads it.

``torch.export`` and AOTInductor turn a model into machine code that a process without a compiler loads in a moment.
The weights stay outside: the code is bound to the memory of a live model. A prepared model writes each adapter to the
same memory (:mod:`hotswap_lab.core.arena`), and its scalings are buffers, so the code reads the current adapter.

AOTInductor checks nothing, so this package does. ``compiling`` writes the code's assumptions to the file: the
conditions on sizes (``sizes``), the model's modules, settings and tensors (``live``). ``loading`` refuses a model that
differs, ``proof`` compares code and model once, and :class:`AheadModel` looks for changes before each call.
"""

from .compiling import aoti_compile
from .loading import AheadModel, aoti_load

__all__ = ["AheadModel", "aoti_compile", "aoti_load"]
