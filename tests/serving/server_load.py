"""How many answers of mixed lengths a replica gives, and how long their first and their other tokens take.

python tests/serving/server_load.py --requests 96 --threads 2

Rows that come and go, whole batches (the next one starts when all answers of one have ended), and one at a time. The
ways take turns, because a machine has other things to do, too.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable

import torch

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
#: for each model its adapters, and the longest answer
MODELS = {
    "demo": ({name: demo.adapter_path(name) for name in demo.adapter_names()}, 32),
    "smollm2": ({name: voices.path(name) for name in voices.names()}, max(LENGTHS)),
}


def ask_replica(model: str, rows: int) -> Ask:
    """Asks a replica in this process. No answer ends by itself."""
    (adapters, longest), tokenizer = MODELS[model], (demo if model == "demo" else smollm2).load_tokenizer()
    versions = {name: Version.of(name, path) for name, path in adapters.items()}
    options = Options(rows=rows, longest_prompt=24, longest_answer=longest)
    base = str(demo.BASE_DIR) if model == "demo" else tokenizer.name_or_path
    replica = load_replica(base, list(versions.values()), options)
    how = dict(logit_bias={tokenizer.eos_token_id: -100.0}, is_streamed=True)
    return lambda name, length: replica.answer(
        Request(prompt=PROMPT, shares={versions[name]: 1.0}, max_tokens=length, **how)
    )


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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    (adapters, longest), chosen = MODELS[given.model], random.Random(0)
    asked = [(chosen.choice([*adapters]), chosen.choice(LENGTHS)) for _ in range(given.requests)]
    asked = [(name, min(length, longest)) for name, length in asked]
    tokens = sum(length for _, length in asked)
    rows, one = (ask_replica(given.model, count) for count in (ROWS, 1))
    ways = {"come and go": Way(rows, CLIENTS), "whole batches": Way(rows, 0, ROWS), "one at a time": Way(one, 1)}
    for _ in range(given.rounds):
        for way in ways.values():
            asyncio.run(way.round(asked))
    print(f"{given.model}, {machine()}; {given.requests} requests, {tokens} tokens, best of {given.rounds} rounds")
    for name, way in ways.items():
        print(f"{name:13} {way.told(given.requests, tokens)}")
