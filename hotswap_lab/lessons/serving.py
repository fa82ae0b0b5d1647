"""Chapter 09: a quiet Ray, a replica to try batches with, one that is lost, and which replica gets a request."""

from __future__ import annotations

import logging
import os
import random
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .. import demo
from ..pools.adapter_pool import AdapterPool
from .exercise import Exercise

#: no messages in a notebook but what its cells print
QUIET = {"log_level": "CRITICAL"}
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # it would make a token, and say so
# for a machine that is busy: time to start, and as much of it for replicas as for others
os.environ.setdefault("RAY_worker_niceness", "0")
os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")
os.environ.setdefault("RAY_agent_register_timeout_ms", "100000")


def start_ray(cpus: int = 2, port: int = 0) -> str:
    """Starts Ray and Ray Serve on this machine, without their messages. Returns where HTTP requests go.

    Without a ``port`` it is a free one; Serve's own, 8000, may be taken.
    """
    import ray
    from ray import serve

    ray.init("local", num_cpus=cpus, include_dashboard=False, logging_level="CRITICAL", log_to_driver=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", port))
        port = free.getsockname()[1]
    logging.getLogger("ray.serve").disabled = True  # Serve sets its level anew
    serve.start(http_options={"port": port}, logging_config=QUIET)
    return f"http://127.0.0.1:{port}"


def lose(replica: str) -> None:
    """Kills a replica of the application, as ``kill -9`` would; ``replica`` as ``/healthz`` calls it."""
    import ray

    ray.kill(ray.get_actor(f"SERVE_REPLICA::default#Replica#{replica}", namespace="serve"))


class Desk:
    """A model, and a pool with eight rows. Its ``calls`` are the requests of each batch that it has answered.

    Examples
    --------
    >>> desk = Desk()
    >>> desk.pool.assign(["shout", "sort"])
    >>> desk.answer([(0, "shout", "hotswap"), (1, "sort", "hotswap")])
    ['HOTSWAP!', 'ahopstw']
    >>> desk.calls
    [[(0, 'shout'), (1, 'sort')]]
    """

    def __init__(self) -> None:
        self.model: Any
        self.tokenizer: Any
        self.model, self.tokenizer = demo.load("reverse")
        family = {name: demo.adapter_path(name) for name in demo.adapter_names()}
        self.pool: AdapterPool = AdapterPool(self.model, adapters=family, rows=8, progress=False)
        self.calls: list[list[tuple[int, str]]] = []

    def answer(self, requests: Sequence[tuple[int, str, str]]) -> list[str]:
        """One call of the model. A request is its number, its adapter and its word."""
        self.calls.append([(number, name) for number, name, _ in requests])
        return demo.ask_all(self.model, self.tokenizer, [word for _, _, word in requests])

    async def past_calls(self) -> list[list[tuple[int, str]]]:
        """The calls since it was last asked."""
        calls, self.calls = self.calls, []
        return calls


def split_by_adapter(desk: type) -> type:
    """The class with another method, ``one_adapter(requests)``: batches as Serve makes them, one adapter in each."""
    from ray import serve

    class SplitDesk(desk):
        @serve.multiplexed(max_num_models_per_replica=8)
        async def find(self, name: str) -> str:
            return name

        @serve.batch(max_batch_size=8, batch_wait_timeout_s=0.1)
        async def one_adapter(self, requests: list[Any]) -> list[str]:
            self.pool.swap(await self.find(serve.get_multiplexed_model_id()))
            return self.answer(requests)

    return SplitDesk


# --- exercise: which replica gets a request ----------------------------------------------------------------------


def adapters_read(rule: Callable[[str, Sequence[Mapping[str, Any]], int], int], count: int = 200, held: int = 4) -> str:
    """Say how often two replicas read an adapter from its files if ``rule`` chooses, and how many requests waited."""
    replicas: list[dict[str, Any]] = [{"held": [], "waiting": 0} for _ in range(2)]
    read, longest, choices = 0, 0, random.Random(0)
    for number in range(count):
        name = choices.choice(demo.adapter_names())
        chosen = replicas[rule(name, [{**each, "held": set(each["held"])} for each in replicas], 3)]
        chosen["waiting"] += 1
        longest = max(longest, chosen["waiting"])
        read += name not in chosen["held"]
        chosen["held"] = [*(each for each in chosen["held"] if each != name), name][-held:]
        if number % 2:  # in the time of two requests, each replica answers one
            for replica in replicas:
                replica["waiting"] = max(replica["waiting"] - 1, 0)
    return f"{read} reads, at most {longest} waiting"


def _choose(name: str, replicas: Sequence[Mapping[str, Any]], most: int) -> int:
    numbers = range(len(replicas))
    having = [n for n in numbers if name in replicas[n]["held"] and replicas[n]["waiting"] < most]
    return min(having or numbers, key=lambda n: replicas[n]["waiting"])


@Exercise
def choose_replica(solution):
    """Return the index of the replica that gets a request for the adapter `name`. About 3 lines."""
    for what, waiting in {"nobody waits": (0, 0, 0), "two have it": (0, 2, 1), "all are busy": (5, 3, 4)}.items():
        held = ({"sort"}, {"shout"}, {"shout", "sort"})
        replicas = [{"held": set(h), "waiting": w} for h, w in zip(held, waiting, strict=True)]
        for name in ("shout", "double"):
            yield f"{name}, {what}", solution(name, replicas, 3), _choose(name, replicas, 3)
    yield "200 requests", adapters_read(solution), adapters_read(_choose)
