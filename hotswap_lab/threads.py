"""Turns: blocks in which threads and tasks compute with a model, or swap its adapter, one after the other.

A swap writes for a moment (milliseconds). A forward pass in another thread would then read some layers of the old
adapter and some of the new one. A thread that computes while others may swap says so: ``with in_use(model): ...``. A
swap then waits until no thread is inside, and a thread that comes later waits for the swap. Swaps take turns by
themselves: all code that changes a model uses :func:`held`.

A turn belongs to its block, not to a thread, and any thread may end it: servers enter a block in one thread and leave
it in another. Code is *inside* of a block if the frame that owns the block is on its stack. The owner is the innermost
generator or task at the entry, since their frames go to sleep with the block open and others run meanwhile. Where there
is none, the block belongs to the thread, as far as a context variable is passed on.

Each model has one lock, held for microseconds, and one queue in the order of arrival. Waiting never takes a thread from
a task. Where nobody else can end the block in the way, an entry is refused at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import math
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Set
from concurrent import futures
from contextlib import AbstractContextManager
from contextvars import ContextVar
from types import FrameType
from typing import Generic, TypeVar

import torch

from .core.errors import HotswapError, refusal, refuse
from .core.host import carriers

T = TypeVar("T")
#: the kinds of turns: several blocks may compute at once; one swaps, while others compute; one writes, alone
COMPUTE, SWAP, WRITE = "compute", "swap", "write"
#: the kind that each has to wait for
EXCLUDED = {COMPUTE: WRITE, SWAP: SWAP, WRITE: COMPUTE}
#: frames that can go to sleep, and those of them that can be awaited
AWAITING = inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
SLEEPING = AWAITING | inspect.CO_GENERATOR
#: how long to wait at a time, in seconds: on Windows, Ctrl-C works only between two waits
NAP = 0.02
#: how many seconds a thread waits for a block in a generator. All threads of a server may wait for one, and the
#: generator needs a thread to go on
STREAM_LIMIT = 30.0


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


#: how many seconds to wait at most; infinite if the user has not said so
_patience: ContextVar[float] = ContextVar("hotswap_lab_patience", default=math.inf)
#: the open blocks that this context was made in. In a copy of it, too, nobody else can end them
_around: ContextVar[tuple[Entry, ...]] = ContextVar("hotswap_lab_around", default=())
#: the turn of each base model
_turns: weakref.WeakKeyDictionary[torch.nn.Module, Turn] = weakref.WeakKeyDictionary()


class Entry:
    """A block that is open, or waits for its turn."""

    is_open = is_left = False
    #: the time at which it was let in
    since: float = math.inf
    #: done as soon as it is let in; None if it has never had to wait
    future: futures.Future[None] | None = None
    #: the open blocks that it is nested in
    inside: Set[Entry] = frozenset()

    def __init__(self, turn: Turn, kind: str, awaits: bool = False):
        self.turn, self.kind, self.awaits = turn, kind, awaits
        #: what its end has to put back, the last one first
        self.back: list[Callable[[], object]] = []
        self.adopt()

    def adopt(self) -> None:
        """Make the code that calls this the owner."""
        self.owner: FrameType | None = owner_of(sys._getframe(1))
        self.thread: int = threading.get_ident()

    @property
    def is_in_generator(self) -> bool:
        owner = self.owner
        return owner is not None and bool(owner.f_code.co_flags & inspect.CO_GENERATOR)

    def is_around(self, frame: FrameType | None) -> bool:
        """Whether the code that runs in a frame is inside of this block."""
        if self.owner is None:  # a thread of a pool may run other requests meanwhile, each in a context of its own
            return self.thread == threading.get_ident() and self in _around.get()
        while frame is not None and frame is not self.owner:
            frame = frame.f_back
        return frame is not None

    def note(self) -> None:
        """Note in this context that the block is open."""
        around = _around.get()
        _around.set((*[each for each in around if not each.is_left], self) if around else (self,))

    def enter(self) -> None:
        """Wait for the turn."""
        if self.kind == COMPUTE:
            self.turn.pay()
        patience, start = _patience.get(), time.monotonic()
        self.turn.ask(self)
        while not self.is_open:
            try:
                self.future.result(max(0, min(NAP, start + patience - time.monotonic())))
            except futures.TimeoutError:
                self.check_patience(patience, start)
        self.note()
        if self.kind == SWAP and self.turn.owed:
            with _taken([self.turn], WRITE):
                put_all_back(self.turn.owed)

    async def enter_awaiting(self, to_the_end: bool = False) -> asyncio.CancelledError | None:
        """:meth:`enter` for a task, which lets the event loop go on meanwhile.

        ``to_the_end`` is for the end of a block. It waits however long that takes. A task that is cancelled meanwhile
        goes on to the end of the block: the error is returned.
        """
        patience, start, cancelled = math.inf if to_the_end else _patience.get(), time.monotonic(), None
        self.turn.ask(self)
        while not self.is_open:
            timeout = None if patience == math.inf else max(0, start + patience - time.monotonic())
            try:
                await asyncio.wait([asyncio.wrap_future(self.future)], timeout=timeout)
            except asyncio.CancelledError as error:
                if not to_the_end:
                    raise
                cancelled = error
            if not self.is_open:
                self.check_patience(patience, start)
        self.note()
        return cancelled

    def check_patience(self, patience: float, start: float) -> None:
        """Raise if this has waited too long."""
        now, others = time.monotonic(), self.turn.in_the_way(self)
        if self.kind == COMPUTE:  # swaps end by themselves
            return
        if now - start >= patience:
            computing = {each.thread for each in others if each.kind == COMPUTE}
            names = [each.name for each in threading.enumerate() if each.ident in computing]
            found = f"a thread that computes with it: {names[0]}" if names else "another thread or task that swaps"
            raise ModelInUseError(refusal("model_in_use", found=found, seconds=patience))
        asleep = [each for each in others if each.is_in_generator or each.thread == self.thread]
        if patience == math.inf and not self.awaits and any(now - max(start, e.since) > STREAM_LIMIT for e in asleep):
            raise ModelInUseError(refusal("stream_in_use", seconds=STREAM_LIMIT))

    def leave(self) -> None:
        """End the block, in any thread. May be called again, if Ctrl-C has come between."""
        if self.back:
            self.turn.owed.extend(self.back)
            self.back.clear()
        self.is_left, self.owner, self.inside = True, None, frozenset()
        self.turn.settle()
        if self.kind == COMPUTE and self.turn.owed:
            with waiting_at_most(0):
                self.turn.pay()


class Turn:
    """The blocks of one base model: those that are open, and those that wait, in the order in which they came."""

    def __init__(self) -> None:
        self.lock: threading.RLock = threading.RLock()
        self.open: dict[Entry, None] = {}
        self.queue: dict[Entry, None] = {}
        #: what is to be put back before anything else, and could not be when its block ended
        self.owed: list[Callable[[], object]] = []
        #: the numbers of the threads that have computed with the model
        self.threads: set[int] = set()
        self.is_changed = False

    def pay(self) -> None:
        """Put back what is owed, unless that would have to wait for the code that calls this."""
        if self.owed:
            with contextlib.suppress(HotswapError), _taken([self], SWAP):
                pass

    def above(self, entry: Entry) -> list[Entry]:
        """The blocks that were entered inside of an open one, and have not been left yet."""
        swapping = [each for each in list(self.open) if each.kind == SWAP]
        return swapping[swapping.index(entry) + 1 :] if entry in swapping else []

    def in_the_way(self, entry: Entry) -> list[Entry]:
        """The blocks that an entry has to wait for."""
        if not self.open and not self.queue:
            return []
        kind, spared = EXCLUDED[entry.kind], {entry, *entry.inside}
        found = [each for each in list(self.open) if each.kind == kind and each not in spared]
        if entry.kind == COMPUTE and not any(each.kind == COMPUTE for each in entry.inside):
            # a swap that waits goes first, unless it is a task's of this thread, which has to go on for that
            found += [each for each in list(self.queue) if each.kind == WRITE and each.thread != entry.thread]
        return found

    def ask(self, entry: Entry) -> None:
        """Let an entry in, put it into the queue, or refuse it where nobody else can end the block in its way."""
        if self.lock._is_owned():  # the garbage collector has called a finalizer in the middle of this module's work
            raise refuse("thread_is_computing")
        try:
            with self.lock:
                self._ask(entry, sys._getframe(1), _around.get())
        finally:
            if self.is_changed:
                self.settle()

    def _ask(self, entry: Entry, frame: FrameType, around: tuple[Entry, ...]) -> None:
        if self.open:
            entry.inside = {each for each in self.open if each.is_around(frame)}
            computing = {each for each in self.open if each.kind == COMPUTE}
            mine = {each for each in computing if each in entry.inside or each in around}
            if mine and entry.kind != COMPUTE:
                raise refuse("thread_is_computing")
            if entry.kind == COMPUTE:
                # where this thread computes already, a swap waits in any case, perhaps for the end of this one
                entry.inside |= mine | {each for each in computing if each.thread == entry.thread}
        if entry.kind == COMPUTE:
            self.threads.add(entry.thread)
        others = self.in_the_way(entry)
        if not set(others).isdisjoint(around):
            raise refuse("block_is_open")
        if not entry.awaits and self.open and _is_in_loop() and self._hold_up(entry, others, around):
            raise refuse("another_task")
        if others:
            entry.future = futures.Future()
            self.queue[entry] = None
        else:
            self.let_in(entry)

    def _hold_up(self, entry: Entry, others: list[Entry], around: tuple[Entry, ...]) -> bool:
        """Whether blocks can't end while the event loop of this thread waits, or could not wait for an entry."""
        if entry.kind == COMPUTE:  # the end of a plain `with` in another task
            others = [*others, *[each for each in self.open if each.kind == SWAP and not each.awaits]]
            return any(e.thread == entry.thread and e not in entry.inside and e not in around for e in others)
        return any(each.thread == entry.thread or each.is_in_generator for each in others)

    def let_in(self, entry: Entry) -> None:
        self.open[entry] = None
        entry.since, entry.is_open = time.monotonic(), True
        if entry.future is not None:
            with contextlib.suppress(futures.InvalidStateError):  # it was let in before, and Ctrl-C came between
                entry.future.set_result(None)
            self.queue.pop(entry, None)

    def settle(self) -> None:
        """Let in all entries whose turn it is.

        The garbage collector may close a generator at any line, and its block ends in the middle of this: then the loop
        goes on once more.
        """
        self.is_changed = True
        while self.is_changed and not self.lock._is_owned():
            with self.lock:
                self.is_changed = False
                for each in (self.open, self.queue):
                    for entry in [entry for entry in each if entry.is_left]:
                        del each[entry]
                for entry in list(self.queue):
                    if not self.in_the_way(entry):
                        self.let_in(entry)


def owner_of(frame: FrameType | None) -> FrameType | None:
    """The innermost frame of a generator, or of a task, on a stack; None if there is none.

    Generators that contextlib runs don't count, since their block ends where it was entered. Of coroutines that await
    one another, the outermost counts: all of them are the same task.
    """
    while frame is not None:
        back = frame.f_back
        if frame.f_code.co_flags & SLEEPING:
            if back is None:
                return frame
            is_run = "contextlib" in (frame.f_globals.get("__name__"), back.f_globals.get("__name__"))
            is_awaited = frame.f_code.co_flags & inspect.CO_COROUTINE and back.f_code.co_flags & AWAITING
            if not is_run and not is_awaited:
                return frame
        frame = back
    return None


def _is_in_loop() -> bool:
    """Whether this thread runs an event loop."""
    return asyncio._get_running_loop() is not None


def turns_of(bases: Iterable[torch.nn.Module]) -> list[Turn]:
    """The turns of some models, in the same order for every caller, so that no two wait for each other."""
    return [_turns.get(base) or _turns.setdefault(base, Turn()) for base in sorted(set(bases), key=id)]


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
        A model with an adapter, compiled or not, an :class:`~hotswap_lab.AdapterPool`, or a diffusers pipeline.

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
    return _taken(turns_of(bases_of(model)), COMPUTE)


@contextlib.contextmanager
def waiting_at_most(seconds: float) -> Iterator[None]:
    """Refuse swaps in this block that would have to wait longer for threads that compute, or that swap.

    Parameters
    ----------
    seconds:
        The limit of each wait. 0 refuses a swap at once while another thread is inside ``with in_use(model)``. The swap
        raises :class:`ModelInUseError`, which is a :class:`HotswapError`. Without this block, a swap waits as long as it
        takes, except for a plain generator that yields inside of its block: a thread waits 30 seconds for one. A server
        steps generators in a few threads, and the generator can't go on if all of these wait for it.

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
    return _taken(turns_of(bases), *([SWAP] if computing else [SWAP, WRITE]))


@contextlib.contextmanager
def _taken(turns: list[Turn], *kinds: str, taken: Iterable[Entry] = ()) -> Iterator[None]:
    """Enter blocks, and leave these and those that are ``taken`` already at the end, the last one first."""
    entries = list(taken)
    try:
        for kind in kinds:
            for turn in turns:
                entries.append(Entry(turn, kind))
                entries[-1].enter()
        yield
    finally:
        try:
            _leave(entries)
        except BaseException:  # Ctrl-C, at any step of it
            _leave(entries)
            raise


def _leave(entries: list[Entry]) -> None:
    for each in reversed(entries):
        each.leave()


class Block(contextlib.ContextDecorator, Generic[T]):
    """A block with its own adapter: ``with`` in a thread; ``async with`` in a task, which lets other tasks go on.

    Parameters
    ----------
    begin:
        Puts the adapter in and returns the value of the block. It gets a list, and adds what puts the former one back.
    what:
        Ends a warning: what a second Ctrl-C leaves as it is.
    """

    def __init__(self, base: torch.nn.Module, begin: Callable[[list[Callable[[], object]]], T], what: str):
        self._made = base, begin, what
        self._entry: Entry | None = None

    def _recreate_cm(self) -> Block[T]:
        return type(self)(*self._made)

    def _begun(self, awaits: bool = False) -> Entry:
        if self._entry is not None:
            raise RuntimeError("a block can be entered once: make a new one")
        self._entry = Entry(*turns_of([self._made[0]]), SWAP, awaits)
        return self._entry

    def __enter__(self) -> T:
        entry = self._begun()
        try:
            entry.enter()
            return self._made[1](entry.back)
        except BaseException as error:
            self.__exit__(type(error), error)
            raise

    def __exit__(self, kind: type[BaseException] | None = None, error: object = None, trace: object = None) -> None:
        entry = self._entry
        try:
            entry.adopt()
            entry.note()
            if above := entry.turn.above(entry):
                above[0].back[:0] = entry.back
                entry.back.clear()
                raise refuse("left_out_of_order")
            if entry.back and kind is GeneratorExit:  # any code may close a generator, and doesn't expect to wait
                with waiting_at_most(0):
                    _put_back(entry)
            elif entry.back:
                try:
                    put_back(lambda: _put_back(entry), self._made[2])
                except KeyboardInterrupt:
                    entry.back.clear()
                    raise
        finally:
            try:
                entry.leave()
            except BaseException:
                entry.leave()
                raise

    async def __aenter__(self) -> T:
        entry = self._begun(awaits=True)
        writing = Entry(entry.turn, WRITE, awaits=True)
        with _taken([], taken=[writing]):
            try:
                await entry.enter_awaiting()
                await writing.enter_awaiting()
                put_all_back(entry.turn.owed)
                return self._made[1](entry.back)  # which has nothing to wait for
            except BaseException as error:
                self.__exit__(type(error), error)
                raise

    async def __aexit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        writing, cancelled = Entry(self._entry.turn, WRITE, awaits=True), None
        with _taken([], taken=[writing]):
            try:
                if kind is not GeneratorExit:
                    with contextlib.suppress(HotswapError):  # what is in the way can't end meanwhile
                        cancelled = await writing.enter_awaiting(to_the_end=True)
            finally:
                self.__exit__(kind if writing.is_open else GeneratorExit)
        if cancelled is not None:
            raise cancelled


def _put_back(entry: Entry) -> None:
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(_taken([entry.turn], WRITE))
        except HotswapError:
            return  # what is in the way can't end while this waits
        put_all_back(entry.back)


def put_all_back(backs: list[Callable[[], object]]) -> None:
    """Run actions, the last one first. One that is interrupted stays in the list; one that is refused does not."""
    while backs:
        back = backs.pop()
        try:
            back()
        except BaseException as error:
            if not isinstance(error, HotswapError):
                backs.append(back)
            raise


def is_shared(base: torch.nn.Module) -> bool:
    """Whether other threads have computed with the model, and may be doing so now."""
    return any(thread != threading.get_ident() for turn in turns_of([base]) for thread in turn.threads)


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
