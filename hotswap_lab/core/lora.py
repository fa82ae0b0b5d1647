"""LoRA: which tensors a layer has, which scalars go with them, and what of LoRA can be swapped.

Follows ``peft.tuners.lora``: ``LoraModel._create_and_replace`` for the rank and alpha of a layer,
``LoraLayer.update_layer`` for everything that is set on it.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper, _ConvNd
from peft.tuners.lora.variants import (
    DoraConv1dVariant,
    DoraConv2dVariant,
    DoraConv3dVariant,
    DoraEmbeddingVariant,
    DoraLinearVariant,
)
from peft.tuners.tuners_utils import (
    _find_minimal_target_modules,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.constants import MIN_TARGET_MODULES_FOR_OPTIMIZATION
from peft.utils.integrations import dequantize_module_weight
from peft.utils.other import get_pattern_key

from .errors import Refusal, refusal
from .host import Config, Host, TunerLayer
from .journal import Journal
from .parts import LayerSettings, SlotTensor, slot_tensor
from .prepared import EvalFreeDropout, ScalingTable, prepared_class

layer_class = LoraLayer
_overlaps: Any = torch._debug_has_internal_overlap  # pyright: ignore[reportPrivateImportUsage]

#: ranks up to this one are small in any layer
POINTLESS = 1024

#: the only module that PEFT may import for an adapter
MEGATRON = "megatron.core"

#: inits after which a fresh load leaves other base weights behind than before
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq")

#: config fields that add state of another kind than the tensors and scalars of a layer
OTHER_STATE = (
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "ensure_weight_tying",
    "target_modules_to_tie",
    "megatron_config",
    "use_qalora",
)


def _is_number(value: object) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that is larger than any float
        return False


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_pattern(value: object, is_value: Callable[[object], bool]) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) and is_value(each) for key, each in value.items())


def _is_selection(value: Any) -> bool:
    return value is None or isinstance(value, str) or all(isinstance(each, str) for each in value)


def _are_indices(value: object) -> bool:
    return value is None or all(
        isinstance(each, int) and not isinstance(each, bool) for each in (value if isinstance(value, list) else [value])
    )


def malformed(config: Config) -> Iterator[Refusal]:
    """What in ``config`` has a value of the wrong kind; PEFT takes a config from a file without looking at it."""
    checks = {
        "r": (_is_rank, "a positive whole number"),
        "lora_alpha": (_is_number, "a number"),
        "lora_dropout": (lambda value: _is_number(value) and 0 <= value <= 1, "a number from 0 to 1"),
        **dict.fromkeys(
            ("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out"),
            (lambda value: value is None or isinstance(value, bool), "true or false"),
        ),
        "bias": (lambda value: value in ("none", "all", "lora_only"), "'none', 'all' or 'lora_only'"),
        "init_lora_weights": (lambda value: value is None or isinstance(value, (bool, str)), "true, false or a name"),
        "rank_pattern": (lambda value: _is_pattern(value, _is_rank), "names of layers with positive whole numbers"),
        "alpha_pattern": (lambda value: _is_pattern(value, _is_number), "names of layers with numbers"),
        "target_modules": (_is_selection, "a list of names or one regular expression"),
        "exclude_modules": (_is_selection, "a list of names or one regular expression"),
        "layers_pattern": (_is_selection, "a list of names or one regular expression"),
        "layers_to_transform": (_are_indices, "a list of whole numbers, or one"),
    }
    for name, (is_right, expected) in checks.items():
        value = getattr(config, name)
        try:
            right = is_right(value)
        except Exception:  # of any kind, depending on what is there instead
            right = False
        if not right:
            yield refusal("config_damaged", name=name, value=value, expected=expected)
    yield from _broken_expressions(config)


def _broken_expressions(config: Config) -> Iterator[Refusal]:
    expressions = [value for value in (config.target_modules, config.exclude_modules) if isinstance(value, str)]
    for field in (config.layers_pattern, config.modules_to_save):
        listed = [field] if isinstance(field, str) else field if isinstance(field, (list, tuple, set)) else []
        expressions += [each for each in listed if isinstance(each, str)]
    for pattern in (config.rank_pattern, config.alpha_pattern):
        expressions += [key for key in pattern if isinstance(key, str)] if isinstance(pattern, dict) else []
    for expression in expressions:
        try:
            re.compile(expression)
        except Exception as error:  # not only re.error: too many parentheses or repetitions are errors of other kinds
            yield refusal("broken_expression", expression=expression, error=error)


def pointless_rank(rank: Any, path: str, module: torch.nn.Module) -> Iterator[Refusal]:
    """Refuses a rank that no update of this layer can have: room for it would take more memory than the model."""
    sizes = [max(parameter.shape, default=0) for parameter in module.parameters()]
    most = max([POINTLESS, *(2 * size for size in sizes)])
    if not _is_rank(rank) or rank > most:
        yield refusal("pointless_rank", rank=rank, path=path, most=most)


def unsupported(config: Config, role: str) -> Iterator[Refusal]:
    """What in ``config`` can't be swapped; ``role`` says whose config it is ("new" or "loaded")."""
    init, found = config.init_lora_weights, None
    if isinstance(init, str) and init.lower().startswith(BASE_CHANGING_INITS):
        found = f"init_lora_weights={init!r}"
    elif getattr(config, "kasa_config", None):
        found = "a kasa_config"
    if getattr(config, "arrow_config", None):
        yield refusal("arrow_router", role=role)
    if getattr(config, "megatron_config", None) and config.megatron_core != MEGATRON:
        yield refusal("imports_a_module", role=role, megatron_core=config.megatron_core, allowed=MEGATRON)
    if found:
        yield refusal("changes_base_weights", role=role, found=found)


def other_state(config: Config) -> list[str]:
    """The fields of ``config`` that stand for state beyond the tensors that :func:`tensors_of` knows."""
    fields = {field.name: field for field in dataclasses.fields(config)}
    variants = {name for name, field in fields.items() if field.metadata.get("is_lora_variant")}
    found = [name for name in (*OTHER_STATE, *sorted(variants - {"use_dora"})) if getattr(config, name, None)]
    if config.init_lora_weights in fields["init_lora_weights"].metadata.get("lora_variants", ()):
        found.append("init_lora_weights")
    if getattr(config, "bias", "none") != "none":
        found.append("bias")
    return found


def needs_donor(config: Config) -> bool:
    """Whether PEFT must load an adapter with this config itself, beside the model."""
    return bool(other_state(config))


#: variants whose tensors :func:`tensors_of` knows
KNOWN_VARIANTS = (DoraLinearVariant, DoraEmbeddingVariant, DoraConv1dVariant, DoraConv2dVariant, DoraConv3dVariant)


def is_special(layer: TunerLayer, adapter_name: str) -> bool:
    """Whether the layer has state beyond what :func:`tensors_of` knows."""
    variant = layer.lora_variant.get(adapter_name)
    return isinstance(layer, (MultiheadAttention, ParamWrapper)) or not isinstance(
        variant, (type(None), *KNOWN_VARIANTS)
    )


def form_of(layer: TunerLayer, adapter_name: str) -> tuple[bool, bool]:
    """Which tensors a layer has beside A and B: a magnitude (DoRA), a bias."""
    # not every module that stands for a lora_B has the attribute: BD-LoRA's has only a weight
    has_bias = adapter_name in layer.lora_B and getattr(layer.lora_B[adapter_name], "bias", None) is not None
    return adapter_name in layer.lora_magnitude_vector, has_bias


def form_for(config: Config) -> tuple[bool, bool]:
    """:func:`form_of` the layers that are loaded with this config."""
    return bool(config.use_dora), bool(config.lora_bias)


def unsupported_layer(layer: TunerLayer, adapter_name: str, tensors: Sequence[SlotTensor]) -> str | None:
    """Why this layer can't be swapped, or None."""
    if is_special(layer, adapter_name):
        return f"a {type(layer.lora_variant.get(adapter_name, layer)).__name__}"
    return unsupported_tensors(tensors)


def unsupported_tensors(tensors: Sequence[SlotTensor]) -> str | None:
    """Why the tensors of a layer can't be swapped, or None."""
    if not tensors:
        return "a lora_A and a lora_B that are no parameters, as FullyShardedDataParallel (FSDP1) leaves them"
    for tensor in tensors:
        parameter = tensor.owner._parameters.get(tensor.name)
        if parameter is None:
            return f"a parametrized or replaced {tensor.named_key}"
        if parameter.device.type == "meta":
            if hasattr(tensor.owner, "_hf_hook"):
                # where the hook keeps it, nobody would look for a change
                return (
                    f"a {tensor.named_key} that accelerate keeps elsewhere between calls: swap after "
                    "accelerate.hooks.remove_hook_from_submodules(model), then offload the model again"
                )
            return f"a {tensor.named_key} without data (on the meta device)"
        if tensor.is_shard and (reason := tensor.obstacle()):
            return f"a {tensor.named_key} {reason}"
        plain = type(parameter) is torch.nn.Parameter and type(parameter.data) is torch.Tensor
        if not plain and not tensor.is_shard:
            return f"a {tensor.named_key} of type {type(parameter.data).__name__}"
        if not parameter.is_contiguous() and _overlaps(tensor.memory) == 1:
            return f"an expanded {tensor.named_key}, whose values share memory"
    return None


def has_adapter(layer: TunerLayer, adapter_name: str) -> bool:
    return adapter_name in layer.lora_A or adapter_name in layer.lora_embedding_A


def tensors_of(layer: TunerLayer, adapter_name: str) -> list[SlotTensor]:
    """The tensors of one adapter on one layer, A before B.

    Shapes, with rank r: Linear and GPT-2's Conv1D ``(r, in)`` and ``(out, r)``; Embedding ``(r, vocabulary)``
    and ``(dimension, r)``; convolutions ``(r, in, *kernel)`` and ``(out, r / groups, 1, ...)``.
    """
    if adapter_name in layer.lora_embedding_A:
        tensors = [
            slot_tensor(name, f"{name}.{adapter_name}", getattr(layer, name), adapter_name, rank_axis=axis)
            for axis, name in enumerate(("lora_embedding_A", "lora_embedding_B"))
        ]
        return tensors + _magnitude_of(layer, adapter_name)
    is_conv = isinstance(layer, _ConvNd)
    tensors = []
    for axis, name in enumerate(("lora_A", "lora_B")):
        owner = getattr(layer, name)[adapter_name]
        side = "in" if axis else "out"
        for parameter_name in owner._parameters:
            if owner._parameters[parameter_name] is None:
                continue
            is_weight = parameter_name == "weight"
            tensors.append(
                slot_tensor(
                    key=f"{name}.{parameter_name}",
                    named_key=f"{name}.{adapter_name}.{parameter_name}",
                    owner=owner,
                    name=parameter_name,
                    rank_axis=axis if is_weight else None,
                    groups=layer.get_base_layer().groups if is_conv and axis else 1,
                    blocks=layer.get_base_layer().groups if is_conv and not axis and is_weight else 1,
                    size_attribute=f"{side}_{'channels' if is_conv else 'features'}" if is_weight else None,
                )
            )
    return tensors + _magnitude_of(layer, adapter_name)


def _magnitude_of(layer: TunerLayer, adapter_name: str) -> list[SlotTensor]:
    """DoRA's magnitude, one number for each output, if the layer has one (arXiv 2402.09353)."""
    if adapter_name not in layer.lora_magnitude_vector:
        return []
    name, owner = "lora_magnitude_vector", layer.lora_magnitude_vector[adapter_name]

    def norm_of_base() -> torch.Tensor:
        # with B = 0 and this magnitude, DoRA computes what the base layer does
        weight = dequantize_module_weight(layer.get_base_layer())
        with torch.no_grad():
            return owner.get_weight_norm(weight, 0.0, 1.0).to(owner.weight.dtype).reshape(owner.weight.shape)

    return [slot_tensor(name, f"{name}.{adapter_name}.weight", owner, "weight", rank_axis=None, off=norm_of_base)]


def rank_step(layer: TunerLayer) -> int:
    """The number that a rank on this layer must be divisible by."""
    base: Any = layer.get_base_layer()
    return base.groups if isinstance(layer, _ConvNd) else 1


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
    """The scalars that an adapter has on a layer now."""
    return LayerSettings(
        rank=layer.r[adapter_name],
        alpha=layer.lora_alpha[adapter_name],
        use_rslora=layer.use_rslora.get(adapter_name, False),
        dropout=getattr(layer.lora_dropout[adapter_name], "p", 0.0),
    )


def fingerprint(config: Config) -> tuple[object, ...]:
    """Equal for configs for which :func:`settings_for` and :func:`targets` say the same of every layer."""
    fields = ("r", "lora_alpha", "use_rslora", "lora_dropout", "layers_to_transform", "layers_pattern")
    selections = (config.target_modules, config.exclude_modules)
    return (
        *(repr(getattr(config, field)) for field in fields),
        *(tuple(pattern.items()) for pattern in (config.rank_pattern, config.alpha_pattern)),
        *(each if each is None or isinstance(each, str) else frozenset(each) for each in selections),
    )


def targets(config: Config, path: str) -> bool:
    """Whether a fresh load with this (resolved) config would put an adapter on the layer at ``path``."""
    return config.target_modules is not None and bool(check_target_module_exists(config, path))


def resolved_config(config: Config, host: Host) -> Config:
    """A copy of ``config`` with its target modules spelled out for the model, as a fresh load leaves it."""
    config = copy.deepcopy(config)
    if config.target_modules is None:
        model_type = getattr(getattr(host.base, "config", None), "model_type", None)
        known = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(str(model_type))
        if known is not None:
            config.target_modules = known if isinstance(known, str) else set(known)
    config = _maybe_include_all_linear_layers(config, host.base)
    if (
        isinstance(config.target_modules, (list, set))
        and len(config.target_modules) >= MIN_TARGET_MODULES_FOR_OPTIMIZATION
    ):
        suffixes = tuple(f".{target}" for target in config.target_modules)
        others = [
            name
            for name, _ in host.base.named_modules()
            if name not in config.target_modules and not name.endswith(suffixes)
        ]
        fewer = _find_minimal_target_modules(config.target_modules, others)
        if len(fewer) < len(config.target_modules):
            config.target_modules = fewer
    return config


#: the tables on a layer that hold one scalar per adapter, and which of its settings that is
SCALAR_TABLES = {"r": "rank", "lora_alpha": "alpha", "use_rslora": "use_rslora", "scaling": "scaling"}


def changes_constants(layer: TunerLayer, adapter_name: str, settings: LayerSettings) -> bool:
    """Whether these settings change what a graph that was compiled in eval mode has taken for a constant."""
    scaling, dropout = layer.scaling[adapter_name], layer.lora_dropout[adapter_name]
    fixed_scaling = not isinstance(scaling, torch.Tensor) and scaling != settings.scaling
    fixed_dropout = not isinstance(dropout, EvalFreeDropout) and getattr(dropout, "p", 0.0) != settings.dropout
    return fixed_scaling or fixed_dropout


def write_dropout(layer: TunerLayer, adapter_name: str, p: float, journal: Journal) -> None:
    """Makes the adapter's dropout what a fresh load makes it."""
    # a module looks its attributes up slowly, and those that it lacks most slowly
    table: Any = layer._modules["lora_dropout"]
    present = table._modules[adapter_name]
    if present.__dict__.get("p", 0.0) == p:
        return
    if isinstance(present, EvalFreeDropout):
        journal.set_attribute(present, "p", p)
    else:
        module = torch.nn.Dropout(p=p) if p > 0 else torch.nn.Identity()
        journal.set_item(layer.lora_dropout, adapter_name, module.train(present.training))


def cache_of(layer: TunerLayer, adapter_name: str) -> dict[str, Any]:
    """What DoRA has computed from the weights and kept (``peft.tuners.lora.dora.ENABLE_DORA_CACHING``)."""
    if adapter_name not in layer.lora_magnitude_vector:
        return {}
    return layer.lora_magnitude_vector[adapter_name].__dict__.get("_dora_cache", {})


def write_prepared(layer: TunerLayer, adapter_name: str, scaling: torch.Tensor, journal: Journal) -> None:
    """Makes whatever a compiled graph would take for a constant a thing that it reads anew, or does not look at.

    ``scaling`` is the tensor, without axes, that holds the layer's scaling from now on.
    """
    values = dict(layer.__dict__["scaling"])
    values[adapter_name] = scaling
    journal.set_item(vars(layer), "scaling", ScalingTable(values))
    if (cls := prepared_class(type(layer))) is not type(layer):
        journal.set_attribute(layer, "__class__", cls)
    present = layer.lora_dropout[adapter_name]
    if not isinstance(present, EvalFreeDropout):
        dropout = EvalFreeDropout(p=getattr(present, "p", 0.0))
        journal.set_item(layer.lora_dropout, adapter_name, dropout.train(present.training))
