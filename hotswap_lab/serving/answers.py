"""A request to a replica, its answer on the way, and the pieces in which that is sent."""

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .sampling import Sampler, Sampling
from .table import Version


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
    """The text and the log probability of a token, the most probable ones at its place, and where its text begins."""

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()
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
        token = self._choose(logits.float(), best)
        self.tokens.append(token)
        most = self.request.max_tokens or self.replica.options.longest_answer
        finish = "stop" if token in self.replica.ends else "length" if len(self.tokens) == most else None
        text, stops = self._decode(self.tokens), self.request.stop
        found = [at for at in map(text.find, stops) if at >= 0]
        finish, text = ("stop", text[: min(found)]) if found else (finish, text)
        # text that may be the start of a stop string is not sent yet
        longest = [min(len(each), len(text) + 1) for each in stops]  # a client may send stops of 65,000 letters
        starts = [each[:n] for each, most in zip(stops, longest, strict=True) for n in range(1, most)]
        unsent = max((len(each) for each in starts if text.endswith(each)), default=0)
        ready = len(text) if finish else len(text) - unsent
        # so is a letter that takes several tokens
        if finish or (not text.endswith("\ufffd") and ready >= self.ready):
            self.text += text[self.ready : ready]
            self.ready = ready
            # an answer that is not streamed is made of the same pieces, so that its text is the same
            if finish or self.request.is_streamed:
                self.send(Piece(self.text, finish, len(self.ids), len(self.tokens), tuple(self.described)))
                self.text, self.described = "", []
        return token

    def _decode(self, tokens: Sequence[int]) -> str:
        # cleaning up spaces would change text that is sent already: "a ." becomes "a."
        return self.replica.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _choose(self, logits: torch.Tensor, best: int) -> int:
        best, most = self.sampler.choose(logits, best, self.tokens), self.request.logprobs
        if most is not None:
            values = logits.log_softmax(-1)
            best_ones = values.topk(min(most, len(values))).indices.tolist()
            top = [(self._decode([each]), float(values[each])) for each in best_ones]
            # decoded alone, a token may lack its space, or be half a letter
            start = len(self._decode(self.tokens).rstrip("\ufffd"))
            self.described.append(Token(self._decode([best]), float(values[best]), tuple(top), start))
        return best
