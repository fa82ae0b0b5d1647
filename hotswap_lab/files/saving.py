"""Saving a swapped adapter as if it had been loaded fresh."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import PeftConfig
from peft.tuners.adaption_prompt import AdaptionPromptModel
from peft.tuners.ln_tuning.layer import LNTuningLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME, AuxiliaryTrainingWrapper, get_peft_model_state_dict
from safetensors.torch import save_file

from ..beyond import general
from ..beyond.wrappers import WRAPPERS, has_adapter, inside, is_table
from ..core.compiled import COMPILED
from ..core.errors import HotswapError, refuse
from ..core.host import PEFT_PREFIX, Host, canonical_path, is_embedding
from ..core.interrupts import interrupts_held
from ..core.slot import Slot, resolve_slot
from ..core.state_view import is_off, own_tensor, strange_padding
from ..shards import local_part, whole
from ..threads import in_use
from .together import replace_together

#: what wrappers call the module that they are around
INSIDE = ("base_layer", "original_module")
#: where PEFT asks a model for the embeddings
EMBEDDINGS = ("get_input_embeddings", "get_output_embeddings")
#: methods that keep a part of an adapter beside the layers, and those of them that may leave it out of their files
BESIDE_LAYERS = ("VERA", "PVERA", "RANDLORA", "FROD", "TINYLORA", "VBLORA", "UNILORA", "SHADOW")
MAY_LEAVE_OUT = ("VERA", "PVERA", "RANDLORA", "FROD")


def save_adapter(model: torch.nn.Module, folder: str | os.PathLike, adapter_name: str = "default") -> None:
    """Writes one adapter to a folder, just as it would be saved after a fresh load.

    Layers that are turned off are left out, and so is the padding of a prepared model. Both files are written beside
    an older adapter's and then replace them at one moment, so that after an error, or if the process is killed, the
    folder has the old adapter or the new one, whole (see :mod:`hotswap_lab.together` for the file systems where that
    holds). Other files in the folder are left alone.

    Parameters
    ----------
    model:
        A model with the adapter, compiled or not.
    folder:
        Where ``adapter_config.json`` and ``adapter_model.safetensors`` go. Made if it isn't there.
    adapter_name:
        The adapter to save.

    Raises
    ------
    HotswapError
        If the model has no such adapter, if its padding (in a prepared model) was written to by somebody else, if the
        file would hold base weights that an adapter is merged into, or if a part of the adapter isn't in the model.

    Examples
    --------
    >>> import tempfile
    >>> from hotswap_lab import demo, hotswap_adapter, save_adapter, verify_hotswap
    >>> model, _ = demo.load("reverse")
    >>> hotswap_adapter(model, demo.adapter_path("double"), "default")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_adapter(model, folder)
    ...     bool(verify_hotswap(model, folder))
    True

    Notes
    -----
    The format is that of ``PeftModel.save_pretrained``. That function works too and leaves out the same layers;
    this one also serves models that aren't a ``PeftModel``, and never mixes several adapters in one folder.
    """
    resolve_slot(model, adapter_name)  # says so if there is none
    with interrupts_held(), in_use(model):
        slot = resolve_slot(model, adapter_name)  # as it is now: a swap may have been waited for
        _check_padding(slot)
        _check_carrier(slot)
        live = _live_tensors(slot, embeddings=True)
        _check_merged(slot, live)
        config, tensors = saved_config(slot), {key: _copy(tensor) for key, tensor in live.items()}
    replace_together(folder, lambda beside: write_adapter(beside, config, tensors))


def _refuse(slot: Slot, found: str, expected: str, next_step: str) -> HotswapError:
    return refuse(f"The adapter {slot.adapter_name!r} can't be saved as it is.", found, expected, next_step)


def _check_padding(slot: Slot) -> None:
    for layer in slot.layers:
        for tensor in layer.tensors:
            if reason := strange_padding(layer.module, slot.adapter_name, tensor):
                raise _refuse(
                    slot,
                    found=reason,
                    expected="zeros beyond the adapter's own rank",
                    next_step="swap the adapter in again, and train it with a new optimizer",
                )


def _check_carrier(slot: Slot) -> None:
    """Where adapters were injected, the tuner that holds the rest of these adapters is gone."""
    host, method = slot.host, slot.config.peft_type.value
    if host.is_peft_model or host.tuner is not None or method not in BESIDE_LAYERS:
        return
    if method not in MAY_LEAVE_OUT or slot.config.save_projection:
        raise _refuse(
            slot,
            found=f"an adapter of the method {method} in a {type(host.base).__name__} that it was injected into",
            expected="a PeftModel or a tuner, which holds what the layers share",
            next_step="load the adapter with PeftModel.from_pretrained, and save it from there",
        )


def _check_merged(slot: Slot, tensors: dict[str, torch.Tensor]) -> None:
    """Some files hold base weights, too; of these, merging leaves no original that is right to the last bit."""
    changed: dict[int, str] = {}
    for path, module in slot.host.base.named_modules():
        if isinstance(module, BaseTunerLayer) and module.merged:
            merged = [module.get_base_layer()]
            if isinstance(module, LNTuningLayer):  # merging exchanges the adapter's module and the base model's
                merged += [module.ln_tuning_layers[name] for name in module.merged_adapters]
            changed |= {local_part(each).data_ptr(): path for part in merged for each in part.parameters()}
    for key, tensor in tensors.items():
        if changed and (path := changed.get(local_part(tensor).data_ptr())) is not None:
            raise _refuse(
                slot,
                found=f"{key}, of a layer with a merged adapter: {canonical_path(path)}",
                expected="base weights without an adapter in them, since this file holds them, too",
                next_step="call model.unmerge_adapter() first",
            )


def saved_tensors(slot: Slot) -> dict[str, torch.Tensor]:
    """The adapter's tensors by the names of its file, on the CPU, without base weights and layers that are off."""
    return {key: _copy(tensor) for key, tensor in _live_tensors(slot, embeddings=False).items()}


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return whole(tensor.detach()).cpu().clone(memory_format=torch.contiguous_format)


def _live_tensors(slot: Slot, embeddings: bool) -> dict[str, torch.Tensor]:
    """``embeddings`` includes the weights of embeddings that the adapter is on, where PEFT's own saving does."""
    name = slot.adapter_name
    on = [layer for layer in slot.layers if not is_off(layer.module, name)]
    embeddings = embeddings and any(is_embedding(slot.host.base, layer.module) for layer in on)
    if embeddings or slot.method is general or slot.method.needs_donor(slot.config):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT says that it can't find the embeddings of what is no such model
            carrier = LoadedAlone(slot.host, name)
            embeddings = "auto" if embeddings else False
            return carrier.own(get_peft_model_state_dict(carrier, adapter_name=name, save_embedding_layers=embeddings))
    return {
        f"{PEFT_PREFIX}{layer.path}.{tensor.key}": own_tensor(layer.module, name, tensor)
        for layer in on
        for tensor in layer.tensors
    }


class LoadedAlone:
    """What a carrier shows to PEFT's saving, under the names that it has after a fresh load of one adapter.

    PEFT's saving takes names as they are. But the live ones start otherwise where the carrier is no ``PeftModel``, have
    more parts where modules are compiled or have other adapters around them, and whatever has the name of another
    adapter somewhere in its own would be left out.
    """

    def __init__(self, host: Host, adapter_name: str):
        config = copy.copy(host.configs[adapter_name])
        config.base_model_name_or_path = None  # or PEFT asks the Hub whether the vocabulary has grown
        self.peft_config = {adapter_name: config}
        self._carrier = host.carrier
        self._adapter_name = adapter_name
        self._others = host.configs.keys() - {adapter_name}
        is_tuner = isinstance(host.carrier, (BaseTuner, AdaptionPromptModel))
        self._start = [] if host.is_peft_model else ["base_model"] if is_tuner else ["base_model", "model"]

    def __getattr__(self, attribute: str) -> object:
        value = getattr(self._carrier, attribute)
        # PEFT saves the weights of the embeddings that are wrapped
        return (lambda: self._as_loaded(value())) if attribute in EMBEDDINGS else value

    def _as_loaded(self, module: torch.nn.Module | None) -> torch.nn.Module | None:
        """A module, or the innermost around which a fresh load would have nothing."""
        while self._is_missing(module):
            module = inside(module)
        return module

    def state_dict(self) -> dict[str, torch.Tensor]:
        named = ((self._fresh_name(key), tensor) for key, tensor in self._carrier.state_dict().items())
        return {name: tensor for name, tensor in named if name is not None}

    def named_modules(self) -> Iterator[tuple[str, torch.nn.Module]]:
        for path, module in self._carrier.named_modules():
            if isinstance(module, AuxiliaryTrainingWrapper) and not has_adapter(module, self._adapter_name):
                continue  # PEFT 0.21 looks for the adapter's trained tokens wherever another one has some
            if (name := self._fresh_name(path)) is not None:
                yield name, module

    def own(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What PEFT has chosen, without the indices of other adapters, which it takes from the layers."""
        strange = tuple(f".shira_indices.{name}" for name in self._others)
        return {key: tensor for key, tensor in tensors.items() if not key.endswith(strange)}

    def _fresh_name(self, live_name: str) -> str | None:
        """None for what belongs to another adapter."""
        parts = list(self._start)
        owner, module = None, self._carrier
        for part in live_name.split(".") if live_name else ():
            if part in self._others and is_table(module) and isinstance(owner, (*WRAPPERS, BaseTuner)):
                return None
            if part != COMPILED and not (part in INSIDE and self._is_missing(module)):
                parts.append(part)
            owner, module = module, None if module is None else module._modules.get(part)
        return ".".join(parts)

    def _is_missing(self, module: torch.nn.Module | None) -> bool:
        """Whether the module is a wrapper that a fresh load would not make."""
        if not isinstance(module, WRAPPERS):
            return False
        return not has_adapter(module, self._adapter_name) or is_off(module, self._adapter_name)


def saved_config(slot: Slot) -> PeftConfig:
    """The adapter's config as ``PeftModel.save_pretrained`` would write it."""
    config = copy.deepcopy(slot.config)
    config.inference_mode = True
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = slot.host.base.__dict__.get("name_or_path") or None
    if config.task_type is None:
        base_class = type(slot.host.base)
        config.auto_mapping = {"base_model_class": base_class.__name__, "parent_library": base_class.__module__}
    return config


def write_adapter(folder: str | os.PathLike, config: PeftConfig, tensors: dict[str, torch.Tensor]) -> None:
    """Writes config and tensors to a folder that nobody reads yet."""
    save_file(tensors, Path(folder, SAFETENSORS_WEIGHTS_NAME), metadata={"format": "pt"})
    config.save_pretrained(folder)
