"""In which order clicks were made. A kernel may hand them over in another one.

JupyterLab 4.4 and later send clicks to a thread of the kernel that cells don't keep waiting, a subshell. ipykernel 7.4
hands each to the thread that last sent something to its control instead (``Comm._reply_subshell_for``). Where a cell
did, that is the main thread, and the click comes after the end of the cell that computes, later than others that were
made after it.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import ipywidgets


class Clicks:
    """Takes clicks, unless one that was made later has been taken before.

    When a click was made, by the clock of the page that it was made on, is written in its message. Each page has a
    session of its own there, and clicks of two pages, whose clocks may differ, are taken as they come. So is what is
    called from Python.

    >>> clicks = Clicks()
    >>> clicks.take(lambda: print("taken"))
    taken
    True
    """

    def __init__(self):
        # two threads may hand over one click each, at the same time
        self._lock = threading.RLock()
        #: for each session, when the latest click that was taken was made
        self._latest: dict[str, datetime] = {}

    def take(self, act: Callable[[], object]) -> bool:
        """Calls ``act``, which must be quick, if the click that is being handled counts. Returns whether it does."""
        with self._lock:
            session, moment = _made()
            if moment is not None:
                if moment < self._latest.get(session, moment):
                    return False
                self._latest[session] = moment
            act()
        return True


def keep_apart_from_cells(widget: ipywidgets.Widget) -> None:
    """Sends something to each control in ``widget``, so that ipykernel 7.4 goes on handing clicks to this thread.

    To be called where a click is handled.
    """
    for each in getattr(widget, "children", ()):
        keep_apart_from_cells(each)
        each.send_state("_model_name")  # which never changes


def _made() -> tuple[str, datetime | None]:
    """The session of the message that is being handled, and when it was made; None if no page sent one."""
    kernelbase = sys.modules.get("ipykernel.kernelbase")
    if kernelbase is None or not kernelbase.Kernel.initialized():
        return "", None
    header = kernelbase.Kernel.instance().get_parent("shell").get("header") or {}
    is_click = header.get("msg_type") == "comm_msg" and isinstance(header.get("date"), datetime)
    return header.get("session", ""), header["date"] if is_click else None
