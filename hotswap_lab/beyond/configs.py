"""Checks of configs: values of the wrong type, adapters that can't be swapped, and adapters that are more than LoRA.

PEFT reads a config from a file without checking it, so its values may have any type.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import PeftConfig, PeftType

from ..core.errors import Refusal, refusal
from ..core.host import kind_of

#: ranks up to this one are allowed in any layer, however small; a rank of 10**9 from a damaged config would take 64 GB
#: of memory in a layer of 8 x 8
POINTLESS = 1024
#: how deep a config's values may be nested; PEFT writes three levels at most, and Python can't copy hundreds
MAX_DEPTH = 20
#: the only module that a config may make PEFT import
MEGATRON = "megatron.core"
#: values of ``init_lora_weights`` with which a fresh load changes the base weights
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq")
#: other names of initializations that PEFT knows; they, unlike "gaussian" and "mica", are in lower case only
INITS = ("eva", "orthogonal", "lora_ga")
#: config fields that add something besides B @ A, which no scaling applies to
NOT_SCALED = ("modules_to_save", "trainable_token_indices", "bias", "layer_replication")
#: config fields that add state beyond the tensors and scalars of a layer
OTHER_STATE = (
    *NOT_SCALED,
    *("target_parameters", "ensure_weight_tying", "target_modules_to_tie", "megatron_config", "use_qalora"),
)


def judge(config: PeftConfig, role: str, loaded: PeftConfig | None = None) -> Iterator[Refusal]:
    """Refusals of an adapter because of its config alone.

    Parameters
    ----------
    role:
        "new" if the config was only read from a file so far, or "loaded".
    loaded:
        The config of an adapter that must share a compiled graph with this one, if any.
    """
    is_lora = config.peft_type == PeftType.LORA
    damages = [] if role == "loaded" else _damages(config)
    yield from damages or (_unsupported(config, role) if is_lora else ())
    if config.peft_type == PeftType.XLORA:
        yield refusal("method_refused", role=role)
    if is_lora and loaded is not None and form_for(config) != form_for(loaded):
        found, expected = (f"use_dora={each.use_dora}, lora_bias={each.lora_bias}" for each in (config, loaded))
        yield refusal("no_common_graph", found=found, expected=expected)
    elif (
        is_lora and not damages and loaded is not None and (more := set(extra_state(config)) ^ set(extra_state(loaded)))
    ):
        yield refusal("member_of_another_kind", other_state=", ".join(sorted(more)))


def form_for(config: PeftConfig) -> tuple[bool, bool]:
    """Whether layers of LoRA with this config have a magnitude (DoRA), and whether they have a bias."""
    return bool(config.use_dora), bool(config.lora_bias)


# ---- values of the wrong type


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_rank(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_flag(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _is_pattern(value: Any, is_value: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) and is_value(each) for key, each in value.items())


def _is_selection(value: Any) -> bool:
    return value is None or isinstance(value, str) or all(isinstance(each, str) for each in value)


def _are_indices(value: Any) -> bool:
    return value is None or all(type(each) is int for each in (value if isinstance(value, list) else [value]))


def _is_init(name: str) -> bool:
    lower = name.lower()
    return name in INITS or lower in ("gaussian", "mica") or lower.startswith(BASE_CHANGING_INITS)


#: fields of LoRA's config, a check that returns false or raises for wrong values, and the values that are expected
RULES: list[tuple[tuple[str, ...], Callable[[Any], bool], str]] = [
    (("r",), _is_rank, "a positive whole number"),
    (("lora_alpha",), _is_number, "a number"),
    (("lora_dropout",), lambda value: _is_number(value) and 0 <= value <= 1, "a number from 0 to 1"),
    (("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out"), _is_flag, "true or false"),
    (("bias",), ("none", "all", "lora_only").__contains__, "'none', 'all' or 'lora_only'"),
    (("init_lora_weights",), lambda value: _is_flag(value) or _is_init(value), "true, false or a name that PEFT knows"),
    (("rank_pattern",), lambda value: _is_pattern(value, _is_rank), "names of layers with positive whole numbers"),
    (("alpha_pattern",), lambda value: _is_pattern(value, _is_number), "names of layers with numbers"),
    (("target_modules", "exclude_modules", "layers_pattern"), _is_selection, "a list of names or one expression"),
    (("trainable_token_indices",), lambda value: value != [], "null, or at least one token"),
    (("layers_to_transform",), _are_indices, "a list of whole numbers, or one"),
]


def _damages(config: PeftConfig) -> list[Refusal]:
    nested = {name: value for name, value in vars(config).items() if isinstance(value, (dict, list))}
    if deep := [name for name, value in nested.items() if _is_deeper(value, MAX_DEPTH)]:
        expected = f"lists or tables within one another, {MAX_DEPTH} deep at most"
        return [refusal("config_damaged", name=name, value="what is nested deeper", expected=expected) for name in deep]
    return [*(_damaged_lora(config) if config.peft_type == PeftType.LORA else _damaged_other(config))]


def _is_deeper(value: object, levels: int) -> bool:
    """Whether lists and dicts are nested more than ``levels`` deep."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return inner is not None and (levels == 0 or any(_is_deeper(each, levels - 1) for each in inner))


def _damaged_lora(config: PeftConfig) -> Iterator[Refusal]:
    for names, is_right, expected in RULES:
        for name in names:
            value = getattr(config, name)
            with contextlib.suppress(Exception):  # a check may raise any error for a value of the wrong type
                if is_right(value):
                    continue
            yield refusal("config_damaged", name=name, value=value, expected=expected)
    yield from _broken_expressions(config)


def _broken_expressions(config: PeftConfig) -> Iterator[Refusal]:
    names = ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save", "rank_pattern", "alpha_pattern")
    for name, value in ((name, getattr(config, name)) for name in names):
        is_list = isinstance(value, (list, tuple, set, dict)) and name not in ("target_modules", "exclude_modules")
        for expression in value if is_list else [value]:
            try:
                re.compile(expression if isinstance(expression, str) else "")
            except Exception as error:  # too many parentheses or repetitions raise other errors than re.error
                yield refusal("broken_expression", expression=expression, error=error)


def _damaged_other(config: PeftConfig) -> Iterator[Refusal]:
    """Refuse NaN and infinity in a config of another method. PEFT checks the rest when it loads the adapter."""
    for name, value in vars(config).items():
        if isinstance(value, float) and not math.isfinite(value):
            yield refusal("config_damaged", name=name, value=value, expected="a finite number")


def pointless_rank(rank: Any, path: str, module: torch.nn.Module) -> Iterator[Refusal]:
    """Refuse a rank far above any that this layer's update can have: its room might take more memory than the model."""
    most = max([POINTLESS, *(2 * max(each.shape, default=0) for each in module.parameters())])
    if not _is_rank(rank) or rank > most:
        yield refusal("pointless_rank", rank=rank, path=path, most=most)


# ---- more than LoRA's own tensors


def _unsupported(config: PeftConfig, role: str) -> Iterator[Refusal]:
    """Refusals because of fields of LoRA's config that can't be swapped."""
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


def extra_state(config: PeftConfig) -> list[str]:
    """The fields of LoRA's config that add state beyond the tensors and scalars of its layers."""
    fields = {field.name: field for field in dataclasses.fields(config)}
    variants = {name for name, field in fields.items() if field.metadata.get("is_lora_variant")}
    found = [name for name in (*OTHER_STATE, *sorted(variants - {"use_dora"})) if _has(config, name)]
    if config.init_lora_weights in fields["init_lora_weights"].metadata.get("lora_variants", ()):
        found.append("init_lora_weights")
    return found


def changes_while_computing(config: PeftConfig) -> bool:
    """Whether a forward changes the data that a plan is made from, for a moment or for good.

    Layers around single parameters (``target_parameters``) give the module another class while it computes, and move
    its parameters; OFT with ``coft`` writes to its weights.
    """
    return bool(getattr(config, "target_parameters", None) or getattr(config, "coft", False))


def not_scaled(config: PeftConfig) -> str | None:
    """Describe an adapter that can't be scaled completely, because of its config; None if it can."""
    if config.peft_type != PeftType.LORA:
        return f"an adapter of type {kind_of(config)}"
    if config.use_dora:
        return "an adapter of type DoRA, whose magnitude would stay at full strength"
    if present := [name for name in NOT_SCALED if _has(config, name)]:
        return f"an adapter with {' and '.join(present)}, which would stay at full strength"
    return None


def _has(config: PeftConfig, name: str) -> bool:
    value = getattr(config, name, None)
    return bool(value) and value != "none"
