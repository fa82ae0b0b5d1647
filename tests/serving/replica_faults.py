"""Replicas are killed and adapters get new weights while clients ask: no answer is lost, wrong, or of two versions.

python tests/serving/replica_faults.py --requests 2000
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1])]

import httpx2
import openai
from running import change, running, states
from served import FAMILY, alone

from hotswap_lab.demo.tasks import sample_words
from hotswap_lab.lessons.serving import lose

WORDS = sample_words(4, seed=0, held_out=True)
NAMES = ["one", "two", "three", "four", "five", "six"]
ADAPTERS = dict(zip(NAMES, FAMILY.values(), strict=False))


class Trial:
    """Clients that know what each version of each adapter says by itself, and who makes trouble for them."""

    def __init__(self, address: str):
        self.address, self.random = address, random.Random(0)
        #: for each version, the folder that its weights are from
        numbers = change(address, ADAPTERS).json()
        self.folders = {(name, numbers[name]): folder for name, folder in ADAPTERS.items()}
        self.counts: Counter[str] = Counter(asked=0, retried=0, wrong=0, lost=0, kills=0, updates=0)
        self.lock, self.is_over = threading.Lock(), threading.Event()

    def note(self, what: str) -> None:
        with self.lock:
            self.counts[what] += 1

    def client(self, number: int, count: int) -> None:
        """Asks so often, one after the other, and looks at what comes."""
        choose = random.Random(number)
        client = openai.OpenAI(base_url=f"{self.address}/v1", api_key="-", max_retries=0, timeout=120)
        for _ in range(count):
            name, word, is_streamed = choose.choice(NAMES), choose.choice(WORDS), choose.random() < 0.3
            for attempt in range(20):
                try:
                    said, versions = _ask(client, name, word, is_streamed)
                    break
                except (openai.APIError, httpx2.HTTPError):
                    self.note("retried")
                    time.sleep(min(0.2 * 2**attempt, 2))
            else:
                self.note("lost")
                continue
            self.note("asked")
            (version,) = versions  # of all pieces the same
            folder = self.folders[name, int(version.removeprefix(f"{name}@"))]
            if said != alone(folder, word):
                self.note("wrong")

    def kill_every(self, requests: int) -> None:
        """One replica, whichever there is."""
        due = requests
        while not self.is_over.wait(0.02):
            if self.counts["asked"] >= due:
                due += requests
                with contextlib.suppress(Exception):
                    lose(self.random.choice(states(self.address))["replica"])
                    self.note("kills")

    def update_every(self, seconds: float) -> None:
        """One adapter gets the weights of another task."""
        while not self.is_over.wait(seconds):
            name, folder = self.random.choice(NAMES), self.random.choice(list(FAMILY.values()))
            newest = max(number for known, number in self.folders if known == name)
            if self.folders[name, newest] == folder:
                continue
            self.folders[name, newest + 1] = folder  # before anybody can get it
            answer = change(self.address, {name: folder})
            if answer.status_code == 200:
                assert answer.json()[name] == newest + 1
                self.note("updates")
            else:  # 503: there was no replica at that moment
                del self.folders[name, newest + 1]
                self.note(f"updates_{answer.status_code}")


def _ask(client: openai.OpenAI, name: str, word: str, is_streamed: bool) -> tuple[str, set[str]]:
    said = client.completions.create(model=name, prompt=f"{word}>", stream=is_streamed)
    pieces = list(said) if is_streamed else [said]
    if pieces[-1].choices[0].finish_reason is None:
        raise httpx2.RemoteProtocolError("the stream broke off")
    return "".join(piece.choices[0].text for piece in pieces), {piece.system_fingerprint for piece in pieces}


def trial(address: str, requests: int, clients: int = 8, kill_every: int = 0, update_every: float = 0) -> dict:
    """How many requests of one trial went how."""
    for folder in FAMILY.values():  # the truth, beforehand
        for word in WORDS:
            alone(folder, word)
    each = Trial(address)
    with ThreadPoolExecutor(clients + 2) as pool:
        troubles = [(each.kill_every, kill_every), (each.update_every, update_every)]
        making = [pool.submit(make, often) for make, often in troubles if often]
        done = [pool.submit(each.client, number, requests // clients) for number in range(clients)]
        try:
            for one in done:
                one.result(600)
        finally:
            each.is_over.set()
        for one in making:
            one.result(600)
    return dict(each.counts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=2000)
    requests = parser.parse_args().requests
    with running(replicas=2, adapters=ADAPTERS) as address:
        print(json.dumps(trial(address, requests, kill_every=200, update_every=2)))
