"""AdapterPool: many adapters in memory, in the layout of the model's room, switched by name with one copy."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Literal, cast

import torch
from peft import PeftConfig
from tqdm.auto import tqdm

from ..beyond.base_values import ANY, base_weights_in, change_to_originals, kept_originals, lost_originals
from ..beyond.passes import METHODS, PASSES
from ..core.adapter import ORIGIN, Adapter
from ..core.change import Change, Step, apply
from ..core.compiled import frozen, frozen_in
from ..core.errors import HotswapError, advise, listing, refused
from ..core.host import find_host, kind_of, name_in
from ..core.journal import Journal
from ..core.loaded import state_of
from ..core.log import log_event
from ..core.planner import make_plan
from ..core.prepare import changes_to_prepare
from ..core.report import html_table, text_table
from ..core.room import Packed, Room, State
from ..core.slot import begin_change, room_of, slot_for
from ..core.strength import check_strength
from ..core.tensors import is_shared
from ..files.reading import read
from ..swap import get_strength, refusals_logged, warn_of
from ..threads import Block, locked, put_back
from . import snapshot
from .copies import Copies
from .learners import of_learner
from .members import Member, Members, check_named, drop, lines_and_notes
from .mixes import Mix
from .modules import module_tensors, taken_apart
from .rows import Row, RowRoom

#: a name, None for no adapter, or a mix: weights by name
Wanted = str | Mapping[str, float] | None
Strengths = Sequence[float] | None
#: how a batch repeats its rows: ABAB, AABB
Order = Literal["tile", "interleave"] | None
#: tensors, an adapter, or a learner, whose adapter is copied
Weights = Mapping[str, torch.Tensor] | Adapter | torch.nn.Module
#: the advice of a refusal that a pool can't follow, since its layers are fixed, and what to do instead
IN_POOLS = {
    "pass add_layers=True to add them, or load the adapter that targets the most layers first": "make the pool with "
    "this adapter among its `adapters`",
}


class AdapterPool:
    """Many adapters for one place in one model, in memory, switched by name.

    The model is prepared for all of them (ranks, layers), so that a swap never moves a tensor and never recompiles.
    Each adapter takes the memory of its own rank. A swap copies only this memory; its other work does not depend on the
    number of layers.

    If several threads answer requests, each with its own adapter, put ``with pool.using(name):`` around each whole
    answer. Swaps from other threads then wait for its end. In tasks of asyncio, use
    ``async with pool.using(name):``.

    Parameters
    ----------
    model:
        A model with a loaded LoRA adapter. Make the pool before compiling: a compiled model is accepted only if it was
        prepared for all of these adapters already.
    adapter_name:
        The name of the loaded adapter whose place the pool uses. Default: the only adapter, or ``"default"``.
    adapters:
        By their names, folders, Hub ids, :class:`Adapter` objects, or pairs of a state dict and its config.
    target_rank:
        A rank to make room for, for adapters that are added later. The highest rank of ``adapters`` always has room.
    max_bytes:
        How much memory the adapters may take together. The least recently used one is dropped, and read again from its
        source when it is needed.
    rows:
        The largest batch in which each row may have its own adapter (:meth:`assign`). The model's memory for adapters
        gets that many times as large, and each adapter takes the memory of the highest rank. Not for a model whose
        memory is shared with other processes, because these don't know the assigned rows.
    check_compiled:
        What to do if the model is compiled and has to be prepared: ``"error"``, ``"warn"`` or ``"ignore"``. Its next
        call compiles once more then.
    progress:
        Whether to show a progress bar while adapters are read.
    base_weights:
        The base model's own values by name, as for :func:`hotswap_lab.hotswap_adapter`. Needed if the file of an
        adapter has base weights, such as embeddings, because PEFT may have overwritten the model's with them; ``{}`` if
        it has not. If the model's differ from these, they are restored, and the loaded adapter is turned off.
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
        adapter_name: str | None = None,
        adapters: Mapping[str, object] | None = None,
        *,
        target_rank: int | None = None,
        max_bytes: int | None = None,
        rows: int = 1,
        check_compiled: Literal["error", "warn", "ignore"] = "error",
        progress: bool = True,
        base_weights: Mapping[str, torch.Tensor] | None = None,
        **hub: Any,
    ):
        check_named(adapters)
        self.model = model
        self.adapter_name: str = name_in(model, adapter_name)
        self._members = Members(hub, self._pack, max_bytes)
        self._refusals_logged = partial(refusals_logged, model, self.adapter_name)
        adapters, kind = dict(adapters or {}), RowRoom.of(rows)
        slot = slot_for(METHODS, find_host(model, self.adapter_name), self.adapter_name)
        # adapters of another method, or with more extra state, can't be packed
        if not slot.method.is_lora:
            raise refused("pool_needs_lora", adapter_name=self.adapter_name, kind=kind_of(slot.config))
        if fields := [field for field in slot.method.extra_state(slot.config) if field != "modules_to_save"]:
            raise refused("pool_needs_lora_alone", adapter_name=self.adapter_name, fields=", ".join(fields))
        base = slot.host.base
        with self._refusals_logged(), locked(base, computing=True):
            way_back = Journal()
            try:
                family = [read(source, only_config=True, **hub) for source in adapters.values()]
                with locked(base):
                    needs: dict[str, Any] = dict(target_rank=target_rank, check_compiled=check_compiled)
                    needs |= dict(adapter_name=self.adapter_name, extra_tensors=module_tensors, kind=kind)
                    apply(changes_to_prepare(METHODS, model, family, **needs), way_back)
                self._room = cast(Room, room_of(base, self.adapter_name))
                if base_weights is not None or kept_originals(base, self.adapter_name):
                    off = self._room.change_strength(0).copies
                    with locked(base):
                        apply([change_to_originals(self._room.slot, base_weights, off)], way_back)
                self._fill(adapters.items(), progress)
                self._log_swap = partial(log_event, "swap", [self._room.slot])
                log_event("prepare", [self._room.slot])
            except BaseException:
                if way_back.steps:
                    put_back(lambda: _roll_back(way_back, base), "leaves the model prepared")
                raise

    def _fill(self, adapters: Iterable[tuple[str, object]], progress: bool) -> None:
        is_known = False
        # a bar takes a lock of its own even if it shows nothing, and Ctrl-C may come right after that
        for name, source in tqdm(adapters, desc="packing", unit="adapter") if progress else adapters:
            self._members.add(name, source)
            packed = self._members[name].packed
            # checked now, because the next adapters may cause this one to be dropped
            if packed and not is_known and snapshot.is_in(self._room, packed):
                is_known, self._room.state = True, packed.state

    # ---- its contents

    @property
    def names(self) -> list[str]:
        """The names of all adapters, in the order they were added."""
        return list(self._members)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, name: object) -> bool:
        return name in self._members

    @property
    def active(self) -> str | None:
        """The name of the adapter that all rows compute with; None if there is none, or it is off or disabled."""
        owner = self._owner
        return owner.name if isinstance(owner, Member) else None

    @property
    def mix(self) -> dict[str, float] | None:
        """The weights of the mix that all rows compute with, by name; None if there is no mix, or it is off."""
        owner = self._owner
        return owner.weights if isinstance(owner, Mix) else None

    @property
    def _owner(self) -> Member | Mix | None:
        """The adapter or mix that all rows compute with, from a comparison of the weights; None if it is off or
        disabled, not of this pool, or written to by other code."""
        room = self._room
        owner = snapshot.owner_in(room, self._members) if not room.assigned and room.is_intact() else None
        if owner is None or state_of(room.slot) not in ("active", "merged") or not snapshot.has_weights_of(room, owner):
            return None
        with contextlib.suppress(HotswapError):  # if the user has scaled only some of the layers
            return None if self.strength == 0 else owner
        return owner

    @property
    def rows(self) -> list[Row]:
        """The adapter of each row of a batch, for labels on answers; empty after a swap, which is for all."""
        strength = self.strength if self._room.assigned else 1.0
        return [snapshot.row_of(packed, strength) for packed in self._room.assigned]

    @property
    def strength(self) -> float:
        """The strength of the adapter: 1 as trained, 0 not at all. May be set at any time; a swap sets it to 1."""
        return get_strength(self.model, self.adapter_name)

    @strength.setter
    def strength(self, value: float) -> None:
        with self._refusals_logged(), self._turn(), self._writing():
            check_strength(value, self._room.slot)
            apply([self._room.change_strength(value)], log=lambda: log_event("strength", [self._room.slot]))

    def version(self, name: str) -> int:
        """The version of an adapter's weights: 1 at first, one more with each :meth:`update`."""
        return self._members[name].version

    # ---- adapters in and out of the pool

    def add(self, name: str, source: object) -> None:
        """Read and pack an adapter; ``source`` as in ``adapters``. The model is not changed.

        Raises
        ------
        HotswapError
            If the name is taken, or the adapter can't be read or doesn't fit the room that was prepared.
        """
        with self._refusals_logged(name):
            self._members.add(name, source)

    def remove(self, name: str) -> None:
        """Remove an adapter from the pool. One in use can't be removed."""
        with self._refusals_logged(name), self._members.lock:
            if snapshot.is_used(self._room, self._members[name]):
                raise refused("adapter_in_use", name=name)
            apply([Change(steps=[lambda journal: journal.remove(self._members, name)])])

    def update(self, name: str, state_dict: Weights, config: PeftConfig | None = None) -> None:
        """Give an adapter new weights. If the model computes with it, it gets them at once.

        For training loops that produce new weights at every step. ``pool.version(name)`` is a new number as soon
        as the new weights are in place; there is never a mixture of old and new ones.

        Parameters
        ----------
        state_dict:
            ``lora_A`` of shape ``(rank, in_features)`` and ``lora_B`` of shape ``(out_features, rank)`` per layer. Or
            the learner: a model whose adapter of this name, or only adapter, is copied as it is now. Or an
            :class:`Adapter`, with its own config.
        config:
            Its config. Default: the learner's, or the one that the adapter has.
        """
        with self._refusals_logged(name), self._turn():
            member = self._members[name]
            if isinstance(state_dict, torch.nn.Module):
                packed, learned = of_learner(state_dict, config, member, self._room, self._pack)
            elif isinstance(state_dict, Adapter):
                packed, learned = self._pack(member, state_dict, True), None
            else:
                # new weights need nothing of the old ones, whose files may have changed since
                config = config or self._members.packed(member).state.config
                adapter = Adapter.from_state_dict(state_dict, config)
                packed, learned = self._pack(member, adapter, False), None

            def put(journal: Journal) -> None:
                drop(unneeded, journal)
                journal.set_attribute(member, "packed", packed)
                journal.set_attribute(member, "version", member.version + 1)
                journal.set_attribute(member, "learned", learned)

            in_model = snapshot.is_used(self._room, member)
            with self._writing() if in_model else self._members.lock:
                if self._members.get(name) is not member:
                    raise refused("not_in_pool", name=name, found="another thread has removed or replaced it meanwhile")
                if in_model:  # at its present strength
                    previous = snapshot.take(self._room, self._members)
                    current = snapshot.with_current_weights(self._room, self._members, previous, {member: packed})
                    change = snapshot.change_to(self._room, current)
                else:
                    change = begin_change(self._room.slot)
                unneeded = self._members.without_room(member, packed, updated=True)
                change.steps.append(put)
                apply([change], log=self._log_swap if in_model else None)

    def _pack(self, member: Member, adapter: Adapter, check_targets: bool) -> Packed:
        self._check_room()
        slot, sources, task_type = self._room.slot, [], adapter.config.task_type
        origin = adapter.source, adapter.revision, adapter.file
        if slot.config.modules_to_save:
            slot, adapter, sources = taken_apart(self._room, adapter, member.name)
        self._check_base_weights(adapter, member.name)
        # in diffusers' own models, the tensors decide which layers are adapted, whatever a file's metadata says; and a
        # pipeline's file has no config for a component that it has nothing for
        checks = check_targets and bool(adapter.tensors) and not hasattr(type(slot.host.base), "load_lora_adapter")
        plan = make_plan(slot, adapter, passes=PASSES, check_targets=checks)
        if plan.refusals:
            raise advise(HotswapError(*plan.refusals), IN_POOLS) from plan.cause
        if plan.is_decided:  # by a fresh load, which found only values that differ
            fields = ", ".join(slot.method.extra_state(adapter.config))
            raise refused("pool_needs_lora_alone", adapter_name=member.name, fields=fields)
        warn_of(plan)
        member.notes = plan.notes
        sources += [
            (target, source)
            for layer_plan in plan.layers
            for target, source in zip(layer_plan.layer.tensors, layer_plan.sources, strict=True)
            if source is not None
        ]
        if slot is not self._room.slot:
            # like after loading: PEFT adds a classifier's names to the given ones
            plan.config.modules_to_save, plan.config.task_type = [*self._room.slot.config.modules_to_save], task_type
        vars(plan.config)[ORIGIN] = origin
        settings = tuple([layer_plan.settings for layer_plan in plan.layers])
        return self._room.pack(State(settings, plan.config, member), sources)

    def _check_base_weights(self, adapter: Adapter, name: str) -> None:
        """Refuse an adapter with base weights in its file while these may be what PEFT has put into the model.

        The base model, which ``off`` and rows without an adapter compute, and all other adapters would have them.
        """
        host = self._room.slot.host
        paths = base_weights_in(host.base, adapter)
        if paths and ANY in lost_originals(host, self.adapter_name):
            raise refused("base_weights_unknown", name=name, found=listing(sorted(paths), 3))

    # ---- adapters in and out of the model

    def swap(self, name: str | Mapping[str, float], strength: float = 1.0) -> None:
        """Put an adapter, or a mix of several, into the model.

        Parameters
        ----------
        name:
            A name, or a mix such as ``{"pirate": 0.7, "haiku": 0.3}``: the sum of these, each times its weight.
        strength:
            As in :func:`hotswap_lab.set_strength`: 0 is the base model, 1 as trained.

        Raises
        ------
        HotswapError
            If there is no such adapter, its files can't be read any more, or the model was moved or merged.
        """
        self._swap(name, strength)

    def _swap(self, name: str | Mapping[str, float], strength: float, *steps: Step) -> None:
        members, is_mix = self._members, isinstance(name, Mapping)
        try:
            is_slow = is_mix or members[name].packed is None
            with self._turn() if is_slow else contextlib.nullcontext():
                if is_slow:
                    self._packed(name)  # while others go on computing
                with locked(self._room.slot.host.base), members.lock:
                    self._check_room()
                    if strength != 1:
                        check_strength(strength, self._room.slot)
                    # looked up here: another adapter may have this name by now
                    packed = self._packed(name) if is_mix else members.packed(members[name])
                    change = self._room.change_to_packed(packed, strength)
                    change.steps += steps
                    apply([change], log=self._log_swap)
        except HotswapError:
            with self._refusals_logged(name):  # only here, because entering it takes time
                raise

    def off(self) -> None:
        """Turn the adapter off: the model computes like the base model until the next swap."""
        self.strength = 0

    def assign(
        self, adapters: Sequence[Wanted], strengths: Strengths = None, *, copies: int = 1, order: Order = None
    ) -> None:
        """Give each row of the next batches its own adapter. Row 0 and rows that change are written.

        A proof runs before the first batch of each kind of inputs (their names, dtypes and numbers of axes) whose
        rows differ: ``2 + log2(rows)`` forwards, or three times as many where the rows may have other lengths, with a
        random adapter in some of the rows, show that the model keeps rows apart. If a layer does not, the forward
        refuses it by name. If other inputs than tokens feed a layer with an adapter, as images do, each batch is
        proven. The proof changes nothing, but its forwards call the user's own hooks. Call the model itself, with the
        whole batch: a library that sorts it gives the rows to other inputs.

        Parameters
        ----------
        adapters:
            For each row a name; None for the base model; or a mix such as ``{"pirate": 0.7, "haiku": 0.3}``: the sum of
            these adapters, each times its weight, as PEFT computes it with all of them active.
        strengths:
            The strength of each row; 1 is as trained.
        copies, order:
            How often a batch repeats each row, and how: ``"tile"``, as ``torch.cat([x, x])`` does (ABAB), or
            ``"interleave"``, as ``torch.repeat_interleave`` does (AABB). A model that is not compiled needs them
            only where the order is not known: ``generate`` of transformers has that of ``num_beams``,
            ``num_return_sequences`` and MusicGen's guidance, and diffusers' pipelines tile. With diffusers'
            ``num_images_per_prompt``, assign one row for each picture. A compiled model takes both for constants, and
            computes no other batches.

        Raises
        ------
        HotswapError
            If the pool was made for fewer rows, there is no such adapter, a mix needs a higher rank than has room, or
            ``copies`` has no order. Nothing is changed then.

        Examples
        --------
        >>> from hotswap_lab import AdapterPool, demo
        >>> model, tokenizer = demo.load("reverse")
        >>> family = {name: demo.adapter_path(name) for name in ("shout", "sort")}
        >>> pool = AdapterPool(model, adapters=family, rows=3, progress=False)
        >>> pool.assign(["shout", "sort", None])
        >>> demo.ask_all(model, tokenizer, ["hotswap"] * 3)
        ['HOTSWAP!', 'ahopstw', 'hotswap']
        >>> pool.assign(["shout", "sort"], copies=2, order="tile")
        >>> demo.ask_all(model, tokenizer, ["hotswap", "hotswap"] * 2)
        ['HOTSWAP!', 'ahopstw', 'HOTSWAP!', 'ahopstw']
        """
        self._assign(adapters, strengths, copies, order)

    def _assign(
        self, adapters: Sequence[Wanted], strengths: Strengths, copies: int, order: Order, *steps: Step
    ) -> None:
        if isinstance(adapters, (str, Mapping)):
            raise TypeError(f"assign() takes a list, an adapter or a mix for each row: got {adapters!r}")
        strengths = [1.0] * len(adapters) if strengths is None else strengths
        room, count = self._room, len(adapters)
        if not isinstance(room, RowRoom) or not 0 < count <= room.rows:
            raise refused("no_room_for_rows", count=count, rows=getattr(room, "rows", 1), wanted=max(count, 2))
        if not isinstance(copies, int) or copies < 1:
            raise refused("copies_is_no_number", copies=copies)
        if order not in (None, "tile", "interleave") or (copies > 1 and order is None and not room.batch.is_tiled):
            raise refused("copies_without_order", copies=copies, order=order)
        if len(strengths) != count:
            raise refused("strengths_of_others", strengths=len(strengths), rows=count)
        with self._refusals_logged(adapters), self._turn():
            self._all_packed(adapters)  # which may take long
            with self._writing():
                for strength in strengths:
                    check_strength(strength, room.slot)
                packed = self._all_packed(adapters)
                rows = [own and room.at_strength(own, by) for own, by in zip(packed, strengths, strict=True)]
                is_tiled = order == "tile" or (order is None and room.batch.is_tiled)
                change = room.change_rows(rows, Copies(copies) if is_tiled else Copies(repeats=copies))
                change.steps += steps
                apply([change], log=self._log_swap)

    def _all_packed(self, adapters: Sequence[Wanted]) -> list[Packed | None]:
        keys = [tuple(wanted.items()) if isinstance(wanted, Mapping) else wanted for wanted in adapters]
        # each mix once: rows with the same one are equal, which any model can compute
        by_key = dict(zip(keys, adapters, strict=True))
        packed = {key: None if wanted is None else self._packed(wanted) for key, wanted in by_key.items()}
        return [packed[key] for key in keys]

    def _packed(self, name: str | Mapping[str, float]) -> Packed:
        """An adapter or a mix, ready to be written."""
        if not isinstance(name, Mapping):
            return self._members.packed(self._members[name])
        if not name:
            raise refused("mix_of_nothing")
        self._check_room()
        if reason := self._room.slot.method.not_scaled(self._room.slot):
            raise refused("no_mix", names=[*name], found=reason)
        for weight in name.values():
            check_strength(weight, self._room.slot)
        shares = [(self._members[share], float(weight)) for share, weight in name.items()]
        return snapshot.weights_of(self._room, self._members, Mix(tuple(shares)))

    # ---- blocks, which restore the previous adapter

    def using(self, name: str | Mapping[str, float], strength: float = 1.0) -> Block[AdapterPool]:
        """Activate an adapter inside a block; restore the previous one on exit, even after an error.

        ``with pool.using(name):`` waits for other threads that swap or compute, and swaps from other threads wait for
        the end of the block. With asyncio, ``async with pool.using(name):`` also waits for other tasks of the same
        thread, and the event loop continues. Swaps of tasks that don't wait are refused. If the task is cancelled,
        the previous adapter is restored. An adapter that ``max_bytes`` has dropped is read in another thread.

        Blocks may be nested. Any thread may end a block, so a generator may yield inside, and a server may step it in
        several threads. While it sleeps, other code is outside of its block, also in the same thread: computing is
        allowed there, and a swap waits. Where no other code could end the block meanwhile, the swap is refused. This
        includes the code that steps the generator, and a test whose pytest fixture yields inside. To stream from a
        server, prefer an ``async def`` generator, which takes no thread to wait. A generator that is closed while
        others compute doesn't wait: the next block puts the previous adapter back before anything else.

        Parameters
        ----------
        name, strength:
            As for :meth:`swap`: a name or a mix, and 0 to 1 or more.

        Raises
        ------
        HotswapError
            As :meth:`swap`; if the model is in shared memory, because no other process waits for the block; if this
            would wait for a block that can't end meanwhile; or at the end, if a block inside of this one is still open.
            The end of that one then restores the adapter from before both.

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
        return self._block([name], lambda step: self._swap(name, strength, step), f"leaves {name!r} in the model")

    def assigned(
        self, adapters: Sequence[Wanted], strengths: Strengths = None, *, copies: int = 1, order: Order = None
    ) -> Block[AdapterPool]:
        """:meth:`assign` inside a block, ``with`` or ``async with``; restore the previous adapters on exit."""
        put_in = lambda step: self._assign(adapters, strengths, copies, order, step)  # noqa: E731
        return self._block(adapters, put_in, f"leaves {adapters!r} in the model")

    def _block(self, adapters: Sequence[Wanted], put_in: Callable[[Step], None], failure: str) -> Block[AdapterPool]:
        """A block that puts adapters in, and the previous ones at its end."""

        def begin(back: list[Callable[[], object]]) -> AdapterPool:
            if any(is_shared(band.memory) for band in self._room.bands):  # other processes may see what is written
                raise refused("block_in_shared_memory")
            self._check_room()
            previous = snapshot.take(self._room, self._members)
            put_in(lambda journal: back.append(lambda: self._put_back(previous)))
            return self

        def read_dropped() -> list[Callable[[], object]]:
            names = [name for wanted in adapters for name in ([wanted] if isinstance(wanted, str) else wanted or ())]
            members = filter(None, map(self._members.get, names))
            return [partial(self._members.packed, member) for member in members if member.packed is None]

        return Block(self._room.slot.host.base, begin, failure, read_dropped, partial(self._refusals_logged, adapters))

    def _put_back(self, previous: Packed) -> None:
        packed = snapshot.with_current_weights(self._room, self._members, previous)
        with self._writing():
            apply([snapshot.change_to(self._room, packed)], log=self._log_swap)

    # ---- turns

    def _turn(self) -> AbstractContextManager:
        """Keep other threads from swapping; they may go on computing."""
        return locked(self._room.slot.host.base, computing=True)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Keep other threads from computing and from changing the pool. Not for work that takes long."""
        with locked(self._room.slot.host.base), self._members.lock:
            self._check_room()
            yield

    def _check_room(self) -> None:
        if not self._room.is_intact():
            raise refused("pool_lost_its_place")
        if self._room.slot.is_merged:
            raise refused("merged", adapter_name=self.adapter_name)
        if frozen and (reason := frozen_in(self._room.slot.host.base)):
            raise refused("compiled_would_not_notice", reason=reason)

    # ---- display

    COLUMNS = ("adapter", "rank", "alpha", "layers", "bytes", "")

    @property
    def nbytes(self) -> int:
        """The memory that the packed adapters take, in bytes."""
        return sum(packed.nbytes for member in list(self._members.values()) if (packed := member.packed))

    @property
    def table(self) -> list[tuple[str, ...]]:
        """One line for each adapter: name, rank, alpha, layers, bytes, and whether it is active, or its weight."""
        notes = {name: f"{weight:g} of the mix" for name, weight in (self.mix or {}).items()} or {self.active: "active"}
        return [(*member.row, notes.get(member.name, "")) for member in list(self._members.values())]

    @property
    def summary(self) -> str:
        """One line: the number of adapters, and the memory that they take."""
        names = f"{len(self)} adapter{'s' * (len(self) != 1)}"
        rows = f" in each of {count} rows" if (count := getattr(self._room, "rows", 0)) else ""
        return f"{names}, {self.nbytes:,} bytes packed, room of {self._room.nbytes:,} bytes{rows}"

    def __str__(self) -> str:
        table, notes = lines_and_notes(self.table, self._members)
        return "\n".join([f"AdapterPool: {self.summary}", *text_table(self.COLUMNS, table), *notes])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        table, notes = lines_and_notes(self.table, self._members)
        return html_table("AdapterPool", self.COLUMNS, table, caption=self.summary, notes=notes)


def _roll_back(journal: Journal, base: torch.nn.Module) -> None:
    with locked(base):
        journal.roll_back()
