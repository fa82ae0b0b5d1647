"""RecompileWatch: counts compilations and recompiles, and names the guard that failed. Also picks a backend that works.

It uses PyTorch's own bookkeeping: ``torch._dynamo.callback`` announces each compilation with an id, whose second
part counts the graphs of one piece of code, and its metrics give the failed guard. That nothing is compiled does not
show that compiled code runs, so a watch also counts its runs: PyTorch calls a hook each time it has checked the guards
of compiled code, and another one with new code, which it then runs. Outside of a block this costs nothing.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import os
import re
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from . import compat
from .core.compiled import listen
from .core.report import html_table

T = TypeVar("T")

#: kinds of compilations that are not the graph of a piece of code
TRIGGERS = {"LAZY_BACKWARD": "backward", "CUDAGRAPH_RECORDING": "cudagraph"}
IDLE = "nothing that torch.compile compiled ran"
#: the text of an error, or PyTorch's description of one, in place of a guard
ERROR = "object (has no|is not|does not) |Error on |failed on source |index out of range|operand|not supported between"


class RecompileError(AssertionError):
    """A recompile happened under ``RecompileWatch(allow=...)``. Its text has the reason.

    An ``AssertionError``, because PyTorch's compiler lets these through, and only adds an empty line.

    Examples
    --------
    >>> import torch
    >>> from hotswap_lab import RecompileError, RecompileWatch
    >>> scale = torch.compile(lambda x, factor: x * factor, backend="eager", dynamic=False)
    >>> try:
    ...     with RecompileWatch(allow=0):
    ...         _ = scale(torch.ones(2), 5.0), scale(torch.ones(2), 6.0)
    ... except RecompileError as error:
    ...     print("factor was 5.0" in str(error))
    True
    """

    def __str__(self) -> str:
        return super().__str__().strip()


@dataclass(frozen=True)
class Compilation:
    """One compilation.

    Parameters
    ----------
    kind:
        ``"compile"`` for the first graph of a piece of code, ``"recompile"`` for any further one, ``"backward"``
        for a gradient, ``"cudagraph"`` for a recording on the GPU.
    reason:
        The reason, in words, why no existing graph could be used; empty unless it is a recompile.
    guard:
        The guard that failed, as PyTorch reports it.
    call:
        The label of the call it happened in; empty outside of :meth:`RecompileWatch.call`.
    """

    kind: str
    reason: str = ""
    guard: str = ""
    call: str = ""

    def __str__(self) -> str:
        return self.kind + (f" in {self.call!r}" if self.call else "") + (f": {self.reason}" if self.reason else "")


@dataclass
class Call:
    """One call that was run by :meth:`RecompileWatch.call`: its label, its seconds, and what it compiled."""

    label: str
    seconds: float = 0.0
    compilations: list[Compilation] = field(default_factory=list)

    @property
    def recompiles(self) -> int:
        return sum(compilation.kind == "recompile" for compilation in self.compilations)


class RecompileWatch:
    """Context manager that counts ``torch.compile`` compilations in this process, with any backend.

    Parameters
    ----------
    allow:
        The number of recompiles that are allowed; the next one raises an error where it happens. None: any number.
        With a number, a block that runs no compiled code ends with a warning, because it shows nothing. So does a block
        where PyTorch neither had a graph for a call nor compiled one, as after its ``recompile_limit``.

    Raises
    ------
    RecompileError
        At the first recompile that is not allowed. The model keeps working afterwards.

    Notes
    -----
    ``generate`` of ``torch.compile(model)`` calls the module inside, which is not compiled. For ``generate``, compile
    in place: ``model.get_base_model().compile()`` of a ``PeftModel``, ``model.compile()`` of any other model. A package
    that was compiled ahead of time never recompiles, so its calls are not counted as runs.

    Examples
    --------
    >>> import torch
    >>> from hotswap_lab import RecompileWatch
    >>> scale = torch.compile(lambda x, factor: x * factor, backend="eager", dynamic=False)
    >>> with RecompileWatch() as watch:
    ...     _ = scale(torch.ones(2), 2.0), scale(torch.ones(2), 3.0)
    >>> watch.compiles, watch.recompiles
    (1, 1)
    >>> print(watch.reasons[0])
    a Python number in the graph has changed: factor was 2.0
    """

    def __init__(self, allow: int | None = None):
        if not (allow is None or isinstance(allow, int)):
            raise TypeError(f"allow is a number of recompiles, or None: got {allow!r}")
        self.allow = allow
        self.compilations: list[Compilation] = []
        #: the calls that :meth:`call` ran, in order
        self.calls: list[Call] = []
        #: how often code of ``torch.compile`` ran in the block, each piece between two graph breaks; None: unknown
        self.runs: int | None = 0
        #: called when a compilation has begun, in the middle of it
        self.began: Callable[[], object] = lambda: None
        self._current: Call | None = None
        self._blocks = 0  # the blocks that are open, one inside another
        self._misses = 0  # how often no graph fitted, whether one was compiled then or not
        self._earlier_runs: int | None = None  # before the block
        self._earlier_uncompiled = 0

    @property
    def compiles(self) -> int:
        """The number of pieces of code that were compiled for the first time."""
        return self._count("compile")

    @property
    def recompiles(self) -> int:
        """The number of graphs that were compiled because no existing one could be used."""
        return self._count("recompile")

    @property
    def reasons(self) -> list[str]:
        """The reason for each recompile."""
        return [compilation.reason for compilation in self.compilations if compilation.kind == "recompile"]

    @property
    def uncompiled(self) -> int:
        """How often no graph fitted and none was compiled, as after the recompile limit, so the code ran eagerly."""
        return max(self._misses - self.recompiles, 0)

    def _count(self, kind: str) -> int:
        return sum(compilation.kind == kind for compilation in self.compilations)

    def __enter__(self) -> RecompileWatch:
        self._earlier_runs, self._earlier_uncompiled = self.runs, self.uncompiled
        listen(self._on_start)
        self._blocks += 1
        try:
            _begin(self)
        except BaseException:
            self.__exit__(True)
            raise
        return self

    def __exit__(self, error: object, *_: object) -> None:
        self._blocks -= 1  # one of the same watch may be around this one
        if not self._blocks and self._on_start in compat.dynamo_callbacks.start_callbacks:
            compat.dynamo_callbacks.remove_start_callback(self._on_start)
        if self in _watching:
            _watching.remove(self)
            _end(self)
        is_content = error is None and self.allow is not None and self.recompiles <= self.allow
        if is_content and self.runs == self._earlier_runs is not None:
            warnings.warn(
                f"{IDLE} in this block, so it does not show that nothing recompiles: in it, call what torch.compile "
                "returned; for generate, which calls the module inside, use model.get_base_model().compile()",
                stacklevel=2,
            )
        elif is_content and self.uncompiled > self._earlier_uncompiled:
            warnings.warn(
                "in this block, no graph fitted a call and none was compiled for it, so it ran without one, as after "
                "torch._dynamo.config.recompile_limit: prepare the model, or raise the limit and call "
                "torch.compiler.reset()",
                stacklevel=2,
            )

    def call(self, label: str, function: Callable[..., T], *args: object, **kwargs: object) -> T:
        """Run ``function(*args, **kwargs)`` and record its time and, in the block, its compilations under ``label``."""
        outer, self._current = self._current, (call := Call(label))
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            call.seconds = time.perf_counter() - start
            self.calls.append(call)  # not before: another thread may draw them
            self._current = outer

    def _on_start(self, args: Any) -> None:
        # PyTorch's record of the compilation that is starting; empty if it is the first of its code
        guard = getattr(compat.dynamo_metrics(), "_metrics", {}).get("recompile_reason") or ""
        kind, label = _kind(args, guard), self._current.label if self._current else ""
        compilation = Compilation(kind, explain(guard) if kind == "recompile" else "", guard, label)
        self.compilations.append(compilation)
        if self._current:
            self._current.compilations.append(compilation)
        self.began()
        if self.allow is not None and self.recompiles > self.allow:
            raise RecompileError(f"recompile number {self.recompiles}, {self.allow} allowed: {compilation.reason}")

    @property
    def summary(self) -> str:
        """``1 compiled, 0 recompiles``"""
        others = [f"{self._count(kind)} {kind}" for kind in TRIGGERS.values() if self._count(kind)]
        plural = "" if self.recompiles == 1 else "s"
        others += [IDLE] if self.runs == self._earlier_runs == 0 else []
        others += [f"{self.uncompiled} without a graph"] if self.uncompiled and self.runs else []
        return ", ".join([f"{self.compiles} compiled", f"{self.recompiles} recompile{plural}", *others])

    def __str__(self) -> str:
        return "\n".join([self.summary, *(f"  {one}" for one in self.compilations if one.kind == "recompile")])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        rows = [(one.call, one.kind, one.reason) for one in self.compilations]
        return html_table("Compilations", ["call", "what", "why"], rows, caption=self.summary)


#: the watches whose block is running, and the hooks that PyTorch calls: after a look at guards, and with new code
_watching: list[RecompileWatch] = []
_hook: Any = None
_handle: Any = None
_lock = threading.Lock()


def _begin(watch: RecompileWatch) -> None:
    """Count for ``watch`` how often compiled code runs: found by its guards, or just compiled."""
    global _hook, _handle
    with _lock:
        try:
            set_hook, register = compat.set_guard_complete_hook, compat.register_bytecode_hook
        except ImportError:
            watch.runs = None
            return
        if not _watching:
            if _handle:  # an end that was interrupted may have left it, and the hook: they would count twice
                _handle.remove()
            others = set_hook(None)
            if isinstance(others, functools.partial) and others.func is _on_lookup:
                (others,) = others.args
            set_hook(_hook := functools.partial(_on_lookup, others))
            _handle = register(_on_run)
        _watching.append(watch)


def _end(watch: RecompileWatch) -> None:
    with _lock:
        hook = compat.set_guard_complete_hook(_hook if _watching else _hook.args[0])
        if hook is not _hook:  # other code set this one in the block, and it may not call ours
            compat.set_guard_complete_hook(hook)
            watch.runs = None
        if not _watching:
            _handle.remove()


def _on_lookup(others: Callable[[bool], bool] | None, fits: bool) -> bool:
    # PyTorch has checked the guards of a piece of code, and runs what it has compiled if this returns True
    if fits := others(fits) if others else fits:
        _on_run()
    else:
        for watch in {*_watching}:
            watch._misses += 1
    return fits


def _on_run(*_: object) -> None:
    for watch in {*_watching}:
        if watch.runs is not None:
            watch.runs += 1


def _kind(args: Any, guard: str) -> str:
    is_again = guard or re.search(r"/[1-9]\d*(_\d+)?$", str(args.compile_id))
    return TRIGGERS.get(args.callback_trigger.name) or ("recompile" if is_again else "compile")


def explain(guard: str) -> str:
    """Describe a failed guard in words.

    >>> explain("0/0: self._modules['lin'].scaling['default'] == 2.0  # x * scaling")
    "a Python number in the graph has changed: lin.scaling['default'] was 2.0"
    >>> explain("0/0: tensor 'self._parameters['weight']' size mismatch at index 0. expected 4, actual 8")
    'a tensor has another shape: weight, axis 0, was 4, is 8'
    """
    text = re.sub(r"^\d+/\d+: ", "", guard.strip().split("\n")[0].split("  #")[0]).strip()
    # paths through a module's tables, as people write them
    text = re.sub(r"\.__dict__\['(\w+)'\]", r".\1", text)
    text = re.sub(r"\._(?:modules|parameters|buffers)\['([^']+)'\]", r".\1", text)
    text = re.sub(r"\b(?:self|L\['self'\])\.", "", text)
    number = r"[-+]?[\d.]+(?:e[-+]?\d+)?|True|False"
    if match := re.fullmatch(rf"(.+) == ({number})", text):
        return f"a Python number in the graph has changed: {match[1]} was {match[2]}"
    if match := re.match(r"tensor '(.+)' size mismatch at index (\d+)\. expected (\d+), actual (\d+)", text):
        return f"a tensor has another shape: {match[1]}, axis {match[2]}, was {match[3]}, is {match[4]}"
    if match := re.match(r"___check_type_id\((.+), \d+\)", text):
        return f"an object of another type: {match[1]}"
    if not text:
        return "the reason is not reported by this version of PyTorch"
    # an expression, the message of an error while one was evaluated, or a text of PyTorch's
    with contextlib.suppress(SyntaxError):
        is_value = isinstance(ast.parse(text, mode="eval").body, ast.Constant)
        return f"a guard could not be evaluated: {text}" if is_value else f"this no longer holds: {text}"
    return f"{'a guard could not be evaluated' if re.search(ERROR, text) else 'PyTorch reports'}: {text}"


# ---- which backend works


def pick_backend() -> str:
    """Return a backend for ``torch.compile`` that works on this machine: ``"inductor"``, or else ``"aot_eager"``.

    Inductor needs a C++ compiler on the CPU. Without one, ``aot_eager`` traces and guards the model in the same
    way, so that recompiles can be watched, but runs no faster than without compiling; a warning says so, once.

    Examples
    --------
    >>> from hotswap_lab import pick_backend
    >>> pick_backend() in ("inductor", "aot_eager")
    True
    """
    if (reason := _why_not_inductor()) is None:
        return "inductor"
    # PEFT sets CXX to a C compiler when it loads a BOFT adapter
    named = f" (CXX names {os.environ['CXX']!r}: remove it, or set it to 'g++')" if "CXX" in os.environ else ""
    warnings.warn(
        f"torch.compile can't build code here ({reason}), so backend 'aot_eager' is used: recompiles are counted as "
        f"usual, but nothing gets faster. Install a C++ compiler such as g++ for inductor{named}, and restart.",
        stacklevel=2,
    )
    return "aot_eager"


@functools.cache
def _why_not_inductor() -> str | None:
    """Return the reason why inductor doesn't work here, or None. Only compiling something shows it."""
    if (reason := _try_inductor()) is None:
        return None
    # an interrupted build stays in the compiler's cache, broken, so the compiler gets a second try with a fresh cache
    with contextlib.suppress(ImportError), compat.fresh_inductor_cache():
        return reason if _try_inductor() else None
    return reason


def _try_inductor() -> str | None:
    try:
        torch.compile(lambda x: x + 1, backend="inductor", dynamic=False)(torch.zeros(8, device="cpu"))
    except Exception as error:
        cause = error.__cause__ or error
        return (str(cause).strip() or type(cause).__name__).splitlines()[0]
    return None
