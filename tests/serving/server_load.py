"""How many answers of mixed lengths a server gives, and how long their first and their other tokens take.

python tests/serving/server_load.py --requests 96 --threads 2
python tests/serving/server_load.py --requests 96 --http one ray  # the command as a user starts it, and Ray Serve

In this process: rows that come and go, whole batches (the next one starts when all answers of one have ended), and one
at a time. The ways take turns, since a machine has other things to do, too.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1])]

import httpx2
import torch
from running import one_process, running

from hotswap_lab import demo
from hotswap_lab.bench import machine
from hotswap_lab.demo import smollm2, voices
from hotswap_lab.serving import Options, Request, Version
from hotswap_lab.serving.arguments import load_replica

#: how long the answers are, in tokens: most are short, some are long
LENGTHS = (8, 8, 8, 16, 16, 32, 64, 128)
ROWS, CLIENTS, PROMPT = 8, 16, "What is rain? "
#: the pieces of an answer, by the name of its adapter and its length
Ask = Callable[[str, int], AsyncIterator[object]]


def model_of(name: str) -> tuple[dict, int]:
    """A model and its adapters as a server's arguments, and the token that ends an answer."""
    if name == "demo":
        base, paths, longest = str(demo.BASE_DIR), demo.adapter_path, 32
    else:
        base, paths, longest = smollm2.load_tokenizer().name_or_path, voices.path, max(LENGTHS)
    adapters = {each: paths(each) for each in (demo.adapter_names() if name == "demo" else voices.names())}
    end = (demo if name == "demo" else smollm2).load_tokenizer().eos_token_id
    return dict(base=base, adapters=adapters, longest_prompt=24, longest_answer=longest), end


def ask_replica(args: dict, end: int, rows: int) -> Ask:
    """Asks a replica in this process. No answer ends by itself."""
    versions = {name: Version.of(name, path) for name, path in args["adapters"].items()}
    options = Options(rows=rows, longest_prompt=24, longest_answer=args["longest_answer"])
    replica = load_replica(args["base"], list(versions.values()), options)
    how = dict(logit_bias={end: -100.0}, is_streamed=True)
    return lambda name, length: replica.answer(Request(PROMPT, {versions[name]: 1.0}, max_tokens=length, **how))


def ask_server(address: str, end: int) -> Ask:
    """Asks a server."""

    async def ask(name: str, length: int) -> AsyncIterator[object]:
        asked = dict(model=name, prompt=PROMPT, max_tokens=length, stream=True, logit_bias={end: -100})
        async with (
            httpx2.AsyncClient(timeout=300) as client,
            client.stream("POST", f"{address}/v1/completions", json=asked) as answer,
        ):
            async for line in answer.aiter_lines():
                if "choices" in line:
                    yield line

    return ask


class Way:
    """One way to answer, and what was measured of it: seconds of whole rounds, of first tokens, and of the others."""

    def __init__(self, ask: Ask, clients: int, batch: int = 0):
        self.ask, self.clients, self.batch = ask, clients, batch
        self.whole, self.first, self.other = [], [], []

    async def answer(self, name: str, length: int) -> None:
        before, times = time.perf_counter(), []
        async for _ in self.ask(name, length):
            times.append(time.perf_counter())
        self.first.append(times[0] - before)
        self.other += [(times[-1] - times[0]) / (length - 1)]

    async def round(self, asked: list[tuple[str, int]]) -> None:
        """All requests, from this many clients that ask one after the other, or in batches."""
        start, waiting = time.perf_counter(), list(asked)

        async def client() -> None:
            while waiting:
                await self.answer(*waiting.pop())

        while self.batch and waiting:
            now, waiting = waiting[: self.batch], waiting[self.batch :]
            await asyncio.gather(*(self.answer(*each) for each in now))
        await asyncio.gather(*(client() for _ in range(self.clients)))
        self.whole.append(time.perf_counter() - start)

    def told(self, count: int, tokens: int) -> str:
        seconds = min(self.whole)
        parts = [f"{count / seconds:6.2f} requests/s {tokens / seconds:7.1f} tokens/s"]
        for name, values in (("first token", self.first), ("token", self.other)):
            p50, p99 = (sorted(values)[int(part * len(values))] * 1e3 for part in (0.5, 0.99))
            parts.append(f"{name} {p50:.0f} ms (99 %: {p99:.0f})")
        return ", ".join(parts)


@contextlib.contextmanager
def ways_of(kinds: list[str], args: dict, end: int) -> Iterator[dict[str, Way]]:
    if not kinds:
        rows, one = ask_replica(args, end, ROWS), ask_replica(args, end, 1)
        yield {"come and go": Way(rows, CLIENTS), "whole batches": Way(rows, 0, ROWS), "one at a time": Way(one, 1)}
        return
    with contextlib.ExitStack() as stack:
        ways = {}
        for kind in kinds:
            start = time.perf_counter()
            address = stack.enter_context({"one": one_process, "ray": running}[kind](rows=ROWS, **args))
            ways[kind] = Way(ask_server(address, end), CLIENTS)
            asyncio.run(ways[kind].answer(next(iter(args["adapters"])), 8))
            print(f"{kind}: {time.perf_counter() - start:.1f} s to the first answer", flush=True)
        yield ways


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", choices=("smollm2", "demo"), default="smollm2")
    parser.add_argument("--http", choices=("one", "ray"), nargs="*", default=[])
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    args, end = model_of(given.model)
    chosen = random.Random(0)
    asked = [(chosen.choice([*args["adapters"]]), chosen.choice(LENGTHS)) for _ in range(given.requests)]
    asked = [(name, min(length, args["longest_answer"])) for name, length in asked]
    tokens = sum(length for _, length in asked)
    with ways_of(given.http, args, end) as ways:
        for _ in range(given.rounds):
            for way in ways.values():
                asyncio.run(way.round(asked))
        print(f"{given.model}, {machine()}; {given.requests} requests, {tokens} tokens, best of {given.rounds} rounds")
        for name, way in ways.items():
            print(f"{name:13} {way.told(given.requests, tokens)}")
