"""The pool behind a server: OpenAI's API in front, Ray Serve around it.

A *replica* is one model with one pool, and answers many requests at once, each with its own adapter in its own row. A
*register* knows which version of each adapter is in force. Both work by themselves, in one process. ``app`` puts them
behind Ray Serve: many replicas, on one machine or on many. ``serve run hotswap_lab.serving:app`` serves the embedded
model on port 8000.
"""

from typing import Any

from ..core.errors import refuse
from .replica import BusyError, Options, Piece, Replica, Request
from .table import Register, Table, Version

__all__ = ["BusyError", "Options", "Piece", "Register", "Replica", "Request", "Table", "Version", "app"]


def app(args: dict[str, Any]) -> Any:
    """The application, for ``serve run hotswap_lab.serving:app`` and ``serve.run(app({}))``.

    Parameters
    ----------
    args:
        ``base``: a folder or a Hub id; by default the embedded model. ``adapters``: a folder of adapters, or
        ``name=path,name=path``, or (in a file) a mapping. ``replicas``: how many. ``token``: for admin calls; by
        default what the environment's ``HOTSWAP_ADMIN_TOKEN`` is. All else is of :class:`Options`. With ``held``,
        requests for an adapter go to the replicas that have it in memory.

    Raises
    ------
    HotswapError
        If Ray Serve isn't installed, or there are no adapters.

    Examples
    --------
    >>> application = app({"replicas": 2, "rows": 4})  # doctest: +SKIP
    >>> handle = serve.run(application)  # doctest: +SKIP
    """
    try:
        from .cluster import build
    except ModuleNotFoundError as error:
        raise refuse("no_ray", error=error) from None
    return build(args)
