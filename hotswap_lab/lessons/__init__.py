"""What the notebooks show and ask: one module of exercises per chapter, and the pictures they share.

No swap logic is in here. ``figures`` draws, and shows the drawings in the folder ``pictures``; ``exercise`` is the
frame of every exercise. ``start`` belongs to chapter 00, ``uncompiled`` to 01, ``padding`` to 02, ``compiling`` to 03,
``pools`` to 04, ``real_llm`` to 05, ``diffusion`` to 06, ``beyond`` to 07, ``rows`` to 08, ``serving`` to 09, ``ahead``
to 10 and ``beside`` to the comparison with PEFT.
"""

from __future__ import annotations

import logging
import warnings

import torch

from .. import figures

__all__ = ["begin", "figures"]


def begin() -> None:
    """Sets a notebook up: one thread, so that figures can be compared, and no noise.

    The demo models are so small that threads would mostly wait for one another, and on a busy machine for whatever
    else runs there.

    Where there is a CUDA compiler and no GPU, the first compiled graph says so; it is of no use to a reader either.
    PEFT 0.21 with transformers 5.24 warns about a deprecated name at every load, and torch.export about one of its own;
    a reader can do nothing about these.

    >>> begin()
    """
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*LeafSpec")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    torch.set_num_threads(1)
