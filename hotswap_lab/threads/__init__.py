"""Blocks by which threads and tasks that compute with a model, and those that swap its adapter, take turns.

A swap writes for a moment (milliseconds). A forward pass in another thread would then read some layers of the old
adapter and some of the new one. A thread that computes while others may swap does so in ``with in_use(model): ...``.
A swap then waits until no thread is inside, and a thread that comes later waits for the swap. Swaps take turns by
themselves: all code that changes a model uses :func:`locked`, and :mod:`hotswap_lab.threads.turns` decides who waits.

A turn belongs to its block, and any thread may end it: servers enter a block in one thread and leave it in another.

Tests: ``tests/threads/test_turns.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch

from ..core.errors import HotswapError, refused
from ..core.host import hosts_in
from .turns import COMPUTE, SWAP, WRITE, Entry, ModelInUseError, Turn, _patience, note

__all__ = ["ModelInUseError", "in_use", "waiting_at_most"]

T = TypeVar("T")
#: the turns of a swap, one after the other: others may compute until it writes
BOTH = (SWAP, WRITE)
#: the turn of each base model
_turns: weakref.WeakKeyDictionary[torch.nn.Module, Turn] = weakref.WeakKeyDictionary()


def turns_of(bases: Iterable[torch.nn.Module]) -> list[Turn]:
    """The turns of some models, in the same order for every caller, so that no two wait for each other."""
    turns = set()
    for base in bases:  # a comprehension would be one more call at each swap, up to Python 3.11
        turns.add(_turns.get(base) or _turns.setdefault(base, Turn()))
    return sorted(turns, key=id)


def share_turn(bases: Iterable[torch.nn.Module]) -> None:
    """Give models one turn from now on, so that a block in one of them is a block in all. The caller holds them all."""
    first, *others = turns_of(bases)
    for other in others:
        first.join(other)
    _turns.update({base: first for base, turn in list(_turns.items()) if turn in others})


def in_use(model: object) -> AbstractContextManager[object]:
    """Hold swaps back while this thread computes: ``with in_use(model): model(...)``.

    A swap from another thread, and every other change that this package makes to the adapter (strength, preparing, the
    operations of a pool), waits until the block ends. A thread that comes later lets the swap pass first. Threads that
    compute don't wait for each other. Inside, the thread itself can't swap: to compute with a certain adapter, use
    ``with pool.using(name):`` instead, which swaps and keeps other threads from swapping. Needed only if threads share
    a model; it costs about 10 microseconds.

    Parameters
    ----------
    model:
        A model with an adapter, compiled or not, or an object that has such models as attributes: an
        :class:`~hotswap_lab.AdapterPool`, a diffusers pipeline.

    Returns
    -------
    context manager
        Make a new one for each block. May be nested.

    Raises
    ------
    HotswapError
        If the model has no adapter; or on entering, if another task of this thread is inside of a plain
        ``with pool.using(name):``.

    Examples
    --------
    >>> import threading
    >>> from hotswap_lab import demo, hotswap_adapter, in_use
    >>> model, tokenizer = demo.load("reverse")
    >>> swap = threading.Thread(target=hotswap_adapter, args=(model, demo.adapter_path("shout"), "default"))
    >>> with in_use(model):
    ...     swap.start()  # has to wait
    ...     demo.ask(model, tokenizer, "hotswap")
    'pawstoh'
    >>> swap.join()
    >>> demo.ask(model, tokenizer, "hotswap")
    'HOTSWAP!'

    Notes
    -----
    On a GPU, queued work stays in order with the swap as long as both use the same stream. In a block that
    starts other threads and waits for them, let only the outer thread hold ``in_use``: a thread that comes while a swap
    waits is let in only after it. The block may be left in another thread than it was entered in, so a generator may
    yield inside. With asyncio, a task may ``await`` inside. Meanwhile, swaps in other tasks of its thread are refused;
    ``async with pool.using(name)`` waits.
    """
    return _blocks(turns_of(bases_of(model)), COMPUTE)


@contextlib.contextmanager
def in_use_now(model: object) -> Iterator[bool]:
    """:func:`in_use` for code that must not wait: its value is True if no swap is writing or waiting.

    >>> from hotswap_lab import demo
    >>> model, _ = demo.load("reverse")
    >>> with in_use_now(model) as is_mine:
    ...     is_mine
    True
    """
    entries = [Entry(turn, COMPUTE) for turn in turns_of(bases_of(model))]
    with _blocks([], entries=entries):
        yield all(entry.turn.let_in_now(entry) for entry in entries)


@contextlib.contextmanager
def waiting_at_most(seconds: float) -> Iterator[None]:
    """Limit how long swaps in this block wait for other threads.

    Parameters
    ----------
    seconds:
        The limit of each wait. 0 refuses a swap at once while another thread is inside ``with in_use(model)``. The swap
        raises :class:`ModelInUseError`, which is a :class:`HotswapError`. Without this block, a swap waits as long as
        it takes, but a thread waits at most 30 seconds for a plain generator that yields inside of its block. A server
        steps generators in a few threads, and the generator can't go on while all of these wait for it.

    Examples
    --------
    >>> from hotswap_lab import AdapterPool, demo, in_use, waiting_at_most
    >>> model, tokenizer = demo.load("reverse")
    >>> pool = AdapterPool(model, adapters={"shout": demo.adapter_path("shout")}, progress=False)
    >>> with waiting_at_most(0.5):
    ...     pool.swap("shout")
    """
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not seconds >= 0:
        raise refused("no_time_to_wait", seconds=seconds)
    token = _patience.set(float(seconds))
    try:
        yield
    finally:
        _patience.reset(token)


def bases_of(model: object) -> list[torch.nn.Module]:
    """The base models whose adapters a swap in ``model`` may change."""
    bases = [host.base for host in hosts_in(model)]
    if not bases:
        raise refused("nothing_to_hold_back", name=type(model).__name__)
    return bases


def locked(*bases: torch.nn.Module, computing: bool = False) -> AbstractContextManager[None]:
    """Keep other threads out of base models for the length of a block, and wait for them first. May be nested.

    Parameters
    ----------
    computing:
        Whether others may go on computing, and only swaps are kept out, so that a decision stays valid.

    Examples
    --------
    >>> with locked(torch.nn.Linear(2, 2)):
    ...     "decide, and write"
    'decide, and write'
    """
    return _blocks(turns_of(bases), *([SWAP] if computing else BOTH))


@contextlib.contextmanager
def _blocks(turns: list[Turn], *kinds: str, entries: Sequence[Entry] = ()) -> Iterator[None]:
    """Wait for blocks of these kinds, restore what earlier ones owe, and end them and ``entries`` in the end."""
    entries = list(entries)
    try:
        if kinds == BOTH and len(turns) == 1:
            entries += Entry(turns[0], SWAP), Entry(turns[0], WRITE)
            if turns[0].let_in_at_once(entries):
                yield
                return
            entries.clear()
        for kind in kinds:
            for turn in turns:
                if kind == COMPUTE:
                    _restore_owed(turn)
                entry = Entry(turn, kind)
                entries.append(entry)
                entry.wait()
                turn = entry.turn  # another one, if two were joined while this waited
                if kind == SWAP and turn.owed:
                    with _blocks([turn], WRITE):
                        put_all_back(turn.owed)
        yield
    finally:
        try:
            _end(entries)
        except BaseException:  # Ctrl-C, at any step of it
            _end(entries)
            raise


def _end(entries: list[Entry]) -> None:
    """End blocks, the last one first, and restore what they kept others from restoring."""
    for entry in reversed(entries):
        entry.end()
        if entry.kind == COMPUTE and entry.turn.owed:
            with waiting_at_most(0):
                _restore_owed(entry.turn)


def _restore_owed(turn: Turn) -> None:
    """Restore what blocks that have ended owe, unless that would have to wait for the code that calls this."""
    if turn.owed:
        with contextlib.suppress(HotswapError), _blocks([turn], SWAP):
            pass


@dataclass(eq=False, repr=False)
class Block(Generic[T]):
    """A block with its own adapter: ``with`` in a thread; ``async with`` in a task, which lets other tasks go on.

    Parameters
    ----------
    begin:
        Puts the adapter in and returns the value of the block. It gets a list, to which it adds the step that restores
        the previous adapter.
    what:
        The last words of a warning: the result of a second Ctrl-C.
    slow:
        Returns actions to run before ``begin``, in other threads, so that an event loop goes on.
    logging_refusals:
        Makes a context manager that logs a refusal. It is entered before ``begin``, and left after it.
    """

    base: torch.nn.Module
    begin: Callable[[list[Callable[[], object]]], T]
    what: str
    slow: Callable[[], Iterable[Callable[[], object]]]
    logging_refusals: Callable[[], AbstractContextManager]
    _entry: Entry | None = field(default=None, init=False)

    def _new_entry(self, awaits: bool = False) -> Entry:
        if self._entry is not None:
            raise RuntimeError("a block can be entered once: make a new one")
        self._entry = Entry(*turns_of([self.base]), SWAP, awaits)
        return self._entry

    def __enter__(self) -> T:
        entry = self._new_entry()
        try:
            with self.logging_refusals():
                entry.wait()
                if entry.turn.owed:
                    with _blocks([entry.turn], WRITE):
                        put_all_back(entry.turn.owed)
                return self.begin(entry.back)
        except BaseException as error:
            self.__exit__(type(error), error)
            raise

    def __exit__(self, kind: type[BaseException] | None = None, error: object = None, trace: object = None) -> None:
        entry = self._entry
        try:
            entry.adopt()
            note(entry)
            swapping = [other for other in list(entry.turn.open) if other.kind == SWAP]
            if entry in swapping and entry is not swapping[-1]:
                inner = swapping[swapping.index(entry) + 1]
                inner.back[:0] = entry.back
                entry.back.clear()
                raise refused("left_out_of_order")
            if entry.back and kind is GeneratorExit:  # any code may close a generator, and doesn't expect to wait
                with waiting_at_most(0):
                    _restore_previous(entry)
            elif entry.back:
                try:
                    put_back(lambda: _restore_previous(entry), self.what)
                except KeyboardInterrupt:
                    entry.back.clear()
                    raise
        finally:
            try:
                entry.end()
            except BaseException:
                entry.end()
                raise

    async def __aenter__(self) -> T:
        entry = self._new_entry(awaits=True)
        writing = Entry(entry.turn, WRITE, awaits=True)
        with _blocks([], entries=[writing]):
            try:
                with self.logging_refusals():
                    await entry.wait_async()
                    for action in self.slow():
                        await asyncio.to_thread(action)
                    await writing.wait_async()
                    put_all_back(entry.turn.owed)
                    return self.begin(entry.back)  # which has nothing to wait for
            except BaseException as error:
                self.__exit__(type(error), error)
                raise

    async def __aexit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        writing = Entry(self._entry.turn, WRITE, awaits=True)
        with _blocks([], entries=[writing]):
            try:
                if kind is not GeneratorExit:
                    with contextlib.suppress(HotswapError):  # the block in the way can't end meanwhile
                        await writing.wait_to_the_end()
            finally:
                self.__exit__(kind if writing.is_open else GeneratorExit)


def _restore_previous(entry: Entry) -> None:
    """Restore the adapter from before a block; leave that to the next block if this one can't have the model."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(_blocks([entry.turn], WRITE))
        except HotswapError:
            return  # the block in the way can't end while this waits
        put_all_back(entry.back)


def put_all_back(backs: list[Callable[[], object]]) -> None:
    """Run actions, the last one first. One that is interrupted stays in the list; one that is refused does not."""
    while backs:
        action = backs.pop()
        try:
            action()
        except HotswapError:
            raise
        except BaseException:
            backs.append(action)
            raise


def is_shared(base: torch.nn.Module) -> bool:
    """Whether other threads have computed with the model, and may be doing so now."""
    (turn,) = turns_of([base])
    return not turn.threads <= {threading.get_ident()}


def put_back(action: Callable[[], object], what: str) -> None:
    """Run ``action``, which waits for a turn without a limit. Only a second Ctrl-C ends the wait.

    ``what`` completes the warning after the first: "Ctrl-C once more ends this, and ...".
    """
    with waiting_at_most(math.inf):
        try:
            action()
        except KeyboardInterrupt:
            text = f"Waiting for threads that compute with the model. Ctrl-C once more ends this, and {what}."
            warnings.warn(text, stacklevel=5)
            action()
            raise
