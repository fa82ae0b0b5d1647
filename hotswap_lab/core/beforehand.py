"""What can be said against a swap before the adapter's tensors are looked at: kinds, configs, the state of the slot."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from ..beyond.wrappers import WRAPPERS
from .compiled import COMPILED, unwrap_compiled
from .draft import Draft
from .expressions import slow_to_match
from .host import PEFT_PREFIX, canonical_path
from .slot import SlotLayer
from .words import incompatible_types, merged, unexpected_keys


def check_kind(draft: Draft) -> None:
    """Refuses adapters of two types, and configs that no fresh load takes either."""
    loaded, new, name = draft.slot.config, draft.adapter.config, draft.slot.adapter_name
    if loaded.peft_type != new.peft_type:
        next_step = "PeftModel.from_pretrained(model.unload(), adapter) loads it on the same base model"
        draft.refusals.append(incompatible_types(loaded, new, name, "an adapter", next_step))
        return
    draft.refusals += draft.slot.method.malformed(draft.adapter.config)
    draft.refusals += slow_to_match(draft.adapter.config, draft.slot.host.base)
    if draft.refusals:
        return
    _check_prefixes(draft)
    draft.refusals += draft.slot.method.unsupported(draft.adapter.config, "new")
    draft.refusals += draft.slot.method.unsupported(draft.slot.config, "loaded")


def _check_prefixes(draft: Draft) -> None:
    """A fresh load ignores tensors of a file whose names lack PEFT's prefix; from memory they are taken without it."""
    adapter = draft.adapter
    is_file = os.path.isdir(adapter.source) or adapter.revision is not None
    if not is_file or not draft.slot.host.is_peft_model or adapter.config.is_prompt_learning:
        return
    if bare := [key for key in adapter.tensors if not key.startswith("base_model.")]:
        refusal = unexpected_keys(
            bare,
            found=f"{len(bare)} keys without the prefix {PEFT_PREFIX!r}, which a fresh load would ignore",
            expected="keys as PEFT writes them",
            next_step="add the prefix, or pass the tensors to hotswap_adapter_from_state_dict, which needs none",
        )
        draft.refusals.append(refusal)


def check_slot(draft: Draft) -> None:
    """Refuses what can't be written to: merged weights, layers of another make."""
    if draft.slot.is_merged:
        draft.refusals.append(merged(draft.slot.adapter_name))
    for layer, reason in draft.slot.obstacles:
        refuse_layer(draft, layer, reason)


def refuse_layer(draft: Draft, layer: SlotLayer, reason: str) -> None:
    """Refuses a layer on which the adapter is more than plain parameters."""
    draft.refuse(
        f"The layer {layer.path} can't be swapped in place.",
        found=reason,
        expected="plain lora_A and lora_B parameters on the layer",
        next_step="load the adapter with PeftModel.from_pretrained on a fresh base model",
    )


def check_containers(draft: Draft) -> None:
    """A config that names more than layers: PEFT can't load it, so what is saved with it could not be loaded again."""

    def first_named() -> str | None:
        targets = draft.slot.method.targets
        return next((path for path in _containers(draft.slot.host.base) if targets(draft.config, path)), None)

    path = draft.slot.once_for(draft.config, "containers", first_named)
    if path is None:
        return
    module = draft.slot.host.base.get_submodule(path)
    draft.refuse(
        f"Target module {path} is not supported.",
        found=f"target_modules={draft.config.target_modules!r}, which names a {type(module).__name__} too",
        expected="names of layers only: a fresh load refuses this config",
        next_step="correct target_modules in adapter_config.json",
    )


#: what PEFT puts LoRA on, also where a class of these holds modules of its own
ADAPTABLE = (torch.nn.Linear, Conv1D, torch.nn.Embedding, _ConvNd, torch.nn.MultiheadAttention)


def _containers(base: torch.nn.Module) -> Iterator[str]:
    """The paths of all modules that hold others and that no adapter can be on."""
    stack = [(name, child) for name, child in base._modules.items() if child is not None]
    while stack:
        path, module = stack.pop()
        if COMPILED in module._modules:
            module = unwrap_compiled(module)
        children = module._modules
        if children and not isinstance(module, (BaseTunerLayer, *WRAPPERS, *ADAPTABLE)):
            yield canonical_path(path)
            stack += [(f"{path}.{name}", child) for name, child in children.items() if child is not None]
