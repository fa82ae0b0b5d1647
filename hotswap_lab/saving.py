"""Saving a swapped adapter as if it had been loaded fresh."""

from __future__ import annotations

import copy
import os
import warnings
from pathlib import Path

import torch
from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from safetensors.torch import save_file

from .errors import refuse
from .host import PEFT_PREFIX, canonical_path, is_embedding
from .methods import general
from .shards import whole
from .slot import Slot, resolve_slot
from .state_view import is_off, own_tensor, strange_padding
from .together import replace_together
from .turns import in_use


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
        If the model has no such adapter, or its padding (in a prepared model) was written to by somebody else.

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
    with in_use(model):
        slot = resolve_slot(model, adapter_name)  # as it is now: a swap may have been waited for
        for layer in slot.layers:
            for tensor in layer.tensors:
                if reason := strange_padding(layer.module, adapter_name, tensor):
                    raise refuse(
                        f"The adapter {adapter_name!r} can't be saved as it is.",
                        found=reason,
                        expected="zeros beyond the adapter's own rank",
                        next_step="swap the adapter in again, and train it with a new optimizer",
                    )
        config, tensors = saved_config(slot), saved_tensors(slot, embeddings=True)
    replace_together(folder, lambda beside: write_adapter(beside, config, tensors))


def saved_tensors(slot: Slot, embeddings: bool = False) -> dict[str, torch.Tensor]:
    """The adapter's tensors by the names of its file, on the CPU, layers that are off left out.

    ``embeddings`` includes the weights of embeddings that the adapter is on, as PEFT's own saving does.
    """
    name = slot.adapter_name
    on = [layer for layer in slot.layers if not is_off(layer.module, name)]
    embeddings = embeddings and any(is_embedding(slot.host.base, layer.module) for layer in on)
    if embeddings or slot.method is general or slot.method.needs_donor(slot.config):
        prefix = "" if slot.host.is_peft_model else PEFT_PREFIX
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT says that it can't find the embeddings of what is no such model
            tensors = get_peft_model_state_dict(slot.host.carrier, adapter_name=name, save_embedding_layers=embeddings)
        return {prefix + canonical_path(key) if prefix else key: _copy(tensor) for key, tensor in tensors.items()}
    return {
        f"{PEFT_PREFIX}{layer.path}.{tensor.key}": _copy(own_tensor(layer.module, name, tensor))
        for layer in on
        for tensor in layer.tensors
    }


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return whole(tensor.detach()).cpu().clone(memory_format=torch.contiguous_format)


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
