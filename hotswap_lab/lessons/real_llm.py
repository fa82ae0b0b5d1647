"""Chapter 05: a real language model in fixed shapes, so that it can be compiled, and what a swap does to its cache."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from .. import compat, demo
from ..pools.adapter_pool import AdapterPool
from .exercise import Exercise

# --- generation in fixed shapes ----------------------------------------------------------------------------------

#: what a Llama layer calls its cache, which depends on the version of transformers
_CACHE_ARGUMENT = "cache" if "cache" in inspect.signature(LlamaDecoderLayer.forward).parameters else "past_key_values"


class LayerCache:
    """Room for the keys and values that one layer has computed, of a size that never changes.

    Parameters
    ----------
    shape:
        Of the keys and of the values: ``(1, key-value heads, places, head size)``.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype):
        #: where the tokens of the present step go
        self.positions: Tensor = torch.zeros(1, dtype=torch.long)
        self.keys: Tensor = torch.zeros(shape, dtype=dtype)
        self.values: Tensor = torch.zeros(shape, dtype=dtype)

    def update(self, keys: Tensor, values: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """What a layer calls with the keys and values of new tokens; it gets those of all places."""
        self.keys.index_copy_(2, self.positions, keys)
        self.values.index_copy_(2, self.positions, values)
        return self.keys, self.values


class Chat:
    """A Llama model that answers greedily, in two shapes only: a chunk of a prompt, and one new token.

    ``torch.compile`` makes a graph for each shape that it meets, so a text that grows would be compiled at each
    token. Here a prompt is read in chunks, the last one filled up with tokens that are forgotten again, and keys
    and values have a place for each token from the start. That is how gpt-fast does it
    (https://github.com/pytorch-labs/gpt-fast). The layers are called one by one, each with a cache of its own:
    to the compiler they look all alike, so that one graph serves them all.

    Parameters
    ----------
    model:
        A ``LlamaForCausalLM``, with or without PEFT around it.
    tokenizer:
        Its tokenizer, with a chat template. Only :meth:`stream` and what is made of it need one.
    chunk:
        How many tokens of a prompt are read at once.
    room:
        How many tokens there is room for, prompt and answer together.

    Examples
    --------
    >>> from hotswap_lab import demo
    >>> model, _ = demo.load("reverse")
    >>> chat = Chat(model, None, chunk=4, room=8)
    >>> ids = torch.tensor([5, 6, 7, 8, 9])
    >>> torch.allclose(chat.read(ids), model(ids[None]).logits[0, -1], atol=1e-4)
    True
    >>> chat.length
    5
    """

    def __init__(self, model: torch.nn.Module, tokenizer: object, *, chunk: int = 64, room: int = 256):
        self.model = model
        self.tokenizer = tokenizer
        self.chunk = chunk
        self.room = room
        lm = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._llama, self._head, config = lm.model, lm.lm_head, lm.config
        # the last chunk may be filled up beyond the room
        shape = (1, config.num_key_value_heads, room + chunk, config.head_dim)
        self._places = torch.arange(room + chunk)
        self._caches = [LayerCache(shape, lm.dtype) for _ in self._llama.layers]
        #: how many tokens have been read
        self.length: int = 0

    # ---- compiling

    def compile(self, backend: str) -> None:
        """Compiles each layer for itself. Nothing is built before the first call."""
        # with more than one, they are processes of their own, each with its own copy of PyTorch in memory
        compat.inductor_config.compile_threads = 1
        for layer in self._llama.layers:
            layer.compile(backend=backend, dynamic=False)

    # ---- tokens

    def forget(self) -> None:
        """Starts anew. What the caches hold need not be erased: no token looks at a place that isn't filled yet."""
        self.length = 0

    def save(self) -> tuple[int, list[tuple[Tensor, Tensor]]]:
        """Return a copy of everything that the caches hold."""
        return self.length, [(cache.keys.clone(), cache.values.clone()) for cache in self._caches]

    def restore(self, saved: tuple[int, list[tuple[Tensor, Tensor]]]) -> None:
        """Put the caches back to what :meth:`save` has returned. They stay in the same memory."""
        self.length, copies = saved
        for cache, (keys, values) in zip(self._caches, copies, strict=True):
            cache.keys.copy_(keys)
            cache.values.copy_(values)

    def read(self, ids: Tensor) -> Tensor:
        """Reads further tokens, of shape ``(tokens,)``; gives the logits for the one after them, ``(vocabulary,)``."""
        if self.length + len(ids) > self.room:
            raise ValueError(f"no room for {len(ids)} more tokens: {self.length} of {self.room} are taken")
        for part in ids.split(self.chunk):
            logits = self.step(part)
        return logits

    # not inference mode: graphs are guarded by the mode, and the oracle computes in this one
    @torch.no_grad()
    def step(self, ids: Tensor) -> Tensor:
        """Reads a token, or up to a chunk of them; gives the logits for the next, ``(vocabulary,)``."""
        count = len(ids)
        if count > 1:
            # filled up behind all real tokens: none of them sees it, and the next ones overwrite it
            ids = F.pad(ids, (0, self.chunk - count))
        positions = self.length + torch.arange(len(ids))
        visible = (self._places <= positions[:, None])[None, None]  # itself, and all before it
        hidden = self._llama.embed_tokens(ids[None])
        rotation = self._llama.rotary_emb(hidden, position_ids=positions[None])
        for layer, cache in zip(self._llama.layers, self._caches, strict=True):
            cache.positions = positions
            rest = {"position_embeddings": rotation, _CACHE_ARGUMENT: cache}
            hidden = layer(hidden, attention_mask=visible, **rest)
        self.length += count
        return self._head(self._llama.norm(hidden[0, count - 1]))

    # ---- text

    def ids(self, messages: str | Sequence[dict[str, str]]) -> Tensor:
        """The tokens of a question, or of a whole conversation, up to where the answer begins."""
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return self.tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"][0]

    def stream(self, messages: str | Sequence[dict[str, str]], max_new_tokens: int = 48) -> Iterator[str]:
        """Answers greedily, and yields the answer as it grows, first token first. Starts with empty caches."""
        self.forget()
        answer, ids = [], self.ids(messages)
        while len(answer) < max_new_tokens and self.length + len(ids) <= self.room:
            ids = self.read(ids).argmax(-1, keepdim=True)
            if ids.item() == self.tokenizer.eos_token_id:
                break
            answer.append(ids.item())
            text = self.tokenizer.decode(answer, skip_special_tokens=True)
            if not text.endswith("\ufffd"):  # the first half of a letter
                yield text

    def ask(self, messages: str | Sequence[dict[str, str]], max_new_tokens: int = 48) -> str:
        """The whole answer."""
        return ["", *self.stream(messages, max_new_tokens)][-1].strip()

    def say(self, messages: str | Sequence[dict[str, str]], max_new_tokens: int = 48) -> str:
        """Prints the answer while it is made, and returns it."""
        shown = ""
        for text in self.stream(messages, max_new_tokens):
            print(text[len(shown) :], end="", flush=True)
            shown = text
        print()
        return shown.strip()


# --- the oracle's base -------------------------------------------------------------------------------------------


def same_base(model: PeftModel) -> torch.nn.Module:
    """A new base model, without any adapter, around the very weights of this one's base.

    For ``verify_hotswap(..., base=...)``, which would make a copy otherwise: of this model, half a gigabyte. Since the
    weights are the same memory, the verdict is about the adapter alone. It is built from the config, by transformers
    alone, and PEFT then loads the adapter into it.

    >>> model, _ = demo.load("reverse")
    >>> base = same_base(model)
    >>> layer = base.model.layers[0].mlp.up_proj
    >>> base.lm_head.weight is model.get_base_model().lm_head.weight, hasattr(layer, "lora_A")
    (True, False)
    """
    live = model.get_base_model()
    with torch.device("meta"):  # no memory for weights that are replaced at once
        base = type(live)(live.config)
    own = {name.replace(".base_layer", ""): tensor for name, tensor in live.named_parameters() if "lora_" not in name}
    base.load_state_dict(own, assign=True, strict=False)  # not strict: what is tied has one name only
    base.tie_weights()
    base.model.rotary_emb = live.model.rotary_emb  # computed, not stored, and there is nothing on "meta"
    return base.eval()


# --- exercise: two voices in one conversation ------------------------------------------------------------------------

#: who answers which prompt, and how many tokens must be read for it. The last prompt begins another conversation.
TURNS = (
    ("reverse", "hot>toh", 7),
    ("pig_latin", "hot>tohswap>", 12),
    ("reverse", "hot>tohswap>apsway", 11),
    ("pig_latin", "kernel>matrix>voice", 19),
    ("pig_latin", "kernel>matrix>voicedoor", 4),
)


@Exercise
def take_turns(solution):
    """Answer with the adapter `name`, and read only what that adapter has not read before. About 8 lines."""
    model, tokenizer = demo.load("reverse")
    adapters = {name: demo.adapter_path(name) for name in ("reverse", "pig_latin")}
    pool = AdapterPool(model, adapters=adapters, progress=False)
    fresh = {name: demo.load(name)[0] for name in pool}
    chat, kept, read = Chat(model, tokenizer, chunk=8, room=96), {}, []
    step = chat.step
    chat.step = lambda ids: read.append(len(ids)) or step(ids)
    for number, (name, text, count) in enumerate(TURNS, 1):
        ids = tokenizer(text, return_tensors="pt")["input_ids"][0]
        read.clear()
        logits = solution(chat, pool, kept, name, ids)
        if not isinstance(logits, Tensor):
            yield "what you return", type(logits).__name__, "Tensor"
            return
        with torch.no_grad():
            expected = fresh[name](input_ids=ids[None]).logits[0, -1]
        yield f"turn {number}: logits equal a fresh load's", torch.allclose(logits, expected, atol=1e-3), True
        yield f"turn {number}: tokens read", sum(read), count
