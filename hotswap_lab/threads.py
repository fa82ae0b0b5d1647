"""Turns: threads that compute with a model, and threads that swap its adapter, one after the other.

A swap writes for a moment (milliseconds) in which a forward pass in another thread would read some layers of the old
adapter and some of the new one. Whoever computes while others may swap says so, ``with in_use(model): ...``; a swap
then waits until nobody is inside, and whoever comes later waits for the swap. Swaps take turns among themselves
without being asked to.

Reading is cheap and writing pays: each thread has a lock of its own for each model, which nobody else touches but a
swap, and that takes them all (the Linux kernel once called this a big-reader lock). The locks are handed out as they
are, so entering and leaving ``with in_use(model)`` are single steps in C, which Ctrl-C can't split.
"""

from __future__ import annotations

import contextlib
import contextvars
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch

from .core.errors import HotswapError, Refusal, listing, refuse
from .core.host import Host, carriers
from .core.interrupts import interruptible, interrupts_held, let_through

#: how long a swap sleeps before it looks whether Ctrl-C was pressed meanwhile, in seconds
NAP = 0.02

_patience: contextvars.ContextVar[float | None] = contextvars.ContextVar("hotswap_lab_patience", default=None)


class ModelInUseError(HotswapError):
    """A swap would have had to wait longer than :func:`waiting_at_most` lets it. It may go well a moment later.

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


class Turn:
    """Whose turn it is at one base model."""

    def __init__(self) -> None:
        #: held by the thread that swaps, planning included
        self.swap = threading.RLock()
        #: held, too, while it waits for those inside, and while it writes: nobody else enters
        self.gate = threading.RLock()
        #: how many writers are behind it: one, or one and others that it called
        self.closing = 0
        self._own = threading.local()
        self._threads: weakref.WeakKeyDictionary[object, str] = weakref.WeakKeyDictionary()
        self._registering = threading.Lock()

    @property
    def lock(self) -> threading.RLock:
        """This thread's own lock. It is forgotten when the thread ends."""
        try:
            return self._own.lock
        except AttributeError:
            lock = threading.RLock()
            with self._registering:
                self._threads[lock] = threading.current_thread().name
            self._own.lock = lock
            return lock

    def ticket(self) -> threading.RLock:
        """What a thread that computes enters with. A swap that waits already is let pass."""
        # first the lock, then the look at the gate: a swap that closes it later finds the lock
        lock = self.lock
        if self.closing and not lock._is_owned():
            with _taken([(self.gate, None)]):
                pass
        return lock

    def check_outside(self) -> None:
        """A thread that is inside can't swap: it would wait for itself."""
        if self.lock._is_owned():
            raise refuse(
                "This thread is computing with the model.",
                found="a swap inside `with in_use(model)` of the same thread",
                expected="a swap outside of it: what is being computed began with the old adapter",
                next_step="swap before or after the block; with asyncio, await asyncio.to_thread(pool.swap, name)",
            )

    def inside(self) -> list[tuple[threading.RLock, str]]:
        """The lock and name of each thread that may be inside."""
        with self._registering:
            return list(self._threads.items())


_turns: weakref.WeakKeyDictionary[torch.nn.Module, Turn] = weakref.WeakKeyDictionary()
_making = threading.Lock()


def _turn(base: torch.nn.Module) -> Turn:
    turn = _turns.get(base)
    if turn is None:
        with _making:
            turn = _turns.setdefault(base, Turn())
    return turn


def in_use(model: object) -> AbstractContextManager:
    """Holds swaps back while this thread computes: ``with in_use(model): model(...)``.

    A swap from another thread, and every other change that this package makes to the adapter (strength, preparing, the
    operations of a pool), waits until the block is left. Threads that compute don't wait for each other. Inside, the
    thread itself can't swap. Needed only where threads share a model; it costs some microseconds.

    Parameters
    ----------
    model:
        A model with an adapter, compiled or not, an :class:`~hotswap_lab.AdapterPool`, or a diffusers pipeline.

    Returns
    -------
    context manager
        To be made anew for each block. May be nested.

    Raises
    ------
    HotswapError
        If the model has no adapter.

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
    On a GPU, work that was only queued is in order with the swap as long as both use the same stream. In a block that
    starts other threads and waits for them, let only the outer thread hold ``in_use``: a thread that comes while a swap
    waits is let in only after it. The thread that enters has to be the one that leaves, so a generator that yields from
    inside must not be handed from thread to thread.
    """
    bases = bases_of(model)
    if len(bases) == 1:
        return _turn(bases[0]).ticket()
    return _Several([_turn(base).ticket() for base in bases])


@contextlib.contextmanager
def waiting_at_most(seconds: float) -> Iterator[None]:
    """Swaps in this block are refused where they would have to wait longer for threads that compute, or that swap.

    Parameters
    ----------
    seconds:
        For each wait. 0 refuses a swap at once while anybody is inside ``with in_use(model)``. The swap raises
        :class:`ModelInUseError`, which is a :class:`HotswapError`.

    Examples
    --------
    >>> from hotswap_lab import AdapterPool, demo, in_use, waiting_at_most
    >>> model, tokenizer = demo.load("reverse")
    >>> pool = AdapterPool(model, adapters={"shout": demo.adapter_path("shout")}, progress=False)
    >>> with waiting_at_most(0.5):
    ...     pool.swap("shout")
    """
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not seconds >= 0:
        raise refuse(
            "This is not a time to wait.",
            found=f"{seconds!r}",
            expected="seconds, 0 or more",
            next_step="pass a number; without this block, swaps wait as long as they have to",
        )
    with interrupts_held():
        token = _patience.set(min(float(seconds), threading.TIMEOUT_MAX))
        try:
            with interruptible(block_of="generator"):
                yield
        finally:
            _patience.reset(token)


@contextlib.contextmanager
def without_limit() -> Iterator[None]:
    """What has to be put back is put back, however long that takes to begin."""
    with interrupts_held():
        token = _patience.set(None)
        try:
            yield
        finally:
            _patience.reset(token)


def put_back(action: Callable[[], object], what: str) -> None:
    """What has to be put back although it may have to wait: once Ctrl-C is pressed, and not again, it waits on.

    ``what`` says in a warning what stays as it is after the second time.
    """
    with without_limit():
        try:
            action()
        except KeyboardInterrupt:
            warnings.warn(
                f"Waiting for threads that compute with the model. Ctrl-C once more ends this, and {what}.",
                stacklevel=4,
            )
            action()
            raise


def bases_of(model: object) -> list[torch.nn.Module]:
    """The base models whose adapters a swap in ``model`` may change."""
    if isinstance(model, torch.nn.Module):
        found = [model]
    elif isinstance(parts := getattr(model, "components", None), dict):  # a pipeline's
        found = [part for part in parts.values() if isinstance(part, torch.nn.Module)]
    else:
        found = [getattr(model, "model", model)]  # a pool's
    bases = list(dict.fromkeys(host.base for part in found for host in carriers(part) if host.configs))
    if not bases:
        raise refuse(
            "No adapter layers found on the model.",
            found=f"a {type(model).__name__} without any adapter",
            expected="a model with a loaded adapter: without one there is nothing to swap, and to hold back",
            next_step="load an adapter first, or leave `in_use` out",
        )
    return bases


def swaps_of(*bases: torch.nn.Module) -> AbstractContextManager[None]:
    """Holds the other threads' swaps back: from planning on, what is decided stays true. Computing goes on.

    Ctrl-C ends the waiting; once inside, it comes only where it is let through.
    """
    turns = [_turn(base) for base in _in_order(bases)]
    for turn in turns:
        turn.check_outside()
    return _taken([(turn.swap, None) for turn in turns], _deadline())


def _deadline() -> float | None:
    patience = _patience.get()
    return None if patience is None else time.monotonic() + patience


@contextlib.contextmanager
def _taken(locks: list[tuple[threading.RLock, str | None]], deadline: float | None = None) -> Iterator[None]:
    with interrupts_held():
        taken: list[threading.RLock] = []
        try:
            for lock, name in locks:
                _take(lock, name, deadline, taken)
            yield
        finally:
            for lock in reversed(taken):
                lock.release()


@contextlib.contextmanager
def writing(*bases: torch.nn.Module) -> Iterator[None]:
    """Waits until nobody computes with the models, and holds everybody back for the length of the block.

    Ctrl-C ends the waiting; once inside, it comes only where it is let through.
    """
    turns = [_turn(base) for base in _in_order(bases)]
    for turn in turns:
        turn.check_outside()
    deadline = _deadline()
    with interrupts_held():
        taken: list[threading.RLock] = []
        closed: list[Turn] = []
        try:
            for turn in turns:
                _take(turn.swap, None, deadline, taken)
                _take(turn.gate, None, deadline, taken)
                closed.append(turn)
                turn.closing += 1
            for turn in turns:
                for lock, name in turn.inside():
                    if lock is not turn.lock:
                        _take(lock, name, deadline, taken)
            yield
        finally:
            for turn in closed:
                turn.closing -= 1
            for lock in reversed(taken):
                lock.release()


def undisturbed(host: Host) -> AbstractContextManager[None]:
    """:func:`writing` where a forward changes for a moment, or for good, what a decision goes by; else nothing.

    Layers around single parameters (``target_parameters``) give the module inside another class while it computes, and
    move its parameters about; OFT with ``coft`` writes to its weights.
    """
    changing = any(
        getattr(config, "target_parameters", None) or getattr(config, "coft", False) for config in host.configs.values()
    )
    return writing(host.base) if changing else contextlib.nullcontext()


def _take(lock: threading.RLock, name: str | None, deadline: float | None, taken: list[threading.RLock]) -> None:
    taken.append(lock)  # first: a lock that is taken and then can't be noted would stay so for ever
    try:
        while not lock.acquire(blocking=False):
            let_through()
            left = NAP if deadline is None else deadline - time.monotonic()
            if left <= 0:
                raise _busy([name] if name else [])
            if lock.acquire(timeout=min(left, NAP)):
                break
    except BaseException:
        taken.pop()
        raise


def _busy(names: list[str]) -> ModelInUseError:
    return ModelInUseError(
        Refusal(
            "The model is in use.",
            found=f"a thread that computes with it: {listing(names)}" if names else "another thread that swaps",
            expected=f"a free model within {_patience.get():g} seconds",
            next_step="try again later, or leave `waiting_at_most` out to wait as long as it takes",
        )
    )


def is_shared(base: torch.nn.Module) -> bool:
    """Whether other threads have computed with the model, and may be doing so now."""
    turn = _turn(base)
    return any(lock is not turn.lock for lock, _ in turn.inside())


def _in_order(bases) -> list[torch.nn.Module]:
    """Everybody takes several models in the same order, so that no two wait for each other."""
    return sorted(dict.fromkeys(bases), key=id)


class _Several:
    """Several locks as one, entered and left together."""

    def __init__(self, locks: list[threading.RLock]):
        self._locks = locks
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> _Several:
        with contextlib.ExitStack() as stack:
            for lock in self._locks:
                stack.enter_context(lock)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
