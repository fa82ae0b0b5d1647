"""OpenAI's API in front of replicas: ``model`` is an adapter's name, a mix of some, or the base model."""

import asyncio
import contextlib
import hmac
import json
import logging
import reprlib
import time
import uuid
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from difflib import get_close_matches
from typing import Annotated, Any, Literal

from fastapi import Body, Depends, FastAPI, Header, HTTPException
from fastapi import Request as Call
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, Field, PositiveInt, StringConstraints
from starlette.exceptions import HTTPException as AnyHTTPException

from ..core.errors import HotswapError, advise, refusal, refused
from .answers import Piece, Request, Token
from .metrics import PATHS, Metrics
from .replica import IN_SERVERS, BusyError, UnreadableError
from .sampling import Sampling
from .table import UnknownAdapterError

TEXT, CHAT = "text_completion", "chat.completion"
#: fields that affect neither the model's input nor its answer; they are ignored
IGNORED = {"cache_salt", "metadata", "parallel_tool_calls", "prediction", "priority", "prompt_cache_key", "request_id"}
IGNORED |= {"prompt_cache_options", "prompt_cache_retention", "safety_identifier", "service_tier", "session_id"}
IGNORED |= {"store", "stream_interval", "stream_options.include_obfuscation", "user", "messages.annotations"}
IGNORED |= {"messages.content.cache_control", "messages.content.prompt_cache_breakpoint", "messages.refusal"}
#: of fields that are not served, the values that change nothing, because clients send defaults; null always does
OFF = (
    "continue_final_message echo ignore_eos include_stop_str_in_output messages.prefix return_prompt_text watermarking"
)
OFF += " return_token_ids return_token_offsets return_tokens_as_token_ids use_beam_search"
ON = "add_generation_prompt include_reasoning skip_special_tokens spaces_between_special_tokens"
EMPTY = "bad_words documents functions logits_processors messages.tool_calls stop_token_ids tools"
NOTHING: dict[str, tuple[Any, ...]] = dict.fromkeys(OFF.split(), (False,)) | dict.fromkeys(ON.split(), (True,))
NOTHING |= dict.fromkeys(EMPTY.split(), ([],)) | dict.fromkeys(["function_call", "tool_choice"], ("none", "auto"))
NOTHING |= dict(best_of=(1,), chat_template_kwargs=({},), length_penalty=(1,), min_tokens=(0,), modalities=(["text"],))
NOTHING |= dict(response_format=({"type": "text"},), suffix=("",), verbosity=("medium",))
#: the fields that a request to a replica has, too
SAMPLING = {field.name for field in fields(Sampling)}


class TokenError(HotswapError):
    """An admin call without the right token."""


#: the HTTP status of each kind of error; any other error is 400, the request's own fault
STATUS: dict[type, int] = {TokenError: 401, UnknownAdapterError: 404, UnreadableError: 500, BusyError: 503}

#: how long the server waits for the next part of a request's body
BODY_SECONDS = 30

Stop = Annotated[str, StringConstraints(min_length=1)]


class Object(BaseModel, extra="allow", strict=True):
    """An object in a request. Text isn't converted to numbers, and fields that are not in the model are kept."""

    def others(self, before: str = "") -> Iterator[tuple[str, Any]]:
        """Yield the fields that are not in the model, and their values, also of the objects inside."""
        yield from ((before + name, value) for name, value in (self.model_extra or {}).items())
        for name in type(self).model_fields:
            value = getattr(self, name)
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, Object):
                    yield from item.others(f"{before}{name}.")


class StreamOptions(Object):
    include_usage: bool | None = None


# pydantic takes the fields of the dataclass with the limits that they are annotated with
class Asked(Object, Sampling):
    """The fields that completions and chats share.

    - ``model``: an adapter, the base model, or a mix such as ``pirate:0.7+haiku:0.3``, with weights from 0 to 100.
    - ``max_tokens``, or its newer name ``max_completion_tokens``: the longest answer. Default: the longest that the
      server allows. A request with both names needs the same number for both.
    - ``temperature``: 0 takes the most probable token each time; above that, tokens are drawn.
    - ``top_k``: draw from that many of the most probable tokens; 0 or -1 is all.
    - ``top_p``: of these, draw from the most probable ones that together have this probability.
    - ``min_p``: of these, draw from those that are at least this many times as probable as the first.
    - ``repetition_penalty``: above 1, tokens of the prompt and of the answer become less probable, as in transformers.
    - ``frequency_penalty``: is subtracted from a token's logit as often as the answer has it.
    - ``presence_penalty``: is subtracted once from the logit of each token of the answer.
    - ``logit_bias``: numbers to add to the logits of tokens, by the tokens' ids.
    - ``seed``: the same one draws the same tokens again, in any batch.
    - ``stop``: strings that end the answer, which doesn't contain them.
    - ``n``: how many answers. Their seeds are ``seed``, ``seed + 1`` and so on.
    - ``stream``: send the answer as server-sent events, a token at a time.
    - ``stream_options``: ``{"include_usage": true}`` ends a stream with the number of tokens.

    Where a request leaves out ``temperature``, ``top_k``, ``top_p``, ``min_p`` or ``repetition_penalty``, the model's
    ``generation_config`` decides, as in vLLM. If that has no ``do_sample``, the temperature is 0, and a ``seed`` alone
    has no effect.

    No field is dropped that could change the answer. Those that can't, such as ``user`` and ``metadata``, are ignored.
    All others, also those that the server has never heard of and those of a message, have the status 400, unless their
    value is null or, where the server knows it, the one that changes nothing.
    """

    model: str
    max_tokens: PositiveInt | None = None
    max_completion_tokens: PositiveInt | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    n: int | None = Field(None, ge=1, le=8)
    stream: bool | None = None
    stream_options: StreamOptions | None = None


class AskedText(Asked):
    """More fields of a completion.

    - ``prompt``: the text to go on with.
    - ``logprobs``: send the log probability of each token, and of that many of the most probable ones at its place,
      before temperature, penalties and bias. A token is named by its text; part of a letter by its bytes, as
      ``bytes:\\xc3``; and where two tokens of a place have the same text, one of them as ``token_id:7``.
    - ``echo``: begin the answer with the prompt. Not with ``logprobs``.
    """

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=1)]
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: bool | None = None


class Part(Object):
    type: Literal["text"]
    text: str


class Message(Object):
    role: str
    content: str | list[Part]

    def written(self) -> dict[str, str]:
        """Return the message in the form of a chat template."""
        parts = [self.content] if isinstance(self.content, str) else [part.text for part in self.content]
        return {"role": self.role, "content": "".join(parts)}


class AskedChat(Asked):
    """More fields of a chat.

    - ``messages``: for the model's chat template. Each has a ``role`` and a ``content``: a text, or parts of one.
    - ``logprobs``: whether to send the log probability of each token, as for completions, and its bytes: all of them
      together are those of the answer, and of the ``stop`` that ended it. They are null if the tokenizer hides them.
    - ``top_logprobs``: and of that many of the most probable ones at its place. Only with ``logprobs``.
    """

    messages: list[Message]
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)


class Middleware:
    """ASGI middleware that refuses a request with a longer body, also without a length, and measures answers."""

    def __init__(self, app: Any, most: int, metrics: Metrics):
        self.app: Any = app
        self.most: int = most
        self.metrics: Metrics = metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        start, size, status, has_more = time.perf_counter(), 0, "500", scope["type"] == "http"

        async def receive_limited() -> Any:
            nonlocal size, has_more
            try:
                message = await asyncio.wait_for(receive(), BODY_SECONDS if has_more else None)
            except asyncio.TimeoutError:
                raise HTTPException(408, str(refusal("slow_body", seconds=BODY_SECONDS))) from None
            size += len(message.get("body", b""))
            if size > self.most:
                raise HTTPException(413, str(refusal("long_body", most=self.most)))
            has_more = message.get("more_body", False)
            return message

        async def send_recorded(message: Any) -> None:
            nonlocal status
            status = str(message.get("status", status))
            await send(message)

        try:
            await self.app(scope, receive_limited, send_recorded)
        finally:
            if scope.get("path") in PATHS:
                self.metrics.whole.labels(scope["path"], status).observe(time.perf_counter() - start)


def openai_api(backend: Any, base: str, token: str | None = None, longest_prompt: int = 0) -> FastAPI:
    """Build the application, for any ASGI server.

    Parameters
    ----------
    backend:
        An object with ``table``, ``answer(request)`` as of a :class:`Replica`, ``await change(paths)`` as of a
        :class:`Register`, and ``await states()`` of all replicas.
    base:
        The name of the model without an adapter.
    token:
        The token of admin calls. Without one there are no admin calls.
    longest_prompt:
        In tokens; 0 is 1024. A body may have 64 bytes for each of them, and 64 KiB.
    """
    api, metrics = FastAPI(title="hotswap_lab"), Metrics()
    api.add_middleware(Middleware, most=64 * (longest_prompt or 1024) + 2**16, metrics=metrics)

    @api.exception_handler(HotswapError)
    @api.exception_handler(RequestValidationError)
    @api.exception_handler(AnyHTTPException)
    async def answer_error(call: Call, error: Any) -> JSONResponse:
        if isinstance(error, RequestValidationError):
            wrong = [f"{'.'.join(map(str, field['loc']))}: {field['msg']}" for field in error.errors()]
            if isinstance(error.body, bytes):  # FastAPI parses the body only if its header says what it is
                wrong = [f"content-type: {call.headers.get('content-type')}, where application/json is expected"]
            error = refused("bad_fields", found="; ".join(wrong))
        status, body = _error(error)
        return JSONResponse(body, status, {"Retry-After": "1"} if status == 503 else None)

    async def admin(authorization: str = Header("")) -> None:
        if not token or not hmac.compare_digest(authorization.encode("latin-1"), f"Bearer {token}".encode()):
            raise TokenError(refusal("no_token"))

    async def live() -> list[dict[str, Any]]:
        """Return the states of the replicas; none while no request would be answered."""
        return await backend.states() if backend.table.number else []

    @api.get("/healthz")
    async def healthz() -> Any:
        states = await live()
        status, code = ("ok", 200) if states else ("starting", 503)
        return JSONResponse({"status": status, "replicas": states}, code)

    @api.get("/metrics")
    async def numbers() -> Any:
        text = metrics.text(await backend.states(), backend.table)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    @api.get("/v1/models")
    async def models() -> Any:
        if not (states := await live()):
            raise BusyError(refusal("starting"))
        fields = dict(object="model", created=0, owned_by="", dtype=states[0]["dtype"])
        return {"object": "list", "data": [{"id": name} | fields for name in (base, *backend.table.versions)]}

    async def changed(call: Call, adapters: Mapping[str, str | None]) -> dict[str, int]:
        versions = (await backend.change(adapters)).versions
        changes = (str(versions.get(name, f"{name} removed")) for name in adapters)
        logging.getLogger("ray.serve").info("%s: %s", call.url.path, ", ".join(changes))
        return {name: version.number for name, version in versions.items()}

    @api.post("/admin/adapters", dependencies=[Depends(admin)])
    async def change(call: Call, adapters: dict[str, str | None]) -> Any:
        return await changed(call, adapters)

    @api.post("/v1/load_lora_adapter", dependencies=[Depends(admin)])
    async def load_lora_adapter(call: Call, lora_name: str = Body(), lora_path: str = Body()) -> Any:
        return await changed(call, {lora_name: lora_path})

    @api.post("/v1/unload_lora_adapter", dependencies=[Depends(admin)])
    async def unload_lora_adapter(call: Call, lora_name: str = Body(embed=True)) -> Any:
        return await changed(call, {lora_name: None})

    @api.post("/v1/completions")
    async def completions(call: Call, asked: AskedText) -> Any:
        if asked.echo and asked.logprobs is not None:
            raise refused("echo_with_logprobs", logprobs=asked.logprobs)
        prompt = "".join(asked.prompt)  # also a list of one
        return await answered(call, asked, prompt, TEXT, asked.logprobs, prompt if asked.echo else "")

    @api.post("/v1/chat/completions")
    async def chat_completions(call: Call, asked: AskedChat) -> Any:
        if asked.top_logprobs and not asked.logprobs:
            raise refused("top_without_logprobs", top=asked.top_logprobs)
        prompt = [message.written() for message in asked.messages]
        return await answered(call, asked, prompt, CHAT, (asked.top_logprobs or 0) if asked.logprobs else None)

    async def begun(request: Request, prompt: str) -> AsyncGenerator[Piece, None]:
        """Yield the pieces of one answer, the first with the prompt before it, and measure the time to it."""
        start, has_begun = time.perf_counter(), not request.is_streamed
        async with contextlib.aclosing(backend.answer(request)) as pieces:
            async for piece in pieces:
                if not has_begun:
                    metrics.first.observe(time.perf_counter() - start)
                yield replace(piece, text=prompt + piece.text)
                prompt, has_begun = "", True

    async def answered(call: Call, asked: Asked, prompt: Any, kind: str, logprobs: int | None, echo: str = "") -> Any:
        if not prompt:
            raise refused("no_prompt", field="prompt" if kind == TEXT else "messages")
        harmless = NOTHING | {"add_special_tokens": (kind == TEXT,)}
        for name, value in asked.others():
            if value is None or name in IGNORED or value in harmless.get(name, ()):
                continue
            # 0.85, because no field of another server is that close to one of ours
            if meant := get_close_matches(name.lower(), type(asked).model_fields, 1, 0.85):
                raise refused("misspelled_field", field=name, meant=meant[0])
            expected = " or ".join(map(json.dumps, [None, *harmless.get(name, ())]))
            raise refused("unknown_field", field=name, value=reprlib.repr(value), nothing=expected)
        lengths = {asked.max_tokens, asked.max_completion_tokens} - {None}
        if len(lengths) > 1:
            found = (
                f"max_tokens={asked.max_tokens} and max_completion_tokens={asked.max_completion_tokens}, which differ"
            )
            raise refused("bad_fields", found=found)
        stop = (asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop or ())
        try:
            json.dumps([prompt, stop], ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise refused("no_text", error=error) from None
        if not backend.table.number:
            raise BusyError(refusal("starting"))
        shares = backend.table.shares(asked.model, base)
        # OpenAI's field for the state of the server holds the versions that answer
        versions = "+".join(f"{v}:{weight:g}" if weight != 1 else str(v) for v, weight in shares.items())
        frame = {"id": uuid.uuid4().hex, "created": int(time.time()), "model": asked.model}
        frame["system_fingerprint"] = versions or base
        how = asked.model_dump(include=SAMPLING)
        how |= dict(prompt=prompt, shares=shares, max_tokens=next(iter(lengths), None), stop=stop, logprobs=logprobs)
        requests = [Request(**how, is_streamed=bool(asked.stream))] * (asked.n or 1)
        if asked.seed is not None:
            requests = [replace(request, seed=asked.seed + index) for index, request in enumerate(requests)]
        pieces = _merged([begun(request, echo) for request in requests])
        if asked.stream:
            has_usage = bool(asked.stream_options and asked.stream_options.include_usage)
            first = await anext(pieces)  # until here, an error has a status of its own
            return StreamingResponse(_events(first, pieces, kind, frame, has_usage), media_type="text/event-stream")
        if (ends := await _while_there(call, pieces)) is None:
            return Response(status_code=499)  # nginx's status for a client that has gone
        choices = [_choice(index, ends[index], kind) for index in range(len(requests))]
        return {**frame, "object": kind, "choices": choices, "usage": _usage([*ends.values()])}

    return api


async def _while_there(call: Call, pieces: AsyncGenerator[tuple[int, Piece], None]) -> dict[int, Piece] | None:
    """Return the last piece of each answer; None if the client goes away, which ends the computation."""

    async def read() -> dict[int, Piece]:
        async with contextlib.aclosing(pieces):
            return {index: piece async for index, piece in pieces}

    # the body has been read, so the next message can only be that the client has gone
    reading, leaving = asyncio.ensure_future(read()), asyncio.ensure_future(call.receive())
    try:
        await asyncio.wait([reading, leaving], return_when=asyncio.FIRST_COMPLETED)
        return await reading if reading.done() else None
    finally:
        reading.cancel()
        leaving.cancel()
        await asyncio.gather(reading, leaving, return_exceptions=True)


async def _merged(answers: Sequence[AsyncGenerator[Piece, None]]) -> AsyncGenerator[tuple[int, Piece], None]:
    """Yield the pieces of several answers as they come, with the index of the answer. An error ends them all."""
    queue: asyncio.Queue[tuple[int, Piece] | Exception | None] = asyncio.Queue()

    async def read(index: int, pieces: AsyncGenerator[Piece, None]) -> None:
        end = None
        try:
            async with contextlib.aclosing(pieces):
                async for piece in pieces:
                    queue.put_nowait((index, piece))
        except Exception as error:
            end = error
        finally:  # also where the backend cancels the answer
            queue.put_nowait(end)

    tasks = [asyncio.create_task(read(index, pieces)) for index, pieces in enumerate(answers)]
    try:
        running = len(tasks)
        while running:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item:
                yield item
            else:
                running -= 1
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _choice(index: int, piece: Piece, kind: str, is_part: bool = False) -> dict[str, Any]:
    """Return an answer, or a piece of it, in OpenAI's format."""
    logprobs = _logprobs(piece.tokens, kind) if piece.tokens else None
    choice = {"index": index, "finish_reason": piece.finish, "logprobs": logprobs}
    if kind == TEXT:
        return choice | {"text": piece.text}
    return choice | {"delta" if is_part else "message": {"role": "assistant", "content": piece.text}}


def _logprobs(tokens: Sequence[Token], kind: str) -> dict[str, Any]:
    if kind == CHAT:
        return {"content": [_chosen(token) | {"top_logprobs": [*map(_chosen, token.top)]} for token in tokens]}
    return {
        "tokens": [token.name for token in tokens],
        "token_logprobs": [_logprob(token) for token in tokens],
        "top_logprobs": [{top.name: _logprob(top) for top in token.top} for token in tokens],
        "text_offset": [token.start for token in tokens],
    }


def _chosen(token: Token) -> dict[str, Any]:
    """Return a token in the format of chats."""
    raw = None if token.raw is None else [*token.raw]
    return {"token": token.name, "logprob": _logprob(token), "bytes": raw}


def _logprob(token: Token) -> float:
    """Return the log probability. JSON has no infinity, so a token that can't be drawn has vLLM's -9999."""
    return max(token.logprob, -9999.0)


def _usage(ends: Sequence[Piece]) -> dict[str, int]:
    """Count the tokens of all answers to a request; they share the prompt."""
    counts = {"prompt_tokens": ends[0].prompt_tokens, "completion_tokens": sum(end.completion_tokens for end in ends)}
    return counts | {"total_tokens": sum(counts.values())}


def _error(error: Exception) -> tuple[int, dict[str, Any]]:
    """Return the HTTP status of an error, and its body in OpenAI's format."""
    statuses = [status for kind, status in STATUS.items() if isinstance(error, kind)]
    status = statuses[0] if statuses else getattr(error, "status_code", 400)
    message = advise(error, IN_SERVERS) if isinstance(error, HotswapError) else getattr(error, "detail", error)
    text = str(message).replace(", all in the `refusals` of this error", "")  # a client gets only the text
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return status, {"error": {"message": text, "type": kind, "param": None, "code": None}}


async def _events(
    first: tuple[int, Piece], rest: Any, kind: str, frame: dict[str, str | int], has_usage: bool
) -> AsyncGenerator[str, None]:
    """Yield the answers as a stream of events. A client that goes away ends it, and the computation."""
    ends, item = [], first

    def event(choices: list[Any], usage: Any = None) -> str:
        name = f"{kind}.chunk" if kind == CHAT else kind
        return f"data: {json.dumps({**frame, 'object': name, 'choices': choices, 'usage': usage})}\n\n"

    async with contextlib.aclosing(rest):
        try:
            while item:
                index, piece = item
                yield event([_choice(index, piece, kind, True)])
                ends += [piece] if piece.finish else []
                item = await anext(rest, None)
            if has_usage and ends:
                yield event([], _usage(ends))
            yield "data: [DONE]\n\n"
        except HotswapError as error:
            yield f"data: {json.dumps(_error(error)[1])}\n\n"
