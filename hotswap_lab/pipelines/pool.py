"""PipelinePool: many LoRA files for a diffusers pipeline in memory, switched by name in all components at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from ..core.change import together
from ..core.compiled import unwrap_compiled
from ..core.errors import refused
from ..core.journal import Journal
from ..files.reading import Adapter
from ..pools.adapter_pool import AdapterPool
from ..pools.members import check_named
from ..swap import refusals_logged
from ..threads import Block, bases_of, locked, share_turn
from .lora_files import components_of
from .pipeline import Source, for_all, for_these, prepare_pipeline_for_compiled_hotswap, read_source, with_adapter

#: LoRA files by the names that they get in the pool
Files = Mapping[str, Source]


class PipelinePool:
    """Many LoRA files for one diffusers pipeline, in memory, switched by name: in all components, or in none.

    It has an :class:`~hotswap_lab.AdapterPool` for each component that has the adapter. Where a file has nothing for a
    component, the adapter is off there. All components are prepared for all files, so that a swap never moves a tensor
    and never recompiles. They share one turn: a thread that computes with one of them, or is inside of
    ``with pool.using(name):``, holds back swaps in all of them.

    Parameters
    ----------
    pipe:
        A pipeline with a loaded LoRA in each component that a file has tensors for, under one name: load the file with
        the most components first. Make the pool before compiling.
    adapter_name:
        The name of the loaded adapter whose place the pool uses.
    adapters:
        By their names: files, folders, ids of Hub repositories or state dicts, in any format that
        ``load_lora_weights`` takes; or results of :func:`~hotswap_lab.read_pipeline_lora`.
    target_rank:
        A rank to make room for, for files that are added later and for mixes. The highest rank of ``adapters`` always
        has room.
    **kwargs:
        Other arguments of ``load_lora_weights``, for reading all of the files: ``weight_name``, ``token``, ...

    Raises
    ------
    HotswapError
        If a file can't be read, doesn't fit, or needs a component without the adapter, or if a component can't be
        prepared. The pipeline is unchanged then.

    Examples
    --------
    >>> import torch
    >>> from diffusers import FluxPipeline, FluxTransformer2DModel
    >>> from hotswap_lab import PipelinePool
    >>> transformer = FluxTransformer2DModel(
    ...     in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=1,
    ...     joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4),
    ... )
    >>> pipe = FluxPipeline(None, None, None, None, None, None, transformer)
    >>> def lora(rank):
    ...     tensors = {"A.weight": torch.ones(rank, 4), "B.weight": torch.ones(8, rank)}
    ...     return {f"transformer.x_embedder.lora_{key}": tensor for key, tensor in tensors.items()}
    >>> pipe.load_lora_weights(lora(2), adapter_name="style")
    >>> pool = PipelinePool(pipe, "style", {"ink": lora(3), "oil": lora(5)})
    >>> pool.swap("ink")
    >>> with pool.using("oil"):
    ...     pool.active, pipe.transformer.peft_config["style"].r
    ('oil', 5)
    >>> pool.active
    'ink'
    """

    def __init__(
        self, pipe: Any, adapter_name: str, adapters: Files, *, target_rank: int | None = None, **kwargs: object
    ):
        check_named(adapters)
        self.pipe: Any = pipe
        self.adapter_name: str = adapter_name
        self._reading, self._refusals_logged = kwargs, partial(refusals_logged, pipe, adapter_name)
        with self._refusals_logged():
            self._loaded = with_adapter(pipe, adapter_name, None)
            #: for `loaded` and `in_use`, which look for models in attributes
            self.model: torch.nn.ModuleList = torch.nn.ModuleList(self._loaded.values())
            self._bases = bases_of(self)
            read = {name: self._read(name, source) for name, source in adapters.items()}
            with locked(*self._bases):
                share_turn(self._bases)
                way_back = Journal()
                try:
                    with together(way_back):
                        needs: dict[str, Any] = dict(target_rank=target_rank, adapter_name=adapter_name)
                        prepare_pipeline_for_compiled_hotswap(pipe, read.values(), **needs)
                    self._pools: dict[str, AdapterPool] = {}
                    for key, model in self._loaded.items():
                        family = {name: adapters_of[key] for name, adapters_of in read.items()}
                        self._pools[key] = AdapterPool(model, adapter_name, family, progress=False)
                except BaseException:
                    way_back.roll_back()
                    raise

    def _read(self, name: str, source: Source) -> dict[str, Adapter]:
        with self._refusals_logged(name):
            adapters = for_these(read_source(self.pipe, source, False, self._reading), self._loaded, None)
        return for_all(adapters, self._loaded, self.adapter_name)

    def _in_all_pools(self, action: Callable[[AdapterPool, str], object]) -> None:
        """Do the same in the pools of all components, and write all of it, or nothing."""
        with self._refusals_logged(), locked(*self._bases), together():
            live = components_of(self.pipe)  # a component that was freed is None, and is in no answer
            for component, model in self._loaded.items():
                if component in live and unwrap_compiled(live[component]) is not unwrap_compiled(model):
                    raise refused("component_replaced", component=component)
            for component, pool in self._pools.items():
                action(pool, component)

    @property
    def names(self) -> list[str]:
        """The names of all adapters, in the order of the files."""
        return next(iter(self._pools.values())).names

    def __contains__(self, name: object) -> bool:
        return name in self.names

    @property
    def active(self) -> str | None:
        """The name of the adapter that all components compute with; None if there is none, or it is off."""
        names = {pool.active for pool in self._pools.values()}
        return names.pop() if len(names) == 1 else None

    @property
    def strength(self) -> float | None:
        """The strength of the adapter: 1 as trained, 0 not at all; None if the components have different ones.

        It may be set at any time; a swap sets it to 1.
        """
        # a component that the file has nothing for has none
        strengths = {pool.strength for pool in self._pools.values() if any(pool._room.state.on)} or {1.0}
        return strengths.pop() if len(strengths) == 1 else None

    @strength.setter
    def strength(self, value: float) -> None:
        self._in_all_pools(lambda pool, _: setattr(pool, "strength", value))

    def version(self, name: str) -> int:
        """The version of an adapter's weights: 1 at first, one more with each :meth:`update`."""
        return next(iter(self._pools.values())).version(name)

    def add(self, name: str, source: Source) -> None:
        """Read a LoRA file into memory; ``source`` as in ``adapters``. The pipeline is not changed.

        Raises
        ------
        HotswapError
            If the name is taken, or the file can't be read or doesn't fit what was prepared. Nothing is changed then.
        """
        adapters = self._read(name, source)
        self._in_all_pools(lambda pool, component: pool.add(name, adapters[component]))

    def remove(self, name: str) -> None:
        """Remove an adapter from the pool. One that a component computes with can't be removed."""
        self._in_all_pools(lambda pool, _: pool.remove(name))

    def update(self, name: str, source: Source) -> None:
        """Give an adapter new weights; ``source`` as in ``adapters``. If the pipeline computes with it, it gets them.

        Raises
        ------
        HotswapError
            If there is no such adapter, or the file can't be read or doesn't fit. Nothing is changed then.
        """
        adapters = self._read(name, source)
        self._in_all_pools(lambda pool, component: pool.update(name, adapters[component]))

    def swap(self, name: str | Mapping[str, float], strength: float = 1.0) -> None:
        """Put an adapter, or a mix of several, into all components, or into none: see :meth:`AdapterPool.swap`."""
        self._in_all_pools(lambda pool, _: pool.swap(name, strength))

    def off(self) -> None:
        """Turn the adapter off: the pipeline computes like the base model until the next swap."""
        self.strength = 0

    def using(self, name: str | Mapping[str, float], strength: float = 1.0) -> Block[PipelinePool]:
        """Activate an adapter inside a block, ``with`` or ``async with``; restore the previous one on exit.

        Put it around each whole answer: threads and tasks then take turns. See :meth:`AdapterPool.using`.
        """

        def begin(back: list[Callable[[], object]]) -> PipelinePool:
            self._in_all_pools(lambda pool, _: pool.using(name, strength).begin(back))
            return self

        return Block(
            self._bases[0], begin, f"leaves {name!r} in the pipeline", tuple, partial(self._refusals_logged, name)
        )

    def __str__(self) -> str:
        return "\n".join(f"{component}: {pool}" for component, pool in self._pools.items())

    __repr__ = __str__
