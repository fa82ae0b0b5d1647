"""Swaps of a LoRA in a diffusers pipeline: in all components, or in none of them.

Each component has a plan of its own, as a single model has. All of them are written, or prepared, at once.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch

from .. import compat
from ..beyond.passes import METHODS, PASSES
from ..core.change import apply
from ..core.errors import HotswapError, Refusal, advise, listing, refusal, refused
from ..core.host import carriers, find_host
from ..core.log import log_event
from ..core.plan import Plan
from ..core.planner import make_plan
from ..core.prepare import changes_to_prepare, slots_to_prepare
from ..core.slot import slot_for
from ..files.reading import Adapter
from ..swap import carry_out, commit, refusals_logged
from ..threads import bases_of, locked
from .lora_files import check_pipeline, components_of, read_pipeline_lora

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

#: adapters, and models, by the names of components
Adapters = Mapping[str, Adapter]
Models = dict[str, torch.nn.Module]
#: anything that ``load_lora_weights`` takes, or the result of :func:`read_pipeline_lora`
Source = str | os.PathLike[str] | Mapping[str, torch.Tensor] | Adapters

#: the name that ``load_lora_weights`` gives to the first adapter by default
DEFAULT_NAME = "default_0"

#: texts of refusals that name the functions for single models, and those for a pipeline
IN_PIPELINES = {
    "pass add_layers=True": "call hotswap_pipeline(..., add_layers=True)",
    "prepare_model_for_compiled_hotswap": "prepare_pipeline_for_compiled_hotswap",
}


@dataclass(frozen=True, eq=False)
class PipelinePlan:
    """A planned swap in a pipeline: one :class:`Plan` for each component that has the adapter.

    Parameters
    ----------
    plans:
        The plans by component name.

    Examples
    --------
    See :func:`plan_pipeline_hotswap`, which makes one.
    """

    plans: Mapping[str, Plan]

    @property
    def refusals(self) -> tuple[Refusal, ...]:
        """The reasons against the swap, each after its component's name; empty if it can be done."""
        named = [
            replace(reason, summary=f"{component}: {reason.summary}")
            for component, plan in self.plans.items()
            for reason in plan.refusals
        ]
        return advise(HotswapError(*named), IN_PIPELINES).refusals

    @property
    def ok(self) -> bool:
        """Whether the swap can be done in all components."""
        return not self.refusals

    @property
    def will_recompile(self) -> bool:
        """Whether a compiled component must be recompiled after this swap."""
        return any(plan.will_recompile for plan in self.plans.values())

    def commit(self) -> None:
        """Carry out all the plans, or none of them.

        Raises
        ------
        HotswapError
            If the swap was refused. After any error, every component is as it was.
        """
        self.raise_if_refused()
        commit(*self.plans.values())

    def raise_if_refused(self) -> None:
        """Raise a :class:`HotswapError` with all refusals, if there are any."""
        if self.refusals:
            raise HotswapError(*self.refusals)

    def __str__(self) -> str:
        return "\n".join(f"{component}: {plan}" for component, plan in self.plans.items())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return "".join(f"<h4>{component}</h4>{plan._repr_html_()}" for component, plan in self.plans.items())


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
    """Replace a loaded LoRA of a diffusers pipeline in place, in the text encoders, too.

    Afterwards the pipeline computes the same as a fresh one after ``load_lora_weights(source, adapter_name=...)``. The
    LoRA is turned off in components that the new file has no tensors for. Adapter weights (``set_adapters``) are 1
    again, as after a fresh load. Active adapters stay active. All components are swapped, or none.

    Parameters
    ----------
    pipe:
        The pipeline. Its components may be compiled.
    source:
        A file, a folder, the id of a Hub repository or a state dict, in any format that ``load_lora_weights`` takes; or
        the result of :func:`read_pipeline_lora`.
    adapter_name:
        The name of the loaded adapter to replace.
    components:
        The components to swap, such as ``["unet"]``. The others are left alone, and the file's tensors for them are
        ignored. Default: all components.
    add_layers:
        Whether to add layers that the loaded adapter lacks. Not possible in a compiled component.
    allow_nonfinite:
        Whether weights may contain NaN and infinity.
    **kwargs:
        Other arguments of ``load_lora_weights``: ``weight_name``, ``subfolder``, ``revision``, ``token``, ...

    Raises
    ------
    HotswapError
        If the result would differ from a fresh load. The pipeline is unchanged then.

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
    with refusals_logged(pipe, adapter_name, source if isinstance(source, (str, os.PathLike)) else "a state dict"):
        adapters = read_source(pipe, source, allow_nonfinite, kwargs)
        with locked(*bases_of(pipe)):
            plan = _decide(pipe, adapters, adapter_name, components, add_layers)
            plan.raise_if_refused()
            carry_out(list(plan.plans.values()))


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
    """Plan a :func:`hotswap_pipeline` without doing it: the change of each component, or the reasons against it.

    It takes the same arguments and never changes the pipeline.

    Parameters
    ----------
    pipe, source, adapter_name, components, add_layers, allow_nonfinite, **kwargs:
        As for :func:`hotswap_pipeline`.

    Returns
    -------
    PipelinePlan
        It prints as a table for each component, and its ``commit()`` carries it out.

    Raises
    ------
    HotswapError
        If the file can't be read or is for another kind of pipeline, or if no component has an adapter of that name.

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
    transformer: Swap a state dict into 'style': possible, 144 bytes to write
      action  layers  rank          scaling
      resize       1  2 -> 3        1
    """
    adapters = read_source(pipe, source, allow_nonfinite, kwargs)
    plans = _decide(pipe, adapters, adapter_name, components, add_layers).plans
    return PipelinePlan({component: _with_rounding_note(plan.kept()) for component, plan in plans.items()})


def prepare_pipeline_for_compiled_hotswap(
    pipe: DiffusionPipeline,
    adapters: Iterable[Source] = (),
    *,
    adapter_name: str | None = None,
    target_rank: int | None = None,
    components: Sequence[str] | None = None,
    check_compiled: Literal["error", "warn", "ignore"] = "error",
    **kwargs: object,
) -> None:
    """Prepare all components of a pipeline for swaps that never recompile it. Call it before compiling any of them.

    It calls :func:`hotswap_lab.prepare_model_for_compiled_hotswap` for each component that has an adapter. All or
    nothing: after an error the pipeline is as it was.

    Parameters
    ----------
    pipe:
        A pipeline with at least one loaded LoRA.
    adapters:
        The family that will be swapped in, each of them as ``source`` in :func:`hotswap_pipeline`. Each layer gets room
        for its highest rank, and layers that the loaded adapter lacks are reserved.
    adapter_name:
        The only adapter to prepare. Default: all of them.
    target_rank:
        A rank that every layer gets room for, in addition to those of ``adapters``.
    components:
        The components to prepare. Default: all that have an adapter.
    check_compiled:
        What to do if a component is compiled already: ``"error"``, ``"warn"`` or ``"ignore"``.
    **kwargs:
        Other arguments of ``load_lora_weights``, for reading the files.

    Raises
    ------
    HotswapError
        If a file can't be read or needs a component without an adapter, or if a component is compiled already or can't
        be prepared.

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
    ``pipe.set_adapters`` makes a text encoder's weights trainable, which recompiles a graph once: call it before
    compiling, too, or use :func:`hotswap_lab.set_strength` on the components.
    """
    options = dict(target_rank=target_rank, adapter_name=adapter_name, check_compiled=check_compiled)
    with refusals_logged(pipe, adapter_name):
        loaded = with_adapter(pipe, adapter_name, components)
        read = [for_these(read_source(pipe, source, False, kwargs), loaded, components) for source in adapters]
        families = {name: [adapters[name] for adapters in read if name in adapters] for name in loaded}
        if any(map(compat.is_group_offload_enabled, loaded.values())):
            raise refused("group_offloaded")
        # under one lock, so that no thread computes with a pipeline of which only some components are prepared
        with locked(*bases_of(pipe)):
            changes = [changes_to_prepare(METHODS, model, families[name], **options) for name, model in loaded.items()]
            slots = (slot for model in loaded.values() for slot in slots_to_prepare(METHODS, model, adapter_name))
            apply([change for of_one in changes for change in of_one], log=lambda: log_event("prepare", slots))


def _decide(
    pipe: DiffusionPipeline,
    adapters: Mapping[str, Adapter],
    adapter_name: str,
    components: Sequence[str] | None,
    add_layers: bool,
) -> PipelinePlan:
    loaded, plans = with_adapter(pipe, adapter_name, components), {}
    for name, adapter in for_all(for_these(adapters, loaded, components), loaded, adapter_name).items():
        model = loaded[name]
        slot = slot_for(METHODS, find_host(model, adapter_name), adapter_name)
        # in diffusers' own models, the file's tensors decide which layers are adapted, whatever its metadata says
        checks = not hasattr(type(slot.host.base), "load_lora_adapter")
        plan = make_plan(slot, adapter, passes=PASSES, add_layers=add_layers, check_targets=checks)
        if compat.is_group_offload_enabled(model):
            plan.refusals.append(refusal("group_offloaded"))
        plans[name] = plan
    return PipelinePlan(plans)


def for_all(adapters: Adapters, loaded: Models, adapter_name: str) -> dict[str, Adapter]:
    """The adapters of a file for all components: one without tensors, which is off, where the file has nothing.

    A fresh load would create no adapter there. The old config is kept, so that later files still find a slot.
    """
    source, complete = next(iter(adapters.values())).source, {}
    for name, model in loaded.items():
        config = find_host(model, adapter_name).configs[adapter_name]
        complete[name] = adapters.get(name) or Adapter(copy.deepcopy(config), {}, source)
    return complete


def with_adapter(pipe: DiffusionPipeline, adapter_name: str | None, components: Sequence[str] | None) -> Models:
    """The ``components`` (None: all) that have an adapter of this name (None: any), by name."""
    check_pipeline(pipe)
    models = components_of(pipe)
    chosen = list(models if components is None else components)
    names = {key: sorted({name for host in carriers(model) for name in host.configs}) for key, model in models.items()}
    loaded = {key: models[key] for key in chosen if names.get(key) and adapter_name in (None, *names[key])}
    if not loaded or set(chosen) - models.keys():
        known = "; ".join(f"{key}: {listing(map(repr, own)) or 'no adapter'}" for key, own in names.items())
        raise refused("not_in_pipeline", adapter_name=adapter_name, chosen=listing(chosen), loaded=known)
    return loaded


def for_these(adapters: Adapters, loaded: Models, components: Sequence[str] | None) -> dict[str, Adapter]:
    """The adapters for the chosen components; refuses those for components that have no adapter yet."""
    wanted = {name: adapter for name, adapter in adapters.items() if components is None or name in components}
    if not wanted or wanted.keys() - loaded.keys():
        raise refused("components_without_adapter", found=listing(adapters), loaded=listing(loaded))
    return wanted


def read_source(
    pipe: DiffusionPipeline, source: Source, allow_nonfinite: bool, arguments: Mapping[str, object]
) -> Adapters:
    if not (isinstance(source, Mapping) and any(isinstance(value, Adapter) for value in source.values())):
        return read_pipeline_lora(pipe, source, allow_nonfinite=allow_nonfinite, **arguments)
    if arguments:
        raise TypeError("arguments for reading a LoRA were passed with adapters that are already read")
    check_pipeline(pipe)
    return source


def _with_rounding_note(plan: Plan) -> Plan:
    """Add a note to the plan if values are rounded: a fresh load keeps the file's dtype, a swap keeps the model's."""
    in_model = {tensor.parameter.dtype for tensor in plan.slot.tensors}
    coarsest = max((torch.finfo(dtype).eps for dtype in in_model), default=0)
    in_file = {tensor.dtype for tensor in plan.adapter.tensors.values()}
    if finer := [str(dtype) for dtype in in_file if torch.finfo(dtype).eps < coarsest]:
        rounded_to = f"the {listing(in_model)} that the first LoRA was loaded in"
        plan.notes.append(f"the file has {listing(finer)}, which is rounded to {rounded_to}")
    return plan


def is_offloaded(model: torch.nn.Module) -> bool:
    """Whether the weights of a component are elsewhere until a hook brings them."""
    return compat.is_group_offload_enabled(model) or any(parameter.is_meta for parameter in model.parameters())
