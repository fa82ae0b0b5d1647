"""Faults at every step: runs something and raises at the n-th line of the package, or C call, that it comes to.

Four kinds of steps. ``"line"``: a line of the package is about to run; Ctrl-C comes like that. ``"call"``: a line of
the package is about to call something written in C, such as ``torch.empty``, ``copy_``, ``open`` or ``os.replace``,
which fails instead. ``"deep"``: the same anywhere below the package: in PEFT, safetensors, torch, the standard library.
At a ``"signal"`` step nothing is raised: the process sends itself the signal of Ctrl-C, and what becomes of that is up
to the package. These are the steps where Python looks for signals: when a function of the package begins or a generator
of it goes on, and after calls of C functions. Left out is what only enters and leaves blocks, of the package and of
torch, but for those that keep others out of a model: Ctrl-C in just these few steps leaves the block half entered, or
half left, in any Python program.
"""

from __future__ import annotations

import contextlib
import dis
import errno
import functools
import inspect
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import CodeType

import torch

import hotswap_lab

PACKAGE = str(Path(hotswap_lab.__file__).parent)
TESTS = str(Path(__file__).parent)
#: loses a lock of its own when it fails in taking the second of two
STRANGERS = f"{os.sep}tqdm{os.sep}"
#: what takes a failed write back is left alone: it is what is tested; and so is what takes temporary files away, of
#: which something stays if it fails
SPARED = frozenset({"roll_back", "_restore", "_cleaned_up", "cleanup"})
#: what enters and leaves blocks, and takes and gives back locks: no line of it can fail
BLOCKS = frozenset({"_blocks", "waiting_at_most", "put_back", "_opened", "_locked", "__enter__", "__exit__"})
#: of these, what Ctrl-C may come to at any of its steps
TURNS = frozenset({"_blocks"})
#: nor can a line fail here; but Ctrl-C may come at any of its steps
HOLDING = "interrupts_held"
#: C functions that can't fail: they take no memory, and ask no disk and no device
UNFAILING = frozenset(
    {"__enter__", "__exit__", "release", "reset", "signal", "getsignal", "set_state", "setstate", "_is_owned"}
)
UNFAILING |= {"_set_grad_enabled", "is_grad_enabled", "list.remove", "Listeners.remove", "list.pop", "get_ident"}
UNFAILING |= {"_pop_torch_function_stack"}
#: by which contextlib enters and leaves blocks; what they run may fail, and is looked at by itself
UNFAILING |= {"next", "generator.throw", "generator.close"}

#: closes the file even where it returns an error
UNFAILING_FUNCTIONS = (os.close,)
#: Python 3.13 frees the arguments of ``f(*arguments)`` twice if a profiler raises there: what follows is chance
FREED_TWICE = {dis.opmap["CALL_FUNCTION_EX"]} if sys.version_info >= (3, 13) else set()


class Fault(BaseException):
    """No code that catches Exception gets to see this one."""


def _cuda_error() -> Exception:
    kind = getattr(torch, "AcceleratorError", RuntimeError)
    return kind("CUDA error: an illegal memory access was encountered (pretended)")


#: what can go wrong anywhere
FAULTS: dict[str, Callable[[], BaseException]] = {
    "KeyboardInterrupt": lambda: KeyboardInterrupt("pretended"),
    "MemoryError": lambda: MemoryError("pretended"),
    "OSError": lambda: OSError(errno.ENOSPC, "No space left on device (pretended)"),
    "CUDA error": _cuda_error,
    "CUDA out of memory": lambda: torch.OutOfMemoryError("CUDA out of memory (pretended)"),
}


@dataclass(frozen=True)
class Outcome:
    """What became of a run with a fault."""

    #: where the fault was; empty if there were fewer steps
    where: str
    #: what the caller got to see; None if the action ended as if nothing had been
    error: BaseException | None
    #: whether Ctrl-C is handled as before
    handler_kept: bool = True

    def __bool__(self) -> bool:
        return bool(self.where)


def run_with_fault(
    action: Callable[[], object], step: int, make: Callable[[], BaseException] = Fault, unit: str = "line"
) -> Outcome:
    """Runs ``action`` and raises at the ``step``-th step, counted from 1. False in a condition if there are fewer."""
    count, where, mine = 0, "", None

    def at_step(place: str) -> None:
        nonlocal count, where, mine
        count += 1
        if count == step and unit == "signal":
            where = place
            signal.raise_signal(signal.SIGINT)
        elif count == step and not _is_spared(sys._getframe(2)):
            where, mine = place, make()
            raise mine

    handler, error = signal.getsignal(signal.SIGINT), None
    try:
        watch_steps(action, unit, at_step)
    except BaseException as raised:
        if not where:
            raise
        error = raised
    finally:
        kept = signal.getsignal(signal.SIGINT) is handler
        signal.signal(signal.SIGINT, handler)
    return Outcome(where, error, kept)


def list_steps(action: Callable[[], object], unit: str = "line") -> list[str]:
    """The places of all steps of ``action``, in turn."""
    places: list[str] = []
    watch_steps(action, unit, places.append)
    return places


def watch_steps(action: Callable[[], object], unit: str, at_step: Callable[[str], None]) -> None:
    """Calls ``at_step`` before each step; what it raises comes out of the step."""

    def trace(frame, event, argument):
        code = frame.f_code
        if not code.co_filename.startswith(PACKAGE) or code.co_name == HOLDING:
            return None
        if code.co_name in SPARED | BLOCKS:
            return None
        if event == "line" and frame.f_lasti not in _unreal(code):
            at_step(_place(frame))
        return trace

    def profile(frame, event, argument):
        if event != "c_call" or argument in UNFAILING_FUNCTIONS:
            return
        if not UNFAILING.isdisjoint((argument.__name__, argument.__qualname__)):
            return
        if frame.f_code.co_code[frame.f_lasti] in FREED_TWICE:
            return
        path = frame.f_code.co_filename
        inside = path.startswith(PACKAGE)
        if inside if unit == "call" else not (inside or path.startswith(TESTS) or STRANGERS in path):
            at_step(f"{_place(frame)} {argument.__name__}")

    def signals(frame, event, argument):
        if _is_ours(frame) and (event == "c_return" or (event == "call" and not _may_be_closing(frame))):
            at_step(_place(frame) + (f" after {argument.__name__}" if event == "c_return" else ""))

    hooks = {"line": (sys.settrace, trace), "signal": (sys.setprofile, signals)}
    switch, hook = hooks.get(unit, (sys.setprofile, profile))
    switch(hook)
    try:
        action()
    finally:
        switch(None)


def _is_ours(frame) -> bool:
    """Whether a frame is the package's, or enters or leaves a block that holds Ctrl-C back."""
    code = frame.f_code
    if code.co_filename.startswith(PACKAGE):
        return code.co_name not in BLOCKS - TURNS
    if code.co_filename != contextlib.__file__ or code.co_name not in ("__enter__", "__exit__"):
        return False
    generator = getattr(frame.f_locals.get("self"), "gen", None)
    return generator is not None and generator.gi_code.co_name == HOLDING


def _may_be_closing(frame) -> bool:
    """Whether a generator may be going on only to be closed, or with an error: Python looks for no signals then."""
    if not frame.f_code.co_flags & inspect.CO_GENERATOR:
        return False
    if frame.f_back.f_code.co_filename == contextlib.__file__:  # which throws the error of a block into it
        return frame.f_back.f_locals.get("typ") is not None
    return frame.f_lasti >= _first_yield(frame.f_code)


@functools.cache
def _first_yield(code: CodeType) -> int:
    return next(step.offset for step in dis.get_instructions(code) if step.opname in ("YIELD_VALUE", "SEND"))


@functools.cache
def _unreal(code: CodeType) -> frozenset[int]:
    """Where a tracer can raise and nothing else: between a with block and its ``__exit__``, and at ``try:``."""
    steps = list(dis.get_instructions(code))
    found = {step.offset for step in steps if step.opname == "NOP"}
    for number, (one, two, three) in enumerate(zip(steps, steps[1:], steps[2:], strict=False)):
        normal = one.opname == "LOAD_CONST" and one.argval is None and three.opname in ("LOAD_CONST", "DUP_TOP")
        same = two.opname == three.opname and three.argval in (None, one.argval)
        if (normal and same) or two.opname == "WITH_EXCEPT_START":
            found.add(one.offset)
            # a value that is returned from the block is put aside first
            if number and steps[number - 1].opname in ("SWAP", "ROT_TWO", "ROT_THREE"):
                found.add(steps[number - 1].offset)
    return frozenset(found)


def _place(frame) -> str:
    path = frame.f_code.co_filename
    name = path.removeprefix(PACKAGE + "/") if path.startswith(PACKAGE) else "/".join(Path(path).parts[-2:])
    return f"{name}:{frame.f_lineno}"


def _is_spared(frame) -> bool:
    while frame is not None:
        if frame.f_code.co_name in SPARED:
            return True
        frame = frame.f_back
    return False
