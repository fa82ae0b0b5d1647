"""Chapter 05: a real language model in two graphs, and its KV cache after a swap."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest.mock import Mock

import torch
from peft import PeftModel
from torch import Tensor

from .. import compat, demo, generating
from ..pools.adapter_pool import AdapterPool
from .exercise import Exercise

# --- generation in two graphs ------------------------------------------------------------------------------------


class ByLayer(generating.Reader):
    """A reader of a Llama model that calls its layers one by one, each with its own KV cache.

    All layers look alike to the compiler, so one graph serves them all.
    """

    def compile(self, backend: str) -> None:
        """Compile each layer on its own, at its first call."""
        # more threads would be processes, each with its own copy of PyTorch in memory
        compat.inductor_config.compile_threads = 1
        for layer in self._lm.model.layers:
            layer.compile(backend=backend, dynamic=False)
        self.compiled: Callable[..., Tensor] | None = self.step

    def _call(self, ids: Tensor, *, cache: Any, **inputs: Tensor) -> Tensor:
        if not inputs:  # the first call, which determines the sizes of the caches
            return super()._call(ids, cache=cache)
        llama = self._lm.model
        hidden = llama.embed_tokens(ids)
        rotation = llama.rotary_emb(hidden, position_ids=inputs["position_ids"])
        rest = {"position_embeddings": [generating.any_size(tensor, 1) for tensor in rotation]}
        rest["attention_mask"] = generating.any_size(inputs["attention_mask"], 2, 3)
        for layer, own in zip(llama.layers, cache.layers, strict=True):
            hidden = layer(generating.any_size(hidden, 1), **rest, **{self._cache: own})
        return self._lm.lm_head(llama.norm(hidden[:, -1:]))


class Chat:
    """A Llama model that answers greedily in only two graphs: one for parts of a prompt, and one for a new token.

    ``torch.compile`` makes a graph for each new shape, so a growing text would recompile at each token. Here growing
    sizes are marked as dynamic, and the KV cache has its full size from the start
    (:class:`hotswap_lab.generating.Reader`, here with one row).

    Parameters
    ----------
    model:
        A ``LlamaForCausalLM``, with or without PEFT around it.
    tokenizer:
        Its tokenizer, with a chat template. Only :meth:`stream`, :meth:`ask` and :meth:`say` need one.
    chunk:
        The number of tokens of a prompt that are read at once.
    room:
        The maximum number of tokens, prompt and answer together.

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

    def __init__(self, model: torch.nn.Module, tokenizer: Any, *, chunk: int = 64, room: int = 256):
        self.tokenizer = tokenizer
        self.reader: ByLayer = ByLayer(model, rows=1, chunk=chunk, longest=room)
        #: compiles each layer for itself
        self.compile: Callable[[str], None] = self.reader.compile

    # ---- tokens

    @property
    def length(self) -> int:
        """The number of tokens that have been read."""
        return int(self.reader.lengths)

    def forget(self) -> None:
        """Empty the caches."""
        self.reader.forget(0)

    def _state(self) -> list[Tensor]:
        """The length and the content of the caches."""
        return [self.reader.lengths, *self.reader.buffers(recurse=False)]

    def save(self) -> list[Tensor]:
        """Return a copy of the caches and of their length."""
        return [tensor.clone() for tensor in self._state()]

    def restore(self, saved: Sequence[Tensor]) -> None:
        """Restore the caches from a copy that :meth:`save` returned. They stay in the same memory."""
        for tensor, copy in zip(self._state(), saved, strict=True):
            tensor.copy_(copy)

    def read(self, ids: Tensor) -> Tensor:
        """Read further tokens, of shape ``(tokens,)``, and return the next token's logits, ``(vocabulary,)``."""
        if self.length + len(ids) > self.reader.longest:
            raise ValueError(f"no room for {len(ids)} more tokens: {self.length} of {self.reader.longest} are used")
        for part in ids.split(self.reader.chunk):
            logits = self.reader.read([part.tolist()])
        return logits[0]

    # ---- text

    def ids(self, messages: str | Sequence[dict[str, str]]) -> Tensor:
        """Return the tokens of a question or of a whole conversation, up to the start of the answer."""
        return generating.prompt_of(self.tokenizer, messages)

    def stream(self, messages: str | Sequence[dict[str, str]], max_new_tokens: int = 48) -> Iterator[str]:
        """Answer greedily from empty caches, and yield the answer so far after each token."""
        self.forget()
        ids = self.ids(messages)
        # plus 1, because the last token isn't read
        limit = min(max_new_tokens, self.reader.longest - len(ids) + 1)
        yield from generating.stream(self.read, ids, limit, self.reader.model, self.tokenizer)

    def ask(self, messages: str | Sequence[dict[str, str]], max_new_tokens: int = 48) -> str:
        """Return the whole answer."""
        return [*self.stream(messages, max_new_tokens)][-1].strip()

    def say(self, messages: str | Sequence[dict[str, str]], max_new_tokens: int = 48) -> str:
        """Print the answer while it grows, and return it."""
        shown = ""
        for text in self.stream(messages, max_new_tokens):
            print(text[len(shown) :], end="", flush=True)
            shown = text
        print()
        return shown.strip()


# --- the oracle's base -------------------------------------------------------------------------------------------


def same_base(model: PeftModel) -> torch.nn.Module:
    """Return a new base model without adapters that shares the weights of this model's base.

    Pass it to ``verify_hotswap(..., base=...)``, which would otherwise copy the base: for this model, half a gigabyte.
    Because the weights share memory, the verdict is about the adapter alone. Only transformers builds the base, from
    its config, and PEFT then loads the adapter into it.

    >>> model, _ = demo.load("reverse")
    >>> base = same_base(model)
    >>> layer = base.model.layers[0].mlp.up_proj
    >>> base.lm_head.weight is model.get_base_model().lm_head.weight, hasattr(layer, "lora_A")
    (True, False)
    """
    live = model.get_base_model()
    with torch.device("meta"):  # no memory, because all weights are replaced below
        base = type(live)(live.config)
    own = {name.replace(".base_layer", ""): tensor for name, tensor in live.named_parameters() if "lora_" not in name}
    base.load_state_dict(own, assign=True, strict=False)  # not strict, because tied weights have only one name here
    base.tie_weights()
    base.model.rotary_emb = live.model.rotary_emb  # its buffers are computed, not stored, and "meta" has no values
    return base.eval()


# --- exercise: two voices in one conversation ------------------------------------------------------------------------

#: The adapter that answers, the prompt, and the number of tokens to read. The fourth turn begins a conversation. The
#: seventh differs in the middle only, and the other adapter continues it. The next two are the same. Then one differs
#: in the last token only (33 for 3: as text, 33 begins with 3), and one has the same letters. The last but one reads as
#: many tokens as the other adapter had read, and the last continues by one token.
TURNS = (
    ("reverse", "hot>toh", 7),
    ("pig_latin", "hot>tohswap>", 12),
    ("reverse", "hot>tohswap>apsway", 11),
    ("pig_latin", "kernel>matrix>voice", 19),
    ("pig_latin", "kernel>matrix>voicedoor", 4),
    ("pig_latin", "kernel>matrix>voicedoorways", 4),
    ("pig_latin", "kernel>matrox>voicedoorways>s", 29),
    ("reverse", "kernel>matrox>voicedoorways>s>x", 31),
    *[("pig_latin", "kernel ", 7)] * 2,
    ("pig_latin", "kernel>x", 8),
    ("pig_latin", "kenrel>x>y", 10),
    ("pig_latin", "colonel>matrix>voicedoorways>", 29),
    ("reverse", "kernel>matrox>voicedoorways>s>x>", 1),
)


@Exercise
def take_turns(solution):
    """Answer with the adapter `name`, and read only what that adapter has not read before. About 8 lines."""
    model, tokenizer = demo.load("reverse")
    adapters = {name: demo.adapter_path(name) for name in ("reverse", "pig_latin")}
    pool = AdapterPool(model, adapters=adapters, progress=False)
    fresh = {name: demo.load(name)[0] for name in pool}
    chat, kept = Chat(model, tokenizer, chunk=8, room=96), {}
    pool.swap("pig_latin")
    chat.read(tokenizer("swap>", return_tensors="pt")["input_ids"][0])
    read = chat.reader.read = Mock(wraps=chat.reader.read)  # records its arguments
    for number, (name, text, count) in enumerate(TURNS, 1):
        ids = tokenizer(text, return_tensors="pt")["input_ids"][0]
        read.reset_mock()
        logits = solution(chat, pool, kept, name, ids)
        with torch.no_grad():
            expected = fresh[name](input_ids=torch.cat([ids, ids[:2]])[None]).logits[0]
        kinds = [(type(x).__name__, *getattr(x, "shape", ()), getattr(x, "dtype", "")) for x in (logits, expected[-3])]
        if kinds[0] != kinds[1]:
            yield "what you return", *kinds
            return
        yield f"turn {number}: logits equal a fresh load's", torch.allclose(logits, expected[-3], atol=1e-3), True
        yield f"turn {number}: tokens read", sum(len(call.args[0][0]) for call in read.call_args_list), count
        answer = chat.read(ids[:2])
        pool.strength = 0.5  # as other code may
        yield f"turn {number}: it stays in for the answer", torch.allclose(answer, expected[-1], atol=1e-3), True
