"""Requests that no client would send: none gets a 500, and a good one next to them gets its answer."""

import asyncio
import itertools

from hostile import Hostile
from lengths import TIMES
from served import FAMILY, WORDS, Served, alone

from hotswap_lab.serving.api import openai_api


def test_hostile_requests():
    served = Served(FAMILY)
    hostile, words = Hostile(openai_api(served, "demo", "secret", 24)), itertools.cycle(WORDS)

    async def is_right():
        word = next(words)
        return await served.ask("reverse", word) == alone(FAMILY["reverse"], word)

    asyncio.run(asyncio.wait_for(hostile.run(150 * TIMES, is_right), 60 + 60 * TIMES))
    assert 500 not in hostile.statuses
    assert {200, 400, 404, 413} <= set(hostile.statuses)
    assert served.replicas[0].state["waiting"] == 0
    print(dict(hostile.statuses))
