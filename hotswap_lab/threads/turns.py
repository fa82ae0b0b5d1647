"""The turns of one model: who computes, who swaps, who waits for whom, and who is refused rather than wait.

Each model has one lock, held for microseconds, and one queue in the order of arrival. Waiting never takes a thread from
a task. Where nobody else can end the block in the way, an entry is refused at once.

A turn belongs to a block, not to a thread. Code is *inside* of a block if the frame that owns the block is on its
stack. The owner is the innermost generator or task at the entry, because their frames go to sleep with the block open,
and others run meanwhile. Where there is none, the block belongs to the thread, as far as a context variable is passed
on: a thread of a pool runs other requests meanwhile. For example, one thread sends two answers, token by token in
turn::

    def answer(name):
        with pool.using(name):
            yield from tokens_of_the_answer()

    first, second = answer("pirate"), answer("haiku")
    next(first), next(second)

``next(first)`` opens a block and returns with the block open: its owner is the frame of ``first``, which
:func:`owner_of` finds by the flag of generators in its ``co_flags``. That frame is not on the stack of
``next(second)``, so ``second`` is not inside, and is refused: this thread would wait for itself. If the block belonged
to the thread, ``second`` would be let in as nested, and ``first`` would go on with haiku's weights, without an error
(``test_two_generators_in_one_thread`` in ``tests/threads/test_turns.py``).

The garbage collector may close such a generator at any line, those of this module included. Its block then ends on a
thread that holds the lock, and the lock of a thread lets that thread in again. So :meth:`Turn.ask` and
:meth:`Turn.let_in_waiting` look first whether this thread is at work here already (``lock._is_owned()``). Without that
look, an entry would wait for a turn that only its own thread can give
(``test_a_swap_by_a_finalizer_in_the_middle_of_an_entry_is_refused``), and blocks would be let in or taken out while
another line looks through them (``test_a_generator_collected_in_the_middle_of_an_entry``).
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import math
import sys
import threading
import time
from collections.abc import Callable, Sequence, Set
from concurrent import futures
from contextvars import ContextVar
from itertools import filterfalse
from operator import attrgetter
from types import FrameType

from ..core.errors import HotswapError, refusal, refused

#: the kinds of turns: several blocks may compute at once; one swaps, while others compute; one writes, alone
COMPUTE, SWAP, WRITE = "compute", "swap", "write"
#: for each kind, the kind that it has to wait for
EXCLUDED = {COMPUTE: WRITE, SWAP: SWAP, WRITE: COMPUTE}
#: frames that can go to sleep, and those of them that can be awaited
AWAITING = inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
SLEEPING = AWAITING | inspect.CO_GENERATOR
#: how long to wait at a time, in seconds: on Windows, Ctrl-C works only between two waits
NAP = 0.02
_is_left = attrgetter("is_left")
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


#: how many seconds to wait at most; infinite outside of :func:`waiting_at_most`
_patience: ContextVar[float] = ContextVar("hotswap_lab_patience", default=math.inf)
#: the open blocks that this context was made in. In a copy of it, too, nobody else can end them
AROUND: ContextVar[tuple[Entry, ...]] = ContextVar("hotswap_lab_around", default=())


class Entry:
    """A block that is open, or waits for its turn."""

    is_open: bool = False
    is_left: bool = False
    #: the time at which it was let in
    since: float = math.inf
    #: done as soon as it is let in; None if it has never had to wait
    future: futures.Future[None] | None = None
    #: the open blocks that it is nested in
    inside: Set[Entry] = frozenset()

    def __init__(self, turn: Turn, kind: str, awaits: bool = False):
        self.turn: Turn = turn
        self.kind: str = kind
        self.awaits: bool = awaits
        #: the steps that restore the previous adapter at its end, the last one first
        self.back: list[Callable[[], object]] = []
        self.owner: FrameType | None = owner_of(sys._getframe(1))
        self.thread: int = threading.get_ident()

    def adopt(self) -> None:
        """Make the code that calls this the owner."""
        self.owner, self.thread = owner_of(sys._getframe(1)), threading.get_ident()

    @property
    def is_in_generator(self) -> bool:
        owner = self.owner
        return owner is not None and bool(owner.f_code.co_flags & inspect.CO_GENERATOR)

    def is_around(self, frame: FrameType | None) -> bool:
        """Whether the code that runs in a frame is inside of this block."""
        if self.owner is None:  # a thread of a pool may run other requests meanwhile, each in a context of its own
            return self.thread == threading.get_ident() and self in AROUND.get()
        while frame not in (None, self.owner):
            frame = frame.f_back
        return frame is not None

    def wait(self) -> None:
        """Wait for the turn."""
        patience, start = _patience.get(), time.monotonic()
        self.turn.ask(self)
        while not self.is_open:
            try:
                self.future.result(max(0, min(NAP, start + patience - time.monotonic())))
            except futures.TimeoutError:
                self.check_patience(patience, start)
        note(self)

    async def wait_async(self) -> None:
        """:meth:`wait` for a task, which lets the event loop go on meanwhile."""
        patience, start = _patience.get(), time.monotonic()
        self.turn.ask(self)
        while not self.is_open:
            timeout = None if patience == math.inf else max(0, start + patience - time.monotonic())
            await asyncio.wait([asyncio.wrap_future(self.future)], timeout=timeout)
            if not self.is_open:
                self.check_patience(patience, start)
        note(self)

    async def wait_to_the_end(self) -> None:
        """:meth:`wait_async` without a limit. If the task is cancelled meanwhile, that is raised after the wait."""
        cancelled = None
        self.turn.ask(self)
        while not self.is_open:
            try:
                await asyncio.wait([asyncio.wrap_future(self.future)])
            except asyncio.CancelledError as error:
                cancelled = error
        note(self)
        if cancelled is not None:
            raise cancelled

    def check_patience(self, patience: float, start: float) -> None:
        """Raise if this has waited too long."""
        if self.kind == COMPUTE:  # swaps end by themselves
            return
        now, others = time.monotonic(), self.turn.in_the_way(self)
        if now - start >= patience:
            computing = {entry.thread for entry in others if entry.kind == COMPUTE}
            names = [thread.name for thread in threading.enumerate() if thread.ident in computing]
            holder = f"a thread that computes with it: {names[0]}" if names else "another thread or task that swaps"
            raise ModelInUseError(refusal("model_in_use", found=holder, seconds=patience))
        if patience < math.inf or self.awaits:
            return
        asleep = [entry for entry in others if entry.is_in_generator or entry.thread == self.thread]
        if any(now - max(start, entry.since) > STREAM_LIMIT for entry in asleep):
            raise ModelInUseError(refusal("stream_in_use", seconds=STREAM_LIMIT))

    def end(self) -> None:
        """End the block, in any thread. May be called again, if Ctrl-C has come between."""
        if self.back:
            self.turn.owed.extend(self.back)
            self.back.clear()
        self.is_left, self.owner, self.inside = True, None, frozenset()
        self.turn.let_in_waiting()


class Turn:
    """The blocks of one base model: those that are open, and those that wait, in the order in which they came.

    Several models may have the same turn: see :meth:`join`.
    """

    #: the turn that has its blocks now, for threads that still have this one
    joined: Turn | None = None

    def __init__(self) -> None:
        self.lock: threading.RLock = threading.RLock()
        self.open: dict[Entry, None] = {}
        self.queue: dict[Entry, None] = {}
        #: steps of blocks that have ended and could not restore the previous adapter: the next block runs them first
        self.owed: list[Callable[[], object]] = []
        #: the numbers of the threads that have computed with the model
        self.threads: set[int] = set()
        self.is_changed: bool = False

    def join(self, other: Turn) -> None:
        """Make all blocks of another turn blocks of this one, also those that wait. The caller is alone in both."""
        with self.lock, other.lock:
            for entry in (*other.open, *other.queue):
                entry.turn = self
            self.open |= other.open
            self.queue |= other.queue
            self.threads |= other.threads
            other.joined = self

    def in_the_way(self, entry: Entry) -> list[Entry]:
        """The blocks that an entry has to wait for."""
        kind, spared = EXCLUDED[entry.kind], {entry, *entry.inside}
        others = [other for other in list(self.open) if other.kind == kind and other not in spared]
        if entry.kind == COMPUTE and not any(outer.kind == COMPUTE for outer in entry.inside):
            # a swap that waits goes first, unless it is a task's of this thread, which has to go on for that
            others += [other for other in list(self.queue) if other.kind == WRITE and other.thread != entry.thread]
        return others

    def ask(self, entry: Entry) -> None:
        """Let an entry in, put it into the queue, or refuse it where nobody else can end the block in its way."""
        if self.lock._is_owned():  # the garbage collector has called a finalizer in the middle of this module's work
            raise refused("thread_is_computing")
        try:
            with self.lock:
                self._ask(entry, sys._getframe(1), AROUND.get())
        finally:
            if self.is_changed:
                self.let_in_waiting()

    def let_in_at_once(self, entries: Sequence[Entry]) -> bool:
        """Let in blocks that are nested in one another, if no other block is open or waits; return whether it did."""
        if self.lock._is_owned():
            return False
        now = time.monotonic()
        for number, entry in enumerate(entries):
            entry.since, entry.is_open, entry.inside = now, True, frozenset(entries[:number])
        with self.lock:
            is_idle = not (self.open or self.queue or self.owed or self.joined)
            if is_idle:
                self.open.update(dict.fromkeys(entries))
        if is_idle:
            AROUND.set((*filterfalse(_is_left, AROUND.get()), *entries))
        return is_idle

    def _ask(self, entry: Entry, frame: FrameType, around: tuple[Entry, ...]) -> None:
        if self.joined is not None:
            entry.turn = self.joined
            return entry.turn.ask(entry)
        entry.inside = {other for other in self.open if other.is_around(frame)}
        computing = {other for other in self.open if other.kind == COMPUTE}
        mine = computing.intersection((*entry.inside, *around))
        if entry.kind == COMPUTE:
            # where this thread computes already, a swap waits in any case, perhaps for the end of this one
            entry.inside |= mine | {other for other in computing if other.thread == entry.thread}
            self.threads.add(entry.thread)
        elif mine:
            raise refused("thread_is_computing")
        others = self.in_the_way(entry)
        if not set(others).isdisjoint(around):
            raise refused("block_is_open")
        stops_the_loop = not entry.awaits and asyncio._get_running_loop() is not None
        if stops_the_loop and self._needs_the_loop(entry, others, around):
            raise refused("another_task")
        if others:
            entry.future = futures.Future()
            self.queue[entry] = None
        else:
            self.let_in(entry)

    def let_in_now(self, entry: Entry) -> bool:
        """Let an entry in if it doesn't have to wait; return whether it is open."""
        with self.lock:
            self._let_in_now(entry)
        return entry.is_open

    def _let_in_now(self, entry: Entry) -> None:
        entry.inside = {other for other in self.open if other.kind == COMPUTE and other.thread == entry.thread}
        if not self.in_the_way(entry):
            self.threads.add(entry.thread)
            self.let_in(entry)

    def _needs_the_loop(self, entry: Entry, others: list[Entry], around: tuple[Entry, ...]) -> bool:
        """Whether a block can't end while an entry stops the event loop of this thread, or could not wait for it."""
        if entry.kind != COMPUTE:
            return any(other.thread == entry.thread or other.is_in_generator for other in others)
        # the end of a plain `with` in another task could not wait
        plain = [other for other in self.open if other.kind == SWAP and not other.awaits]
        others = {*others, *plain}.difference(entry.inside, around)
        return any(other.thread == entry.thread for other in others)

    def let_in(self, entry: Entry) -> None:
        """Open an entry's block, and end its wait."""
        self.open[entry] = None
        entry.since, entry.is_open = time.monotonic(), True
        if entry.future is not None:
            with contextlib.suppress(futures.InvalidStateError):  # it was let in before, and Ctrl-C came between
                entry.future.set_result(None)
            self.queue.pop(entry, None)

    def let_in_waiting(self) -> None:
        """Let in all entries whose turn it is.

        The garbage collector may close a generator at any line, and its block ends in the middle of this: then the loop
        goes on once more.
        """
        self.is_changed = True
        while self.is_changed and not self.lock._is_owned():
            with self.lock:  # a call alone: in Python 3.13, Ctrl-C at the end of a loop in here would keep the lock
                self._let_in_waiting()

    def _let_in_waiting(self) -> None:
        self.is_changed = False
        for entries in (self.open, self.queue):
            for entry in filter(_is_left, list(entries)):
                del entries[entry]
        for entry in list(self.queue):
            if not self.in_the_way(entry):
                self.let_in(entry)


def note(entry: Entry) -> None:
    """Note in this context that a block is open."""
    AROUND.set((*filterfalse(_is_left, AROUND.get()), entry))


def owner_of(frame: FrameType | None) -> FrameType | None:
    """The innermost frame of a generator, or of a task, on a stack; None if there is none.

    Generators that contextlib runs don't count, because their block ends where it was entered. Of coroutines that await
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
