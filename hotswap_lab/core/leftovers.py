"""What no layer of the slot took: base weights that were saved too, layers to add, keys that mean nothing here."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from ..beyond.decide import former_layers
from .beforehand import refuse_layer
from .draft import Draft
from .errors import listing
from .host import PEFT_PREFIX
from .layers import plan_layer
from .plan import Action
from .sameness import have_same_values
from .shadow import adaptable, build_shadow_layers
from .words import unexpected_keys


def has_strange_leftovers(draft: Draft, tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether what no layer took may mean something to PEFT: names of older models, other base weights."""
    if draft.refusals or not tensors or draft.compiled or draft.is_prepared:
        return False
    keys = set(tensors)
    keys -= {key for key in keys if adaptable(draft.slot.host.base, key) is not None}
    return any(not _is_unchanged_base_weight(draft, key, tensors[key]) for key in keys)


def plan_leftovers(draft: Draft, tensors: dict[str, torch.Tensor]) -> None:
    """Plans what no layer of the slot took: base weights that were saved too, layers to add, unknown keys."""
    if not tensors:
        return
    _drop_unchanged_base_weights(draft, tensors)
    paths = {path for key in tensors if (path := adaptable(draft.slot.host.base, key)) is not None}
    if paths and (draft.add_layers or paths <= former_layers(draft.slot.host.base, draft.slot.adapter_name)):
        _add_layers(draft, tensors)
    if not tensors:
        return
    keys = _as_peft_keys(draft, tensors)
    layers = sorted({layer for key in tensors if (layer := adaptable(draft.slot.host.base, key)) is not None})
    if layers:
        next_step = "load first the adapter that targets most layers"
        if draft.compiled:
            next_step = "before compiling, call prepare_model_for_compiled_hotswap with this adapter among `adapters`"
        elif not draft.add_layers:
            next_step = f"pass add_layers=True to add them, or {next_step}"
        found = f"tensors for {len(layers)} layers that the loaded adapter lacks: {listing(layers, 3)}"
    else:
        next_step = "check that both adapters were made for the same base model, or pass key_mapping"
        found = f"{len(keys)} keys that name no layer of the base model"
    expected = f"tensors only for layers of the loaded adapter {draft.slot.adapter_name!r}"
    draft.refusals.append(unexpected_keys(keys, found, expected, next_step))


def _drop_unchanged_base_weights(draft: Draft, tensors: dict[str, torch.Tensor]) -> None:
    """PEFT saves embedding weights beside their LoRA. They are fine as long as they are the base model's own."""
    for key in [key for key in tensors if ".lora_" not in key]:
        if (weight := _base_weight(draft, key)) is None or weight.shape != tensors[key].shape:
            continue
        if not have_same_values(weight, tensors.pop(key)):
            draft.refuse(
                "The adapter comes with other base weights than the model has.",
                found=f"a different {key!r}",
                expected="the base weights that the model was loaded with",
                next_step="swap it in before the model is prepared or compiled",
            )


def _is_unchanged_base_weight(draft: Draft, key: str, value: torch.Tensor) -> bool:
    weight = _base_weight(draft, key)
    return weight is not None and weight.shape == value.shape and have_same_values(weight, value)


def _base_weight(draft: Draft, key: str) -> torch.Tensor | None:
    """The base model's weight of this name, whether or not its layer has an adapter, here or in the file."""
    path, _, name = key.rpartition(".")
    path = path.removesuffix(".base_layer")
    try:
        module = draft.slot.host.base.get_submodule(path)
    except AttributeError:
        return None
    module = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return module._parameters.get(name, module._buffers.get(name))


def _add_layers(draft: Draft, tensors: dict[str, torch.Tensor]) -> None:
    slot = draft.slot
    paths = sorted({path for key in tensors if (path := adaptable(slot.host.base, key)) is not None})
    if not paths:
        return
    if draft.compiled:
        draft.refuse(
            "Layers can't be added to a compiled model.",
            found=f"{len(paths)} layers that the loaded adapter lacks: {listing(paths, 3)}",
            expected="an adapter whose layers are all in the compiled graph",
            next_step="before compiling, call prepare_model_for_compiled_hotswap with this adapter among `adapters`",
        )
        for key in [key for key in tensors if adaptable(slot.host.base, key) is not None]:
            del tensors[key]  # their reason is given
        return
    try:
        shadows = build_shadow_layers(slot, draft.config, paths)
    except Exception as error:
        draft.refuse(
            "The layers that the loaded adapter lacks can't be added.",
            found=f"{type(error).__name__}: {error}",
            expected="layers that PEFT can put LoRA on",
            next_step="load this adapter with PeftModel.from_pretrained on a fresh base model",
        )
        return
    for layer in shadows:
        if reason := slot.method.unsupported_layer(layer.module, slot.adapter_name, layer.tensors):
            refuse_layer(draft, layer, reason)
        plan_layer(draft, layer, tensors, Action.ADD)


def _as_peft_keys(draft: Draft, tensors: dict[str, torch.Tensor]) -> list[str]:
    """Keys as PEFT's messages show them: with prefix, adapter name and all."""
    prefix = PEFT_PREFIX if draft.slot.host.is_peft_model else ""
    name = draft.slot.adapter_name
    keys = []
    for key in tensors:
        head, _, last = key.rpartition(".")
        keys.append(
            f"{prefix}{head}.{name}.{last}" if last == "weight" and not head.endswith(f".{name}") else prefix + key
        )
    return keys
