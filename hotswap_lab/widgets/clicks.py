"""Handling clicks in the order in which they were made, because a kernel may deliver them in another order.

JupyterLab 4.4 and later send clicks to a subshell, a thread of the kernel that doesn't wait for cells. ipykernel 7.4
delivers each to the thread that last sent something to the clicked control instead (``Comm._reply_subshell_for``). If
that was a cell, the main thread gets the click when the computing cell has ended, after clicks that were made later.
"""

import threading
from collections.abc import Callable
from datetime import datetime

from .view import get_ipython, w


class Clicks:
    """Accepts clicks, except those that are older than one that was accepted before.

    The message of a click has the time at which it was made, by the page's clock, and the page's session. Clicks are
    ordered only within a session, because the clocks of two pages may differ. Calls from Python are always accepted.

    >>> clicks = Clicks()
    >>> clicks.take(lambda: print("taken"))
    taken
    True
    """

    def __init__(self):
        # two threads may deliver one click each at the same time
        self._lock = threading.RLock()
        #: for each session, the time of the latest accepted click
        self._latest: dict[str, datetime] = {}

    def take(self, act: Callable[[], object]) -> bool:
        """Call ``act``, which must be quick, if the click being handled is accepted. Returns whether it is."""
        with self._lock:
            session, moment = _made()
            if moment is not None:
                if moment < self._latest.get(session, moment):
                    return False
                self._latest[session] = moment
            act()
        return True


def keep_apart_from_cells(widget: w.Widget) -> None:
    """Send something to each control in ``widget``, so that ipykernel 7.4 delivers later clicks to this thread.

    Call it where a click is handled.
    """
    for each in getattr(widget, "children", ()):
        keep_apart_from_cells(each)
        each.send_state("_model_name")  # an attribute that never changes


def _made() -> tuple[str, datetime | None]:
    """The session and the time of the click being handled; the time is None if there is none."""
    kernel = getattr(get_ipython(), "kernel", None)
    header = (kernel and kernel.get_parent("shell").get("header")) or {}
    is_click = header.get("msg_type") == "comm_msg" and isinstance(header.get("date"), datetime)
    return header.get("session", ""), header["date"] if is_click else None
