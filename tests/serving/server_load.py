"""How many answers of mixed lengths a replica gives, with rows that come and go, and one at a time.

python tests/serving/server_load.py --requests 96 --threads 2
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import time

import torch
from peft import PeftModel

from hotswap_lab import demo
from hotswap_lab.bench import machine
from hotswap_lab.demo import smollm2, voices
from hotswap_lab.serving import Options, Replica, Request, Version

#: how long the answers are, in tokens: most are short, some are long
LENGTHS = (8, 8, 8, 16, 16, 32, 64, 128)
SHORT = 8
CLIENTS = 16


def make_replica(model: str, options: Options) -> tuple[Replica, list[Version]]:
    """A replica of SmolLM2 with its voices, or of the embedded model, whose answers never end by themselves."""
    if model == "smollm2":
        paths = {name: voices.path(name) for name in voices.names()}
        base, tokenizer = smollm2.load_base(), smollm2.load_tokenizer()
    else:
        paths = {name: demo.adapter_path(name) for name in demo.adapter_names()}
        base, tokenizer = demo.load_base(), demo.load_tokenizer()
    versions = [Version.of(*each) for each in paths.items()]
    replica = Replica(PeftModel.from_pretrained(base, versions[0].path), tokenizer, versions, options)
    replica.ends, replica.pool.model.generation_config.eos_token_id = [-1], None
    return replica, versions


async def serve(replica: Replica, asked: list[tuple[Version, int]], clients: int) -> tuple[float, list[float]]:
    """Seconds for all requests, and for each of the short ones, with this many clients that ask one after the other."""
    waiting, short = list(asked), []

    async def client() -> None:
        while waiting:
            version, length = waiting.pop()
            start = time.perf_counter()
            request = Request("What is rain? ", {version: 1.0}, max_tokens=length)
            assert [piece async for piece in replica.answer(request)][-1].completion_tokens == length
            if length == SHORT:
                short.append(time.perf_counter() - start)

    start = time.perf_counter()
    await asyncio.gather(*[client() for _ in range(clients)])
    return time.perf_counter() - start, short


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", choices=("smollm2", "demo"), default="smollm2")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    longest = max(LENGTHS) if given.model == "smollm2" else 32
    for label, rows, clients in (("come and go", 8, CLIENTS), ("one at a time", 1, 1)):
        options = Options(rows=rows, longest_prompt=24, longest_answer=longest)
        replica, versions = make_replica(given.model, options)
        chosen = random.Random(0)
        asked = [(chosen.choice(versions), min(chosen.choice(LENGTHS), longest)) for _ in range(given.requests)]
        asyncio.run(serve(replica, asked[:8], clients))
        seconds, short = asyncio.run(serve(replica, asked, clients))
        tokens = sum(length for _, length in asked)
        print(f"{given.model}, {machine()}; {given.requests} requests, {tokens} tokens, {clients} clients: {label}")
        p50, p99 = statistics.median(short), sorted(short)[int(0.99 * len(short))]
        print(f"{given.requests / seconds:6.2f} requests/s {tokens / seconds:7.1f} tokens/s")
        print(f"answers of {SHORT} tokens: median {p50:.2f} s, 99 % within {p99:.2f} s")
