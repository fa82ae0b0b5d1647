"""Reading a diffusers LoRA file: one adapter for each component of the pipeline that the file has tensors for.

diffusers supports many key formats, and every pipeline class has a ``load_lora_weights`` of its own. None of that is
repeated here: this module calls the pipeline's own function on a stand-in, whose components record their adapters
instead of loading them. So each adapter is the one that a fresh load would get, and the pipeline is not changed.

Tests: ``tests/pipelines/test_pipeline.py``.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from peft import PeftConfig

from .. import compat
from ..beyond.base_twin import make_base_twin
from ..core.errors import listing, refused
from ..files.reading import Adapter

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

#: config and tensors by component name
Records = dict[str, tuple[PeftConfig, Mapping[str, torch.Tensor]]]


def read_pipeline_lora(
    pipe: DiffusionPipeline,
    source: str | os.PathLike[str] | Mapping[str, torch.Tensor],
    *,
    allow_nonfinite: bool = False,
    **kwargs: object,
) -> dict[str, Adapter]:
    """Read a LoRA for a diffusers pipeline into one :class:`Adapter` for each component.

    Use it to swap the same file in more than once, and to get an ``Adapter`` for ``verify_hotswap``, or for an
    ``AdapterPool`` on one component. It reads all formats that ``pipe.load_lora_weights`` does (diffusers' own keys,
    PEFT's, kohya's, ..., alphas, metadata), with the same result.

    Parameters
    ----------
    pipe:
        The pipeline that the file is for. It is only read.
    source:
        A file, a folder, the id of a Hub repository, or a state dict.
    allow_nonfinite:
        Whether weights may contain NaN and infinity.
    **kwargs:
        Other arguments of ``load_lora_weights``: ``weight_name``, ``subfolder``, ``revision``, ``token``, ...

    Returns
    -------
    dict
        Adapters by component name, such as ``"unet"`` and ``"text_encoder"``.

    Raises
    ------
    HotswapError
        If the LoRA can't be read, or is for another kind of pipeline.

    Examples
    --------
    >>> import torch
    >>> from diffusers import FluxPipeline, FluxTransformer2DModel
    >>> from hotswap_lab import read_pipeline_lora
    >>> transformer = FluxTransformer2DModel(
    ...     in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=1,
    ...     joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4),
    ... )
    >>> pipe = FluxPipeline(None, None, None, None, None, None, transformer)
    >>> lora = {"A.weight": torch.ones(2, 4), "B.weight": torch.ones(8, 2)}
    >>> lora = {f"transformer.x_embedder.lora_{key}": tensor for key, tensor in lora.items()}
    >>> adapters = read_pipeline_lora(pipe, lora)
    >>> adapters["transformer"].config.r
    2
    """
    check_pipeline(pipe)
    is_file = isinstance(source, (str, os.PathLike))
    label = os.fspath(source) if is_file else "a state dict"
    # these say how diffusers makes the adapter, so a caller can't override them
    arguments = dict(adapter_name="default", hotswap=False, low_cpu_mem_usage=True, **kwargs)
    try:
        records = _recorded_load(pipe, label if is_file else dict(source), arguments)
    except Exception as error:  # diffusers raises many types: no such file, another format, another model's layers
        kind, parts = type(pipe).__name__, listing(components_of(pipe), 9)
        raise refused("pipeline_lora_unreadable", label=label, kind=kind, error=error, components=parts) from error
    adapters = {}
    for component, (config, tensors) in records.items():
        adapter = Adapter.from_state_dict(tensors, config, allow_nonfinite=allow_nonfinite)
        adapters[component] = replace(adapter, source=label)
    return adapters


def check_pipeline(pipe: object) -> None:
    """Refuse an object that is not a pipeline that LoRA can be loaded into."""
    if not callable(getattr(pipe, "load_lora_weights", None)) or not hasattr(pipe, "_lora_loadable_modules"):
        raise refused("not_a_pipeline", name=type(pipe).__name__)


def components_of(pipe: DiffusionPipeline) -> dict[str, torch.nn.Module]:
    """The components of a pipeline that LoRA can be loaded into, by name, except those that are None."""
    named = ((name, getattr(pipe, name, None)) for name in pipe._lora_loadable_modules)
    return {name: module for name, module in named if isinstance(module, torch.nn.Module)}


def _recorded_load(pipe: DiffusionPipeline, source: str | dict[str, torch.Tensor], arguments: dict) -> Records:
    """Call the pipeline's ``load_lora_weights`` on a stand-in, and return the adapter of each component."""
    records: Records = {}
    keys: list[str] = []

    def lora_state_dict(*args: object, **kwargs: object) -> tuple | dict:
        converted = pipe.lora_state_dict(*args, **kwargs)
        keys.extend(converted[0] if isinstance(converted, tuple) else converted)
        return converted

    stand_in = object.__new__(type(pipe))
    # through __dict__, because setting an attribute of a pipeline also changes its config
    components = {name: _recording_twin(name, model, records) for name, model in components_of(pipe).items()}
    # diffusers leaves the hooks of offloading alone if hf_device_map is not None
    stand_in.__dict__.update(pipe.__dict__, **components, lora_state_dict=lora_state_dict, hf_device_map={})
    # the result shows the components that a file has no tensors for; diffusers would log a line for each
    logger = logging.getLogger("diffusers.loaders.lora_base")
    logger.addFilter(_is_not_about_missing_keys)
    try:
        stand_in.load_lora_weights(source, **arguments)
    finally:
        logger.removeFilter(_is_not_about_missing_keys)
    # diffusers silently drops tensors that no component takes
    if left := len(keys) - sum(len(tensors) for _, tensors in records.values()):
        heads = sorted({key.partition(".")[0] for key in keys})
        raise ValueError(f"{left} tensors that belong to no component of it; there are some for {listing(heads)}")
    if not records:
        raise ValueError("no tensors at all")
    return records


def _is_not_about_missing_keys(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("No LoRA keys associated")


def _recording_twin(name: str, model: torch.nn.Module, records: Records) -> torch.nn.Module:
    """A twin of a component that adds a loaded adapter to ``records``, and refuses writes to its base weights."""
    from diffusers.utils import convert_unet_state_dict_to_peft

    def load_lora_adapter(state_dict: dict, prefix="transformer", network_alphas=None, metadata=None, **_) -> None:
        """Make the config and tensors as diffusers' ``PeftAdapterMixin.load_lora_adapter`` does."""
        if not (tensors := _below(prefix, state_dict)):
            return
        if "lora_A" not in next(iter(tensors)):
            tensors = convert_unet_state_dict_to_peft(tensors)
        # the ^ makes PEFT match the whole path, not the end of one
        ranks = {f"^{key}": lora_b.shape[1] for key, lora_b in tensors.items() if "lora_B" in key and lora_b.ndim > 1}
        if not ranks:
            raise ValueError(f"no lora_B among keys such as {next(iter(tensors))!r}")
        alphas = {key: float(value) for key, value in (_below(prefix, network_alphas) or {}).items()} or None
        saved = _below(prefix, metadata)
        config = compat.create_lora_config(tensors, alphas, saved, ranks, model_state_dict=twin.state_dict())
        records[name] = config, tensors

    def load_adapter(adapter_state_dict: dict, peft_config: PeftConfig, **_: object) -> None:
        records[name] = peft_config, adapter_state_dict

    def load_state_dict(state_dict: dict, *_: object, **__: object) -> None:
        raise ValueError(f"base weights for {name}, such as {listing(state_dict, 1)}, which a swap leaves alone")

    twin = make_base_twin(model).model
    # diffusers calls load_lora_adapter on its own models, and load_adapter on those of transformers
    twin.__dict__.update(load_lora_adapter=load_lora_adapter, load_adapter=load_adapter)
    twin.__dict__.update(load_state_dict=load_state_dict, to=lambda *_, **__: twin)
    return twin


def _below(prefix: str, items: Mapping[str, object] | None) -> dict[str, object] | None:
    """The items for one component, with ``prefix`` removed from their keys."""
    if items is None:
        return None
    return {key.removeprefix(f"{prefix}."): value for key, value in items.items() if key.startswith(f"{prefix}.")}
