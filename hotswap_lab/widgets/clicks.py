"""Handle clicks in the order they were made, because a kernel may deliver them in a different one.

JupyterLab 4.4 and later send clicks to a subshell, a thread of the kernel that doesn't wait for cells. ipykernel 7.4
delivers a click to the thread that last sent something to the clicked control instead (``Comm._reply_subshell_for``).
If a cell did, the main thread gets the click when the running cell has ended, after clicks that were made later.

Tests: ``tests/widgets/test_two_at_once.py``.
"""

import threading
from collections.abc import Callable
from datetime import datetime

from .view import get_ipython, w


class Clicks:
    """Accept clicks, except those that are older than an accepted one.

    The message of a click has its time, by the page's clock, and the page's session. Clicks are ordered only within a
    session, because the clocks of two pages may differ. Calls from Python are always accepted.

    >>> clicks = Clicks()
    >>> clicks.accept(lambda: print("clicked"))
    clicked
    True
    """

    def __init__(self):
        # two threads may deliver one click each at the same time
        self._lock = threading.RLock()
        #: for each session, the time of the latest accepted click
        self._latest: dict[str, datetime] = {}

    def accept(self, act: Callable[[], object]) -> bool:
        """Call ``act``, which must be quick, if the click being handled is accepted. Return whether it is."""
        with self._lock:
            session, moment = _session_and_time()
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
    for child in getattr(widget, "children", ()):
        keep_apart_from_cells(child)
        child.send_state("_model_name")  # an attribute that never changes


def _session_and_time() -> tuple[str, datetime | None]:
    """The session and the time of the click being handled. Outside of a click, the time is None."""
    kernel = getattr(get_ipython(), "kernel", None)
    header = (kernel and kernel.get_parent("shell").get("header")) or {}
    is_click = header.get("msg_type") == "comm_msg" and isinstance(header.get("date"), datetime)
    return header.get("session", ""), header["date"] if is_click else None
