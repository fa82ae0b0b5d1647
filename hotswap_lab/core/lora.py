"""LoRA: the tensors and scalars of a layer, and what a config says about them.

Follows ``peft.tuners.lora``: ``LoraModel._create_and_replace`` for the rank and alpha of a layer,
``LoraLayer.update_layer`` for everything that is set on it.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Collection
from typing import Any

import torch
from peft import PeftType
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND, MIN_TARGET_MODULES_FOR_OPTIMIZATION
from peft.utils.other import get_pattern_key

from .. import compat
from .adapter import BASE, ORIGIN, WHEN
from .host import Config, Host, TunerLayer, modules_in
from .journal import Journal
from .method import Method
from .tensors import LayerSettings, SlotTensor, is_prepared


class Lora(Method):
    """LoRA on plain layers."""

    def takes(self, config: Config) -> bool:
        return config.peft_type == PeftType.LORA

    def tensors_of(self, layer: torch.nn.Module, adapter_name: str) -> list[SlotTensor] | None:
        """The tensors of one adapter on one layer, A before B.

        Shapes, with rank r: Linear and GPT-2's Conv1D ``(r, in)`` and ``(out, r)``; Embedding ``(r, vocabulary)``
        and ``(dimension, r)``; convolutions ``(r, in, *kernel)`` and ``(out, r / groups, 1, ...)``.
        """
        if not isinstance(layer, LoraLayer):
            return None
        # attribute access on a module is slow
        tables: dict[str, Any] = layer._modules
        tensors: list[SlotTensor] = []
        if adapter_name in tables["lora_embedding_A"]:
            for axis, table in enumerate(("lora_embedding_A", "lora_embedding_B")):
                tensors.append(SlotTensor(table, f"{table}.{adapter_name}", tables[table], adapter_name, axis))
        elif adapter_name not in tables["lora_A"]:
            return None
        for axis, table in enumerate(("lora_A", "lora_B")) if adapter_name in tables["lora_A"] else ():
            owner = tables[table][adapter_name]
            size = f"{'in' if axis else 'out'}_{'channels' if 'kernel_size' in owner.__dict__ else 'features'}"
            for name, parameter in owner._parameters.items():
                if parameter is not None:
                    key, named_key, is_weight = f"{table}.{name}", f"{table}.{adapter_name}.{name}", name == "weight"
                    along, repeated = (axis, size) if is_weight else (None, None)
                    tensors.append(SlotTensor(key, named_key, owner, name, along, repeated))
        return tensors


class EvalFreeDropout(torch.nn.Dropout):
    """A dropout that reads ``p`` in training mode only, so that no graph of eval mode depends on it."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(input, self.p, True, self.inplace) if self.training and self.p else input


#: the mark of a config that a swap put into a model; its value belongs to ``beyond``, see ``base_values``
NOTED = "_hotswap_lost"


def settings_for(config: Config, path: str) -> LayerSettings:
    """The scalars that a fresh load gives to the layer at ``path``, patterns included."""
    rank_key = get_pattern_key(config.rank_pattern.keys(), path)
    alpha_key = get_pattern_key(config.alpha_pattern.keys(), path)
    return LayerSettings(
        rank=config.rank_pattern.get(rank_key, config.r),
        alpha=config.alpha_pattern.get(alpha_key, config.lora_alpha),
        use_rslora=config.use_rslora,
        dropout=config.lora_dropout,
    )


def settings_of(layer: TunerLayer, adapter_name: str) -> LayerSettings:
    """The current scalars of an adapter on a layer."""
    return LayerSettings(
        rank=layer.r[adapter_name],
        alpha=layer.lora_alpha[adapter_name],
        use_rslora=layer.use_rslora.get(adapter_name, False),
        dropout=getattr(layer.lora_dropout[adapter_name], "p", 0.0),
    )


def fingerprint(config: Config) -> bytes | None:
    """A key of a config. Equal keys mean equal fields, also in type; None for a config that has no key.

    Whether the adapter is trained doesn't count.
    """
    fields = dict(vars(config))
    for name in ("inference_mode", NOTED, ORIGIN, WHEN, BASE):
        fields.pop(name, None)
    try:
        for name, value in [*fields.items()]:
            if isinstance(value, set):  # equal ones may have other orders
                fields[name] = [set, *sorted(value)]
        return pickle.dumps((type(config), fields))
    except Exception:  # fields from a file or from the user may be of any type, and nested
        return None


#: the modules that a PeftModel saves with an adapter for a task, as it says in the config even if the model has none
HEADS: dict[str, tuple[str, ...]] = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def complete(config: Config, host: Host) -> Config:
    """Resolve the target modules of a config for a model, as a fresh load does."""
    if host.is_peft_model and config.modules_to_save is None and config.task_type in HEADS:
        config.modules_to_save = [*HEADS[config.task_type]]
    if config.target_modules is None:
        model_type = getattr(getattr(host.base, "config", None), "model_type", None)
        known = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(str(model_type))
        if known is not None:
            config.target_modules = known if isinstance(known, str) else set(known)
    names = config.target_modules
    if isinstance(names, str) and names.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
        config = compat.include_all_linear_layers(config, host.base)
        names = config.target_modules
    if isinstance(names, (list, set)) and len(names) >= MIN_TARGET_MODULES_FOR_OPTIMIZATION:
        ends = tuple(f".{name}" for name in names)
        others = [path for path, _ in host.base.named_modules() if path not in names and not path.endswith(ends)]
        fewer = compat.find_minimal_target_modules(names, others)
        if len(fewer) < len(names):
            config.target_modules = fewer
    return config


def is_targeted(config: Config, path: str) -> bool:
    """Whether a fresh load with this (resolved) config would put an adapter on the layer at ``path``."""
    return config.target_modules is not None and bool(check_target_module_exists(config, path))


def retarget(config: Config, paths: Collection[str], base: torch.nn.Module) -> None:
    """Make a config name exactly these layers of a base model."""
    config.target_modules = {*paths}
    config.layers_to_transform = config.layers_pattern = config.exclude_modules = None
    # a path may be the end of another one, which PEFT takes for targeted too
    ends = tuple([f".{path}" for path in paths])
    if any(path.endswith(ends) for path, _ in modules_in(base) if path not in config.target_modules):
        config.target_modules = "|".join(map(re.escape, sorted(paths)))


#: the tables on a layer that hold one scalar per adapter, except for the scaling; and the setting in each
SCALAR_TABLES = {"r": "rank", "lora_alpha": "alpha", "use_rslora": "use_rslora"}


def changes_constants(layer: TunerLayer, adapter_name: str, settings: LayerSettings) -> bool:
    """Whether these settings change a value that is a constant in a graph compiled in eval mode."""
    dropout = layer.lora_dropout[adapter_name]
    fixed_scaling = not is_prepared(layer, adapter_name) and layer.scaling[adapter_name] != settings.scaling
    fixed_dropout = not isinstance(dropout, EvalFreeDropout) and getattr(dropout, "p", 0.0) != settings.dropout
    return fixed_scaling or fixed_dropout


def write_dropout(layer: TunerLayer, adapter_name: str, p: float, journal: Journal) -> None:
    """Set the adapter's dropout to that of a fresh load."""
    present = layer.lora_dropout[adapter_name]
    if isinstance(present, EvalFreeDropout):
        journal.set_attribute(present, "p", p)
    else:
        module = torch.nn.Dropout(p=p) if p > 0 else torch.nn.Identity()
        journal.set_item(layer.lora_dropout, adapter_name, module.train(present.training))
