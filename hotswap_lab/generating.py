"""Generating: the loop that answers greedily, and a reader in two graphs, for rows of a batch at different positions.

``torch.compile`` makes code for each shape that it meets, so a growing text would be compiled at each token. Here, two
graphs are enough: one reads a part of a prompt in each row, however long the part and the text before it are, and one
reads a single token in each row. The memory for the keys and values of all tokens is allocated at the start, as in
gpt-fast (https://github.com/pytorch-labs/gpt-fast).
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from . import compat
from .core.errors import HotswapError


def prompt_of(tokenizer: Any, messages: str | Sequence[dict[str, str]]) -> Tensor:
    """Return the token ids, ``[tokens]``, of a question or a whole conversation, up to the start of the answer."""
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    options = dict(add_generation_prompt=True, return_dict=True, return_tensors="pt")
    return tokenizer.apply_chat_template(messages, **options)["input_ids"][0]


def stream(
    read: Callable[[Tensor], Tensor], ids: Tensor, most: int, model: torch.nn.Module, tokenizer: Any
) -> Iterator[str]:
    """Answer greedily, and yield the answer so far after each token; at least one text, which may be empty.

    Parameters
    ----------
    read:
        A function that reads further token ids, ``[tokens]``, and returns the logits after them, ``[vocabulary]``.
    ids, most:
        The prompt, and the largest number of tokens in the answer.
    model, tokenizer:
        The answer ends with the end token of one of them.

    Examples
    --------
    >>> from hotswap_lab import demo
    >>> model, tokenizer = demo.load("shout")
    >>> reader = Reader(model, rows=1)
    >>> prompt = tokenizer("oh>", return_tensors="pt")["input_ids"][0]
    >>> list(stream(lambda ids: reader.read([ids.tolist()])[0], prompt, 8, model, tokenizer))
    ['O', 'OH', 'OH!']
    """
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    answer, text = [], None
    for _ in range(most):
        ids = read(ids).argmax(-1, keepdim=True)
        if ids.item() in ends:
            break
        answer.append(ids.item())
        longer = tokenizer.decode(answer, skip_special_tokens=True)
        if not longer.endswith("\ufffd"):  # part of a letter
            yield (text := longer)
    if text is None:
        yield ""


@dataclass
class LayerCache:
    """The keys and values of one layer, with rows at different places: ``positions`` is ``[rows, tokens]``.

    New tokens look at the first places only, as many as ``seen`` has. It is a tensor, because a graph is compiled again
    for another integer.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    seen: Tensor

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store the keys and values of new tokens. A layer calls this, and gets those of all places that are seen."""
        rows = torch.arange(keys.shape[0], device=keys.device)[:, None]
        self.keys[rows, :, self.positions] = keys.transpose(1, 2)
        self.values[rows, :, self.positions] = values.transpose(1, 2)
        length = self.seen.shape[0]
        return self.keys[:, :, :length], self.values[:, :, :length]


@dataclass
class RowCache:
    """The caches of all layers, in the form that the models of transformers take."""

    layers: Sequence[LayerCache]

    def get_seq_length(self, *_: Any) -> int:
        """The number of places that new tokens look at."""
        return self.layers[0].seen.shape[0]

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store the keys and values of new tokens in one layer, and return those of all places that are seen."""
        return self.layers[layer_idx].update(keys, values)


def any_size(tensor: Tensor, *axes: int) -> Tensor:
    """Have a graph that is compiled next take any size of these axes, but for those of size 1."""
    for axis in axes:
        if tensor.shape[axis] > 1:
            compat.maybe_mark_dynamic(tensor, axis)
    return tensor


class Reader(torch.nn.Module):
    """A language model that reads on in all rows of a batch: up to a chunk of tokens in each row at once.

    For models that keep keys and values in transformers' cache and have no other memory of a text: Llama, SmolLM2,
    Qwen, Mistral, Gemma and their like. :meth:`agrees` checks a model.

    Parameters
    ----------
    model:
        A causal language model of transformers, with or without PEFT around it.
    rows, chunk, longest:
        How many rows there are, how many tokens of each are read at once, and how many each can have.

    Examples
    --------
    >>> from hotswap_lab import demo
    >>> model, _ = demo.load("reverse")
    >>> reader = Reader(model, rows=2, chunk=4, longest=8)
    >>> logits = reader.read([[5, 6, 7], [8]])  # a short part is filled up
    >>> logits = reader.read([[], [9]])
    >>> reader.lengths.tolist(), torch.allclose(logits[1], model(torch.tensor([[8, 9]])).logits[0, -1], atol=1e-4)
    ([3, 2], True)
    """

    def __init__(self, model: torch.nn.Module, rows: int, *, chunk: int = 8, longest: int = 40):
        super().__init__()
        self.training = False
        self.model: torch.nn.Module = model
        self.rows: int = rows
        self.chunk: int = chunk
        self.longest: int = longest
        # the name of the cache depends on the version of transformers
        self._cache: str = "cache" if "cache" in inspect.signature(self._lm.forward).parameters else "past_key_values"
        device, sample = self._lm.device, DynamicCache()
        with torch.no_grad():
            self._call(torch.zeros((rows, 1), dtype=torch.long, device=device), cache=sample)
        self.layers: int = len(sample.layers)
        for number, layer in enumerate(sample.layers):
            for name in ("keys", "values"):
                tensor = getattr(layer, name)
                # one position more than there are tokens: the padding of short parts is written there
                memory = tensor.new_zeros((rows, tensor.shape[1], longest + 1, tensor.shape[3]))
                self.register_buffer(f"{name}_{number}", memory, persistent=False)
        self.register_buffer("places", torch.arange(longest + 1, device=device), persistent=False)
        #: how many tokens of each row have been read
        self.lengths: Tensor = torch.zeros(rows, dtype=torch.long, device="cpu")
        #: the compiled step; None if it is not compiled
        self.compiled: Callable[..., Tensor] | None = None
        #: the steps that were compiled ahead of time, by their number of tokens
        self.ahead: dict[int, Callable[..., Tensor]] = {}

    @property
    def _lm(self) -> Any:
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def compile(self, backend: str) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Compile a step. Nothing is built before the first one; there will be two graphs."""
        self.compiled = torch.compile(self.step, backend=backend, dynamic=False)

    def use_ahead(self, folder: str | os.PathLike[str], progress: bool = True) -> None:
        """Use steps that were compiled ahead of time, for a whole chunk and for one token: a file each in a folder.

        A missing file is made first (:func:`hotswap_lab.aoti_compile`). A shorter part is filled up to a chunk.
        """
        from .ahead import aoti_compile, aoti_load  # here, so that everything else works without that folder

        Path(folder).mkdir(parents=True, exist_ok=True)
        for width in (self.chunk, 1):
            file = Path(folder, "token.pt2" if width == 1 else "chunk.pt2")
            if not file.exists():
                # different tokens, because the code is checked on them
                ids = torch.arange(self.rows * width, device=self._lm.device).view(self.rows, width)
                inputs = dict(ids=ids % self._lm.config.get_text_config().vocab_size, positions=ids % width)
                aoti_compile(self, file, kwargs=inputs, progress=progress)
            self.ahead[width] = aoti_load(file, self)

    def forget(self, row: int) -> None:
        """Empty one row. Its keys and values are erased, because NaN would reach even tokens that are masked."""
        self.lengths[row] = 0
        for buffer in self.buffers(recurse=False):
            if buffer is not self.places:
                buffer[row] = 0

    @torch.no_grad()
    def read(self, parts: Sequence[list[int]]) -> Tensor:
        """Read up to a chunk in each row, or nothing; return the logits after it, ``[rows, vocabulary]``.

        Raises ValueError if a row would have more than ``longest`` tokens: nothing is read then.
        """
        most, counts = max(1, *map(len, parts)), torch.tensor([len(part) for part in parts], device="cpu")
        if (over := int((self.lengths + counts).max())) > self.longest:
            raise ValueError(f"a row would have {over} tokens: expected {self.longest} at most, this reader's longest")
        # code that was compiled ahead has two shapes
        width = self.chunk if self.ahead and most > 1 else most
        # the last tokens of all parts are in the last column
        ids = torch.tensor([[0] * (width - len(part)) + part for part in parts], device="cpu")
        places = torch.arange(width, device="cpu") - (width - counts)[:, None]
        positions = torch.where(places < 0, self.longest, self.lengths[:, None] + places)
        inputs = [ids.to(self.places.device), positions.to(self.places.device)]
        step = self.ahead.get(width, self.compiled or self.step)
        if not self.ahead:  # no token looks beyond the longest row; one position would need a different graph
            seen = self.places[: max(2, int(self.lengths.max()) + width)]
            inputs = [any_size(inputs[0], 1), any_size(inputs[1], 1), any_size(seen, 0)]
        try:
            logits = step(*inputs)
        except HotswapError:
            if step == self.step:
                raise
            # a pool's check that these layers keep the rows apart needs a call that is not compiled
            self.step(*inputs)
            logits = step(*inputs)
        self.lengths += counts
        return logits[:, -1]

    def step(self, ids: Tensor, positions: Tensor, seen: Tensor | None = None) -> Tensor:
        """The model itself, with all of its caches: ``[rows, tokens]`` to the logits ``[rows, 1, vocabulary]``.

        ``seen`` are the places that tokens may look at: the first ones of all, or all.
        """
        dtype, seen = self._lm.dtype, self.places if seen is None else seen
        # each token sees itself, and all before it in its row
        visible = (seen <= positions[..., None])[:, None]
        mask = torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)
        memories = ((getattr(self, f"keys_{n}"), getattr(self, f"values_{n}")) for n in range(self.layers))
        cache = RowCache([LayerCache(*memory, positions, seen) for memory in memories])
        return self._call(ids, cache=cache, attention_mask=mask, position_ids=positions.clamp(max=self.longest - 1))

    forward = step

    def _call(self, ids: Tensor, *, cache: object, **inputs: Tensor) -> Tensor:
        return self._lm(input_ids=ids, use_cache=True, logits_to_keep=1, **{self._cache: cache}, **inputs).logits

    @torch.no_grad()
    def agrees(self) -> bool:
        """Whether the logits are those of the model itself, in a row as long as can be served next to a short one.

        The model reads the longest text once, so this takes as long as that. The batches have other sizes than
        ``rows``, so all rows of a pool must have the same adapter. It is also False where the model's config says that
        a text of this length is computed in another way, because half precision may hide that.
        """
        config = self._lm.config.get_text_config()
        names = ("sliding_window", "attention_chunk_size", "window_size", "keep_window_size")
        windows = [getattr(config, name, None) for name in names]
        is_windowed = any(isinstance(window, int) and 0 < window < self.longest for window in windows)
        if self.longest < 4 or (is_windowed and getattr(config, "use_sliding_window", True)):
            return False  # too few tokens to tell; or the mask here has no window
        ropes = getattr(config, "rope_parameters", None) or {}
        for rope in (ropes, *ropes.values()):  # some models have one for each type of layer
            changes = isinstance(rope, dict) and rope.get("rope_type") in ("longrope", "dynamic")
            if changes and self.longest > rope.get("original_max_position_embeddings", config.max_position_embeddings):
                return False  # from there on, the longest row changes the angles of all rows
        return self._agrees_in_trial(config.vocab_size)

    def _agrees_in_trial(self, tokens: int) -> bool:
        device, split = self._lm.device, self.longest - 4
        ids = torch.randint(tokens, (self.longest,), generator=torch.Generator("cpu").manual_seed(0), device="cpu")
        texts, cache = [ids[split:].tolist(), ids[:4].tolist()], DynamicCache()
        expected = [self._call(ids[None].to(device), cache=cache)]
        expected.append(self._call(ids[None, :4].to(device), cache=DynamicCache()))
        trial = Reader(self.model, 2, longest=self.longest)
        for number, layer in enumerate(cache.layers):  # the long row begins shortly before its end
            for name in ("keys", "values"):
                getattr(trial, f"{name}_{number}")[0, :, :split] = getattr(layer, name)[0, :, :split]
        trial.lengths[0] = split
        trial.read([text[:2] for text in texts])
        logits, expected = trial.read([text[2:] for text in texts]), torch.cat(expected)[:, -1]
        # rounding differs; another text would change much more
        tolerance = min(0.02, torch.finfo(logits.dtype).eps ** 0.5)
        return bool((logits - expected).abs().max() < tolerance * expected.abs().max())
