"""Pipelines: swapping what ``load_lora_weights`` loads, in all parts of a diffusers pipeline, or in none of them."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..core.adapter import Adapter
from ..core.change import apply
from ..core.commit import commit_together
from ..core.decide import make_plan
from ..core.errors import HotswapError, Refusal, listing, refuse
from ..core.host import carriers, find_host
from ..core.plan import Plan
from ..core.prepare import changes_to_prepare
from ..core.report import html_table
from ..core.slot import slot_for
from ..threads import swaps_of, writing
from .lora_files import check_pipeline, is_diffusers_model, parts_of, read_pipeline_lora

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

#: what can be swapped in: what ``load_lora_weights`` takes, or what :func:`read_pipeline_lora` returned
Source = str | os.PathLike | Mapping[str, torch.Tensor] | Mapping[str, Adapter]

#: the name that ``load_lora_weights`` gives to the first adapter unless told otherwise
DEFAULT_NAME = "default_0"


@dataclass(frozen=True, eq=False)
class PipelinePlan:
    """A swap in a whole pipeline that was decided but not done: one :class:`Plan` for each part with the adapter.

    Parameters
    ----------
    adapter_name, source:
        What is swapped out, and where what is swapped in comes from.
    plans:
        The plans by the names of the parts.
    pipeline_refusals, pipeline_notes:
        What speaks against the swap, and what a reader should know, beside those of the plans.

    Examples
    --------
    :func:`plan_pipeline_hotswap` makes one, and has an example.
    """

    adapter_name: str
    source: str
    plans: Mapping[str, Plan]
    pipeline_refusals: tuple[Refusal, ...] = ()
    pipeline_notes: tuple[str, ...] = ()

    @property
    def refusals(self) -> tuple[Refusal, ...]:
        """Why the swap can't be done, the part's name before each reason; empty if it can."""
        of_plans = [
            dataclasses.replace(refusal, summary=f"{part}: {refusal.summary}")
            for part, plan in self.plans.items()
            for refusal in plan.refusals
        ]
        return (*self.pipeline_refusals, *of_plans)

    @property
    def ok(self) -> bool:
        """Whether the swap can be done, in all parts."""
        return not self.refusals

    @property
    def will_recompile(self) -> bool:
        """Whether a compiled part must be compiled anew after this swap."""
        return any(plan.will_recompile for plan in self.plans.values())

    @property
    def nbytes(self) -> int:
        """The bytes that the swap writes to all parts."""
        return sum(plan.nbytes for plan in self.plans.values())

    def commit(self) -> None:
        """Carries the plans out, all of them or none.

        Raises
        ------
        HotswapError
            If the swap was refused. Whatever is raised, every part is as it was.
        """
        if self.refusals:
            raise HotswapError(*self.refusals)
        commit_together(list(self.plans.values()))

    @property
    def rows(self) -> list[tuple[str, str, int, str, str]]:
        """The report: part, action, number of layers, rank, scaling."""
        return [(part, *row) for part, plan in self.plans.items() for row in plan.rows]

    @property
    def notes(self) -> list[str]:
        """What a reader should know although it doesn't prevent the swap."""
        return [*self.pipeline_notes, *(f"{part}: {note}" for part, plan in self.plans.items() for note in plan.notes)]

    @property
    def title(self) -> str:
        """What is swapped, in a few words."""
        label = os.path.basename(os.path.normpath(self.source)) if os.path.exists(self.source) else self.source
        return f"Swap {label} into {self.adapter_name!r}"

    @property
    def verdict(self) -> str:
        """Whether the swap is possible, in a few words."""
        if self.refusals:
            return f"refused, {len(self.refusals)} reason{'s' if len(self.refusals) > 1 else ''}; nothing is written"
        return f"possible, {self.nbytes:,} bytes to write"

    COLUMNS = ("part", "action", "layers", "rank", "scaling")

    def __str__(self) -> str:
        table = [self.COLUMNS, *self.rows] if self.rows else []
        lines = [
            f"  {part:16}{action:8}{layers!s:>6}  {rank:14}{scaling}".rstrip()
            for part, action, layers, rank, scaling in table
        ]
        notes = [f"  note: {note}" for note in self.notes]
        return "\n".join([f"{self.title}: {self.verdict}", *lines, *notes, *map(str, self.refusals)])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table(
            self.title,
            list(self.COLUMNS),
            self.rows,
            caption=self.verdict,
            notes=[*self.notes, *map(str, self.refusals)],
        )


def hotswap_pipeline(
    pipe: DiffusionPipeline,
    source: Source,
    adapter_name: str = DEFAULT_NAME,
    *,
    components: Sequence[str] | None = None,
    add_layers: bool = False,
    allow_nonfinite: bool = False,
    **kwargs: object,
) -> None:
    """Replaces a LoRA that ``load_lora_weights`` loaded into a diffusers pipeline, in place, text encoders included.

    Afterwards the pipeline gives what a fresh one gives after ``load_lora_weights(source, adapter_name=adapter_name)``.
    Parts that the new file has nothing for are turned off. Adapter weights (``set_adapters``) are back at 1, as after a
    fresh load, and which adapters are active stays as it is. All parts are swapped, or none.

    Parameters
    ----------
    pipe:
        The pipeline. Its parts may be compiled.
    source:
        A file, a folder, the id of a Hub repository or a state dict, in any format that ``load_lora_weights`` takes; or
        what :func:`read_pipeline_lora` returned.
    adapter_name:
        The name of the loaded adapter to replace.
    components:
        The parts to swap, such as ``["unet"]``; all others are left alone, and what the file has for them is not used.
        Default: all parts.
    add_layers:
        Whether layers that the loaded adapter lacks are added. Not possible in a compiled part.
    allow_nonfinite:
        Whether NaN and infinity among the weights are let through.
    **kwargs:
        What ``load_lora_weights`` takes: ``weight_name``, ``subfolder``, ``revision``, ``token``, ...

    Raises
    ------
    HotswapError
        If the swap can't be right. The pipeline is untouched then.

    Examples
    --------
    >>> import torch
    >>> from diffusers import FluxPipeline, FluxTransformer2DModel
    >>> from hotswap_lab import hotswap_pipeline
    >>> transformer = FluxTransformer2DModel(
    ...     in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=1,
    ...     joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4),
    ... )
    >>> pipe = FluxPipeline(None, None, None, None, None, None, transformer)
    >>> def lora(rank):
    ...     tensors = {"A.weight": torch.ones(rank, 4), "B.weight": torch.ones(8, rank)}
    ...     return {f"transformer.x_embedder.lora_{key}": tensor for key, tensor in tensors.items()}
    >>> pipe.load_lora_weights(lora(2), adapter_name="style")
    >>> hotswap_pipeline(pipe, lora(3), "style")
    >>> pipe.transformer.peft_config["style"].r
    3

    Notes
    -----
    diffusers' own ``load_lora_weights(..., hotswap=True)`` refuses files with tensors for a text encoder.
    """
    check_pipeline(pipe)
    with swaps_of(*_bases(pipe)):
        plan_pipeline_hotswap(
            pipe,
            source,
            adapter_name,
            components=components,
            add_layers=add_layers,
            allow_nonfinite=allow_nonfinite,
            **kwargs,
        ).commit()


def plan_pipeline_hotswap(
    pipe: DiffusionPipeline,
    source: Source,
    adapter_name: str = DEFAULT_NAME,
    *,
    components: Sequence[str] | None = None,
    add_layers: bool = False,
    allow_nonfinite: bool = False,
    **kwargs: object,
) -> PipelinePlan:
    """The dry run of :func:`hotswap_pipeline`: what would be written to each part, or why nothing can be.

    Takes the same arguments and never changes the pipeline.

    Parameters
    ----------
    pipe, source, adapter_name, components, add_layers, allow_nonfinite, **kwargs:
        As for :func:`hotswap_pipeline`.

    Returns
    -------
    PipelinePlan
        Shows itself as a table, as text and in a notebook; its ``commit()`` carries it out.

    Raises
    ------
    HotswapError
        If the file can't be read or is for another kind of pipeline, or no part has an adapter of that name.

    Examples
    --------
    >>> import torch
    >>> from diffusers import FluxPipeline, FluxTransformer2DModel
    >>> from hotswap_lab import plan_pipeline_hotswap
    >>> transformer = FluxTransformer2DModel(
    ...     in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=1,
    ...     joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4),
    ... )
    >>> pipe = FluxPipeline(None, None, None, None, None, None, transformer)
    >>> def lora(rank):
    ...     tensors = {"A.weight": torch.ones(rank, 4), "B.weight": torch.ones(8, rank)}
    ...     return {f"transformer.x_embedder.lora_{key}": tensor for key, tensor in tensors.items()}
    >>> pipe.load_lora_weights(lora(2), adapter_name="style")
    >>> print(plan_pipeline_hotswap(pipe, lora(3), "style"))
    Swap a state dict into 'style': possible, 144 bytes to write
      part            action  layers  rank          scaling
      transformer     resize       1  2 -> 3        1
    """
    check_pipeline(pipe)
    parts = _chosen(pipe, components)
    loaded = [name for name, model in parts.items() if _has_adapter(model, adapter_name)]
    if not loaded:
        raise refuse(
            f"Adapter {adapter_name} not found.",
            found=_what_is_loaded(parts),
            expected="the name of an adapter that is loaded, since its place is what the new one takes",
            next_step="load a first LoRA with pipe.load_lora_weights(..., adapter_name=...), then swap others in",
        )
    adapters = _read(pipe, source, allow_nonfinite, kwargs)
    label = next(iter(adapters.values())).source if adapters else "nothing"
    refusals = [
        Refusal(
            f"The new LoRA has tensors for {name}, where no adapter {adapter_name!r} is loaded.",
            found=_what_is_loaded({name: parts[name]}),
            expected="an adapter of that name in every part that the new LoRA has tensors for",
            next_step="load first the LoRA that has most parts, or name the `components` to swap",
        )
        for name in adapters
        if name in parts and name not in loaded
    ]
    if foreign := sorted(adapters.keys() - parts_of(pipe).keys()):
        raise refuse(
            f"The LoRA is not for this {type(pipe).__name__}.",
            found=f"tensors for {listing(foreign)}",
            expected=f"tensors for its parts only: {listing(parts_of(pipe), 9)}",
            next_step="read it for this pipeline: read_pipeline_lora(pipe, source)",
        )
    if not adapters.keys() & parts.keys():
        raise refuse(
            "Hot swapping the adapter did not succeed, the LoRA has nothing for these parts.",
            found=f"tensors for {listing(adapters) or 'no part'}",
            expected=f"tensors for {listing(parts)}",
            next_step="check `components`, or use a LoRA that was made for this pipeline",
        )
    plans, notes = {}, []
    for name in loaded:
        refusals += _offloading(name, parts[name])
        plans[name] = _plan_part(parts[name], adapters.get(name), adapter_name, label, add_layers).kept()
        notes += _rounding(name, plans[name])
    return PipelinePlan(adapter_name, label, plans, tuple(refusals), tuple(notes))


def prepare_pipeline_for_compiled_hotswap(
    pipe: DiffusionPipeline,
    adapters: Iterable[Source] = (),
    *,
    adapter_name: str | None = None,
    target_rank: int | None = None,
    components: Sequence[str] | None = None,
    **kwargs: object,
) -> None:
    """Makes every part of a pipeline ready for swaps that never recompile it. Call it before compiling any part.

    Does for each part that has an adapter what :func:`hotswap_lab.prepare_model_for_compiled_hotswap` does for a model.
    All or nothing: after an error the pipeline is as it was.

    Parameters
    ----------
    pipe:
        A pipeline with at least one loaded LoRA.
    adapters:
        The family that will be swapped in, each of them as ``source`` in :func:`hotswap_pipeline`: room is made for the
        highest rank at each layer, and layers that the loaded adapter lacks are reserved.
    adapter_name:
        Prepares only the adapter of this name. Default: all of them.
    target_rank:
        A rank to make room for in every layer, beside those of ``adapters``.
    components:
        The parts to prepare. Default: all that have an adapter.
    **kwargs:
        What ``load_lora_weights`` takes, for reading the files.

    Raises
    ------
    HotswapError
        If a file can't be read or needs a part without an adapter, a part is compiled already, or can't be prepared.

    Examples
    --------
    >>> import torch
    >>> from diffusers import FluxPipeline, FluxTransformer2DModel
    >>> from hotswap_lab import plan_pipeline_hotswap, prepare_pipeline_for_compiled_hotswap
    >>> transformer = FluxTransformer2DModel(
    ...     in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=1,
    ...     joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4),
    ... )
    >>> pipe = FluxPipeline(None, None, None, None, None, None, transformer)
    >>> def lora(rank):
    ...     tensors = {"A.weight": torch.ones(rank, 4), "B.weight": torch.ones(8, rank)}
    ...     return {f"transformer.x_embedder.lora_{key}": tensor for key, tensor in tensors.items()}
    >>> pipe.load_lora_weights(lora(2), adapter_name="style")
    >>> prepare_pipeline_for_compiled_hotswap(pipe, [lora(3), lora(5)])
    >>> plan_pipeline_hotswap(pipe, lora(3), "style").plans["transformer"].counts["pad"]
    1

    Notes
    -----
    ``pipe.set_adapters`` makes a text encoder's weights trainable, which a compiled graph notices once: call it before
    compiling, too, or use :func:`hotswap_lab.set_strength` on the parts.
    """
    check_pipeline(pipe)
    parts = _chosen(pipe, components)
    loaded = {name: model for name, model in parts.items() if _has_adapter(model, adapter_name)}
    if not loaded:
        raise refuse(
            "No adapter layers found in the pipeline.",
            found=_what_is_loaded(parts),
            expected="a pipeline into which a LoRA was loaded",
            next_step="load the LoRA that has most parts and layers, then prepare the pipeline",
        )
    families: dict[str, list[Adapter]] = {name: [] for name in loaded}
    for source in _as_list(adapters):
        for name, adapter in _read(pipe, source, False, kwargs).items():
            if name in families:
                families[name].append(adapter)
            elif name in parts:
                raise refuse(
                    f"There is no adapter in {name} whose place {adapter.label} could take.",
                    found=_what_is_loaded(parts),
                    expected="an adapter in every part that one of the family has tensors for",
                    next_step="load first the LoRA that has most parts, or name the `components` to prepare",
                )
    for name, model in loaded.items():
        if refusals := _offloading(name, model):
            raise HotswapError(*refusals)
    options = dict(target_rank=target_rank, adapter_name=adapter_name, may_be_compiled=False)
    # all at once: between two parts, nobody may compute with a pipeline of which one is prepared
    with writing(*_bases(pipe)):
        changes = [changes_to_prepare(model, families[name], **options) for name, model in loaded.items()]
        apply([change for of_part in changes for change in of_part])


def _plan_part(
    model: torch.nn.Module, adapter: Adapter | None, adapter_name: str, label: str, add_layers: bool
) -> Plan:
    slot = slot_for(find_host(model, adapter_name), adapter_name)
    if adapter is None:
        # a fresh load would put nothing here; the old config stays, so that later files find a place to go
        return make_plan(slot, Adapter(copy.deepcopy(slot.config), {}, label), all_off=True)
    plan = make_plan(slot, adapter, add_layers=add_layers)
    if not plan.ok and is_diffusers_model(slot.host.base):
        # a file's tensors decide there which layers are adapted, whatever its metadata says; transformers goes by that
        plan = make_plan(slot, adapter, add_layers=add_layers, check_targets=False)
    return plan


def _chosen(pipe: DiffusionPipeline, components: Sequence[str] | None) -> dict[str, torch.nn.Module]:
    parts = parts_of(pipe)
    if components is None:
        return parts
    components = [components] if isinstance(components, str) else list(components)
    if unknown := [name for name in components if name not in parts]:
        raise refuse(
            "The pipeline has no such part.",
            found=f"components={components!r}, without {listing(map(repr, unknown))} in the pipeline",
            expected=f"some of {listing(map(repr, parts), 9)}",
            next_step="check the names",
        )
    return {name: parts[name] for name in components}


def _bases(pipe: DiffusionPipeline) -> list[torch.nn.Module]:
    return [host.base for part in parts_of(pipe).values() for host in carriers(part)]


def _has_adapter(model: torch.nn.Module, adapter_name: str | None) -> bool:
    """Whether the model has an adapter of this name; None stands for any."""
    names = {name for host in carriers(model) for name in host.configs}
    return adapter_name in names if adapter_name is not None else bool(names)


def _what_is_loaded(parts: Mapping[str, torch.nn.Module]) -> str:
    names = {part: sorted(name for host in carriers(model) for name in host.configs) for part, model in parts.items()}
    return "; ".join(f"{part}: {listing(map(repr, each)) or 'no adapter'}" for part, each in names.items())


def _read(
    pipe: DiffusionPipeline, source: Source, allow_nonfinite: bool, arguments: Mapping[str, object]
) -> dict[str, Adapter]:
    if isinstance(source, Mapping) and any(isinstance(value, Adapter) for value in source.values()):
        if arguments:
            raise TypeError("arguments for reading a LoRA were passed with adapters that are already read")
        return dict(source)
    return read_pipeline_lora(pipe, source, allow_nonfinite=allow_nonfinite, **arguments)


def _as_list(sources: object) -> list:
    return [sources] if isinstance(sources, (str, os.PathLike, Mapping)) else list(sources)


def _rounding(name: str, plan: Plan) -> list[str]:
    """A fresh load takes each file's own precision; a swap keeps that of the memory it writes to."""
    there = {tensor.parameter.dtype for tensor in plan.slot.tensors if tensor.parameter.is_floating_point()}
    coming = {tensor.dtype for tensor in plan.adapter.tensors.values()}
    if not (finer := {dtype for dtype in coming if any(torch.finfo(dtype).eps < torch.finfo(e).eps for e in there)}):
        return []
    return [
        f"{name}: the file has {listing(sorted(map(str, finer)))}, which is rounded to the "
        f"{listing(sorted(map(str, there)))} that the first LoRA was loaded in"
    ]


def _offloading(name: str, model: torch.nn.Module) -> list[Refusal]:
    """Group offloading keeps weights in copies of its own, which a swap would not reach."""
    for module in model.modules():
        registry = module.__dict__.get("_diffusers_hook")
        if registry is not None and registry.get_hook("group_offloading") is not None:
            return [
                Refusal(
                    f"{name}: weights that are offloaded in groups can't be swapped in place.",
                    found="diffusers' group offloading, which keeps copies of the weights",
                    expected="weights that stay where they are, or model offloading",
                    next_step="swap without group offloading, or use pipe.load_lora_weights under another name",
                )
            ]
    return []
