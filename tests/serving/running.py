"""A server in Ray processes of its own."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import httpx2
from prometheus_client.parser import text_string_to_metric_families

from hotswap_lab.lessons.serving import QUIET, start_ray

os.environ["OMP_NUM_THREADS"] = "1"

TOKEN = "secret"


@contextlib.contextmanager
def running(**args: Any) -> Iterator[str]:
    """The address of a server of the embedded model that runs as long as the block."""
    import ray
    from ray import serve

    from hotswap_lab.serving import app

    for is_last in (False, False, True):
        try:
            address = start_ray(cpus=max(2, int(args.get("replicas", 1))))
            break
        except Exception:  # where a machine has more to do, Ray's own processes don't wait long for each other
            ray.shutdown()
            if is_last:
                raise
    try:
        serve.run(app({"token": TOKEN, **args}), logging_config=QUIET)
        yield address
    finally:
        serve.shutdown()
        ray.shutdown()


def states(address: str) -> list[dict]:
    """The states of all replicas; none if there is none that answers."""
    return httpx2.get(f"{address}/healthz", timeout=30).json().get("replicas", [])


def change(address: str, adapters: Mapping[str, str | None]) -> httpx2.Response:
    """The answer to an admin call that changes adapters."""
    header = {"Authorization": f"Bearer {TOKEN}"}
    return httpx2.post(f"{address}/admin/adapters", json=adapters, headers=header, timeout=60)


def eventually(is_so: Callable[[], Any], seconds: float = 120) -> Any:
    """What ``is_so`` gives as soon as that is true; asked once more at the end."""
    deadline = time.monotonic() + seconds
    while not (found := is_so()) and time.monotonic() < deadline:
        time.sleep(0.5)
    return found


def numbers(text: str) -> dict[tuple[str, ...], float]:
    """What ``/metrics`` says: the values by their names and labels."""
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {(each.name.removeprefix("hotswap_lab_"), *each.labels.values()): each.value for each in samples}
