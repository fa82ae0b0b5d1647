"""AdapterPool: the engine's pool, and what only some pools need: undo, a limit of memory, reading ahead."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from peft.utils import ModulesToSaveWrapper
from tqdm.auto import tqdm

from ..core.adapter import Adapter
from ..core.change import Change
from ..core.errors import refuse
from ..core.host import Config, canonical_path, modules_in
from ..core.report import html_table, text_table
from ..core.room import Packed, Room
from ..core.slot import Slot
from ..core.tensors import SlotTensor
from ..threads import awaited, pass_on, put_back
from .mixes import Mix
from .pool import Member, Pool
from .row_pool import PackedRows, RowPool, Wanted
from .rows import RowRoom

P_co = TypeVar("P_co", covariant=True)
#: how many swaps back :meth:`AdapterPool.undo` can go
HISTORY = 100
#: and how many of these may have found something in the model that no pool has, and that is kept for them
FOREIGN = 4


@dataclass(eq=False)
class _Member(Member):
    """An adapter that may be dropped from memory as long as its files have it."""

    #: what to read it from again; None if it came from memory
    source: str | None = None
    #: the folder's state when it was read, to notice that it has changed since
    stamp: tuple[object, ...] | None = None
    #: the commit, if it was read from the Hub: somebody may push another one
    revision: str | None = None
    #: what it takes when it is packed
    nbytes: int = 0
    #: counts up with each use; the lowest is dropped first
    used: int = 0
    loading: Future[Packed] | None = field(default=None, repr=False)

    @property
    def is_in_files(self) -> bool:
        return self.source is not None and self.version == 1

    @property
    def row(self) -> tuple[str, str, str, str, str]:
        """Name, rank, alpha, layers and bytes."""
        if self.packed is None:
            return self.name, "", "", "", "in its files"
        columns = self.packed.content.columns
        ranks, alphas = columns["rank"], columns["alpha"]
        return self.name, _span(ranks), _span(alphas), str(len(ranks)), f"{self.packed.nbytes:,}"


class _Buffer(SlotTensor):
    """A buffer of a saved module, such as a BatchNorm's running mean."""

    @property
    def parameter(self) -> Any:
        return self.owner._buffers[self.name]

    def shape_for(self, rank: int | None) -> tuple[int, ...]:
        return tuple(self.parameter.shape)


class Block(contextlib._GeneratorContextManager[P_co]):  # pyright: ignore[reportPrivateUsage]
    """A block with an adapter of its own: ``with`` in a thread, ``async with`` in a task, which waits for others."""

    _awaited: contextlib.AbstractAsyncContextManager[P_co]

    async def __aenter__(self) -> P_co:
        self._awaited = self._while_awaited()
        return await self._awaited.__aenter__()

    async def __aexit__(self, *error: Any) -> bool | None:
        return await self._awaited.__aexit__(*error)

    @contextlib.asynccontextmanager
    async def _while_awaited(self) -> AsyncIterator[P_co]:
        base = self.func.__self__._room.slot.host.base
        async with awaited(base, computing=True):
            async with awaited(base):  # so that the block itself has nothing to wait for, at both of its ends
                pool = self.__enter__()
            try:
                yield pool
            finally:
                async with awaited(base, to_the_end=True):
                    self.__exit__(None, None, None)


class AdapterPool(RowPool):
    """Many adapters for one place in one model, in memory, switched by name.

    The model is prepared for all of them (ranks, layers), so that a swap never moves a tensor and never recompiles.
    Each adapter takes the memory of its own rank. A swap copies just that, and nothing else depends on the number
    of layers.

    Where several threads answer requests, each with its own adapter, ``with pool.using(name):`` around the whole
    answer is what keeps them apart: swaps from other threads wait for its end. With tasks of asyncio, it is
    ``async with pool.using(name):``.

    Parameters
    ----------
    model:
        A model with a loaded LoRA adapter. Make the pool before compiling: a compiled model is taken only if it was
        prepared for all of these adapters already.
    adapter_name:
        The name of the loaded adapter whose place the pool uses. Default: the one that there is, or ``"default"``.
    adapters:
        Names, and for each a folder, a Hub id, an :class:`Adapter`, or a pair of a state dict and its config.
    target_rank:
        Room for adapters that will be added later; the highest of all ranks is made room for anyway.
    max_bytes:
        How much memory the adapters may take together. The one that was not used for longest is dropped, and read
        again from where it came from when it is wanted.
    rows:
        The largest batch in which each row may have its own adapter (:meth:`assign`). The model's memory for adapters
        is that many times as large, and each adapter takes that of the highest rank. Not for a model whose memory is
        shared with other processes, which don't know what is assigned.
    check_compiled:
        What to do if the model is compiled and has to be prepared: ``"error"``, ``"warn"`` or ``"ignore"``. Its next
        call compiles once more then.
    progress:
        Whether to show a progress bar while adapters are read.
    **hub:
        ``revision``, ``token`` and the other arguments of ``huggingface_hub.hf_hub_download``.

    Raises
    ------
    HotswapError
        If the model can't be prepared, or an adapter can't be read or doesn't fit. The model is untouched then.

    Examples
    --------
    >>> from hotswap_lab import AdapterPool, demo
    >>> model, tokenizer = demo.load("reverse")
    >>> pool = AdapterPool(model, adapters={n: demo.adapter_path(n) for n in ("shout", "sort")}, progress=False)
    >>> pool.swap("shout")
    >>> demo.ask(model, tokenizer, "hotswap")
    'HOTSWAP!'
    >>> with pool.using("sort"):
    ...     demo.ask(model, tokenizer, "hotswap")
    'ahopstw'
    >>> demo.ask(model, tokenizer, "hotswap")
    'HOTSWAP!'
    >>> pool.off()
    >>> demo.ask(model, tokenizer, "hotswap")
    'hotswap'
    """

    MEMBER: type[Member] = _Member

    def __init__(
        self,
        model: torch.nn.Module,
        adapter_name: str | None = None,
        adapters: Mapping[str, object] | None = None,
        *,
        target_rank: int | None = None,
        max_bytes: int | None = None,
        rows: int = 1,
        check_compiled: Literal["error", "warn", "ignore"] = "error",
        progress: bool = True,
        **hub: Any,
    ):
        self.max_bytes = max_bytes
        self.room_kind: type[Room] = RowRoom.of(rows)
        self._clock = 0
        #: what was in the model before each write, a new one after each
        self._history: Sequence[Packed] = ()
        self._background: ThreadPoolExecutor | None = None
        self._shows_progress = progress
        options: dict[str, Any] = dict(target_rank=target_rank, check_compiled=check_compiled)
        check_named(adapters)
        super().__init__(model, adapter_name, adapters, **options, **hub)

    def _fill(self, adapters: Iterable[tuple[str, object]]) -> None:
        is_known = False
        # a bar takes a lock of its own even where it shows nothing, and Ctrl-C may come when it has just done that
        for name, source in tqdm(adapters, desc="packing", unit="adapter") if self._shows_progress else adapters:
            self.add(name, source)
            packed = self._members[name].packed
            # looked at now, since the next adapters may have this one dropped
            if packed and not is_known and _is_in(self._room, packed):
                is_known, self._room.content = True, packed.content

    # ---- modules that are saved with an adapter

    BESIDE: Collection[str] = ("modules_to_save",)

    def _beside(self, slot: Slot) -> list[SlotTensor]:
        """The tensors of whole modules, such as a classifier: their parameters, and the buffers that are saved."""
        tensors: list[SlotTensor] = []
        for path, module in modules_in(slot.host.base):
            if isinstance(module, ModulesToSaveWrapper) and slot.adapter_name in module.modules_to_save:
                whole = module.modules_to_save[slot.adapter_name]
                for kind, named in ((SlotTensor, whole.named_parameters()), (_Buffer, whole.named_buffers())):
                    for key, _ in named:
                        owner_path, _, name = key.rpartition(".")
                        owner = whole.get_submodule(owner_path)
                        if name not in owner._non_persistent_buffers_set:  # which no file has
                            tensors.append(kind(f"{path}.{key}", key, owner, name, rank_axis=None))
        self._whole = [(each, each.parameter) for each in tensors]
        return tensors

    def _check_room(self) -> None:
        super()._check_room()
        if any(each.parameter is not noted for each, noted in self._whole):  # a buffer is moved by taking another one
            raise refuse("pool_lost_its_place")

    def _pack(self, member: _Member, adapter: Adapter, check_targets: bool) -> Packed:
        slot, whole = self._room.slot, getattr(adapter.config, "modules_to_save", None) or ()
        if not slot.config.modules_to_save:
            return super()._pack(member, adapter, check_targets)
        if set(whole) != set(slot.config.modules_to_save):
            raise refuse("other_modules_to_save", name=member.name, found=whole, expected=slot.config.modules_to_save)
        tensors = {canonical_path(key): tensor for key, tensor in adapter.tensors.items()}
        beside = []
        for each in self._room.places.keys() - slot.tensors:
            tensor = tensors.pop(each.key, None)
            if tensor is None or tensor.shape != each.parameter.shape:
                found = "no such tensor" if tensor is None else f"shape {tuple(tensor.shape)}"
                raise refuse("module_differs", key=each.key, found=found, expected=tuple(each.parameter.shape))
            beside.append((each, tensor))
        # what is left is LoRA alone, in a slot that has nothing else
        alone = dataclasses.replace(
            slot, host=dataclasses.replace(slot.host, configs={self.adapter_name: _without_modules(slot.config)})
        )
        layers = dataclasses.replace(
            adapter,
            config=_without_modules(adapter.config),
            tensors={key: tensor for key, tensor in adapter.tensors.items() if canonical_path(key) in tensors},
        )
        packed = self._pack_layers(alone, member, layers, check_targets, beside)
        # as loading leaves it: PEFT adds a classifier's names to those that are there
        packed.content.config.modules_to_save = list(slot.config.modules_to_save)
        return packed

    # ---- a limit of memory

    def _read(self, member: _Member, source: object) -> Packed:
        stamp = _stamp_of(source)
        hub = {**self._hub, "revision": member.revision} if member.revision else self._hub
        adapter = self.engine.read(source, **hub)
        packed = self._pack(member, adapter, check_targets=not isinstance(source, tuple))
        member.source, member.stamp, member.revision = _path_of(source), stamp, adapter.revision
        member.nbytes = packed.nbytes
        return packed

    def _read_again(self, member: _Member) -> Packed:
        if member.stamp != _stamp_of(member.source):
            raise refuse("files_changed", name=member.name, source=member.source)
        return self._read(member, member.source)

    def _packed(self, member: _Member) -> Packed:
        packed, loading, member.loading = member.packed, member.loading, None
        if packed is None:
            packed = loading.result() if loading is not None else self._read_again(member)
            with self._lock:
                self._make_space(member, packed)
                member.packed = packed
        self._clock += 1
        member.used = self._clock
        return packed

    def _make_space(self, member: _Member, packed: Packed, updated: bool = False) -> None:
        """Drops adapters until this one fits; refuses it if it never would."""
        if self.max_bytes is None:
            return
        others = [each for each in self._members.values() if each is not member]
        stays = updated or not member.is_in_files
        fixed = packed.nbytes + sum(each.packed.nbytes for each in others if each.packed and not each.is_in_files)
        droppable = sorted((each for each in others if each.is_in_files), key=lambda each: each.used)
        # any adapter must find room beside those that can't be dropped
        needed = fixed + (max((each.nbytes for each in droppable), default=0) if stays else 0)
        if needed > self.max_bytes:
            raise refuse("pool_is_full", name=member.name, needed=needed, max_bytes=self.max_bytes)
        held = [each for each in droppable if each.packed is not None]
        total = fixed + sum(each.nbytes for each in held)
        for each in held:
            if total > self.max_bytes:
                each.packed = None
                total -= each.nbytes

    def prefetch(self, *names: str) -> None:
        """Reads and packs adapters that were dropped, in the background. A swap to one of them waits for it.

        Until they are used, they stand as in their files in the pool's table, and don't count for ``max_bytes``.
        """
        with self._lock:
            for member in map(self._member, names):
                if member.packed is None and member.loading is None:
                    if self._background is None:
                        self._background = ThreadPoolExecutor(1, thread_name_prefix="hotswap-prefetch")
                    member.loading = self._background.submit(self._read_again, member)

    # ---- what was there before

    def using(self, name: str, strength: float = 1.0) -> Block[Pool]:
        """Puts an adapter in for the length of a block; then the former one is back, after errors too.

        ``with pool.using(name):`` waits for other threads that swap or compute, and swaps from other threads wait for
        the end of the block. With asyncio, ``async with pool.using(name):`` waits for other tasks of the same thread,
        too, and the event loop goes on meanwhile. Other tasks that don't wait are refused. If the task is cancelled,
        the former adapter is put back. What ``max_bytes`` has dropped is read in the event loop's own thread, unless
        :meth:`prefetch` has read it before.

        Examples
        --------
        >>> import asyncio
        >>> from hotswap_lab import AdapterPool, demo
        >>> model, tokenizer = demo.load("reverse")
        >>> family = {name: demo.adapter_path(name) for name in ("shout", "sort")}
        >>> pool = AdapterPool(model, adapters=family, progress=False)
        >>> async def answer(name):
        ...     async with pool.using(name):
        ...         return await asyncio.to_thread(demo.ask, model, tokenizer, "hotswap")
        >>> async def both():
        ...     return await asyncio.gather(answer("shout"), answer("sort"))
        >>> asyncio.run(both())
        ['HOTSWAP!', 'ahopstw']
        """
        return Block(self._for_a_while, (lambda: self.swap(name, strength), f"leaves {name!r} in the model"), {})

    def assigned(
        self, adapters: Sequence[Wanted], strengths: Sequence[float] | None = None, *, copies: int = 1
    ) -> Block[Any]:
        """:meth:`assign` for the length of a block, ``with`` or ``async with``; then what was there before is back."""
        put_in = lambda: self.assign(adapters, strengths, copies=copies)  # noqa: E731
        return Block(self._for_a_while, (put_in, f"leaves {adapters!r} in the model"), {})

    def _for_a_while(self, put_in: Callable[[], None], what: str) -> Iterator[AdapterPool]:
        """Puts back what was in the model before the block."""
        with self._turn():
            self._check_room()
            former, history = self._former(), self._history
            try:
                put_in()
                yield self
            finally:
                # the block is left for good: its adapter must not stay
                if self._history is not history:
                    put_back(lambda: self._leave(former, history), what)

    def _leave(self, former: Packed, history: Sequence[Packed]) -> None:
        pass_on(self._room.slot.host.base)
        self._put_back(former, history)

    def undo(self) -> None:
        """Takes the last swap, :meth:`off` or change of strength back.

        An adapter that was updated since comes back as it is now; one that was removed, as it was.

        Raises
        ------
        HotswapError
            If there is nothing to take back.
        """
        with self._turn():
            if not self._history:
                raise refuse("nothing_to_undo")
            *history, former = self._history
            self._put_back(former, history)

    def _put_back(self, former: Packed, history: Sequence[Packed]) -> None:
        packed = self._as_now(former)
        with self._writing():
            self._apply(self._change_to(packed), history)

    def _apply(self, change: Change, history: Sequence[Packed] | None = None) -> None:
        if history is None:
            history = self._longer_history()
        change.steps.append(lambda journal: journal.set_attribute(self, "_history", history))
        super()._apply(change)

    def _longer_history(self) -> Sequence[Packed]:
        former = self._former()
        history = [*self._history[-HISTORY + 1 :], _without_parts(former)]
        if former.content.owner is not None:
            return history
        foreign = [number for number, each in enumerate(history) if each.content.owner is None]
        return history[foreign[-FOREIGN - 1] + 1 :] if len(foreign) > FOREIGN else history

    # ---- how it looks

    COLUMNS = ("adapter", "rank", "alpha", "layers", "bytes", "")

    @property
    def nbytes(self) -> int:
        """The memory that the packed adapters take, in bytes."""
        return sum(packed.nbytes for member in list(self._members.values()) if (packed := member.packed))

    @property
    def table(self) -> list[tuple[str, ...]]:
        """One row for each adapter: name, rank, alpha, layers, bytes, and whether it is the active one."""
        active = self.active
        return [(*each.row, "active" if each.name == active else "") for each in list(self._members.values())]

    @property
    def summary(self) -> str:
        """One line: how many adapters there are, and in how much memory."""
        plural = "" if len(self) == 1 else "s"
        return f"{len(self)} adapter{plural}, {self.nbytes:,} bytes packed, room of {self._room.nbytes:,} bytes"

    def __str__(self) -> str:
        return "\n".join([f"AdapterPool: {self.summary}", *text_table(self.COLUMNS, self.table), *self._notes])

    @property
    def _notes(self) -> list[str]:
        return [f"{member.name}: {note}" for member in list(self._members.values()) for note in member.notes]

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table("AdapterPool", list(self.COLUMNS), self.table, caption=self.summary, notes=self._notes)


def check_named(adapters: object) -> None:
    """Refuses adapters without names: a list of folders, or a single one.

    >>> check_named({"style": "folder"})
    """
    if adapters is not None and not isinstance(adapters, Mapping):
        raise refuse("adapters_without_names", kind=type(adapters).__name__)


def _is_in(room: Room, packed: Packed) -> bool:
    """Whether a room has just this adapter, at its trained strength."""
    content = room.content
    configs = [_with_sets(each.config) for each in (packed.content, content)]
    if packed.content.settings != content.settings or configs[0] != configs[1]:
        return False
    pairs = [(band.memory[: len(part)], part) for band, part in zip(room.bands, packed.parts, strict=True)]
    # layers that are off have some scaling or other
    pairs += [(scalings[content.on], packed.scalings[content.on]) for scalings in room.scalings]
    return all(torch.equal(one.detach(), other.to(one.device)) for one, other in pairs)


def _with_sets(config: Config) -> dict[str, object]:
    """A config's fields; for some architectures PEFT makes sets of lists of names, empty ones among them."""
    fields = config.to_dict()
    return {name: {*each} if isinstance(each, (list, tuple, set)) else each for name, each in fields.items()}


def _without_modules(config: Config) -> Config:
    config = copy.deepcopy(config)
    config.modules_to_save = None
    return config


def _span(values: Sequence[float]) -> str:
    if not values:
        return "-"
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _path_of(source: object) -> str | None:
    """What an adapter can be read from again: a folder or a Hub id. None for what is in memory."""
    return os.fspath(source) if isinstance(source, (str, os.PathLike)) else None


def _stamp_of(source: object) -> tuple[object, ...] | None:
    """What changes when an adapter's folder is written to. None for what is not a folder."""
    path = _path_of(source)
    if path is None or not os.path.isdir(path):
        return None
    files = [os.path.join(path, name) for name in sorted(os.listdir(path)) if name.startswith("adapter_")]
    return tuple((file, os.stat(file).st_mtime_ns, os.stat(file).st_size) for file in files if os.path.exists(file))


def _without_parts(former: Packed) -> Packed:
    """What was there, without the weights that its owner has, or that can be read or mixed again."""
    if isinstance(former, PackedRows):
        return dataclasses.replace(former, rows=tuple([each and _without_parts(each) for each in former.rows]))
    return dataclasses.replace(former, parts=()) if isinstance(former.content.owner, (Mix, _Member)) else former
