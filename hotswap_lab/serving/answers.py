"""A request to a replica, its answer on the way, and the pieces in which that is sent."""

import asyncio
import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers.convert_slow_tokenizer import bytes_to_unicode

from .sampling import Sampler, Sampling
from .table import Version

#: what tokenizers write for bytes that are no text
LOST = "\ufffd"
#: the byte of each letter in the vocabularies of GPT-2 and its like
BYTES: dict[str, int] = {letter: byte for byte, letter in bytes_to_unicode().items()}


@dataclass(frozen=True, kw_only=True)
class Request(Sampling):
    """A prompt, or the messages of a chat; the share of each adapter, none for the base model; and how to answer.

    The answer ends before the first of the ``stop`` strings. ``logprobs`` asks for the log probability of each token,
    before all that :class:`Sampling` does, and for that many of the most probable ones at its place. An answer that is
    not streamed is one piece. For the other fields, see :class:`Sampling`.
    """

    prompt: str | Sequence[Mapping[str, str]]
    shares: Mapping[Version, float] = field(default_factory=dict)
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    is_streamed: bool = False


@dataclass(frozen=True)
class Token:
    """The name, log probability and bytes of a token, the most probable ones at its place, and where it begins.

    ``raw`` is what the token adds to the answer, so that those of all tokens are the answer's; None if the tokenizer
    doesn't show them. ``name`` is their text. Part of a letter has OpenAI's ``bytes:\\xc3``. A token whose bytes are
    unknown, or whose name another token at this place has already, has vLLM's ``token_id:7``.
    """

    name: str
    logprob: float
    raw: bytes | None = None
    top: tuple["Token", ...] = ()
    start: int = 0


@dataclass(frozen=True)
class Piece:
    """A part of an answer. The last one says why it ends: at a ``stop``, or at the ``length`` that was allowed."""

    text: str
    finish: str | None
    prompt_tokens: int
    completion_tokens: int
    tokens: tuple[Token, ...] = ()


class Answer:
    """A request on its way: computed in one thread, listened to in another one's event loop."""

    def __init__(self, request: Request, ids: list[int], replica: Any):
        self.request: Request = request
        self.ids: list[int] = ids
        self.replica: Any = replica
        self.pieces: asyncio.Queue[Piece | Exception] = asyncio.Queue()
        self.loop: asyncio.AbstractEventLoop = asyncio.get_running_loop()
        self.sampler: Sampler = Sampler(request, ids, replica.pool.model, replica.defaults, replica.ends)
        #: the end of the prompt, which the model has not read yet
        self.unread: list[int] = ids
        self.tokens: list[int] = []
        self.described: list[Token] = []
        #: the text of the tokens, and their bytes, if they are wanted and known
        self.whole: str = ""
        self.raw: bytes | None = b""
        #: the last text that didn't end in part of a letter, and how many tokens it has
        self.complete: tuple[str, int] = "", 0
        #: text that is not sent yet, and how many letters are in it or sent
        self.text: str = ""
        self.ready: int = 0
        #: the answer has ended, or its client has gone
        self.is_over: bool = False

    @property
    def adapter(self) -> str | dict[str, float] | None:
        """The adapter or mix of this request, in the form that a pool takes for a row."""
        shares = {version.key: weight for version, weight in self.request.shares.items()}
        return next(iter(shares)) if list(shares.values()) == [1.0] else shares or None

    def next_part(self, most: int) -> list[int]:
        """The tokens that the model reads next: a part of the prompt, or else the last token of the answer."""
        if not self.unread:
            return self.tokens[-1:]
        part, self.unread = self.unread[:most], self.unread[most:]
        return part

    def send(self, piece: Piece | Exception) -> None:
        if isinstance(piece, Exception) or piece.finish:  # and never back to False: the client may have gone meanwhile
            self.is_over = True
        with contextlib.suppress(RuntimeError):  # the event loop is closed, so the client has gone
            self.loop.call_soon_threadsafe(self.pieces.put_nowait, piece)

    def take(self, logits: torch.Tensor, best: int) -> int:
        """Chooses the next token, and sends the new part of the text."""
        logits, previous = logits.float(), self.whole
        token = self.sampler.choose(logits, best, self.tokens)
        self.tokens.append(token)
        self.whole = self._read()
        if self.request.logprobs is not None:
            self._describe(previous, logits.log_softmax(-1), self.request.logprobs)
        most = self.request.max_tokens or self.replica.options.longest_answer
        finish = "stop" if token in self.replica.ends else "length" if len(self.tokens) == most else None
        text, stops = self.whole, self.request.stop
        found = [at for at in map(text.find, stops) if at >= 0]
        finish, text = ("stop", text[: min(found)]) if found else (finish, text)
        # text that may be the start of a stop string is not sent yet
        longest = [min(len(each), len(text) + 1) for each in stops]  # a client may send stops of 65,000 letters
        starts = [each[:n] for each, most in zip(stops, longest, strict=True) for n in range(1, most)]
        unsent = max((len(each) for each in starts if text.endswith(each)), default=0)
        ready = len(text) if finish else len(text) - unsent
        # so is a letter that takes several tokens
        if finish or (not text.endswith(LOST) and ready >= self.ready):
            self.text += text[self.ready : ready]
            self.ready = ready
            # an answer that is not streamed is made of the same pieces, so that its text is the same
            if finish or self.request.is_streamed:
                self.send(Piece(self.text, finish, len(self.ids), len(self.tokens), tuple(self.described)))
                self.text, self.described = "", []
        return token

    def _read(self) -> str:
        """The text of the tokens."""
        text, (before, count) = self._decode(self.tokens), self.complete
        if LOST in text and not text.startswith(before):  # Llama's decodes bytes in a row as a whole, or none of them
            last = count - 1
            text = before + self._decode(self.tokens[last:])[len(self._decode(self.tokens[last:count])) :]
        if not text.endswith(LOST):
            self.complete = text, len(self.tokens)
        return text

    def _decode(self, tokens: Sequence[int]) -> str:
        # cleaning up spaces would change text that is sent already: "a ." becomes "a."
        return self.replica.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _describe(self, previous: str, values: torch.Tensor, most: int) -> None:
        """Notes the log probability of the last token, and of the most probable ones at its place."""
        token, best = self.tokens[-1], values.topk(min(most, len(values))).indices.tolist()
        found: dict[int, Token] = {}
        for each in dict.fromkeys([token, *best]):
            added, other = self._added(previous, each), f"token_id:{each}"
            name = other if added is None else _name(added)
            is_taken = name in [earlier.name for earlier in found.values()]
            found[each] = Token(other if is_taken else name, float(values[each]), added)
        start, added = len(previous), found[token].raw
        text = "" if added is None else added.decode(errors="replace")
        if text.encode() == added and self.whole.endswith(text):
            start = len(self.whole) - len(text)
        elif added and self.raw is not None:  # its first byte may belong to a letter that has begun before it
            start = len((self.raw + added[:1]).decode(errors="replace")) - 1
        self.described.append(replace(found[token], top=tuple(map(found.__getitem__, best)), start=start))
        is_known = None not in (self.raw, added)
        self.raw = self.raw + added if is_known else None if LOST in self.whole else self.whole.encode()

    def _added(self, previous: str, token: int) -> bytes | None:
        """The bytes that a token adds to the answer, whose text was ``previous``; None if the tokenizer hides them."""
        text = self._decode([*self.tokens[:-1], token])
        added = text[len(previous) :]
        if text.startswith(previous) and not previous.endswith(LOST) and LOST not in added:
            return added.encode()
        if LOST not in previous + text:  # a tokenizer that changes earlier text
            return None
        spelled = self._spelled(token)
        is_other = None not in (spelled, self.raw) and LOST not in text and self.raw + spelled != text.encode()
        return None if is_other else spelled

    def _spelled(self, token: int) -> bytes | None:
        """The bytes of a token next to part of a letter, from its spelling, where the tokenizer decodes that alike."""
        alone, twice = self._decode([token]), self._decode([token, token])
        spelled = self.replica.tokenizer.convert_ids_to_tokens(token)
        if LOST not in twice:
            return twice[len(alone) :].encode()  # the first one may lack its space
        if re.fullmatch("<0x[0-9A-F]{2}>", spelled) and alone == LOST:
            return bytes.fromhex(spelled[3:5])
        found = bytes(map(BYTES.get, spelled)) if {*spelled} <= BYTES.keys() else b""
        if (found * 2).decode(errors="replace").endswith(twice):
            return found
        return alone.encode() if alone == spelled else None


def _name(added: bytes) -> str:
    """The text of some bytes, or themselves where they are none."""
    text = added.decode(errors="replace")
    return text if text.encode() == added else "bytes:" + "".join(f"\\x{each:02x}" for each in added)
