"""The undo list of a commit, and Ctrl-C that waits. Together they keep a model whole, bit for bit."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

#: marks an entry that did not exist
MISSING = object()


@dataclass(eq=False)
class Journal:
    """Undo steps in the order of the changes. Each step may run twice without harm.

    >>> table, journal = {"a": 1}, Journal()
    >>> journal.set_item(table, "a", 2)
    >>> journal.set_item(table, "b", 3)
    >>> table
    {'a': 2, 'b': 3}
    >>> journal.roll_back()
    >>> table
    {'a': 1}
    >>> table["c"] = 3
    >>> journal.remove(table, "a")
    >>> journal.roll_back()
    >>> table  # in its previous place
    {'a': 1, 'c': 3}
    """

    steps: list[Callable[[], object]] = field(default_factory=list)

    def record(self, undo: Callable[[], object]) -> None:
        """Add an undo step. Call this *before* the change that ``undo`` takes back."""
        self.steps.append(undo)

    def set_item(self, table: MutableMapping[Any, Any], key: object, value: object) -> None:
        """Set ``table[key] = value`` and record how to undo it. Do nothing if the entry is that very object already."""
        old = table[key] if key in table else MISSING  # noqa: SIM401 - a ModuleDict has no get
        if old is value:
            return

        def undo() -> None:
            if old is not MISSING:
                table[key] = old
            elif key in table:
                del table[key]

        self.record(undo)
        table[key] = value

    def set_items(self, tables: Sequence[MutableMapping[Any, Any]], key: object, values: Sequence[object]) -> None:
        """Set ``table[key] = value`` in many tables that have this key, and record how to undo it."""
        old = [table[key] for table in tables]
        if old == values:
            return

        def undo() -> None:
            for table, value in zip(tables, old, strict=True):
                table[key] = value

        self.record(undo)
        for table, value in zip(tables, values, strict=True):
            table[key] = value

    def remove(self, table: MutableMapping[Any, Any], *keys: object) -> None:
        """Delete the keys that the table has, and record the undo step, which restores them in their previous order."""
        if table.keys().isdisjoint(keys):
            return
        content = dict(table.items())

        def undo() -> None:
            table.clear()
            table.update(content)

        self.record(undo)
        for key in content.keys() & set(keys):
            del table[key]

    def set_attribute(self, target: object, name: str, value: object) -> None:
        """Set ``target.name = value`` for an attribute that exists, and record how to undo it."""
        old = getattr(target, name)
        self.record(lambda: setattr(target, name, old))
        setattr(target, name, value)

    def roll_back(self) -> None:
        """Undo everything, last step first. Ctrl-C waits until the model is whole."""
        with interrupts_held():
            while self.steps:
                self.steps[-1]()
                self.steps.pop()
            torch.clear_autocast_cache()  # it may have casts of values that are gone again


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """Hold back Ctrl-C until the end of the block. May be nested.

    Only the main thread receives signals. In other threads, and under handlers that weren't installed from Python, this
    does nothing.

    Examples
    --------
    >>> with interrupts_held():
    ...     done = True
    >>> done
    True
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    pressed: list[tuple] = []
    try:
        signal.signal(signal.SIGINT, lambda *how: pressed.append(how))
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if pressed:
            before(*pressed[0])
