"""Turns: locks by which threads that compute with a model, and threads that swap its adapter, take turns.

A swap writes for a moment (milliseconds). A forward pass in another thread would then read some layers of the old
adapter and some of the new one. A thread that computes while others may swap says so: ``with in_use(model): ...``. A
swap then waits until no thread is inside, and a thread that comes later waits for the swap. Swaps take turns by
themselves: all code that changes a model uses :func:`held`.

Computing is cheap and swapping pays: each thread has its own lock for each model. Only a swap takes the locks of other
threads, and it takes them all (the Linux kernel once called this a big-reader lock). ``in_use`` returns the bare lock,
so entering and leaving the block are single steps in C, which Ctrl-C can't split.

The locks belong to threads, but the tasks of an event loop share a thread. So a turn notes its task, too: another task
of the thread is refused, or it waits in :func:`awaited`, which lets the event loop go on.
"""

from __future__ import annotations

import contextlib
import math
import sys
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from contextvars import ContextVar
from itertools import compress
from operator import methodcaller
from typing import Any, NamedTuple

import torch

from .core.errors import HotswapError, refusal, refuse
from .core.host import carriers

#: consumes an iterator and keeps nothing of it
NOWHERE: deque[object] = deque(maxlen=0)
#: how long to wait at a time, in seconds: on Windows, Ctrl-C works only between two waits
NAP = 0.02
#: the same for tasks, which have to poll for their turn
TASK_NAP = 0.002


class ModelInUseError(HotswapError):
    """A swap would have had to wait longer than :func:`waiting_at_most` allows. It may succeed a moment later.

    Examples
    --------
    >>> import threading
    >>> from hotswap_lab import ModelInUseError, demo, hotswap_adapter, in_use, waiting_at_most
    >>> model, _ = demo.load("reverse")
    >>> entered, leave = threading.Event(), threading.Event()
    >>> def compute():
    ...     with in_use(model):
    ...         entered.set(), leave.wait()
    >>> thread = threading.Thread(target=compute)
    >>> thread.start(), entered.wait()
    (None, True)
    >>> try:
    ...     with waiting_at_most(0.01):
    ...         hotswap_adapter(model, demo.adapter_path("shout"), "default")
    ... except ModelInUseError:
    ...     print("not now")
    ... finally:
    ...     leave.set()
    not now
    """


class Owner(NamedTuple):
    """The task that has a turn, or None; and whether the end of its turn can wait for other tasks of the thread."""

    task: weakref.ref[Any] | None
    can_wait: bool


class Turn:
    """The locks of one base model, and the task whose turn it is."""

    def __init__(self) -> None:
        #: held by the thread that swaps, planning included
        self.swap: threading.RLock = threading.RLock()
        #: also held while it waits for the threads inside, and while it writes, so that no other thread enters
        self.gate: threading.RLock = threading.RLock()
        #: the lock of each thread that has computed with the model, by its number; held while the thread is inside
        self.locks: dict[int, threading.RLock] = {}
        #: the task of the thread that holds ``swap``; means nothing while that lock is free
        self.owner: Owner = Owner(None, False)
        #: for each thread with an event loop, by its number: the tasks that may be inside, and those in a queue
        self.inside: dict[int, weakref.WeakSet[Any]] = {}
        self.queues: dict[int, deque[Any]] = {}

    @property
    def lock(self) -> threading.RLock:
        """This thread's own lock."""
        return self.locks.setdefault(threading.get_ident(), threading.RLock())

    @property
    def is_of_this_task(self) -> bool:
        """Whether the running task, or this thread where there are no tasks, has the turn already."""
        return self.swap._is_owned() and self.owner.task == this_task()

    @property
    def is_of_another_task(self) -> bool:
        """Whether another task of this thread has the turn."""
        return self.swap._is_owned() and self.owner.task != this_task()

    def ticket(self) -> threading.RLock:
        """The lock with which a computing thread enters. A swap that is already waiting goes first."""
        # first the lock, then the gate, so that a swap that closes the gate later finds the lock
        lock, task, owner = self.lock, this_task(), self.owner
        if owner.task is not None and not owner.can_wait and self.is_of_another_task:
            raise refuse("another_task")  # the end of that task's block could not wait for this one
        if not lock._is_owned():
            with self.gate:
                pass
            self.inside.pop(threading.get_ident(), None)
        if task is not None:
            self.inside.setdefault(threading.get_ident(), weakref.WeakSet()).add(task())
        return lock

    def others(self) -> list[tuple[threading.RLock, int]]:
        """The locks of all other threads that may be inside, and their numbers."""
        return [(lock, thread) for thread, lock in list(self.locks.items()) if thread != threading.get_ident()]


#: how many seconds to wait at most
_patience: ContextVar[float] = ContextVar("hotswap_lab_patience", default=math.inf)
#: the turn of each base model
_turns: weakref.WeakKeyDictionary[torch.nn.Module, Turn] = weakref.WeakKeyDictionary()


def this_task() -> weakref.ref[Any] | None:
    """The task that is running in this thread; None outside of an event loop."""
    running: Any = sys.modules.get("_asyncio")
    if running is None or running._get_running_loop() is None:
        return None
    import asyncio

    return None if (task := asyncio.current_task()) is None else weakref.ref(task)


def turns_of(bases: Iterable[torch.nn.Module]) -> list[Turn]:
    """The turns of some models, in the same order for every caller, so that no two wait for each other."""
    return [_turns.get(base) or _turns.setdefault(base, Turn()) for base in sorted(set(bases), key=id)]


def in_use(model: object) -> AbstractContextManager[object]:
    """Hold swaps back while this thread computes: ``with in_use(model): model(...)``.

    A swap from another thread, and every other change that this package makes to the adapter (strength, preparing, the
    operations of a pool), waits until the block ends. Threads that compute don't wait for each other. Inside, the
    thread itself can't swap: to compute with a certain adapter, use ``with pool.using(name):`` instead, which swaps and
    keeps other threads from swapping. Needed only if threads share a model; it costs some microseconds.

    Parameters
    ----------
    model:
        A model with an adapter, compiled or not, an :class:`~hotswap_lab.AdapterPool`, or a diffusers pipeline.

    Returns
    -------
    context manager
        Make a new one for each block. May be nested.

    Raises
    ------
    HotswapError
        If the model has no adapter, or another task of this thread is inside of a plain ``with pool.using(name):``.

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
    waits is let in only after it. The same thread must enter and leave, so a generator that yields inside must not be
    handed from thread to thread. With asyncio, a task may ``await`` inside. Meanwhile, swaps in other tasks of its
    thread are refused; ``async with pool.using(name)`` waits.
    """
    tickets = [turn.ticket() for turn in turns_of(bases_of(model))]
    return tickets[0] if len(tickets) == 1 else _taken([(each, None) for each in tickets], math.inf)


@contextlib.contextmanager
def waiting_at_most(seconds: float) -> Iterator[None]:
    """Refuse swaps in this block that would have to wait longer for threads that compute, or that swap.

    Parameters
    ----------
    seconds:
        The limit of each wait. 0 refuses a swap at once while another thread is inside ``with in_use(model)``. The swap
        raises :class:`ModelInUseError`, which is a :class:`HotswapError`.

    Examples
    --------
    >>> from hotswap_lab import AdapterPool, demo, in_use, waiting_at_most
    >>> model, tokenizer = demo.load("reverse")
    >>> pool = AdapterPool(model, adapters={"shout": demo.adapter_path("shout")}, progress=False)
    >>> with waiting_at_most(0.5):
    ...     pool.swap("shout")
    """
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not seconds >= 0:
        raise refuse("no_time_to_wait", seconds=seconds)
    token = _patience.set(float(seconds))
    try:
        yield
    finally:
        _patience.reset(token)


def bases_of(model: object) -> list[torch.nn.Module]:
    """The base models whose adapters a swap in ``model`` may change."""
    if isinstance(model, torch.nn.Module):
        found = [model]
    elif isinstance(components := getattr(model, "components", None), dict):  # a pipeline's
        found = [component for component in components.values() if isinstance(component, torch.nn.Module)]
    else:
        found = [getattr(model, "model", model)]  # a pool's
    bases = [host.base for module in found for host in carriers(module) if host.configs]
    if not bases:
        raise refuse("nothing_to_hold_back", name=type(model).__name__)
    return bases


def held(*bases: torch.nn.Module, computing: bool = False) -> AbstractContextManager[None]:
    """Keep other threads out of base models for the length of a block, and wait for them first. May be nested.

    Parameters
    ----------
    computing:
        Whether others may go on computing, and only swaps are kept out, so that a decision stays valid.

    Examples
    --------
    >>> with held(torch.nn.Linear(2, 2)):
    ...     "decide, and write"
    'decide, and write'
    """
    turns = turns_of(bases)
    if any(turn.lock._is_owned() for turn in turns):
        raise refuse("thread_is_computing")
    if any(turn.is_of_another_task for turn in turns):
        raise refuse("another_task")
    return _taken(_locks(turns, computing), _patience.get())


def _locks(turns: list[Turn], computing: bool, can_wait: bool = False) -> Iterator[tuple[threading.RLock, int | None]]:
    for turn in turns:
        is_nested = turn.is_of_this_task
        yield turn.swap, None
        if not is_nested:  # the lock is taken by the time the next one is requested
            turn.owner = Owner(this_task(), can_wait)
    if not computing:
        yield from ((turn.gate, None) for turn in turns)
        for turn in turns:
            yield from turn.others()


@contextlib.contextmanager
def _taken(locks: Iterable[tuple[threading.RLock, int | None]], patience: float) -> Iterator[None]:
    # Taken and noted in one step in C, and released in one: Ctrl-C comes before or after these.
    deadline = time.monotonic() + patience
    held: list[threading.RLock] = []
    releasing = map(methodcaller("release"), held)
    try:
        for number, (lock, thread) in enumerate(locks):
            while len(held) == number:
                acquiring = map(methodcaller("acquire", timeout=max(0, min(NAP, deadline - time.monotonic()))), (lock,))
                held.extend(compress((lock,), acquiring))
                if len(held) == number and time.monotonic() >= deadline:
                    raise _busy(thread, patience)
        yield
    finally:
        NOWHERE.extend(releasing)


@contextlib.asynccontextmanager
async def awaited(base: torch.nn.Module, *, computing: bool = False, to_the_end: bool = False) -> AsyncIterator[None]:
    """:func:`held` for a task: it waits for other threads, and for other tasks of its thread, without blocking them.

    ``to_the_end`` is for the end of a turn. It waits however long that takes, and a task that is cancelled meanwhile
    goes on to the end of the block.
    """
    import asyncio  # here, so that a program without it doesn't pay for it

    (turn,), thread, task = turns_of([base]), threading.get_ident(), this_task()
    patience = math.inf if to_the_end else _patience.get()
    deadline, cancelled = time.monotonic() + patience, None
    if to_the_end:
        pass_on(base)
    elif turn.lock._is_owned() and task is not None and task() in turn.inside.get(thread, ()):
        raise refuse("thread_is_computing")
    held: list[threading.RLock] = []
    releasing = map(methodcaller("release"), held)
    queue = turn.queues.setdefault(thread, deque())
    async with contextlib.nullcontext() if turn.is_of_this_task else _queued(queue, patience):
        try:
            for number, (lock, holder) in enumerate(_locks([turn], computing, can_wait=True)):
                while True:
                    # the locks of this thread would let all of its tasks in
                    is_free = not turn.is_of_another_task and (lock is turn.swap or not turn.lock._is_owned())
                    acquiring = map(methodcaller("acquire", blocking=False), (lock,) if is_free else ())
                    held.extend(compress((lock,), acquiring))
                    if len(held) > number:
                        break
                    if time.monotonic() >= deadline:
                        raise _busy(holder, patience)
                    try:
                        await asyncio.sleep(TASK_NAP)
                    except asyncio.CancelledError as error:
                        if not to_the_end:
                            raise
                        cancelled = error
            yield
        finally:
            NOWHERE.extend(releasing)
    if cancelled is not None:
        raise cancelled


@contextlib.asynccontextmanager
async def _queued(queue: deque[Any], patience: float) -> AsyncIterator[None]:
    """Let the tasks of one thread in one after the other, in the order in which they came."""
    import asyncio

    mine = asyncio.get_running_loop().create_future()
    queue.append(mine)
    try:
        if queue[0] is not mine:
            await asyncio.wait([mine], timeout=None if patience == math.inf else patience)
            if not mine.done():
                raise _busy(None, patience)
        yield
    finally:
        queue.remove(mine)
        if queue and not queue[0].done():
            queue[0].set_result(None)


def pass_on(base: torch.nn.Module) -> None:
    """Give the turn to the task that ends the block. An event loop closes an open block in a task of its own."""
    (turn,) = turns_of([base])
    turn.owner = turn.owner._replace(task=this_task())


def _busy(number: int | None, patience: float) -> ModelInUseError:
    names = [thread.name for thread in threading.enumerate() if thread.ident == number]
    found = f"a thread that computes with it: {names[0]}" if names else "another thread or task that swaps"
    return ModelInUseError(refusal("model_in_use", found=found, seconds=patience))


def is_shared(base: torch.nn.Module) -> bool:
    """Whether other threads have computed with the model, and may be doing so now."""
    return any(turn.others() for turn in turns_of([base]))


def put_back(action: Callable[[], object], what: str) -> None:
    """Run ``action``, which waits for a turn without a limit. Ctrl-C doesn't end the wait, unless it comes again.

    ``what`` ends a warning: it says what a second Ctrl-C leaves as it is.
    """
    token = _patience.set(math.inf)
    try:
        action()
    except KeyboardInterrupt:
        warnings.warn(
            f"Waiting for threads that compute with the model. Ctrl-C once more ends this, and {what}.", stacklevel=5
        )
        action()
        raise
    finally:
        _patience.reset(token)


class TurnLock:
    """The lock of an engine (:class:`hotswap_lab.core.engine.Lock`) that lets threads take turns."""

    def held(self, *bases: torch.nn.Module, computing: bool = False) -> AbstractContextManager[None]:
        return held(*bases, computing=computing)

    def is_shared(self, base: torch.nn.Module) -> bool:
        return is_shared(base)
