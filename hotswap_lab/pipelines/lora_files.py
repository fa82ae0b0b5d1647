"""Reading a diffusers LoRA file: one adapter for each part of the pipeline that the file has tensors for.

diffusers knows many key formats, and every kind of pipeline has a ``load_lora_weights`` of its own. None of that is
repeated here: the pipeline's own function is called, on a stand-in whose parts have no weights and note what they are
handed instead of loading it. So each adapter is what a fresh load would have got, and the pipeline is not touched.
"""

from __future__ import annotations

import inspect
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer

from ..core.adapter import Adapter
from ..core.compiled import unwrap_compiled
from ..core.errors import HotswapError, listing, refuse
from ..core.expressions import slow_to_match
from ..core.interrupts import interruptible, interrupts_held

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

#: what a caller may pass on to diffusers to find and read a file; everything else is for ``load_lora_weights``
FILE_ARGUMENTS = (
    "weight_name",
    "use_safetensors",
    "local_files_only",
    "cache_dir",
    "force_download",
    "proxies",
    "token",
    "revision",
    "subfolder",
)
#: what in a key says that it is not of an ordinary LoRA, although diffusers may take some of it
OTHER_KINDS = {
    "dora_scale": "DoRA in kohya's format",
    "lora_controlnet": "a control LoRA",
    "lokr_": "LoKr",
    "hada_": "LoHa",
}
#: arguments of ``load_lora_weights`` that say how a *new* adapter is made, which is not what happens here
NOT_OURS = ("adapter_name", "hotswap", "low_cpu_mem_usage", "return_lora_metadata")

#: what is on a module because of its adapters, because it was compiled, or because its weights come and go
NOT_COPIED = ("peft_config", "_compiled_call_impl", "forward", "_old_forward", "_hf_hook", "_diffusers_hook")


def read_pipeline_lora(
    pipe: DiffusionPipeline,
    source: str | os.PathLike | Mapping[str, torch.Tensor],
    *,
    allow_nonfinite: bool = False,
    **kwargs: object,
) -> dict[str, Adapter]:
    """Reads what ``pipe.load_lora_weights`` takes, as one :class:`Adapter` for each part of the pipeline.

    For swapping the same file in more than once, and for whatever takes an ``Adapter``: ``verify_hotswap``, or an
    ``AdapterPool`` on one part. All of diffusers' key formats (its own, PEFT's, kohya's, ...), alphas and metadata are
    taken, each as a fresh load takes it.

    Parameters
    ----------
    pipe:
        The pipeline that the file is for. It is only looked at.
    source:
        A file, a folder, the id of a Hub repository, or a state dict.
    allow_nonfinite:
        Whether NaN and infinity among the weights are let through.
    **kwargs:
        What ``load_lora_weights`` takes: ``weight_name``, ``subfolder``, ``revision``, ``token``, ...

    Returns
    -------
    dict
        Adapters by the names of parts, such as ``"unet"`` and ``"text_encoder"``.

    Raises
    ------
    HotswapError
        If it can't be read, or is for another kind of pipeline.

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
    if wrong := sorted(set(kwargs) & set(NOT_OURS)):
        raise TypeError(f"arguments for loading a new adapter, which this doesn't do: {', '.join(wrong)}")
    label = "a state dict" if isinstance(source, Mapping) else os.fspath(source)
    file_arguments = {name: kwargs.pop(name) for name in FILE_ARGUMENTS if name in kwargs}
    with interruptible():
        tensors, metadata = _read_file(source, label, file_arguments)
    _check_raw(tensors, label)
    reading = _Reading(pipe, label, metadata)
    with interrupts_held(), torch.no_grad():
        reading.run(tensors, kwargs)
    reading.check()
    adapters = {}
    for part, (config, state_dict) in reading.handed.items():
        adapter = Adapter(config, dict(state_dict), label)
        adapter._check_tensors(allow_nonfinite)
        if slow := slow_to_match(config, reading.hollows[part]):
            raise HotswapError(*slow)
        _warn_of_idle_patterns(part, adapter)
        adapters[part] = adapter
    return adapters


def check_pipeline(pipe: object) -> None:
    """Refuses what is not a pipeline that LoRA can be loaded into."""
    if isinstance(pipe, torch.nn.Module):
        raise refuse(
            "This is a model, not a pipeline.",
            found=f"a {type(pipe).__name__}",
            expected="a diffusers pipeline, whose parts have adapters",
            next_step="call hotswap_adapter for a single model",
        )
    if not callable(getattr(pipe, "load_lora_weights", None)) or not hasattr(pipe, "_lora_loadable_modules"):
        raise refuse(
            "LoRA can't be loaded into this.",
            found=f"a {type(pipe).__name__}",
            expected="a diffusers pipeline with load_lora_weights, such as StableDiffusionPipeline or FluxPipeline",
            next_step="pass the pipeline itself, or call hotswap_adapter for a single model",
        )


def parts_of(pipe: DiffusionPipeline) -> dict[str, torch.nn.Module]:
    """The parts of a pipeline that LoRA can be loaded into, by name, those that are None left out."""
    named = ((name, getattr(pipe, name, None)) for name in pipe._lora_loadable_modules)
    return {name: module for name, module in named if isinstance(module, torch.nn.Module)}


def is_diffusers_model(model: torch.nn.Module) -> bool:
    """Whether diffusers loads an adapter into this part itself, rather than leaving that to transformers."""
    return hasattr(type(unwrap_compiled(model)), "load_lora_adapter")


def _read_file(
    source: str | os.PathLike | Mapping[str, torch.Tensor], label: str, arguments: dict
) -> tuple[dict[str, torch.Tensor], dict | None]:
    """The tensors by the names of the file, and diffusers' metadata if the file has it."""
    if isinstance(source, Mapping):
        return dict(source), None
    from diffusers.loaders.lora_base import _fetch_state_dict

    arguments = {**dict.fromkeys(FILE_ARGUMENTS), "force_download": False, **arguments}
    any_format = arguments["use_safetensors"] is None
    try:
        # diffusers reads .bin files with weights_only=True, so nothing in them is executed
        tensors, metadata = _fetch_state_dict(
            pretrained_model_name_or_path_or_dict=label,
            **{**arguments, "use_safetensors": True if any_format else arguments["use_safetensors"]},
            allow_pickle=any_format,
            user_agent={"file_type": "attn_procs_weights", "framework": "pytorch"},
        )
    except Exception as error:
        raise refuse(
            f"Can't read a LoRA from {label}",
            found=f"{type(error).__name__}: {_first_line(error)}",
            expected="a file, a folder or a Hub repository that load_lora_weights can read",
            next_step="check the path, `weight_name`, `subfolder`, `revision` and `token`, or get an undamaged copy",
        ) from error
    return dict(tensors), metadata


def _check_raw(tensors: Mapping[str, torch.Tensor], label: str) -> None:
    """What diffusers would leave out with no more than a warning, or not take for LoRA."""
    if not tensors:
        raise refuse(
            f"The LoRA from {label} is empty.",
            found="no tensors at all",
            expected="tensors of LoRA layers",
            next_step="get an undamaged copy of it",
        )
    for mark, kind in OTHER_KINDS.items():
        if found := [key for key in tensors if mark in key]:
            raise refuse(
                f"The LoRA from {label} is of a kind that can't be swapped in place.",
                found=f"{kind}: keys such as {found[0]!r}",
                expected="LoRA whose only tensors are the two matrices of each layer, and alphas",
                next_step="load it into a fresh pipeline with load_lora_weights, if diffusers supports it",
            )


@dataclass
class _Reading:
    """One call of ``load_lora_weights`` on a stand-in for the pipeline, and what its parts were handed."""

    pipe: DiffusionPipeline
    label: str
    metadata: dict | None
    #: config and tensors by the name of the part
    handed: dict[str, tuple[PeftConfig, Mapping[str, torch.Tensor]]] = field(default_factory=dict)
    #: the keys after conversion, and the prefixes of those that a part was handed
    keys: list[str] = field(default_factory=list)
    prefixes: set[str | None] = field(default_factory=set)
    #: the stand-in's parts, and the shapes of their weights
    hollows: dict[str, torch.nn.Module] = field(default_factory=dict)
    shapes: dict[str, dict[str, torch.Size]] = field(default_factory=dict)

    def run(self, tensors: dict[str, torch.Tensor], arguments: dict) -> None:
        stand_in = object.__new__(type(self.pipe))
        # not by attribute: a pipeline writes down every part that is set
        stand_in.__dict__.update(self.pipe.__dict__)
        for name, model in parts_of(self.pipe).items():
            stand_in.__dict__[name] = self.hollows[name] = self._hollow_part(name, model)
            self.shapes[name] = _shapes(self.hollows[name])
        stand_in.__dict__["lora_state_dict"] = self._convert
        # any value but None: diffusers leaves the offloading of such a pipeline alone
        stand_in.__dict__["hf_device_map"] = {}
        try:
            stand_in.load_lora_weights(tensors, adapter_name="default", **arguments)
        except HotswapError:
            raise
        except Exception as error:
            lacking = [name for name in self.pipe._lora_loadable_modules if getattr(self.pipe, name, None) is None]
            if lacking := [name for name in lacking if any(key.startswith(f"{name}.") for key in self.keys)]:
                raise self._refusal(
                    f"tensors for {listing(lacking)}, which the pipeline was made without",
                    f"tensors for its parts only: {listing(parts_of(self.pipe), 9)}",
                ) from error
            raise self._refusal(
                f"diffusers can't load it: {type(error).__name__}: {_first_line(error)}",
                "a LoRA for this kind of pipeline, in a format that diffusers knows",
            ) from error

    def check(self) -> None:
        """Refuses tensors that nobody took; diffusers drops them silently."""
        taken = tuple(f"{prefix}." for prefix in self.prefixes if prefix is not None)
        left = [] if None in self.prefixes else [key for key in self.keys if not key.startswith(taken)]
        if left or not self.handed:
            raise self._refusal(
                f"{len(left)} tensors that belong to no part of it, such as {listing(map(repr, left), 2)}",
                f"tensors for its parts only: {listing(parts_of(self.pipe), 9)}",
            )

    def _refusal(self, found: str, expected: str) -> HotswapError:
        return refuse(
            f"The LoRA from {self.label} is not for this {type(self.pipe).__name__}.",
            found,
            expected,
            "check that it was made for the same base model, or get an undamaged copy of it",
        )

    def _convert(self, *args: object, **kwargs: object) -> tuple:
        """Takes the place of ``pipe.lora_state_dict``: the file is read already, and so is its metadata."""
        converted = self.pipe.lora_state_dict(*args, **kwargs)
        if isinstance(converted, tuple):
            if kwargs.get("return_lora_metadata"):
                converted = (*converted[:-1], self.metadata)
            self.keys += converted[0]
        return converted

    def _hollow_part(self, name: str, model: torch.nn.Module) -> torch.nn.Module:
        """A part without weights that notes what is loaded into it, and refuses that anything else happens to it."""
        hollow = _hollow(model)

        def load_lora_adapter(state_dict: dict, prefix: str | None = _default_prefix(model), **kwargs: object) -> None:
            tensors = _below(state_dict, prefix)
            if tensors:
                config, tensors = _config_and_tensors(hollow, tensors, prefix, kwargs)
                self._note(name, prefix, config, tensors)

        def load_adapter(adapter_state_dict: dict, peft_config: PeftConfig, **_: object) -> None:
            # from diffusers' loading of text encoders, which goes by the name of the part and has cut it off
            self._note(name, name, peft_config, adapter_state_dict)

        def load_state_dict(state_dict: dict, *_: object, **__: object) -> None:
            raise self._refusal(
                f"base weights for {name}, such as {listing(map(repr, state_dict), 1)}",
                "LoRA layers only: a swap leaves the base model alone",
            )

        noted = {"load_state_dict": load_state_dict, "to": lambda *_, **__: hollow}
        noted |= {"load_lora_adapter": load_lora_adapter} if is_diffusers_model(model) else {}
        noted |= {"load_adapter": load_adapter} if hasattr(type(hollow), "load_adapter") else {}
        hollow.__dict__.update(noted)
        return hollow

    def _note(self, part: str, prefix: str | None, config: PeftConfig, tensors: Mapping[str, torch.Tensor]) -> None:
        if part in self.handed:
            raise self._refusal(f"two adapters for {part}", "one for each part")
        self.prefixes.add(prefix)
        self.handed[part] = config, tensors
        if _shapes(self.hollows[part]) != self.shapes[part]:
            raise self._refusal(
                f"a control LoRA: diffusers would enlarge layers of {part} for it",
                "LoRA layers that fit the base model as it is",
            )


def _hollow(module: torch.nn.Module) -> torch.nn.Module:
    """A copy of a tree of modules with the shapes of its weights, but neither their values nor any adapters."""
    module = unwrap_compiled(module)
    while isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    hollow = object.__new__(type(module))
    hollow.__dict__.update({name: value for name, value in module.__dict__.items() if name not in NOT_COPIED})
    hollow._parameters = {name: _shape_only(parameter) for name, parameter in module._parameters.items()}
    hollow._modules = {name: None if child is None else _hollow(child) for name, child in module._modules.items()}
    return hollow


def _shape_only(parameter: torch.nn.Parameter | None) -> torch.nn.Parameter | None:
    if parameter is None:
        return None
    empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
    return torch.nn.Parameter(empty, requires_grad=False)


def _shapes(module: torch.nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in module.named_parameters()}


def _default_prefix(model: torch.nn.Module) -> str | None:
    function = getattr(type(unwrap_compiled(model)), "load_lora_adapter", None)
    return None if function is None else inspect.signature(function).parameters["prefix"].default


def _below(items: Mapping[str, object], prefix: str | None) -> dict[str, object]:
    if prefix is None:
        return dict(items)
    return {key.removeprefix(f"{prefix}."): value for key, value in items.items() if key.startswith(f"{prefix}.")}


def _config_and_tensors(
    hollow: torch.nn.Module, tensors: dict[str, torch.Tensor], prefix: str | None, arguments: Mapping[str, object]
) -> tuple[PeftConfig, dict[str, torch.Tensor]]:
    """The config that diffusers makes for a model of its own, and the tensors under PEFT's keys.

    Follows ``diffusers.loaders.peft.PeftAdapterMixin.load_lora_adapter``.
    """
    from diffusers.utils import convert_unet_state_dict_to_peft
    from diffusers.utils.peft_utils import _create_lora_config

    alphas, metadata = arguments.get("network_alphas"), arguments.get("metadata")
    if alphas and metadata:
        raise ValueError("a file with alphas must not have metadata, too")
    if "lora_A" not in next(iter(tensors)):
        tensors = convert_unet_state_dict_to_peft(tensors)
    # the ^ makes PEFT take a key for a whole path, not for the end of one
    ranks = {f"^{key}": tensor.shape[1] for key, tensor in tensors.items() if "lora_B" in key and tensor.ndim > 1}
    if not ranks:
        raise ValueError(f"no lora_B among keys such as {next(iter(tensors))!r}")
    if alphas:
        alphas = {key: float(value) for key, value in _below(alphas, prefix).items()}
    if metadata is not None:
        metadata = _below(metadata, prefix)
    config = _create_lora_config(tensors, alphas, metadata, ranks, model_state_dict=hollow.state_dict())
    return config, tensors


def _warn_of_idle_patterns(part: str, adapter: Adapter) -> None:
    """diffusers gets the layers' names wrong for some alphas in kohya's format, and PEFT then ignores them."""
    paths = {key.partition(".lora_")[0] for key in adapter.tensors}
    for name in ("rank_pattern", "alpha_pattern"):
        # most are plain names, and there may be hundreds
        patterns = [each for each in getattr(adapter.config, name, {}) if each.removeprefix("^") not in paths]
        expressions = {each: re.compile(rf"(.*\.)?({each})$") for each in patterns}
        idle = [each for each, expression in expressions.items() if not any(map(expression.match, paths))]
        if idle:
            warnings.warn(
                f"{part}: {len(idle)} entries of {name} match no layer and are not applied, as load_lora_weights does "
                f"not apply them either: such as {idle[0]!r}",
                stacklevel=3,
            )


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
