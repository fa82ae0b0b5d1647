"""Generating in fixed shapes: a Llama model that reads on in all rows of a batch at once, each row at its own place.

``torch.compile`` makes code for each shape that it meets, so a text that grows would be compiled at each token. Here
there are two shapes: a chunk of a prompt for each row, or one new token for each; and the keys and values of all tokens
have their memory from the start. That is how gpt-fast does it (https://github.com/pytorch-labs/gpt-fast).
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .ahead import aoti_compile, aoti_load


class RowCache:
    """A layer's keys and values, for rows at different places: ``positions`` is ``[rows, tokens]``."""

    def __init__(self, keys: Tensor, values: Tensor, positions: Tensor):
        self.keys: Tensor = keys
        self.values: Tensor = values
        self.positions: Tensor = positions

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        rows = torch.arange(len(keys))[:, None]
        self.keys[rows, :, self.positions] = keys.transpose(1, 2)
        self.values[rows, :, self.positions] = values.transpose(1, 2)
        return self.keys, self.values


class Reader(torch.nn.Module):
    """A Llama model that reads on in all rows of a batch at once, in two shapes: a chunk for each row, or one token.

    It calls the model's layers one by one. For a pool whose rows differ, call the model itself once before: that proves
    that its layers keep the rows apart.

    Parameters
    ----------
    model:
        A ``LlamaForCausalLM``, with or without PEFT around it.
    rows, chunk, room:
        How many rows there are, how many tokens of each are read at once, and how many each has room for.

    Examples
    --------
    >>> from hotswap_lab import demo
    >>> model, _ = demo.load("reverse")
    >>> reader = Reader(model, rows=2, chunk=4, room=8)
    >>> logits = reader.read([[5, 6, 7], [8]])  # a short row is filled up
    >>> logits = reader.read([[], [9]])
    >>> reader.lengths.tolist(), torch.allclose(logits[1], model(torch.tensor([[8, 9]])).logits[0, -1], atol=1e-4)
    ([3, 2], True)
    """

    def __init__(self, model: torch.nn.Module, rows: int, *, chunk: int = 8, room: int = 40):
        super().__init__()
        self.training = False
        self.model: torch.nn.Module = model
        self.rows: int = rows
        self.chunk: int = chunk
        lm = self._lm
        shape = (rows, lm.config.num_key_value_heads, room + chunk, lm.config.head_dim)
        for number in range(len(lm.model.layers)):
            for which in ("keys", "values"):
                self.register_buffer(f"{which}_{number}", torch.zeros(shape, dtype=lm.dtype), persistent=False)
        # what a layer calls its cache depends on the version of transformers
        named = inspect.signature(type(lm.model.layers[0]).forward).parameters
        self._cache: str = "cache" if "cache" in named else "past_key_values"
        self.register_buffer("places", torch.arange(room + chunk), persistent=False)
        #: how many tokens of each row have been read
        self.lengths: Tensor = torch.zeros(rows, dtype=torch.long)
        #: by their number of tokens, the steps that were compiled ahead of time
        self.ahead: dict[int, Callable[..., Tensor]] = {}

    @property
    def _lm(self) -> Any:
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def compile(self, backend: str) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Compiles a step. Nothing is built before the first one."""
        self.step = torch.compile(self.step, backend=backend, dynamic=False)

    def compile_ahead(self, folder: str | os.PathLike[str]) -> None:
        """Compiles both shapes ahead of time, to a file each (:func:`hotswap_lab.aoti_compile`)."""
        for width in (self.chunk, 1):
            ids = torch.zeros((self.rows, width), dtype=torch.long)
            aoti_compile(self, self._file(folder, width), kwargs=dict(ids=ids, positions=ids))

    def load_ahead(self, folder: str | os.PathLike[str]) -> None:
        """Reads with what :meth:`compile_ahead` wrote, in this process or another (:func:`hotswap_lab.aoti_load`)."""
        self.ahead = {width: aoti_load(self._file(folder, width), self) for width in (self.chunk, 1)}

    def _file(self, folder: str | os.PathLike[str], width: int) -> Path:
        return Path(folder) / ("token.pt2" if width == 1 else "chunk.pt2")

    def forget(self, row: int) -> None:
        """Starts anew in one row. Its cache need not be erased: no token looks at a place that isn't filled yet."""
        self.lengths[row] = 0

    @torch.no_grad()
    def read(self, parts: Sequence[list[int]]) -> Tensor:
        """Reads up to a chunk in each row, or nothing; the logits after it, ``[rows, vocabulary]``."""
        width = self.chunk if max(map(len, parts)) > 1 else 1
        ids = torch.tensor([part + [0] * (width - len(part)) for part in parts])
        positions = self.lengths[:, None] + torch.arange(width)
        counts = torch.tensor([len(part) for part in parts])
        logits = self.ahead.get(width, self.step)(ids, positions)
        self.lengths += counts
        return logits[torch.arange(len(parts)), counts - 1]

    def step(self, ids: Tensor, positions: Tensor) -> Tensor:
        """The model itself, with all of its caches: ``[rows, tokens]`` to ``[rows, tokens, vocabulary]``."""
        # to each token: itself, and all before it in its row
        visible = (self.places <= positions[..., None])[:, None]
        llama, head = self._lm.model, self._lm.lm_head
        hidden = llama.embed_tokens(ids)
        rotation = llama.rotary_emb(hidden, position_ids=positions)
        for number, layer in enumerate(llama.layers):
            keys, values = getattr(self, f"keys_{number}"), getattr(self, f"values_{number}")
            cache = {self._cache: RowCache(keys, values, positions)}
            hidden = layer(hidden, attention_mask=visible, position_embeddings=rotation, **cache)
        return head(llama.norm(hidden))

    forward = step
