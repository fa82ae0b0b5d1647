"""ReplicaPanel: a live table of a server's replicas, with their rows and their memory."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .tables import chip, table
from .view import counted, escape, wrapping_row
from .work import WorkingView

if TYPE_CHECKING:
    import ipywidgets

#: the headings of the columns
HEAD = ("replica", "rows of its last batch", "in memory", "waiting", "requests", "tokens", "swaps")


class ReplicaPanel(WorkingView):
    """A table with a line for each replica, updated by a thread of its own. Lost replicas stay in it, marked.

    Parameters
    ----------
    states:
        A function that returns the :attr:`hotswap_lab.serving.Replica.state` of all replicas, each with the name of its
        ``replica``. :meth:`at` gets them from a server.
    every:
        Seconds between updates.

    Examples
    --------
    >>> from hotswap_lab.widgets import ReplicaPanel
    >>> state = {"replica": "a1", "rows": ["sort@1", None], "held": ["sort@1"], "waiting": 0}
    >>> panel = ReplicaPanel(lambda: [{**state, "requests": 2, "tokens": 9, "swaps": 1}])
    >>> panel.look()  # once; ``panel.start()`` goes on looking, as its button does
    >>> print(panel)
    ReplicaPanel: 1 replica
    a1: rows sort@1, base; in memory sort@1; 0 waiting, 2 requests, 9 tokens, 1 swaps

    How to read it: a row shows the version that it last answered with; ``base`` is the model without an adapter.
    Counts begin with the start of the replica.
    """

    doing = "watching"

    def __init__(self, states: Callable[[], Sequence[Mapping[str, Any]]], *, every: float = 0.5):
        self.states: Callable[[], Sequence[Mapping[str, Any]]] = states
        self.every: float = every
        #: the last state of each replica, by its name
        self.replicas: dict[str, Mapping[str, Any]] = {}
        #: the names of replicas that no longer answer
        self.lost: set[str] = set()

    @classmethod
    def at(cls, address: str, **options: float) -> ReplicaPanel:
        """A panel for the server at an address such as ``http://localhost:8000``."""

        def states() -> list[dict[str, Any]]:
            with urllib.request.urlopen(f"{address}/healthz", timeout=30) as answer:
                return json.load(answer)["replicas"]

        return cls(states, **options)

    # ---- actions

    def look(self) -> None:
        """Update the states of all replicas once."""
        now = {state["replica"]: state for state in self.states()}
        self.replicas = {**self.replicas, **now}
        self.lost = set(self.replicas) - set(now)

    def _work(self) -> None:
        """Update the states until :meth:`stop`."""
        while True:
            self._check()
            try:
                self.look()
                self.error: BaseException | None = None
            except Exception as error:  # a server that doesn't answer now may do so later
                self.error = error
            time.sleep(self.every)

    # ---- text, picture and controls

    @property
    def summary(self) -> str:
        """One line: the numbers of live and lost replicas."""
        lost = f", {len(self.lost)} lost" if self.lost else ""
        return counted(len(self.replicas) - len(self.lost), "replica") + lost

    def _lines(self) -> list[str]:
        told = {name: "lost" if name in self.lost else self._told(state) for name, state in self.replicas.items()}
        return [f"{name}: {each}" for name, each in told.items()]

    def _told(self, state: Mapping[str, Any]) -> str:
        rows, held = (", ".join(each or "base" for each in state[what]) or "none" for what in ("rows", "held"))
        return f"rows {rows}; in memory {held}; " + ", ".join(f"{state[what]} {what}" for what in HEAD[3:])

    def _inside(self) -> str:
        return table(HEAD, [self._cells(name, name in self.lost) for name in self.replicas])

    def _cells(self, name: str, is_lost: bool) -> list[str]:
        state = self.replicas[name]
        versions = ("".join(map(chip, state[what])) for what in ("rows", "held"))
        cells = [escape(name) + " (lost)" * is_lost, *versions, *(escape(state[what]) for what in HEAD[3:])]
        return [f'<div style="opacity:.5">{each}</div>' for each in cells] if is_lost else cells

    def _controls(self) -> list[ipywidgets.Widget]:
        start = self._button("Watch", "look again and again", self.start, button_style="primary")
        return [wrapping_row(*self._with_stop(start))]
