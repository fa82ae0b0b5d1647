"""Chapter 09: a quiet Ray, a replica that is lost, and which replica gets a request."""

import logging
import os
import socket

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


# --- exercise: which replica gets a request ----------------------------------------------------------------------


@Exercise
def choose_replica(solution):
    """Return the index of the replica that gets a request for the adapter `name`. About 3 lines."""
    cases = {"nobody waits": (0, 0, 0), "two have it": (0, 2, 1), "who has it is busy": (2, 3, 4), "all are": (5, 3, 4)}
    for what, waiting in cases.items():
        held = ({"sort"}, {"shout"}, {"shout", "sort"})
        replicas = [{"held": set(h), "waiting": w} for h, w in zip(held, waiting, strict=True)]
        for name in ("shout", "double"):
            yours = solution(name, replicas, 3)
            waits = [(name not in each["held"] or each["waiting"] >= 3, each["waiting"]) for each in replicas]
            yield f"{name}, {what}", yours, waits.index(min(waits))
