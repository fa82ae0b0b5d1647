"""The pool behind a server: OpenAI's API in front, in one process or with Ray Serve around it.

A *replica* is one model with one pool, and answers many requests at once, each with its own adapter in its own row. A
*register* knows which version of each adapter is live. ``hotswap-lab serve`` has one of each in one process. ``app``
puts them behind Ray Serve: many replicas, on one machine or on many. ``serve run hotswap_lab.serving:app`` serves the
embedded model on port 8000.

Tests: ``tests/serving/test_cluster.py``.
"""

from typing import Any

from ..core.errors import refused
from .answers import Piece, Request
from .replica import BusyError, Options, Replica
from .sampling import Sampling
from .table import Register, Table, Version

__all__ = ["BusyError", "Options", "Piece", "Register", "Replica", "Request", "Sampling", "Table", "Version", "app"]


def app(args: dict[str, Any]) -> Any:
    """Build the application, for ``serve run hotswap_lab.serving:app`` and ``serve.run(app({}))``.

    Parameters
    ----------
    args:
        ``base``: a folder or a Hub id; by default the embedded model. ``adapters``: a folder of adapters, or
        ``name=path,name=path``, or (in a file) a mapping; by default none, but for the embedded model. ``replicas``:
        the number of replicas, 1 by default. ``token``: the token of admin calls; by default the environment's
        ``HOTSWAP_ADMIN_TOKEN``, and without one there are no admin calls. All others are those of :class:`Options`.
        Each argument may be text, as from a command line.

    Raises
    ------
    HotswapError
        If Ray Serve isn't installed, or an argument is wrong: an unknown name, a number out of its range, a model or
        an adapter that can't be read, or limits that the model doesn't have. The error names all of them.

    Examples
    --------
    >>> application = app({"replicas": 2, "rows": 4})  # doctest: +SKIP
    >>> handle = serve.run(application)  # doctest: +SKIP

    Notes
    -----
    With ``held``, requests for an adapter go to the replicas that have it in memory. With four replicas or more there
    are two fronts. ``/healthz``, ``/metrics``, ``/docs`` and ``/openapi.json`` are public.

    ``/metrics`` is for Prometheus: for each replica the rows in use, the requests in the queue, and the numbers of
    requests, tokens of prompts and of answers, and swaps so far; the version of each adapter, and the number of
    changes; and as histograms the time to the first token of streams, and of whole requests by path and status
    (``hotswap_lab_request_seconds``). A front measures the times of its own requests, so where there are two, take
    those from Ray's metrics (``serve_*``).
    """
    try:
        from .cluster import build
    except ModuleNotFoundError as error:
        raise refused("no_ray", error=error) from None
    return build(args)
