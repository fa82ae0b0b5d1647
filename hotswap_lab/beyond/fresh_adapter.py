"""Fresh adapters: the new adapter as PEFT itself loads it, onto a twin of the live base model.

Tests: ``tests/beyond/test_in_place.py`` and ``tests/beyond/test_every_method.py``.
"""

import contextlib
import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from peft import PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.mapping_func import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

from ..core.host import key_in_file
from ..core.journal import interrupts_held
from ..core.slot import Slot
from ..core.tensors import are_interchangeable, named_tensors
from ..threads import locked
from .base_twin import BaseTwin, make_base_twin
from .guards import compilers_kept, memory_guard, random_numbers_kept, take_out


@dataclass(frozen=True)
class FreshAdapter:
    """A freshly loaded adapter, next to the live model."""

    model: PeftModel
    #: as PEFT has completed it
    config: PeftConfig
    twin: BaseTwin
    #: base weights in the adapter's file, by their names in the base model
    base_values: Mapping[str, torch.Tensor]
    #: all weights of the twin, by the same names
    twins: Mapping[str, torch.Tensor]
    #: the tensor of the fresh load that PEFT loaded each key of the file into
    origins: Mapping[str, torch.Tensor]
    #: keys of the file that PEFT ignores
    unexpected: list[str]
    #: tensors of the adapter that the file has no values for
    missing: list[str]


def load_fresh_adapter(slot: Slot, config: PeftConfig, tensors: Mapping[str, torch.Tensor]) -> FreshAdapter:
    """Let PEFT load an adapter, as ``PeftModel.from_pretrained`` does, onto a twin of the live base model.

    Parameters
    ----------
    slot:
        The live adapter, which is only read. The new adapter gets its name.
    config:
        The new adapter's config, with the ``inference_mode`` of the live one.
    tensors:
        The new adapter's tensors by the keys of its file.
    """
    base, adapter_name = slot.host.base, slot.adapter_name
    # a half-precision adapter was loaded with ``autocast_adapter_dtype=False``, so the new one is, too
    to_float32 = not any(tensor.parameter.dtype in (torch.float16, torch.bfloat16) for tensor in slot.tensors)
    twin = make_base_twin(base)
    twins, config = dict(named_tensors(twin.model)), copy.deepcopy(config)
    if twin.is_unordered and len(getattr(config, "target_parameters", None) or ()) > 1:
        raise RuntimeError("its layers are nested by an order of parameters that the base model may have lost")
    taken_out = take_out(config)
    cls = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, PeftModel)
    # quantized weights have no twins, so PEFT sets `requires_grad` of the live ones, while no other thread may run
    with locked(base) if twin.shared else contextlib.nullcontext(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        memory = memory_guard(base, tensors.values())
        try:
            # torch removes and restores a mode around each function; Ctrl-C in between would leave a mode off
            with interrupts_held(), compilers_kept(), random_numbers_kept(), memory:
                model = cls(twin.model, config, adapter_name, autocast_adapter_dtype=to_float32)
            file = _file_keys(model, tensors, adapter_name)
            base_values, origins, result = _set_tensors(model, file, tensors, {id(twins[name]): name for name in twins})
            if hasattr(model.base_model, "_cast_adapter_dtype"):
                model.base_model._cast_adapter_dtype(adapter_name, autocast_adapter_dtype=to_float32)
        finally:
            with interrupts_held():
                for parameter, requires_grad in twin.shared:
                    parameter.requires_grad_(requires_grad)
    if any(weight.data_ptr() != twin.live_of[id(weight)].data_ptr() for weight in twin.parameters):
        raise RuntimeError("PEFT changes weights of the base model when it loads this adapter")
    config = model.peft_config[adapter_name]
    vars(config).update(taken_out)
    if config.inference_mode:
        model.eval()
    unexpected, missing = _mismatches(model, tensors, file.keys(), adapter_name, result)
    return FreshAdapter(model, config, twin, base_values, twins, origins, unexpected, missing)


def _mismatches(model: PeftModel, tensors: Mapping, keys, adapter_name: str, result) -> tuple[list[str], list[str]]:
    """Keys of the file that PEFT ignores, and tensors of the adapter that are missing in the file."""
    saved = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    if model.peft_config[adapter_name].is_prompt_learning:
        return sorted(tensors.keys() - saved.keys()), sorted(saved.keys() - tensors.keys())
    # Some tensors are never saved, so a fresh load doesn't miss them. Others are saved once and shared by all layers.
    # Keys of a file differ from names in the model, so tensors are matched by their memory.
    # A base may have sparse buffers, which have no address.
    memory = {key: tensor.data_ptr() for key, tensor in model.state_dict().items() if tensor.layout == torch.strided}
    missing = set(result.missing_keys)
    filled = {address for key, address in memory.items() if key not in missing}
    awaited = {tensor.data_ptr() for key, tensor in saved.items() if key not in keys} - filled
    unexpected = [key for key in result.unexpected_keys if key not in saved]
    return unexpected, sorted(key for key in missing if memory.get(key) in awaited)


def _set_tensors(model: PeftModel, file: Mapping, tensors: Mapping, base_names: Mapping[int, str]):
    """Write the adapter's tensors into the fresh load, except those for the base model, which are returned."""
    own = dict(named_tensors(model))
    base_keys = {key: base_names[id(tensor)] for key, tensor in own.items() if id(tensor) in base_names}
    base_values: dict[str, torch.Tensor] = {}
    origins: dict[str, torch.Tensor] = {}
    keys = {id(tensor): key for key, tensor in tensors.items()}

    def keep_apart(module, state_dict: dict, *_: object) -> None:
        # base weights share memory with the live model; PEFT reports those with a different shape
        here = [key for key, value in state_dict.items() if key in base_keys and value.shape == own[key].shape]
        base_values.update({base_keys[key]: state_dict.pop(key) for key in here})
        # a tensor that PEFT has converted is a different object, and gets no origin
        loaded = dict(named_tensors(model))
        for key, tensor in state_dict.items():
            if id(tensor) in keys and key in loaded:
                origins[keys[id(tensor)]] = loaded[key]

    (adapter_name,) = model.peft_config
    with model.register_load_state_dict_pre_hook(keep_apart):
        result = set_peft_model_state_dict(model, file, adapter_name)
    result.missing_keys[:] = [key for key in result.missing_keys if key not in base_keys]
    return base_values, origins, result


def _file_keys(model: PeftModel, tensors: Mapping, adapter_name: str) -> dict[str, torch.Tensor]:
    """The tensors by the keys that PEFT writes to a file: with its prefix, without the adapter's name."""
    config = model.peft_config[adapter_name]
    if config.is_prompt_learning:
        return dict(tensors)
    tuner = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]
    own, renamed = set(model.state_dict()), {}
    for key, tensor in tensors.items():
        full = key_in_file(key)
        if full in own and (f".{adapter_name}." in full or full.endswith(f".{adapter_name}")):
            if hasattr(tuner, "_remove_adapter_name_from_key"):
                full = tuner._remove_adapter_name_from_key(full, adapter_name)
            else:  # PEFT 0.20
                full = "".join(full.rpartition(f".{adapter_name}")[::2])
        if full in renamed and not are_interchangeable(tensor, renamed[full]):
            raise ValueError(f"it has two different values for {full}")
        renamed[full] = tensor
    return renamed
