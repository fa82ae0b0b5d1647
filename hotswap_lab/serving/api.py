"""OpenAI's API in front of replicas: ``model`` is an adapter's name, a mix of some, or the base model."""

import contextlib
import hmac
import json
import time
import uuid
from collections.abc import AsyncGenerator
from typing import Any, Literal

from fastapi import FastAPI, Header
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, Field, PositiveInt

from ..core.errors import HotswapError, refusal, refuse
from .replica import BusyError, Piece, Request
from .table import UnknownAdapterError

TEXT, CHAT = "text_completion", "chat.completion"


class TokenError(HotswapError):
    """An admin call without the right token."""


#: what each kind of error is in HTTP; any other is the request's own fault
STATUS: dict[type, int] = {TokenError: 401, UnknownAdapterError: 404, BusyError: 503}


class Asked(BaseModel, extra="forbid"):
    """A completion's ``prompt``, or a chat's ``messages``. What is not here is refused, rather than left undone."""

    model: str
    prompt: str | None = None
    messages: list[dict[str, str]] | None = None
    max_tokens: PositiveInt | None = None
    max_completion_tokens: PositiveInt | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    stream: bool | None = None
    # what clients send by themselves, and what it has to be
    n: Literal[1] | None = None
    top_p: Literal[1] | None = None
    stream_options: dict[str, bool] | None = None
    user: str | None = None


def openai_api(backend: Any, base: str, token: str | None = None) -> FastAPI:
    """The application, for whatever serves ASGI.

    Parameters
    ----------
    backend:
        What answers: ``table``, ``answer(request)`` as of a :class:`Replica`, ``await change(paths)`` as of a
        :class:`Register`, and ``await states()`` of all replicas.
    base:
        What the model without an adapter is called.
    token:
        What an admin call has to send. Without one there are no admin calls.
    """
    api = FastAPI(title="hotswap_lab")

    @api.exception_handler(HotswapError)
    @api.exception_handler(RequestValidationError)
    async def refused(_: Any, error: Any) -> JSONResponse:
        status = next((status for kind, status in STATUS.items() if isinstance(error, kind)), 400)
        kind = "server_error" if status == 503 else "invalid_request_error"
        wrong = error.errors() if isinstance(error, RequestValidationError) else ()
        text = "; ".join(f"{each['loc'][-1]}: {each['msg']}" for each in wrong) or str(error)
        told = {"error": {"message": text, "type": kind, "param": None, "code": None}}
        return JSONResponse(told, status, {"Retry-After": "1"} if status == 503 else None)

    @api.get("/healthz")
    async def healthz() -> Any:
        return {"replicas": await backend.states()}

    @api.get("/v1/models")
    async def models() -> Any:
        names = [base, *backend.table.versions]
        return {"object": "list", "data": [{"id": n, "object": "model", "created": 0, "owned_by": ""} for n in names]}

    @api.post("/admin/adapters")
    async def change(adapters: dict[str, str | None], authorization: str = Header("")) -> Any:
        if not token or not hmac.compare_digest(authorization.encode(), f"Bearer {token}".encode()):
            raise TokenError(refusal("no_token"))
        return {name: each.number for name, each in (await backend.change(adapters)).versions.items()}

    @api.post("/v1/completions")
    async def completions(asked: Asked) -> Any:
        return await answered(asked, asked.prompt, TEXT)

    @api.post("/v1/chat/completions")
    async def chat_completions(asked: Asked) -> Any:
        return await answered(asked, asked.messages, CHAT)

    async def answered(asked: Asked, prompt: Any, kind: str) -> Any:
        if not prompt:
            raise refuse("no_prompt", field="prompt" if kind == TEXT else "messages")
        shares = backend.table.shares(asked.model, base)
        # OpenAI's field for the state of the server holds the versions that answer
        versions = "+".join(f"{each}:{weight:g}" if weight != 1 else f"{each}" for each, weight in shares.items())
        frame = {"id": uuid.uuid4().hex, "created": int(time.time()), "model": asked.model}
        frame["system_fingerprint"] = versions or base
        most = asked.max_completion_tokens or asked.max_tokens
        request = Request(prompt, shares, most, asked.temperature or 0.0, bool(asked.stream))
        pieces = backend.answer(request)
        if asked.stream:
            first = await anext(pieces)  # until here, an error has a status of its own
            return StreamingResponse(_events(first, pieces, kind, frame), media_type="text/event-stream")
        [whole] = [piece async for piece in pieces]
        return _written(whole, kind, frame)

    return api


def _written(piece: Piece, kind: str, frame: dict[str, str | int], is_part: bool = False) -> dict[str, Any]:
    """A piece of an answer as OpenAI writes it."""
    message = {"role": "assistant", "content": piece.text}
    said = {"text": piece.text} if kind == TEXT else {"delta" if is_part else "message": message}
    counts = {"prompt_tokens": piece.prompt_tokens, "completion_tokens": piece.completion_tokens}
    usage = counts | {"total_tokens": sum(counts.values())} if piece.finish else None
    choice = {"index": 0, "finish_reason": piece.finish, "logprobs": None, **said}
    name = f"{kind}.chunk" if is_part and kind == CHAT else kind
    return {**frame, "object": name, "choices": [choice], "usage": usage}


async def _events(first: Piece, rest: Any, kind: str, frame: dict[str, str | int]) -> AsyncGenerator[str, None]:
    """The answer as a stream. A client that goes away ends it, and the computing with it."""
    async with contextlib.aclosing(rest):
        yield f"data: {json.dumps(_written(first, kind, frame, True))}\n\n"
        async for piece in rest:
            yield f"data: {json.dumps(_written(piece, kind, frame, True))}\n\n"
    yield "data: [DONE]\n\n"
