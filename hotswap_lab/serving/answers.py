"""A request to a replica, the answer while it is computed, and the pieces that are sent."""

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

#: the character that tokenizers decode invalid bytes to
LOST = "\ufffd"
#: the byte of each letter in vocabularies such as GPT-2's
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
    doesn't show them. ``name`` is their text; for part of a letter, OpenAI's ``bytes:\\xc3``. If the bytes are unknown,
    or another token at this place already has this name, it is vLLM's ``token_id:7``.
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
    """The answer to a request. One thread computes it; the event loop of another one receives the pieces."""

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
        #: text that is not sent yet, and the number of letters that are sent or in it
        self.text: str = ""
        self.ready: int = 0
        #: whether the answer has ended, or its client has gone
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
        if isinstance(piece, Exception) or piece.finish:  # never reset: the client may have gone meanwhile
            self.is_over = True
        with contextlib.suppress(RuntimeError):  # the event loop is closed, so the client has gone
            self.loop.call_soon_threadsafe(self.pieces.put_nowait, piece)

    def take(self, logits: torch.Tensor, best: int) -> int:
        """Choose the next token, and send the new part of the text."""
        logits, previous = logits.float(), self.whole
        token = self.sampler.choose(logits, best, self.tokens)
        self.tokens.append(token)
        self.whole = self._read()
        if self.request.logprobs is not None:
            self._describe(previous, logits.log_softmax(-1), self.request.logprobs)
        self._send_new_text(self._finish_at_length(token))
        return token

    def _finish_at_length(self, token: int) -> str | None:
        """Return the reason why the answer ends after this token; None if it goes on."""
        if token in self.replica.ends:
            return "stop"
        most = self.request.max_tokens or self.replica.options.longest_answer
        return "length" if len(self.tokens) == most else None

    def _send_new_text(self, finish: str | None) -> None:
        """Send the text that is not sent yet, up to a stop string, which ends the answer."""
        text, stops = self.whole, self.request.stop
        if positions := [text.find(stop) for stop in stops if stop in text]:
            finish, text = "stop", text[: min(positions)]
        ready = len(text) if finish else len(text) - _longest_start(stops, text)
        # text after part of a letter, and text that may be the start of a stop string, is not sent yet
        if finish or (not text.endswith(LOST) and ready >= self.ready):
            self.text += text[self.ready : ready]
            self.ready = ready
            # an answer that is not streamed is made of the same pieces, so that its text is the same
            if finish or self.request.is_streamed:
                self.send(Piece(self.text, finish, len(self.ids), len(self.tokens), tuple(self.described)))
                self.text, self.described = "", []

    def _read(self) -> str:
        """Decode the tokens."""
        text, (before, count) = self._decode(self.tokens), self.complete
        if LOST in text and not text.startswith(
            before
        ):  # Llama's tokenizer decodes all bytes in a row, or none of them
            last = count - 1
            text = before + self._decode(self.tokens[last:])[len(self._decode(self.tokens[last:count])) :]
        if not text.endswith(LOST):
            self.complete = text, len(self.tokens)
        return text

    def _decode(self, tokens: Sequence[int]) -> str:
        # cleaning up spaces would change text that was sent: "a ." becomes "a."
        return self.replica.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _describe(self, previous: str, values: torch.Tensor, most: int) -> None:
        """Record the log probability of the last token, and of the most probable ones at its place."""
        chosen, best = self.tokens[-1], values.topk(min(most, len(values))).indices.tolist()
        tokens: dict[int, Token] = {}
        for token in dict.fromkeys([chosen, *best]):
            added = self._added(previous, token)
            name = f"token_id:{token}" if added is None else _name(added)
            if name in [earlier.name for earlier in tokens.values()]:
                name = f"token_id:{token}"
            tokens[token] = Token(name, float(values[token]), added)
        start, added = len(previous), tokens[chosen].raw
        text = "" if added is None else added.decode(errors="replace")
        if text.encode() == added and self.whole.endswith(text):
            start = len(self.whole) - len(text)
        elif added and self.raw is not None:  # its first byte may belong to a letter that has begun before it
            start = len((self.raw + added[:1]).decode(errors="replace")) - 1
        self.described.append(replace(tokens[chosen], top=tuple(tokens[token] for token in best), start=start))
        if self.raw is not None and added is not None:
            self.raw += added
        else:
            self.raw = None if LOST in self.whole else self.whole.encode()

    def _added(self, previous: str, token: int) -> bytes | None:
        """Return the bytes that a token adds to the text ``previous``; None if the tokenizer hides them."""
        text = self._decode([*self.tokens[:-1], token])
        added = text[len(previous) :]
        if text.startswith(previous) and not previous.endswith(LOST) and LOST not in added:
            return added.encode()
        if LOST not in previous + text:  # a tokenizer that changes earlier text
            return None
        spelled = self._spelled(token)
        if spelled is not None and self.raw is not None and LOST not in text and self.raw + spelled != text.encode():
            return None
        return spelled

    def _spelled(self, token: int) -> bytes | None:
        """Return the bytes of a token next to part of a letter, from its spelling, if decoding agrees with it."""
        alone, twice = self._decode([token]), self._decode([token, token])
        spelled = self.replica.tokenizer.convert_ids_to_tokens(token)
        if LOST not in twice:
            return twice[len(alone) :].encode()  # the first one may lack its space
        if re.fullmatch("<0x[0-9A-F]{2}>", spelled) and alone == LOST:
            return bytes.fromhex(spelled[3:5])
        raw = bytes(BYTES[letter] for letter in spelled) if {*spelled} <= BYTES.keys() else b""
        if (raw * 2).decode(errors="replace").endswith(twice):
            return raw
        return alone.encode() if alone == spelled else None


def _longest_start(stops: Sequence[str], text: str) -> int:
    """Return the length of the longest start of a stop string that the text ends with."""
    # not longer than the text: a client may send stops of 65,000 letters
    starts = (stop[:length] for stop in stops for length in range(1, min(len(stop), len(text) + 1)))
    return max((len(start) for start in starts if text.endswith(start)), default=0)


def _name(raw: bytes) -> str:
    """Return the text of some bytes; if they aren't text, name the bytes."""
    text = raw.decode(errors="replace")
    return text if text.encode() == raw else "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
