"""One model that answers requests for many adapters: each request gets a row of a batch, with its own adapter."""

import asyncio
import contextlib
import ctypes
import logging
import re
import threading
from collections import Counter, deque
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import LoraConfig
from transformers import GenerationConfig

from ..core.errors import HotswapError, Refusal, advise, first_line, refusal, refused
from ..files import ADVICE
from ..generating import Reader
from ..pools.adapter_pool import AdapterPool
from ..swap import prepare_model_for_compiled_hotswap
from .answers import Answer, Piece, Request
from .sampling import BEYOND
from .table import Version, check_rank, highest_rank

_log = logging.getLogger("ray.serve")
#: how long the first request waits for others, in seconds
GATHERING = 0.005
#: how many tokens of a prompt are read at once
CHUNK = 32
#: advice in refusals that a server has no argument for, and the advice to show instead; empty if only Python can do it
IN_SERVERS: dict[str, str] = {python: "" for python, shown in ADVICE.items() if not shown} | {
    "make the pool with this adapter among its `adapters`": "start the server with it, or layers=all-linear",
    "prepare one model for each kind, or swap between them in a model that is not prepared": "start another server",
}
#: the end of a version's key
DIGEST = re.compile("@[0-9a-f]{64}")


class BusyError(HotswapError):
    """The replica is busy; retry shortly."""


class LateError(BusyError):
    """A request got no answer in time."""


class UnreadableError(HotswapError):
    """The files of a served adapter can't be read, or have changed: the server's fault, not the request's."""


@dataclass(frozen=True)
class Options:
    """How a replica answers.

    ``rows``: how many requests at once. ``queue``: how many may wait. ``longest_prompt``, ``longest_answer``: in
    tokens; 0 is as much as the model reads, but at most 1024 and 256. ``target_rank``: the rank that there is room for,
    for mixes, whose ranks add up, and for adapters that come later; 0 is enough for a mix of any two of the first ones.
    ``held``: how many adapters are in memory; the ones used least recently are dropped, and read again when wanted; 0
    is twice as many as there are at first, so that new versions find room next to the old ones. ``compile``: whether
    the model is compiled, into two graphs. ``package``: a folder with the model compiled ahead of time; the
    first start writes it. ``timeout``: how many seconds a request waits for the next piece of its answer. ``warm``:
    whether a server answers once by itself before it is ready. ``dtype``: the model's, as ``bfloat16``; without it, its
    files' own. ``layers``: the layers to reserve for adapters that come later, by their names as in PEFT's
    ``target_modules``: ``q_proj,v_proj``, or ``all-linear``; the layers of the first adapters are there anyway. Each
    takes ``target_rank * (inputs + outputs)`` numbers for each row and for each adapter in memory, and time in each
    step, whether an adapter uses it or not.
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
    warm: int = True
    dtype: str = ""
    layers: str = ""

    @property
    def targets(self) -> str | list[str]:
        """The layers to reserve, as PEFT's ``target_modules``."""
        return self.layers if self.layers == "all-linear" else self.layers.split(",")

    def for_model(self, config: Any) -> "Options":
        """Return the same options, with lengths that are 0 replaced by those that a model with this config reads."""
        positions = getattr(config.get_text_config(), "max_position_embeddings", None) or 1280
        rest = positions - self.longest_prompt if self.longest_prompt else max(positions // 4, positions - 1024)
        answer = self.longest_answer or min(256, rest)
        prompt = self.longest_prompt or min(1024, positions - answer)
        if prompt < 1 or answer < 1 or prompt + answer > positions:
            raise refused("too_long_for_model", prompt=prompt, answer=answer, positions=positions)
        return replace(self, longest_prompt=prompt, longest_answer=answer)


class Replica:
    """A language model, and a pool with a row for each of its requests.

    All rows advance together, a token at a time. When an answer ends, or its client has gone, the next request gets
    its row while the other answers continue, and its prompt is read in chunks (:class:`Reader`). A model that can't
    be read this way answers with ``generate``, one request at a time.

    Parameters
    ----------
    model, tokenizer:
        A ``PeftModel`` with a loaded LoRA adapter, and its tokenizer.
    versions:
        The adapters that it starts with.
    options:
        See :class:`Options`.
    base_weights:
        As for :class:`AdapterPool`.

    Examples
    --------
    >>> import asyncio
    >>> from hotswap_lab import demo
    >>> from hotswap_lab.serving import Options, Replica, Request, Version
    >>> versions = [Version.of(name, demo.adapter_path(name)) for name in ("reverse", "sort")]
    >>> replica = Replica(*demo.load("reverse"), versions, Options(longest_prompt=16, longest_answer=16))
    >>> async def ask(shares):
    ...     return "".join([piece.text async for piece in replica.answer(Request(prompt="hotswap>", shares=shares))])
    >>> async def ask_all(*all_shares):
    ...     return await asyncio.gather(*map(ask, all_shares))  # in one batch
    >>> asyncio.run(ask_all({versions[0]: 1.0}, {versions[1]: 1.0}, {}))
    ['pawstoh', 'ahopstw', 'hotswap']
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        versions: Sequence[Version],
        options: Options = Options(),
        base_weights: Mapping[str, torch.Tensor] | None = None,
    ):
        self.options: Options = options.for_model(model.config)
        self.tokenizer: Any = tokenizer
        #: the values of the fields that a request leaves out
        self.defaults: Any = model.generation_config
        ends = self.defaults.eos_token_id
        ends = tokenizer.eos_token_id if ends is None else ends
        self.ends: list[int] = ends if isinstance(ends, list) else [ends]
        if unused := [name for name in BEYOND if getattr(self.defaults, name, None) not in (None, 1)]:
            _log.warning("The server ignores these fields of the model's generation_config: %s.", ", ".join(unused))
        # not fewer than the rows need, for mixes, too
        self.held: int = max(options.held or 2 * len(versions), 2 * options.rows)
        #: by their names in the pool, the one used least recently first
        self._held = {version.key: version for version in versions[: self.held]}
        adapters = {key: version.load() for key, version in self._held.items()}
        # a check of the rows covers only the layers that some row's adapter changes
        self._unlike = {frozenset(adapter.tensors): self._held[key] for key, adapter in adapters.items()}.values()
        ranks = sorted(highest_rank(adapter.config) for adapter in adapters.values())
        loaded = highest_rank(next(iter(model.peft_config.values())))
        #: the highest rank that an adapter may have
        self.target_rank: int = max(options.target_rank or sum(ranks[-2:]), loaded)
        rows = max(options.rows, 2)  # a pool has no fewer
        if options.layers:
            reserved = LoraConfig(r=self.target_rank, target_modules=options.targets)
            prepare_model_for_compiled_hotswap(model, adapters=[reserved])
        how: dict[str, Any] = dict(target_rank=self.target_rank, progress=False, base_weights=base_weights)
        self.pool: AdapterPool = AdapterPool(model.requires_grad_(False), adapters=adapters, rows=rows, **how)
        with self.pool.assigned([None]):  # batches of any size; a refusal leaves the loaded adapter
            self._reader: Reader | None = self._make_reader(rows)
        self.pool.assign([None] * (rows if self._reader else 1))
        self._lock = threading.Lock()
        self._waiting: deque[Answer] = deque()
        self._worker: asyncio.Task | None = None
        #: how many accepted requests need each version: it stays in memory, because its files may be replaced meanwhile
        self._wanted: Counter[str] = Counter()
        self.counts: Counter[str] = Counter(requests=0, prompt_tokens=0, tokens=0, swaps=0, rows_in_use=0)

    def _make_reader(self, rows: int) -> Reader | None:
        options, reason = self.options, "logits of a row depend on how it is read, or on other rows"
        try:
            longest = max(4, options.longest_prompt + options.longest_answer)  # agrees() reads four tokens
            reader = Reader(self.pool.model, rows=rows, chunk=min(CHUNK, options.longest_prompt), longest=longest)
            agrees = reader.agrees()
        except Exception as error:  # of many kinds, because models use a cache in different ways
            reader, agrees, reason = None, False, first_line(error)
        if reader is None or not agrees:
            if options.compile or options.package:
                raise refused("not_read_in_rows", name=type(self.pool.model.get_base_model()).__name__, reason=reason)
            _log.warning("Rows can't come and go in this model (%s): it answers one request at a time.", reason)
            return None
        with self.pool.assigned([None] * rows):  # code for as many rows as will be served
            if options.package:
                reader.use_ahead(options.package)
            elif options.compile:
                reader.compile("inductor")
        return reader

    def load(self, versions: Sequence[Version]) -> None:
        """Read and check adapters, and keep them next to those in use. This changes no answer.

        Raises
        ------
        UnreadableError
            If one can't be read, or has different weights here than where it was checked first.
        HotswapError
            If the rank of one is too high.
        """
        with self._lock:
            for version in versions:
                if version.key not in self._held:
                    try:
                        adapter = version.load()
                    except HotswapError as error:
                        raise UnreadableError(*error.refusals) from None
                    check_rank(version.name, adapter.config, self.target_rank)
                    try:
                        self.pool.add(version.key, adapter)
                    except HotswapError as error:
                        raise self._without_digests(error) from None
                self._held[version.key] = self._held.pop(version.key, version)
                for key in [key for key in list(self._held)[: -self.held] if not self._wanted[key]]:
                    with contextlib.suppress(HotswapError):  # it is in use
                        self.pool.remove(key)
                        del self._held[key]
                        # glibc would keep the memory of removed adapters, in pieces too small for the next ones
                        with contextlib.suppress(OSError, AttributeError):  # another C library
                            ctypes.CDLL(None).malloc_trim(0)

    async def warm(self) -> None:
        """Do the one-time work: check the rows, compile, and run the first call of each shape."""
        words = ["warm up " * CHUNK, "warm up", "a"]  # the first one within the server's limits is used
        for prompt in [*([{"role": "user", "content": text}] for text in words), *words]:
            request = Request(prompt=prompt, max_tokens=min(2, self.options.longest_answer))
            with contextlib.suppress(HotswapError):
                self._ids_of(request)
                break

        async def ask(shares: Mapping[Version, float]) -> None:
            async for _ in self.answer(replace(request, shares=shares)):
                pass

        all_shares: list[dict[Version, float]] = [{}, *({version: 1.0} for version in self._unlike)]
        # one that fails, as with a damaged adapter, must not keep the others from being served
        await asyncio.gather(*map(ask, all_shares[: self.options.queue]), return_exceptions=True)
        self.counts.subtract(dict(self.counts))  # these were not clients' requests

    async def answer(self, request: Request) -> AsyncGenerator[Piece, None]:
        """Yield the answer, piece by piece. Closing the generator also stops the computation.

        Raises
        ------
        BusyError
            If too many requests wait already.
        HotswapError
            If the prompt or the answer would be too long, or an adapter or a mix doesn't fit.
        """
        answer = Answer(request, await asyncio.to_thread(self._ids_of, request), self)
        keys = [version.key for version in request.shares]
        self._wanted.update(keys)
        try:
            try:
                await asyncio.to_thread(self.load, list(request.shares))
            except UnreadableError as error:  # it names paths of the server, which a client shouldn't see
                _log.error("A request for %s failed: %s", ", ".join(map(str, request.shares)), error)
                raise UnreadableError(refusal("unreadable")) from None
            if len(self._waiting) >= self.options.queue:
                raise BusyError(refusal("too_many_wait"))
            self._waiting.append(answer)
            if self._worker is None or self._worker.done():
                self._worker = asyncio.create_task(self._work())
            while not isinstance(piece := await answer.pieces.get(), Exception):
                yield piece
                if piece.finish:
                    return
            raise piece
        finally:
            answer.is_over = True
            with contextlib.suppress(ValueError):  # its client has gone while it waited
                self._waiting.remove(answer)
            self._wanted -= Counter(keys)

    def _ids_of(self, request: Request) -> list[int]:
        options, prompt = self.options, request.prompt
        if not isinstance(prompt, str):
            if self.tokenizer.chat_template is None:
                raise refused("no_chat_template")
            try:
                prompt = self.tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)
            except Exception as error:  # a template may raise anything, such as "roles must alternate"
                raise refused("not_this_chat", error=error) from None
        ids = self.tokenizer(prompt, add_special_tokens=prompt is request.prompt, verbose=False)["input_ids"]
        most = options.longest_answer if request.max_tokens is None else request.max_tokens
        if not 0 < len(ids) <= options.longest_prompt or not 0 < most <= options.longest_answer:
            raise refused("too_long", prompt=len(ids), answer=request.max_tokens, options=options)
        return ids

    @property
    def state(self) -> dict[str, Any]:
        """The adapters of the rows and in memory, the number of requests that wait, and the counts."""
        held = dict(self._held)
        mixes = [row.adapter if isinstance(row.adapter, dict) else {row.adapter: 1.0} for row in self.pool.rows]
        rows = [None if None in mix else "+".join(str(held.get(key)) for key in mix) for mix in mixes]
        now = {"rows": rows, "held": list(map(str, held.values())), "waiting": len(self._waiting)}
        return now | {"dtype": str(self.pool.model.dtype).removeprefix("torch."), **self.counts}

    async def _work(self) -> None:
        await asyncio.sleep(GATHERING)
        while self._waiting:
            await asyncio.to_thread(self._answer_all if self._reader else self._answer_one)
        self.counts["rows_in_use"] = 0

    # ---- in a thread of its own

    def _answer_all(self) -> None:
        """Answer requests until none waits and no row is in use."""
        reader: Any = self._reader
        rows: list[Answer | None] = [None] * reader.rows
        with _errors_sent(rows):
            while self._admit(rows):
                parts = [answer.next_part(reader.chunk) if answer else [] for answer in rows]
                self._take(rows, reader.read(parts))

    def _answer_one(self) -> None:
        """Answer one request with transformers' ``generate``, so that no other one can change its answer."""
        rows: list[Answer | None] = [None]
        with _errors_sent(rows):
            if not self._admit(rows):
                return
            answer: Any = rows[0]
            ids = torch.tensor([answer.next_part(len(answer.ids))], device=self.pool.model.device)

            def choose(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
                tokens = torch.tensor(self._take(rows, scores), device=scores.device)
                return torch.full_like(scores, -torch.inf).index_fill(1, tokens, 0.0)

            over = lambda ids, *_, **__: torch.tensor([answer.is_over], device=ids.device)  # noqa: E731
            how = dict(max_new_tokens=self.options.longest_answer, stopping_criteria=[over], logits_processor=[choose])
            base = self.pool.model.get_base_model()
            # the answer's sampler applies all other fields
            base.generation_config = GenerationConfig(eos_token_id=self.ends, pad_token_id=self.defaults.pad_token_id)
            try:
                self.pool.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, **how)
            finally:
                base.generation_config = self.defaults
            raise RuntimeError("the model stopped before the end of its answer")  # sent only if the answer is not over

    def _admit(self, rows: list[Answer | None]) -> bool:
        """Give free rows to requests that wait, and their adapters to the rows. Return whether a row is in use."""
        for row, answer in enumerate(rows):
            rows[row] = None if answer and answer.is_over else answer
        while self._waiting and None in rows[: self.options.rows]:  # a pool may have one row more
            try:
                answer = self._waiting.popleft()
            except IndexError:  # the last client that waited has just gone
                break
            if answer.is_over:
                continue
            adapters = [row.adapter for row in self.pool.rows]
            free = [row for row, other in enumerate(rows[: self.options.rows]) if other is None]
            row = next((row for row in free if adapters[row] == answer.adapter), free[0])
            try:
                self.load(list(answer.request.shares))
                self.pool.assign([*adapters[:row], answer.adapter, *adapters[row + 1 :]])
            except Exception as error:  # the other requests continue
                answer.send(self._without_digests(error) if isinstance(error, HotswapError) else error)
                continue
            if self._reader:
                self._reader.forget(row)
            rows[row] = answer
            self.counts["swaps"] += adapters[row] != answer.adapter
            self.counts["requests"] += 1
            self.counts["prompt_tokens"] += len(answer.ids)
        self.counts["rows_in_use"] = sum(answer is not None for answer in rows)
        return self.counts["rows_in_use"] > 0

    @staticmethod
    def _without_digests(error: HotswapError) -> HotswapError:
        """Make a refusal of the pool one of the server: without digests in names, and with the server's advice."""
        texts = [{part: DIGEST.sub("", text) for part, text in vars(refusal).items()} for refusal in error.refusals]
        return advise(HotswapError(*(Refusal(**parts) for parts in texts)), IN_SERVERS)

    def _take(self, rows: Sequence[Answer | None], logits: torch.Tensor) -> list[int]:
        """Return the next token of each row. An answer whose prompt is read takes it."""
        highest, best = logits.max(-1)
        tokens, are_finite = best.tolist(), highest.isfinite().tolist()
        for row, answer in enumerate(rows):
            if answer is None or answer.is_over or answer.unread:
                continue
            with _errors_sent([answer]):
                if not are_finite[row]:
                    raise refused("no_numbers")
                self.counts["tokens"] += 1  # before the piece is sent, because its client may read the counts
                tokens[row] = answer.take(logits[row], tokens[row])
        return tokens


@contextlib.contextmanager
def _errors_sent(rows: Sequence[Answer | None]) -> Iterator[None]:
    """Send an error in the block to all rows that wait for an answer."""
    try:
        yield
    except Exception as error:
        for answer in rows:
            if answer and not answer.is_over:
                answer.send(error)
