"""Chapter 09: Ray without its messages, a killed replica, and the choice of a replica for a request.

Tests: ``tests/lessons/test_exercises.py`` and ``tests/serving/test_cluster.py``.
"""

import logging
import os
import socket

from .exercise import Exercise

#: hides messages in a notebook's outputs
QUIET = {"log_level": "CRITICAL"}
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # or Ray makes a token and prints a message
# for a busy machine: more time to start, and no lower priority for replicas
os.environ.setdefault("RAY_worker_niceness", "0")
os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")
os.environ.setdefault("RAY_agent_register_timeout_ms", "100000")


def start_ray(cpus: int = 2, port: int = 0) -> str:
    """Start Ray and Ray Serve on this machine, without their messages. Return the address for HTTP requests.

    The default port is a free one, because Serve's own default, 8000, may be in use.
    """
    import ray
    from ray import serve

    ray.init("local", num_cpus=cpus, include_dashboard=False, logging_level="CRITICAL", log_to_driver=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", port))
        port = free.getsockname()[1]
    logging.getLogger("ray.serve").disabled = True  # Serve resets its level
    serve.start(http_options={"port": port}, logging_config=QUIET)
    return f"http://127.0.0.1:{port}"


def lose(replica: str) -> None:
    """Kill a replica of the application, as ``kill -9`` would. ``replica`` is its name in ``/healthz``."""
    import ray

    ray.kill(ray.get_actor(f"SERVE_REPLICA::default#Replica#{replica}", namespace="serve"))


# --- exercise: which replica gets a request ----------------------------------------------------------------------


@Exercise
def choose_replica(solution):
    """Return the index of the replica that gets a request for the adapter `name`. About 3 lines."""
    cases = {"nobody waits": (0, 0, 0), "two have it": (0, 2, 1), "who has it is busy": (2, 3, 4), "all are": (5, 3, 4)}
    for case, waiting in cases.items():
        held = ({"sort"}, {"shout"}, {"shout", "sort"})
        replicas = [{"held": set(h), "waiting": w} for h, w in zip(held, waiting, strict=True)]
        for name in ("shout", "double"):
            yours = solution(name, replicas, 3)
            ranks = [(name not in r["held"] or r["waiting"] >= 3, r["waiting"]) for r in replicas]
            yield f"{name}, {case}", yours, ranks.index(min(ranks))
