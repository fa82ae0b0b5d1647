"""The undo list of a commit, and Ctrl-C that waits: whatever happens, the model is whole, bit for bit."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import Any

#: stands for what is not there
MISSING = object()


class Journal:
    """Undo steps in the order in which things were done. Each step may run twice without harm.

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
    >>> table  # in its former place
    {'a': 1, 'c': 3}
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], object]] = []

    @property
    def is_empty(self) -> bool:
        """Whether nothing was changed, or everything is taken back."""
        return not self._undo

    def record(self, undo: Callable[[], object]) -> None:
        """To be called *before* the change that ``undo`` takes back."""
        self._undo.append(undo)

    def set_item(self, table: MutableMapping[Any, Any], key: object, value: object) -> None:
        """``table[key] = value``, undoable. A value that is there already is left alone."""
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
        """``table[key] = value`` for many tables that have this key, undoable."""
        old = [table[key] for table in tables]
        if old == values:
            return

        def put(values: Sequence[object]) -> None:
            for table, value in zip(tables, values, strict=True):
                table[key] = value

        self.record(lambda: put(old))
        put(values)

    def remove(self, table: MutableMapping[Any, Any], *keys: object) -> None:
        """``del table[key]`` for those of the keys that are there, undoable: they come back, and in their places."""
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
        """``target.name = value`` for an attribute that exists, undoable."""
        old = getattr(target, name)
        self.record(lambda: setattr(target, name, old))
        setattr(target, name, value)

    def roll_back(self) -> None:
        """Undoes everything, last step first. Ctrl-C waits until the model is whole."""
        with interrupts_held():
            while self._undo:
                self._undo[-1]()
                self._undo.pop()


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """Ctrl-C that is pressed in the block comes at its end. May be nested.

    Only the main thread receives signals. Elsewhere, and under handlers that weren't installed from Python, this does
    nothing.

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
