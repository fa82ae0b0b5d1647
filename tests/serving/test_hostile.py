"""Requests that no client would send: none gets a 500, and a good one next to them gets its answer.

TIMES=67 pytest tests/serving/test_hostile.py  # ten thousand of them, instead of 150
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from collections import Counter
from typing import Any

from lengths import TIMES
from served import FAMILY, WORDS, Served, alone

from hotswap_lab.serving.api import openai_api

TEXTS = ["", "hotswap>", "demo", "shout", "nobody", "+", ":", "\ud800", "\0", "\u202e\n", "🤷" * 9]
TEXTS += ["a" * 70, "9" * 2000]
NUMBERS = [0, -1, 1, 2, 3, 8, 9, 1e-40, 1e-3, 0.5, 1e30, -0.0, 2**63, -(2**63), 10**400, float("nan"), float("inf")]
MODELS = ["shout", "demo", "shout:1e30", "shout:nan", "shout:0+sort:100", "shout+" * 9, "sort:1e-40", "shout:-1"]
MODELS += ["caesar+pig_latin+sort", "double:0.5+reverse:0.5", "shout:" + "9" * 999, "9" * 100_000]
FIELDS = ["max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "stop", "n", "stream", "logprobs"]
FIELDS += ["top_logprobs", "stream_options", "user", "tools", "logit_bias", "echo", "response_format", "best_of"]
FIELDS += ["top_k", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty"]
PATHS = ["/v1/completions"] * 3 + ["/v1/chat/completions"] * 3
PATHS += ["/admin/adapters", "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/models", "/healthz", "/nowhere"]
BODIES = [b"", b"{", b"[" * 9_000, b"\xff\xfe", b"null", b"[]", b'"a"', b'{"n": ' + b"9" * 5_000 + b"}", b"a" * 200_000]
ADDRESSES = ["", "/nowhere", "/dev/null", "\0", "\ud800", "a/b", "/", "..", None, None, *FAMILY.values()]


class Hostile:
    """The generator of one seed, and what became of its requests: how many had which status."""

    def __init__(self, app: Any):
        self.app, self.random = app, random.Random(0)
        self.statuses: Counter[int] = Counter()

    def value(self, depth: int = 0) -> Any:
        kind = self.random.choice([TEXTS, NUMBERS, [True, False, None], [{"5": 100}, {"97": -1.5}, {"98": 1}]])
        if depth < 2 and self.random.random() < 0.4:
            several = [self.value(depth + 1) for _ in range(self.random.randint(0, 5))]
            return self.random.choice([several, several, dict(zip(TEXTS, several, strict=False))])
        return self.random.choice(kind)

    def message(self) -> Any:
        content = self.random.choice([self.value(), "hotswap", [{"type": "text", "text": self.random.choice(TEXTS)}]])
        message = {"role": self.random.choice(["user", "assistant", *TEXTS]), "content": content}
        return self.random.choice([message, message, message, self.value()])

    def request(self) -> tuple[str, bytes]:
        """A path and a body."""
        choose = self.random.choice
        path = choose(PATHS)
        if self.random.random() < 0.1:
            return path, choose(BODIES)
        if "completions" not in path:
            names, where = [choose([*TEXTS, "new"]) for _ in range(2)], choose(ADDRESSES)
            asked = dict.fromkeys(names, where) if "admin" in path else {"lora_name": names[0], "lora_path": where}
            return path, json.dumps(asked).encode()
        asked = {"model": choose(MODELS * 2 + TEXTS)}
        asked["prompt"] = choose([*TEXTS, *["hotswap>"] * 9, self.value()])
        asked["messages"] = [self.message() for _ in range(choose([0, 1, 1, 1, 2, 5]))]
        for field in self.random.sample(FIELDS, choose([0, 1, 1, 2, 3])):
            asked[field] = choose([self.value(), choose(NUMBERS), True, 1])
        return path, json.dumps(asked).encode()

    async def send(self) -> None:
        """One request to the application itself. Some clients go away, and read no more, after so many messages."""
        path, body = self.request()
        leaves = self.random.choice([None] * 3 + [0, 1, 2, 4])
        parts = [body[at : at + 4096] for at in range(0, len(body), 4096)] or [b""]
        gone, sent = asyncio.Event(), 0

        async def receive() -> dict[str, Any]:
            if parts:
                part = parts.pop(0)
                return {"type": "http.request", "body": part, "more_body": bool(parts)}
            if leaves is None or sent < leaves:
                await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            nonlocal sent
            sent += 1
            if message["type"] == "http.response.start":
                self.statuses[message["status"]] += 1
            if leaves is not None and sent > leaves:
                gone.set()
                raise OSError("the client has gone")

        method = "GET" if path in ("/v1/models", "/healthz", "/nowhere") else "POST"
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
