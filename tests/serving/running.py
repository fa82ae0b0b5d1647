"""A server in Ray processes of its own."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterator

os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_AUTH_MODE="disabled", OMP_NUM_THREADS="1")
# for a machine that is busy: time to start
os.environ.update(RAY_raylet_start_wait_time_s="120", RAY_agent_register_timeout_ms="100000")

TOKEN = "secret"
QUIET = {"log_level": "CRITICAL"}


@contextlib.contextmanager
def running(application: object | None = None, **args: object) -> Iterator[str]:
    """The address of a server that runs as long as the block; by default one of the embedded model."""
    import ray
    from ray import serve

    from hotswap_lab.serving import app

    for is_last in (False, False, True):
        try:
            ray.init(num_cpus=2, include_dashboard=False, logging_level="CRITICAL", log_to_driver=False)
            break
        except Exception:  # where a machine has more to do, Ray's own processes don't wait long for each other
            ray.shutdown()
            if is_last:
                raise
    try:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        serve.start(http_options={"port": port}, logging_config=QUIET)
        logging.getLogger("ray.serve").setLevel("CRITICAL")
        serve.run(application or app({"token": TOKEN, **args}), logging_config=QUIET)
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


def kill(replica: str) -> None:
    """As if its machine were gone; ``replica`` as ``/healthz`` calls it."""
    import ray

    ray.kill(ray.get_actor(f"SERVE_REPLICA::default#Replica#{replica}", namespace="serve"))
