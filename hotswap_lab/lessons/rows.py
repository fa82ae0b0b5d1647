"""Chapter 08: another adapter in each row of a batch, and rows that are given on while others go on."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor

from ..figures import MUTED, Canvas, Figure
from .exercise import Exercise
from .real_llm import _CACHE_ARGUMENT as CACHE
from .real_llm import LayerCache

# --- adapters that are active together ---------------------------------------------------------------------------


def together(base: torch.nn.Module, folders: Mapping[str, str], weights: Mapping[str, float]) -> PeftModel:
    """What a mix has to equal: PEFT's own model with all of these adapters active, each times its weight.

    Parameters
    ----------
    base:
        A fresh base model, into which the adapters are loaded.
    folders, weights:
        By name, where each adapter is, and how much of it is wanted.

    Examples
    --------
    >>> from hotswap_lab import demo
    >>> both = together(demo.load_base(), {"sort": demo.adapter_path("sort")}, {"sort": 0.0})
    >>> demo.ask(both, demo.load_tokenizer(), "hotswap")
    'hotswap'
    """
    first, *others = weights
    model = PeftModel.from_pretrained(base, folders[first], adapter_name=first)
    for name in others:
        model.load_adapter(folders[name], name)
    model.base_model.set_adapter(list(weights))
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.scaling.update({name: weights[name] * own for name, own in layer.scaling.items()})
    return model.eval()


# --- rows that are at different places ---------------------------------------------------------------------------


class RowCache(LayerCache):
    """A layer's keys and values, for rows at different places: ``positions`` is ``[rows, tokens]``."""

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        rows = torch.arange(len(keys))[:, None]
        self.keys[rows, :, self.positions] = keys.transpose(1, 2)
        self.values[rows, :, self.positions] = values.transpose(1, 2)
        return self.keys, self.values


class Reader:
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
        lm = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.chunk = chunk
        self._llama, self._head, config = lm.model, lm.lm_head, lm.config
        shape = (rows, config.num_key_value_heads, room + chunk, config.head_dim)
        self._caches = [RowCache(shape, lm.dtype) for _ in self._llama.layers]
        self._places = torch.arange(room + chunk)
        #: how many tokens of each row have been read
        self.lengths: Tensor = torch.zeros(rows, dtype=torch.long)

    def compile(self, backend: str) -> None:
        """Compiles a step. Nothing is built before the first one."""
        self.step = torch.compile(self.step, backend=backend, dynamic=False)

    def forget(self, row: int) -> None:
        """Starts anew in one row. Its cache need not be erased: nobody looks at a place that isn't filled yet."""
        self.lengths[row] = 0

    @torch.no_grad()
    def read(self, parts: Sequence[list[int]]) -> Tensor:
        """Reads up to a chunk in each row, or nothing; the logits after it, ``[rows, vocabulary]``."""
        width = self.chunk if max(map(len, parts)) > 1 else 1
        ids = torch.tensor([part + [0] * (width - len(part)) for part in parts])
        positions = self.lengths[:, None] + torch.arange(width)
        counts = torch.tensor([len(part) for part in parts])
        logits = self.step(ids, positions)
        self.lengths += counts
        return logits[torch.arange(len(parts)), counts - 1]

    def step(self, ids: Tensor, positions: Tensor) -> Tensor:
        """The model itself, with all of its caches: ``[rows, tokens]`` to ``[rows, tokens, vocabulary]``."""
        # to each token: itself, and all before it in its row
        visible = (self._places <= positions[..., None])[:, None]
        hidden = self._llama.embed_tokens(ids)
        rotation = self._llama.rotary_emb(hidden, position_ids=positions)
        for layer, cache in zip(self._llama.layers, self._caches, strict=True):
            cache.positions = positions
            hidden = layer(hidden, attention_mask=visible, position_embeddings=rotation, **{CACHE: cache})
        return self._head(self._llama.norm(hidden))


#: one colour for each adapter, light enough for dark letters
COLORS = ("#6fb7f2", "#f2b36f", "#8fd19e", "#e59bb8", "#c9b6f2", "#e8d66b")


def timetable(steps: Sequence[Sequence[tuple[int, str] | None]]) -> Figure:
    """Who had which row of the batch when.

    Parameters
    ----------
    steps:
        For each step, for each row, the number of the request and its adapter; None for a row that nobody has.

    Examples
    --------
    >>> print(timetable([[(0, "sort"), (1, "shout")], [(0, "sort"), (2, "sort")]]))
    2 rows, 2 steps. Row 0: request 0 (sort). Row 1: requests 1 (shout), 2 (sort)
    """
    left, top, width, height = 60, 46, 580 / len(steps), 26
    adapters = dict.fromkeys(each[1] for step in steps for each in step if each)
    colors = dict(zip(adapters, itertools.cycle(COLORS)))
    rows = list(zip(*steps, strict=True))
    canvas = Canvas(660, top + height * len(rows) + 30)
    for number, (adapter, color) in enumerate(colors.items()):
        canvas.box(left + 116 * number, 14, 16, 16, color)
        canvas.text(left + 116 * number + 22, 27, adapter, anchor="start")
    told = []
    for number, row in enumerate(rows):
        y, start, served = top + height * number, 0, []
        canvas.text(left - 10, y + 18, f"row {number}", size=12, anchor="end", color=MUTED)
        for request, run in itertools.groupby(row):
            length = len(list(run))
            if request is not None:
                canvas.box(left + width * start, y + 2, width * length, height - 4, colors[request[1]])
                canvas.text(left + width * (start + length / 2), y + 18, str(request[0]), size=12)
                served.append(f"{request[0]} ({request[1]})")
            start += length
        told.append(f"Row {number}: request{'s' * (len(served) > 1)} {', '.join(served) or 'none'}")
    canvas.text(left, top + height * len(rows) + 20, f"{len(steps)} steps", size=12, anchor="start", color=MUTED)
    return canvas.figure(f"{len(rows)} rows, {len(steps)} steps. {'. '.join(told)}")


# --- exercise: a layer in which each row has its own -------------------------------------------------------------


@Exercise
def own_adapters(solution):
    """`x` is a batch of shape (batch, tokens, inputs), and `base` a layer. There is room for more rows than the batch
    has; the first of them are the batch's:
      a        (rows, rank, inputs)
      b        (rows, rank, outputs)
      scaling  (rows,)
    Return base(x) plus what each row's own adapter adds to it, without a loop. About 5 lines.
    """
    generator = torch.Generator().manual_seed(0)
    for what, rows, batch, tokens in (("three rows", 3, 3, 1), ("two of four rows, two tokens", 4, 2, 2)):
        # whole numbers: they are added up exactly, in whatever order
        shapes = ((batch, tokens, 3), (rows, 2, 3), (rows, 2, 4), (4, 3), (rows,))
        x, a, b, weight, scaling = (torch.randint(-3, 4, each, generator=generator).float() for each in shapes)
        expected = torch.stack([F.linear(x[i], weight + scaling[i] * b[i].T @ a[i]) for i in range(batch)])
        calls: list[torch.Tensor] = []

        def base(x: torch.Tensor, calls: list = calls, weight: torch.Tensor = weight) -> torch.Tensor:
            calls.append(x)
            return F.linear(x, weight)

        yours = solution(base, x, a, b, scaling)
        shape = tuple(yours.shape) if isinstance(yours, torch.Tensor) else type(yours).__name__
        yield f"the shape for {what}", shape, tuple(expected.shape)
        if shape == tuple(expected.shape):
            yield f"the outputs of {what}", yours.tolist(), expected.tolist()
        yield f"calls of the base layer for {what}", len(calls), 1
