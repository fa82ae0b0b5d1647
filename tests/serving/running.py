"""A server in Ray processes of its own."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

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
