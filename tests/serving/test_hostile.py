"""Requests that no client would send: none gets a 500, and a good one next to them gets its answer.

TIMES=67 pytest -m long tests/serving/test_hostile.py  # ten thousand of them, instead of 150
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from collections import Counter
from typing import Any

import pytest
from lengths import TIMES
from served import FAMILY, WORDS, Served, alone
from test_api import ADMIN, CHATS, HOW, MORE, REFUSED, TEXT, UNLOAD

from hotswap_lab.serving.api import openai_api

#: what asks for an answer, any field of it, and values of which some fit some field
ASKED = [body for path, body, *_ in REFUSED if path in (TEXT, CHATS) and isinstance(body, dict)]
FIELDS = sorted({field for body in ASKED for field in body} | {*HOW, *MORE, "max_completion_tokens", "top_logprobs"})
VALUES = [value for body in [*ASKED, HOW, MORE] for value in body.values()]
VALUES += [None, True, 0, 1e-40, 10**400, float("nan"), float("inf"), "\0", "\u202e\n", "🤷" * 9, {}, [[]], {"5": []}]
MODELS = ["shout", "demo", "caesar+pig_latin+sort", "double:0.5+reverse:0.5", "shout:0+sort:100", "9" * 100_000]
OTHERS = [(path, body) for path, body, *_ in REFUSED if path not in (TEXT, CHATS) or not isinstance(body, dict)]
OTHERS += [(ADMIN, {"new": FAMILY["sort"]}), (UNLOAD, {"lora_name": "new"}), ("/v1/models", None), ("/healthz", None)]


class Hostile:
    """The generator of one seed, and what became of its requests: how many had which status."""

    def __init__(self, app: Any):
        self.app, self.random = app, random.Random(0)
        self.statuses: Counter[int] = Counter()

    def request(self) -> tuple[str, Any]:
        """A path and what is sent."""
        choose = self.random.choice
        if self.random.random() < 0.4:
            return choose(OTHERS)
        path = choose([TEXT, CHATS])
        said = {"prompt": "hotswap>"} if path == TEXT else {"messages": [{"role": "user", "content": "hotswap"}]}
        asked = {"model": choose(MODELS), **said}
        for field in self.random.sample(FIELDS, choose([0, 1, 1, 2, 3])):
            asked[field] = choose([choose(VALUES), [choose(VALUES), choose(VALUES)], 1])
        return path, asked

    async def send(self) -> None:
        """One request to the application itself. Some clients go away, and read no more, after so many messages."""
        path, asked = self.request()
        body = asked if isinstance(asked, bytes) else json.dumps(asked).encode()
        leaves = self.random.choice([None] * 3 + [0, 1, 2, 4])
        parts = [body[at : at + 4096] for at in range(0, len(body), 4096)] or [b""]
        gone, sent = asyncio.Event(), 0

        async def receive() -> dict[str, Any]:
            if parts:
                part = parts.pop(0)
                return {"type": "http.request", "body": part, "more_body": bool(parts)}
            if leaves is None or sent < leaves:
                await asyncio.wait_for(gone.wait(), 120)
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            nonlocal sent
            sent += 1
            if message["type"] == "http.response.start":
                self.statuses[message["status"]] += 1
            if leaves is not None and sent > leaves:
                gone.set()
                raise OSError("the client has gone")

        method = "GET" if asked is None else "POST"
        headers = [(b"content-type", b"application/json"), (b"authorization", b"Bearer secret")]
        scope = {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.4"}, "http_version": "1.1"}
        scope |= {"method": method, "path": path, "raw_path": path.encode(), "query_string": b"", "headers": headers}
        scope |= {"scheme": "http", "server": ("served", 80), "client": ("hostile", 1), "root_path": ""}
        try:
            await self.app(scope, receive, send)
        except Exception as error:  # an ASGI server would send a 500, but where the client has gone
            if leaves is None:
                self.statuses[500] += 1
                print(f"{type(error).__name__}: {error}", path, body[:300])
        finally:
            gone.set()


@pytest.mark.long
def test_hostile_requests():
    served = Served(FAMILY)
    hostile, words = Hostile(openai_api(served, "demo", "secret", 24)), itertools.cycle(WORDS)

    async def run():
        for _ in range(150 * TIMES // 8 + 1):
            word = next(words)
            *_, said = await asyncio.gather(*(hostile.send() for _ in range(8)), served.ask("reverse", word))
            assert said == alone(FAMILY["reverse"], word)

    asyncio.run(asyncio.wait_for(run(), 60 + 60 * TIMES))
    assert 500 not in hostile.statuses
    assert {200, 400, 404, 413} <= set(hostile.statuses)
    assert served.replicas[0].state["waiting"] == 0
    print(dict(hostile.statuses))
