"""How many requests a second one replica answers: with rows, one after the other, and in batches of one adapter each.

python tests/serving/server_load.py --requests 800
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import AsyncGenerator

from ray import serve
from replica_faults import ADAPTERS, trial
from running import TOKEN, running

from hotswap_lab import demo
from hotswap_lab.serving import Options, Piece, Request
from hotswap_lab.serving.cluster import REPLICA, Front, RegisterDeployment, ReplicaDeployment


class SplitDeployment(ReplicaDeployment.func_or_class):
    """What Serve does by itself: a request for an adapter goes where that is, and a batch has one adapter only."""

    async def answer(self, request: Request) -> AsyncGenerator[Piece, None]:
        await self._note(serve.get_multiplexed_model_id())
        for piece in await self.batched(request):
            yield piece

    @serve.batch(max_batch_size=8, batch_wait_timeout_s=0.01)
    async def batched(self, requests: list[Request]) -> list[list[Piece]]:
        async def whole(request: Request) -> list[Piece]:
            return [piece async for piece in self._replica.answer(request)]

        return await asyncio.gather(*map(whole, requests))


def split(replicas: int) -> object:
    """The same application with other batches."""
    options = Options(longest_prompt=32, longest_answer=32, target_rank=48)
    replica = serve.deployment(SplitDeployment, name=REPLICA, num_replicas=replicas, max_ongoing_requests=16)
    register = RegisterDeployment.options(user_config={"adapters": ADAPTERS})
    return Front.bind("demo", TOKEN, True, replica.bind(str(demo.BASE_DIR), options), register.bind())


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=800)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--only", default="", help="the beginning of a way's name")
    given = parser.parse_args()
    common = dict(replicas=given.replicas, adapters=ADAPTERS)
    ways = {
        "one after the other": dict(rows=1, **common),
        "batches of one adapter": dict(application=split, **common),
        "rows": dict(rows=8, **common),
    }
    for way, args in ((way, args) for way, args in ways.items() if way.startswith(given.only)):
        make = args.pop("application", None)
        with running(make and make(given.replicas), **args) as address:
            trial(address, 4 * given.clients, given.clients)  # warms up
            print(way, json.dumps(trial(address, given.requests, given.clients)), flush=True)
