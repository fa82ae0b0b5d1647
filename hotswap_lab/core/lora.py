"""LoRA as PEFT loads it: the layers that a config targets, and the values that are set on them.

Follows ``peft.tuners.lora``: ``LoraModel._create_and_replace`` and ``LoraLayer.update_layer``.

Tests: ``tests/core/test_plan.py`` and ``tests/core/test_lora_alone.py``.
"""

import pickle
import re
from collections.abc import Collection

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND, MIN_TARGET_MODULES_FOR_OPTIMIZATION

from .. import compat
from .adapter import BASE, LOST_ORIGINALS, ORIGIN, WHEN
from .host import Config, Host, TunerLayer, modules_in
from .journal import Journal
from .settings import LayerSettings
from .tensors import is_prepared


class EvalFreeDropout(torch.nn.Dropout):
    """A dropout that reads ``p`` in training mode only, so that no graph of eval mode depends on it."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(input, self.p, True, self.inplace) if self.training and self.p else input


def fingerprint(config: Config) -> bytes | None:
    """A key of a config. Equal keys mean equal fields, also in type; None for a config that has no key.

    Whether the adapter is trained doesn't count.
    """
    fields = dict(vars(config))
    for name in ("inference_mode", LOST_ORIGINALS, ORIGIN, WHEN, BASE):
        fields.pop(name, None)
    try:
        for name, value in [*fields.items()]:
            if isinstance(value, set):  # equal ones may have other orders
                fields[name] = [set, *sorted(value)]
        return pickle.dumps((type(config), fields))
    except Exception:  # fields from a file or from the user may be of any type, and nested
        return None


#: the modules that a PeftModel saves with an adapter for a task; its config names them even if the model has none
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


def changes_constants(layer: TunerLayer, adapter_name: str, settings: LayerSettings | None) -> bool:
    """Whether these settings change a value that is a constant in a graph compiled in eval mode; None turns it off."""
    if settings is None:  # zeros turn plain LoRA off, and variants of ours
        variant = layer.lora_variant.get(adapter_name)
        return variant is not None and not hasattr(variant, "hotswap_original")
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
