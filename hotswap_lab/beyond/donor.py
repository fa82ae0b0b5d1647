"""A donor: the new adapter, loaded by PEFT itself onto a stand-in of the live base model."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from peft import PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.mapping_func import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

from ..core.host import PEFT_PREFIX, Host, canonical_path
from ..core.interrupts import let_through
from ..threads import writing
from .guards import compilers_kept, memory_guard, nothing_read
from .randomness import random_numbers_kept, seeds_itself
from .stand_in import StandIn, make_stand_in


@dataclass(frozen=True)
class Donor:
    """A fresh load of an adapter, beside the live model."""

    model: PeftModel
    stand_in: StandIn
    #: base weights that the adapter's file brings, by their names in the base model
    base_values: Mapping[str, torch.Tensor]
    #: all weights of the live base model, by the same names
    live_values: Mapping[str, torch.Tensor]
    #: by keys of the file, the tensors of the donor that PEFT loaded them into
    origins: Mapping[str, torch.Tensor]
    #: keys of the file that mean nothing to this model
    unexpected: tuple[str, ...]
    #: tensors of the adapter that the file has no values for
    missing: tuple[str, ...]

    @property
    def config(self) -> PeftConfig:
        (config,) = self.model.peft_config.values()
        return config


def load_donor(
    host: Host,
    config: PeftConfig,
    tensors: Mapping[str, torch.Tensor],
    adapter_name: str,
    *,
    half_precision: bool = False,
) -> Donor:
    """Lets PEFT load an adapter, as ``PeftModel.from_pretrained`` does, onto a stand-in for the host's base model.

    Parameters
    ----------
    host:
        Where the live adapter is. Only read.
    config:
        The new adapter's config, with the ``inference_mode`` of the live one.
    tensors:
        Its tensors by the names of its file.
    adapter_name:
        The name that the adapter gets.
    half_precision:
        Whether the adapter keeps the precision of a half-precision base, as with ``autocast_adapter_dtype=False``.
    """
    let_through()  # from here on it may take seconds
    stand_in = make_stand_in(host.base)
    versions = stand_in.versions()
    twins = dict(_named_tensors(stand_in.model))
    base_names = {id(tensor): name for name, tensor in twins.items()}
    config = copy.deepcopy(config)
    if replication := getattr(config, "layer_replication", None):
        config.layer_replication = None  # the live base model has its layers repeated already
    cls = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, PeftModel)
    # quantized weights have no twins: PEFT sets `requires_grad` of the live ones, and no other thread must compute then
    with writing(host.base) if stand_in.shared or seeds_itself(config) else contextlib.nullcontext():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                guard = memory_guard(host.base, tensors.values())
                with nothing_read(config), compilers_kept(), random_numbers_kept(config), guard:
                    model = cls(stand_in.model, config, adapter_name, autocast_adapter_dtype=not half_precision)
                base_values, result, origins = _set_tensors(model, tensors, adapter_name, base_names)
                if hasattr(model.base_model, "_cast_adapter_dtype"):
                    model.base_model._cast_adapter_dtype(adapter_name, autocast_adapter_dtype=not half_precision)
        finally:
            for parameter, requires_grad in stand_in.shared:
                parameter.requires_grad_(requires_grad)
    if any(id(module) in stand_in.unordered for module in _nested_around_parameters(model)):
        raise RuntimeError("its layers are nested by an order of parameters that the base model may have lost")
    if stand_in.was_changed(versions):
        raise RuntimeError("PEFT changes weights of the base model when it loads this adapter")
    if replication:
        model.peft_config[adapter_name].layer_replication = replication
    let_through()
    unexpected, missing = _mismatches(model, tensors, adapter_name, result)
    return Donor(
        model.eval() if config.inference_mode else model,
        stand_in,
        base_values,
        {name: stand_in.live_tensors[id(twin)] for name, twin in twins.items()},
        origins,
        unexpected,
        missing,
    )


def _mismatches(
    model: PeftModel, tensors: Mapping, adapter_name: str, result
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Keys of the file that mean nothing to the model, and tensors of the adapter that it should have had."""
    config = model.peft_config[adapter_name]
    saved = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    if config.is_prompt_learning:
        return tuple(sorted(tensors.keys() - saved.keys())), tuple(sorted(saved.keys() - tensors.keys()))
    # Some tensors are never saved, and a fresh load doesn't miss them; others are saved once and shown on each layer.
    # The names in a file are not those in the model, but the memory is the same.
    memory = {key: tensor.data_ptr() for key, tensor in model.state_dict().items()}
    missing = set(result.missing_keys)
    filled = {address for key, address in memory.items() if key not in missing}
    present = _file_keys(model, tensors, adapter_name).keys()
    awaited = {tensor.data_ptr() for key, tensor in saved.items() if key not in present} - filled
    unexpected = [key for key in result.unexpected_keys if key not in saved]
    return tuple(unexpected), tuple(sorted(key for key in missing if memory.get(key) in awaited))


def _nested_around_parameters(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The modules of which several parameters are adapted, each by a layer around the one of another."""
    for module in model.modules():
        inner = module._modules.get("base_layer")
        if "parameter_name" in module.__dict__ and inner is not None and "parameter_name" in inner.__dict__:
            yield module.get_base_layer()


def _named_tensors(model: torch.nn.Module):
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _set_tensors(model: PeftModel, tensors: Mapping, adapter_name: str, base_names: Mapping[int, str]):
    """Writes the adapter's tensors into the donor; those that are for the base model are kept apart."""
    base_keys = {key: base_names[id(tensor)] for key, tensor in _named_tensors(model) if id(tensor) in base_names}
    base_values: dict[str, torch.Tensor] = {}
    origins: dict[str, torch.Tensor] = {}
    keys = {id(tensor): key for key, tensor in tensors.items()}

    def keep_apart(module, state_dict: dict, prefix: str, *_: object) -> None:
        # this memory is the live model's, too
        for key in [key for key in state_dict if key in base_keys]:
            base_values[base_keys[key]] = state_dict.pop(key)
        own = dict(_named_tensors(model))
        # what PEFT converts on the way is another tensor by now, and has no origin
        origins.update(
            {keys[id(each)]: own[key] for key, each in state_dict.items() if id(each) in keys and key in own}
        )

    handle = model.register_load_state_dict_pre_hook(keep_apart)
    try:
        result = set_peft_model_state_dict(model, _file_keys(model, tensors, adapter_name), adapter_name)
    finally:
        handle.remove()
    result.missing_keys[:] = [key for key in result.missing_keys if key not in base_keys]
    return base_values, result, origins


def _file_keys(model: PeftModel, tensors: Mapping, adapter_name: str) -> dict[str, torch.Tensor]:
    """The keys as in a file that PEFT wrote: with its prefix, without the adapter's name."""
    config = model.peft_config[adapter_name]
    if config.is_prompt_learning:
        return dict(tensors)
    tuner = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]
    own = set(model.state_dict())
    renamed = {}
    for key, tensor in tensors.items():
        full = PEFT_PREFIX + canonical_path(key) if not key.startswith("base_model.") else key
        if full in own and (f".{adapter_name}." in full or full.endswith(f".{adapter_name}")):
            full = tuner._remove_adapter_name_from_key(full, adapter_name)
        renamed[full] = tensor
    return renamed
