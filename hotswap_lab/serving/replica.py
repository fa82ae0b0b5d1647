"""One model that answers requests for many adapters: each gets a row of a batch, and its adapter goes there with it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import Counter, deque
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import CompileConfig

from ..core.errors import HotswapError, refusal, refuse
from ..engine import AdapterPool
from .table import Version

#: how long the first request of a batch waits for others, in seconds
GATHERING = 0.005


class BusyError(HotswapError):
    """Not now. It may go well a moment later."""


@dataclass(frozen=True)
class Options:
    """How a replica answers.

    ``rows``: how many requests at once. ``queue``: how many may wait. ``longest_prompt``, ``longest_answer``: in
    tokens; 0 is as much as the model reads, but at most 1024 and 256. ``target_rank``: the rank that there is room for,
    for mixes, whose ranks add up, and for adapters that come later; 0 is enough for a mix of any two of the first ones.
    ``held``: how many adapters are in memory; the ones used least recently are dropped, and read again when wanted; 0
    is twice as many as there are at first, so that new versions find room next to the old ones. ``compile``: whether
    the model is compiled, once for each of two shapes. ``package``: a folder with the model compiled ahead of time; the
    first start writes it. ``timeout``: how many seconds a request waits for the next piece of its answer.
    """

    rows: int = 8
    queue: int = 100
    longest_prompt: int = 0
    longest_answer: int = 0
    target_rank: int = 0
    held: int = 0
    compile: int = False
    package: str = ""
    timeout: int = 120


@dataclass(frozen=True)
class Request:
    """A prompt, or the messages of a chat; the share of each adapter, none for the base model; and how to answer.

    ``temperature`` 0 takes the most probable token each time. Otherwise one is drawn from the most probable tokens that
    together have the probability ``top_p``, with the random numbers of ``seed``. The answer ends before the first of
    the ``stop`` strings. ``logprobs`` asks for the log probability of each token, and for that many of the most
    probable ones at its place. An answer that is not streamed is one piece.
    """

    prompt: str | Sequence[Mapping[str, str]]
    shares: Mapping[Version, float] = field(default_factory=dict)
    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    is_streamed: bool = False


@dataclass(frozen=True)
class Token:
    """The text and the log probability of a token, and of the most probable ones at its place."""

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """A part of an answer. The last one says why it ends: at a ``stop``, or at the ``length`` that was allowed."""

    text: str
    finish: str | None
    prompt_tokens: int
    completion_tokens: int
    tokens: tuple[Token, ...] = ()


class Replica:
    """A language model, and a pool with a row for each of its requests.

    Requests that wait are answered together, in one call of ``generate``, and the next batch begins when the last of
    them is done. A row stops as soon as its answer ends, or nobody listens to it any more.

    Parameters
    ----------
    model, tokenizer:
        A ``PeftModel`` with a loaded LoRA adapter, and what turns text into its tokens.
    versions:
        The adapters that it starts with.
    options:
        See :class:`Options`.

    Examples
    --------
    >>> import asyncio
    >>> from hotswap_lab import demo
    >>> from hotswap_lab.serving import Options, Replica, Request, Version
    >>> versions = [Version.of(name, demo.adapter_path(name)) for name in ("reverse", "sort")]
    >>> replica = Replica(*demo.load("reverse"), versions, Options(longest_prompt=16, longest_answer=16))
    >>> async def ask(shares):
    ...     return "".join([piece.text async for piece in replica.answer(Request("hotswap>", shares))])
    >>> async def ask_all(*all_shares):
    ...     return await asyncio.gather(*map(ask, all_shares))  # in one batch
    >>> asyncio.run(ask_all({versions[0]: 1.0}, {versions[1]: 1.0}, {}))
    ['pawstoh', 'ahopstw', 'hotswap']
    """

    def __init__(self, model: Any, tokenizer: Any, versions: Sequence[Version], options: Options = Options()):
        self.options: Options = options
        self.tokenizer: Any = tokenizer
        ends = model.generation_config.eos_token_id or tokenizer.eos_token_id
        self.ends: list[int] = ends if isinstance(ends, list) else [ends]
        longest, positions = options.longest_prompt + options.longest_answer, model.config.max_position_embeddings
        if longest > positions:
            raise refuse("too_long_for_model", longest=longest, positions=positions)
        # not fewer than a batch needs, of mixes too
        self.held: int = max(options.held or 2 * len(versions), 2 * options.rows)
        #: by their names in the pool, the one used least recently first
        self._held = {version.key: version for version in versions[: self.held]}
        self.pool: AdapterPool = AdapterPool(
            model.requires_grad_(False),
            adapters={key: version.load() for key, version in self._held.items()},
            rows=max(options.rows, 2),  # what a pool calls rows
            target_rank=options.target_rank or None,
            progress=False,
        )
        self._lock = threading.Lock()
        self._waiting: deque[_Answer] = deque()
        self._worker: asyncio.Task | None = None
        self.counts: Counter[str] = Counter(requests=0, tokens=0, swaps=0, rows_in_use=0)

    def load(self, versions: Sequence[Version]) -> None:
        """Reads and checks adapters, and keeps them next to those in use. No answer is changed by that.

        Raises
        ------
        HotswapError
            If one can't be read, has other weights here than where it was checked first, or doesn't fit the room.
        """
        with self._lock:
            for version in versions:
                if version.key not in self._held:
                    self.pool.add(version.key, version.load())
                self._held[version.key] = self._held.pop(version.key, version)
                for key in list(self._held)[: -self.held]:
                    with contextlib.suppress(HotswapError):  # it is in use
                        self.pool.remove(key)
                        del self._held[key]

    async def answer(self, request: Request) -> AsyncGenerator[Piece, None]:
        """The answer, piece by piece. Who stops listening stops the computing as well.

        Raises
        ------
        BusyError
            If too many requests wait already.
        HotswapError
            If the prompt or the answer would be too long, or an adapter or a mix doesn't fit.
        """
        answer = _Answer(request, self._ids_of(request), self)
        await asyncio.to_thread(self.load, list(request.shares))
        if len(self._waiting) >= self.options.queue:
            raise BusyError(refusal("too_many_wait"))
        self._waiting.append(answer)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        try:
            while not isinstance(piece := await answer.pieces.get(), Exception):
                yield piece
                if piece.finish:
                    return
            raise piece
        finally:
            answer.is_over = True

    def _ids_of(self, request: Request) -> list[int]:
        options, prompt = self.options, request.prompt
        if not isinstance(prompt, str):
            if self.tokenizer.chat_template is None:
                raise refuse("no_chat_template")
            prompt = self.tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)
        ids = self.tokenizer(prompt, add_special_tokens=prompt is request.prompt)["input_ids"]
        if not 0 < len(ids) <= options.longest_prompt or (request.max_tokens or 1) > options.longest_answer:
            raise refuse("too_long", prompt=len(ids), answer=request.max_tokens, options=options)
        return ids

    @property
    def state(self) -> dict[str, Any]:
        """What a panel shows: the adapters of the rows and in memory, how many requests wait, and the counts."""
        held = dict(self._held)
        mixes = [each.adapter if isinstance(each.adapter, dict) else {each.adapter: 1.0} for each in self.pool.rows]
        rows = [None if None in mix else "+".join(str(held.get(key)) for key in mix) for mix in mixes]
        return {"rows": rows, "held": list(map(str, held.values())), "waiting": len(self._waiting), **self.counts}

    async def _work(self) -> None:
        await asyncio.sleep(GATHERING)
        while self._waiting:
            taken = [self._waiting.popleft() for _ in range(min(len(self._waiting), self.options.rows))]
            if batch := [each for each in taken if not each.is_over]:
                self.counts["rows_in_use"] = len(batch)
                self.counts["requests"] += len(batch)
                await asyncio.to_thread(self._run, batch)
        self.counts["rows_in_use"] = 0

    # ---- in a thread of its own, for a whole batch

    def _run(self, batch: Sequence[_Answer]) -> None:
        error: Exception = RuntimeError("the model came to an end before its answers did")
        try:
            self._assign(batch)
            self._generate(batch)
        except Exception as caught:
            error = caught
        if isinstance(error, HotswapError) and len(batch) > 1 and not any(each.tokens for each in batch):
            for each in batch:  # one of them is to blame, and the others shall not suffer
                self._run([each])
        else:
            for each in batch:
                if not each.is_over:
                    each.send(error)

    def _assign(self, batch: Sequence[_Answer]) -> None:
        """Puts each request's adapter into its row; a compiled step has rows that nobody uses."""
        before = self.pool.rows
        self.load([version for answer in batch for version in answer.request.shares])
        spare = self.options.rows - len(batch) if self.options.compile else 0
        self.pool.assign([answer.adapter for answer in batch] + [None] * spare)
        self.counts["swaps"] += sum(each not in before[n : n + 1] for n, each in enumerate(self.pool.rows))

    def _generate(self, batch: Sequence[_Answer]) -> None:
        """All answers at once, with what transformers has for that. Rows are looked after one by one."""
        rows = len(self.pool.rows)
        prompts = [answer.ids for answer in batch] + [batch[0].ids[:1]] * (rows - len(batch))
        inputs = self.tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
        device = self.pool.model.device
        heat = torch.zeros(rows, 1, device=device)
        heat[: len(batch), 0] = torch.tensor([answer.request.temperature for answer in batch])
        # what a model's own settings may say, as far as it would do more than a request asks for
        more: dict[str, Any] = {"top_k": 0, "top_p": 1.0, "temperature": 1.0} if heat.any() else {}
        if self.options.compile:
            more |= {"cache_implementation": "static", "compile_config": CompileConfig(mode="default", dynamic=False)}
            more["compile_config"]._compile_all_devices = True

        def cool(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            best = scores.masked_fill(scores < scores.max(-1, keepdim=True).values, -torch.inf)
            return torch.where(heat > 0, scores / heat, best)

        def take(ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
            for answer, token in zip(batch, ids[:, -1].tolist(), strict=False):
                if not answer.is_over:
                    answer.take(token)
                    self.counts["tokens"] += 1
            return torch.tensor([each.is_over for each in batch] + [True] * (rows - len(batch)), device=device)

        self.pool.model.generate(
            **inputs.to(device),
            max_new_tokens=self.options.longest_prompt + self.options.longest_answer - inputs["input_ids"].shape[1],
            do_sample=bool(heat.any()),
            logits_processor=[cool],
            stopping_criteria=[take],
            **more,
        )


class _Answer:
    """A request on its way: computed in one thread, listened to in another one's event loop."""

    def __init__(self, request: Request, ids: list[int], replica: Replica):
        self.request, self.ids, self.replica = request, ids, replica
        self.pieces: asyncio.Queue[Piece | Exception] = asyncio.Queue()
        self.loop: asyncio.AbstractEventLoop = asyncio.get_running_loop()
        self.tokens: list[int] = []
        self.sent = 0
        #: it has ended, or nobody listens any more
        self.is_over = False

    @property
    def adapter(self) -> str | dict[str, float] | None:
        """What a pool takes for a row."""
        shares = {version.key: weight for version, weight in self.request.shares.items()}
        return next(iter(shares)) if list(shares.values()) == [1.0] else shares or None

    def send(self, piece: Piece | Exception) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop is closed: nobody listens any more
            self.loop.call_soon_threadsafe(self.pieces.put_nowait, piece)

    def take(self, token: int) -> None:
        """The next token: sends what is new in the text."""
        self.tokens.append(token)
        most = self.request.max_tokens or self.replica.options.longest_answer
        finish = "stop" if token in self.replica.ends else "length" if len(self.tokens) == most else None
        if finish or self.request.is_streamed:
            text = self.replica.tokenizer.decode(self.tokens, skip_special_tokens=True)
            if finish or not text.endswith("\ufffd"):  # of a letter that takes several tokens
                self.send(Piece(text[self.sent :], finish, len(self.ids), len(self.tokens)))
                self.sent = len(text)
            if finish:  # never back to False: who listened may have gone meanwhile
                self.is_over = True
