"""AdapterPool: many adapters in memory, laid out as the model wants them, switched by name with one copy."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from peft import PeftConfig
from tqdm.auto import tqdm

from . import lora
from .adapter import Adapter, adapter_from, member_from
from .change import apply
from .decide import make_plan
from .errors import HotswapError, refuse
from .guard import guard, put_back
from .host import find_host
from .journal import Journal
from .prepare import changes_to_prepare
from .report import html_table, text_table
from .room import Packed, Room
from .slot import Slot, room_of, slot_for
from .sources import path_of, stamp_of
from .strength import check_scalable, check_strength, get_strength

#: how many swaps back :meth:`AdapterPool.undo` can go
HISTORY = 100
#: and how many of these may have found something in the model that no pool has, and that is kept for them
FOREIGN = 4


@dataclass
class _Entry:
    """One adapter of a pool. ``packed`` is None while only its files have it."""

    name: str
    #: what to read it from again; None if it came from memory
    source: str | None
    packed: Packed | None = None
    #: the folder's state when it was read, to notice that it has changed since
    stamp: tuple | None = None
    #: the commit, if it was read from the Hub: somebody may push another one
    revision: str | None = None
    version: int = 1
    #: what it takes when it is packed
    nbytes: int = 0
    #: counts up with each use; the lowest is dropped first
    used: int = 0
    loading: Future | None = field(default=None, repr=False)
    #: the same for an adapter and its updates
    lineage: object = field(default_factory=object, repr=False)


@dataclass(frozen=True)
class _State:
    """What was in the model at some time: an adapter of the pool, or something else, packed."""

    entry: _Entry | None
    packed: Packed | None
    strength: float | torch.Tensor


class AdapterPool:
    """Many adapters for one place in one model, in memory, switched by name.

    The model is prepared for all of them (ranks, layers), so that a swap never moves a tensor and never recompiles.
    Each adapter takes the memory of its own rank. A swap copies just that, and nothing else depends on the number
    of layers.

    Parameters
    ----------
    model:
        A model with a loaded LoRA adapter. Make the pool before compiling: a compiled model is taken only if it was
        prepared for all of these adapters already.
    adapter_name:
        The name of the loaded adapter whose place the pool uses.
    adapters:
        Names, and for each a folder, a Hub id, an :class:`Adapter`, or a pair of a state dict and its config.
    target_rank:
        Room for adapters that will be added later; the highest of all ranks is made room for anyway.
    max_bytes:
        How much memory the adapters may take together. The one that was not used for longest is dropped, and read
        again from where it came from when it is wanted.
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

    def __init__(
        self,
        model: torch.nn.Module,
        adapter_name: str = "default",
        adapters: Mapping[str, object] | None = None,
        *,
        target_rank: int | None = None,
        max_bytes: int | None = None,
        progress: bool = True,
        **hub: Any,
    ):
        self.model = model
        self.adapter_name = adapter_name
        self.max_bytes = max_bytes
        self._hub = hub
        self._entries: dict[str, _Entry] = {}
        self._history: list[_State] = []
        self._uses = 0
        #: tells this pool's adapters from those of another one on the same model
        self._token = object()
        #: of the table of adapters. Whoever holds it never waits for a turn at the model; it is taken after that
        self._lock = threading.RLock()
        self._background: ThreadPoolExecutor | None = None
        check_named(adapters)
        base = _check_kind(slot_for(find_host(model, adapter_name), adapter_name)).host.base
        with guard(base, computing=True):
            way_back = Journal()
            try:
                self._room = self._prepare(base, dict(adapters or {}), target_rank, way_back)
                self._fill(dict(adapters or {}), progress)
            except BaseException:
                if not way_back.is_empty:
                    put_back(lambda: _roll_back(way_back, base), "leaves the model prepared")
                raise

    def _prepare(self, base: torch.nn.Module, adapters: dict, target_rank: int | None, way_back: Journal) -> Room:
        family = [member_from(source, self._hub) for source in adapters.values()]
        with guard(base):
            changes = changes_to_prepare(
                self.model, family, target_rank=target_rank, adapter_name=self.adapter_name, may_be_compiled=False
            )
            apply(changes, way_back)
        return cast(Room, room_of(base, self.adapter_name))

    def _fill(self, adapters: dict, progress: bool) -> None:
        for name, source in tqdm(adapters.items(), desc="packing", unit="adapter", disable=not progress):
            self.add(name, source)
        # the adapter that is in the model may be one of them
        for entry in self._entries.values():
            if entry.packed is not None and self._room.holds(entry.packed):
                self._room.content, self._room.in_use = entry.packed.content, (entry.packed, 1.0)
                return

    # ---- what is in it

    @property
    def names(self) -> list[str]:
        """The names of all adapters, in the order they were added."""
        return list(self._entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    @property
    def active(self) -> str | None:
        """The name of the adapter that the model computes with; None if it is off, or not one of this pool."""
        intact = room_of(self._room.slot.host.base, self.adapter_name) is self._room
        name = self._loaded if intact else None
        return None if name is None or self._is_off else name

    @property
    def _is_off(self) -> bool:
        try:
            return self.strength == 0
        except HotswapError:
            return False  # somebody has scaled some of the layers

    @property
    def _loaded(self) -> str | None:
        """The name of the adapter in the room, if it is one of this pool."""
        pool, name = self._room.content.label or (None, None)
        return name if pool is self._token and name in self._entries and not self._room.is_touched else None

    @property
    def strength(self) -> float:
        """How strongly the adapter acts: 1 as trained, 0 not at all. May be set at any time; a swap sets it to 1."""
        return get_strength(self.model, self.adapter_name)

    @strength.setter
    def strength(self, value: float) -> None:
        with self._swap(), self._write_access():
            self._check_room()
            check_strength(value)
            check_scalable(self._room.slot)
            history = self._history_with(self._state())
            note = functools.partial(Journal.set_attribute, target=self, name="_history", value=history)
            apply([self._room.change_strength(value, note)])

    @property
    def nbytes(self) -> int:
        """The memory that the packed adapters take, in bytes."""
        self._collect()
        return sum(packed.nbytes for entry in list(self._entries.values()) if (packed := entry.packed))

    def version(self, name: str) -> int:
        """How often this adapter's weights were given: 1 at first, one more with each :meth:`update`."""
        return self._entry(name).version

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise refuse("not_in_pool", name=name, names=", ".join(map(repr, self._entries)) or "(none)")
        return self._entries[name]

    # ---- adapters in and out of the pool

    def add(self, name: str, source: object) -> None:
        """Reads and packs an adapter; ``source`` as in ``adapters``. The model is not changed.

        Raises
        ------
        HotswapError
            If the name is taken, or the adapter can't be read or doesn't fit the room that was prepared.
        """
        self._check_free(name)
        entry = _Entry(name, path_of(source), stamp=stamp_of(source))
        # reading may take long, and swaps must not have to wait for it
        adapter = adapter_from(source, self._hub)
        entry.revision = adapter.revision
        packed = self._pack(name, adapter, check_targets=not isinstance(source, tuple))
        with self._lock:
            self._check_free(name)
            self._keep(entry, packed)
            self._entries[name] = entry

    def _check_free(self, name: str) -> None:
        if name in self._entries:
            raise refuse(
                "already_in_pool", name=name, source=repr(self._entries[name].source or "an adapter from memory")
            )

    def remove(self, name: str) -> None:
        """Forgets an adapter. The one that the model computes with can't be removed."""
        with self._lock:
            entry = self._entry(name)
            if self._loaded == name:
                raise refuse("adapter_in_use", name=name)
            del self._entries[name]
            if entry.loading is not None:
                entry.loading.cancel()

    def update(self, name: str, state_dict: Mapping[str, torch.Tensor], config: PeftConfig | None = None) -> None:
        """Gives an adapter new weights, at once in the model if it is the one in use.

        For training loops that produce new weights at every step. Whoever reads ``pool.version(name)`` sees a new
        number as soon as the new weights are there; nobody ever sees a mixture.

        Parameters
        ----------
        state_dict:
            ``lora_A`` of shape ``(rank, in_features)`` and ``lora_B`` of shape ``(out_features, rank)`` per layer.
        config:
            Its config. Default: the one that the adapter has.
        """
        with self._swap():
            config = config or self._packed(self._entry(name)).content.config
            adapter = Adapter.from_state_dict(state_dict, config)
            packed = self._pack(name, adapter, check_targets=False)
            in_model = self._loaded == name
            with self._write_access() if in_model else self._lock:
                entry = self._entry(name)
                new = _Entry(name, None, version=entry.version + 1, lineage=entry.lineage)
                self._keep(new, packed)  # refuses what is too large

                def replace(journal: Journal) -> None:
                    journal.set_item(self._entries, name, new)

                if in_model:
                    apply([self._room.change_to(packed, self._state().strength, replace)])
                else:
                    replace(Journal())

    def prefetch(self, *names: str) -> None:
        """Reads and packs adapters that were dropped, in the background. A swap to one of them waits for it."""
        with self._lock:
            for entry in map(self._entry, names):
                if entry.packed is None and entry.loading is None:
                    if self._background is None:
                        self._background = ThreadPoolExecutor(1, thread_name_prefix="hotswap-prefetch")
                    entry.loading = self._background.submit(self._load, entry)

    def _collect(self) -> None:
        """Takes over what was read in the background."""
        with self._lock:
            for entry in self._entries.values():
                loading = entry.loading
                if loading is not None and loading.done() and not loading.cancelled() and loading.exception() is None:
                    entry.loading = None
                    self._keep(entry, loading.result())

    def _pack(self, name: str, adapter: Adapter, check_targets: bool) -> Packed:
        self._check_room()
        plan = make_plan(self._room.slot, adapter, check_targets=check_targets)
        plan.raise_if_refused()
        sources = [
            (write.target, write.target.off() if write.source is None and write.target.off else write.source)
            for layer in plan.layers
            for write in layer.tensors
        ]
        content = dataclasses.replace(self._room.content_of(plan), label=(self._token, name))
        return self._room.pack(content, [(target, source) for target, source in sources if source is not None])

    def _load(self, entry: _Entry) -> Packed:
        if entry.stamp != stamp_of(entry.source):
            raise refuse("files_changed", name=entry.name, source=entry.source)
        hub = {**self._hub, "revision": entry.revision} if entry.revision else self._hub
        return self._pack(entry.name, adapter_from(entry.source, hub), check_targets=True)

    def _packed(self, entry: _Entry) -> Packed:
        packed = entry.packed
        if packed is None:
            loading, entry.loading = entry.loading, None
            packed = loading.result() if loading is not None else self._load(entry)
            with self._lock:
                self._keep(entry, packed)
        return packed

    def _keep(self, entry: _Entry, packed: Packed) -> None:
        """Holds an adapter in memory, and drops others for it where there is a limit."""
        others = [each for each in self._entries.values() if each.name != entry.name]
        if self.max_bytes is not None:
            fixed = packed.nbytes + sum(each.nbytes for each in others if each.source is None)
            droppable = [each for each in others if each.source is not None]
            # any adapter must find room beside those that can't be dropped
            needed = fixed + (max((each.nbytes for each in droppable), default=0) if entry.source is None else 0)
            if needed > self.max_bytes:
                raise refuse("pool_is_full", name=entry.name, needed=needed, max_bytes=self.max_bytes)
            held = sorted((each for each in droppable if each.packed is not None), key=lambda each: each.used)
            total = fixed + sum(each.nbytes for each in held)
            while total > self.max_bytes:
                dropped = held.pop(0)
                dropped.packed = None
                total -= dropped.nbytes
        entry.packed, entry.nbytes = packed, packed.nbytes
        self._uses += 1
        entry.used = self._uses

    # ---- adapters in and out of the model

    def swap(self, name: str, strength: float = 1.0) -> None:
        """Puts an adapter into the model. ``strength`` as in :func:`hotswap_lab.set_strength`.

        Raises
        ------
        HotswapError
            If there is no such adapter, its files can't be read any more, or the model was moved or merged.
        """
        with self._swap():
            check_strength(strength)
            if strength != 1:
                check_scalable(self._room.slot)
            entry = self._entries.get(name) or self._entry(name)
            packed = entry.packed or self._packed(entry)
            with self._write_access():
                if self._entries.get(name) is not entry:
                    entry = self._entry(name)  # removed meanwhile, or another one has its name
                    packed = self._packed(entry)
                self._check_room()
                history = self._history_with(self._state())
                self._write(packed, strength, history)
                self._uses += 1
                entry.used = self._uses

    def off(self) -> None:
        """Turns the adapter off: the model computes as the base model does, until the next swap or :meth:`undo`."""
        self.strength = 0

    def undo(self) -> None:
        """Takes the last swap, :meth:`off` or change of strength back.

        An adapter that was updated since comes back as it is now; one that was removed, as it was.

        Raises
        ------
        HotswapError
            If there is nothing to take back.
        """
        with self._swap():
            if not self._history:
                raise refuse("nothing_to_undo")
            self._check_room()
            packed = self._packed_of(self._history[-1])
            with self._write_access():
                self._check_room()
                self._write(packed, self._history[-1].strength, self._history[:-1])

    @contextlib.contextmanager
    def using(self, name: str, strength: float = 1.0) -> Iterator[AdapterPool]:
        """Puts an adapter in for the length of a ``with`` block; then the former one is back, after errors too.

        Swaps from other threads wait for the end of the block.
        """
        with self._swap():
            self._check_room()
            former, history = self._state(), self._history
            try:
                self.swap(name, strength)
                yield self
            finally:
                # the block is left for good: its adapter must not stay
                if self._history is not history:
                    put_back(lambda: self._put_back(former, history), f"leaves {name!r} in the model")

    def _put_back(self, former: _State, history: list[_State]) -> None:
        packed = self._packed_of(former)
        with self._write_access():
            self._check_room()
            self._write(packed, former.strength, history)

    def _swap(self) -> AbstractContextManager:
        """Nobody else swaps; the other threads may go on computing."""
        return guard(self._room.slot.host.base, computing=True)

    @contextlib.contextmanager
    def _write_access(self) -> Iterator[None]:
        """Nobody else computes or changes the pool. Not for what takes long."""
        with guard(self._room.slot.host.base), self._lock:
            yield

    def _state(self) -> _State:
        """What is in the model now, ready to be put back."""
        room, name = self._room, self._loaded
        entry = self._entries[name] if name is not None else None
        if room.in_use is not None and room.is_as_written:
            packed, strength = room.in_use
            return _State(entry if entry and entry.packed is packed else None, packed, strength)
        if entry is not None and entry.packed is not None:
            return _State(entry, entry.packed, room.strengths())  # only scaled since
        return _State(None, room.take(), 1.0)

    def _packed_of(self, state: _State) -> Packed:
        """The adapter that was in the model then, read again if it was dropped since."""
        entry = state.entry
        if entry is None:
            return cast(Packed, state.packed)
        now = self._entries.get(entry.name)
        if now is not None and now is not entry and now.lineage is entry.lineage:
            return self._packed(now)  # it was updated since
        return entry.packed or state.packed or self._load(entry)

    def _write(self, packed: Packed, strength: float | torch.Tensor, history: list[_State]) -> None:
        note = functools.partial(Journal.set_attribute, target=self, name="_history", value=history)
        apply([self._room.change_to(packed, strength, note)])

    def _history_with(self, state: _State) -> list[_State]:
        if state.entry is not None:
            # its entry has the weights, or can read them again
            state = _State(state.entry, None if state.entry.source else state.packed, state.strength)
        history = [*self._history[-HISTORY + 1 :], state]
        foreign = [number for number, each in enumerate(history) if each.entry is None]
        return history[foreign[-FOREIGN - 1] + 1 :] if len(foreign) > FOREIGN else history

    def _check_room(self) -> None:
        room = self._room
        if not room.is_intact():
            raise refuse("pool_lost_its_place")
        if room.slot.is_merged:
            raise refuse("merged", adapter_name=self.adapter_name)

    # ---- how it looks

    @property
    def rows(self) -> list[tuple[str, str, str, str, str, str]]:
        """The table: name, rank, alpha, layers, bytes, and whether it is the active one."""
        self._collect()
        active = self.active
        return [(*_describe(entry), "active" if entry.name == active else "") for entry in list(self._entries.values())]

    COLUMNS = ("adapter", "rank", "alpha", "layers", "bytes", "")

    @property
    def summary(self) -> str:
        """One line: how many adapters there are, and in how much memory."""
        plural = "" if len(self) == 1 else "s"
        return f"{len(self)} adapter{plural}, {self.nbytes:,} bytes packed, room of {self._room.nbytes:,} bytes"

    def __str__(self) -> str:
        return "\n".join([f"AdapterPool: {self.summary}", *text_table(self.COLUMNS, self.rows)])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table("AdapterPool", list(self.COLUMNS), self.rows, caption=self.summary)


def check_named(adapters: object) -> None:
    """Refuses adapters without names: a list of folders, or a single one.

    >>> check_named({"style": "folder"})
    """
    if adapters is not None and not isinstance(adapters, Mapping):
        raise refuse("adapters_without_names", kind=type(adapters).__name__)


def _check_kind(slot: Slot) -> Slot:
    """Refuses what has no layout that adapters could be packed in."""
    kind, name = slot.config.peft_type, slot.adapter_name
    if slot.method is not lora:
        raise refuse("pool_needs_lora", adapter_name=name, kind=getattr(kind, "value", kind))
    if beside := lora.other_state(slot.config):
        raise refuse("pool_needs_lora_alone", adapter_name=name, beside=", ".join(beside))
    return slot


def _describe(entry: _Entry) -> tuple[str, str, str, str, str]:
    packed = entry.packed
    if packed is None:
        return entry.name, "", "", "", "in its files"
    settings = [each for each in packed.content.settings if each is not None]
    ranks, alphas = sorted({each.rank for each in settings}), sorted({each.alpha for each in settings})
    return entry.name, _span(ranks), _span(alphas), str(len(settings)), f"{packed.nbytes:,}"


def _span(values: Sequence[float]) -> str:
    if not values:
        return "-"
    return f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"


def _roll_back(journal: Journal, base: torch.nn.Module) -> None:
    with guard(base):
        journal.roll_back()
