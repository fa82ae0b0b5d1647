"""Settings: the fields of a LoRA config, each declared once.

A new setting of a layer that every supported PEFT has is one line in :class:`LayerSettings`: reading it from a config
and from a layer, writing it, checking its value and packing it follow from there. A field that is declared nowhere is
one that a later PEFT brings.
"""

import contextlib
import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

from peft import PeftType
from peft.utils.other import get_pattern_key

from .errors import Refusal, refusal
from .host import Config, TunerLayer

#: how deep a config's values may be nested; PEFT writes three levels at most, and Python can't copy hundreds
MAX_DEPTH = 20


class Rule(NamedTuple):
    """The values that a field of a config may have: a check, which may raise for wrong ones, and its description."""

    is_right: Callable[[Any], bool]
    expected: str


def is_rank(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_flag(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _is_pattern(value: Any, is_value: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) and is_value(entry) for key, entry in value.items())


def _is_selection(value: Any) -> bool:
    return value is None or all(isinstance(name, str) for name in value)  # so is each character of a string


def _are_indices(value: Any) -> bool:
    return value is None or all(type(index) is int for index in (value if isinstance(value, list) else [value]))


# ---- settings of a layer


def _setting(field: str, rule: Rule, pattern: str | None = None, table: str | None = None, **default: Any) -> Any:
    return dataclasses.field(metadata={"field": field, "rule": rule, "pattern": pattern, "table": table}, **default)


@dataclass(frozen=True)
class LayerSettings:
    """The scalars of one LoRA layer, as its config gives them.

    Each is declared with its field in the config, the values it may have, the field with its exceptions by layer, and
    the layer's table of it. Dropouts have no such table: they are modules. A field that the oldest PEFT lacks
    needs a default, which every layer then has.

    >>> LayerSettings(rank=4, alpha=8, use_rslora=False, dropout=0.0).scaling
    2.0
    >>> LayerSettings(rank=4, alpha=8, use_rslora=True, dropout=0.0).scaling
    4.0
    """

    rank: int = _setting("r", Rule(is_rank, "a positive integer"), "rank_pattern", "r")
    alpha: float = _setting("lora_alpha", Rule(_is_number, "a number"), "alpha_pattern", "lora_alpha")
    dropout: float = _setting("lora_dropout", Rule(lambda p: _is_number(p) and 0 <= p <= 1, "a number from 0 to 1"))
    use_rslora: bool = _setting("use_rslora", Rule(is_flag, "true or false"), None, "use_rslora", default=False)

    @property
    def scaling(self) -> float:
        """The factor of ``B @ A``: alpha / rank, or alpha / sqrt(rank) for rsLoRA (arXiv 2312.03732)."""
        return self.alpha / math.sqrt(self.rank) if self.use_rslora else self.alpha / self.rank


#: the settings of several layers; None where the adapter is off
OfLayers = Sequence[LayerSettings | None]


#: each setting of a layer: its name in :class:`LayerSettings`, and its declaration there
SETTINGS = tuple(SimpleNamespace(name=field.name, **field.metadata) for field in dataclasses.fields(LayerSettings))
#: the tables on a layer that hold one scalar per adapter, except for the scaling; and the setting in each
SCALAR_TABLES: dict[str, str] = {setting.table: setting.name for setting in SETTINGS if setting.table}
#: rules for per-layer pattern fields, by the name of the field
PATTERNS: dict[str, Rule] = {setting.pattern: setting.rule for setting in SETTINGS if setting.pattern}


def settings_for(config: Config, path: str) -> LayerSettings:
    """The settings that a fresh load gives to the layer at ``path``, patterns included."""
    values = {}
    for setting in SETTINGS:
        value = getattr(config, setting.field)
        if setting.pattern and (pattern := getattr(config, setting.pattern)):
            value = pattern.get(get_pattern_key(pattern.keys(), path), value)
        values[setting.name] = value
    return LayerSettings(**values)


def settings_of(layer: TunerLayer, adapter_name: str) -> LayerSettings:
    """The current settings of an adapter on a layer."""
    tables = {setting: getattr(layer, table) for table, setting in SCALAR_TABLES.items()}
    values = {setting: table[adapter_name] for setting, table in tables.items() if adapter_name in table}
    return LayerSettings(**values, dropout=getattr(layer.lora_dropout[adapter_name], "p", 0.0))


# ---- all other fields of a config

_SELECTION = Rule(_is_selection, "a list of names or one expression")
#: fields of LoRA's config that choose its layers or initialize them, and the values that they may have
CHOICES: dict[str, Rule] = {
    **dict.fromkeys(("target_modules", "exclude_modules", "layers_pattern"), _SELECTION),
    "layers_to_transform": Rule(_are_indices, "a list of integers, or one"),
    "fan_in_fan_out": Rule(is_flag, "true or false"),
    "init_lora_weights": Rule(lambda value: is_flag(value) or _is_init(value), "true, false or a name that PEFT knows"),
    **{
        pattern: Rule(partial(_is_pattern, is_value=rule.is_right), f"names of layers, each with {rule.expected}")
        for pattern, rule in PATTERNS.items()
    },
}
#: the fields with the origin of an adapter; PEFT fills them in when it saves, and nothing depends on them
PROVENANCE = ("base_model_name_or_path", "revision", "auto_mapping", "peft_version")
#: the fields without an effect on an adapter that was loaded: where it comes from, how it was initialized and trained
#: (``task_type`` is looked at with the model's heads; ``qalora_group_size`` and ``megatron_core`` need another field)
NO_EFFECT = {
    *PROVENANCE,
    *("peft_type", "task_type", "inference_mode", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("runtime_config", "qalora_group_size", "megatron_core"),
}
#: the rule of each field that LoRA alone needs
RULES: dict[str, Rule] = {setting.field: setting.rule for setting in SETTINGS} | CHOICES
#: the values that fields of LoRA's config beyond plain LoRA may have
MORE_RULES = {
    **dict.fromkeys(("use_dora", "lora_bias"), Rule(is_flag, "true or false")),
    "bias": Rule(("none", "all", "lora_only").__contains__, "'none', 'all' or 'lora_only'"),
    "trainable_token_indices": Rule(lambda value: value != [], "null, or at least one token"),
}
#: names of initializations that leave no trace after loading; "gaussian" may have capitals
INITS = ("eva", "orthogonal", "lora_ga", "gaussian")
#: the beginnings of those with which a fresh load changes the base weights
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq")


def _is_init(name: str) -> bool:
    lower = name.lower()
    return name in INITS or lower in ("gaussian", "mica") or lower.startswith(BASE_CHANGING_INITS)


def unusual(config: Config) -> list[str]:
    """The fields that are not at their defaults and that plain LoRA doesn't have, sorted by name.

    >>> from peft import LoraConfig
    >>> unusual(LoraConfig(r=4, bias="none", use_rslora=True)), unusual(LoraConfig(use_dora=True, bias="all"))
    ([], ['bias', 'use_dora'])
    """
    known = RULES.keys() | NO_EFFECT
    fields = [field for field in dataclasses.fields(config) if field.name not in known]
    names = [field.name for field in fields if not _is_default(field, getattr(config, field.name, None))]
    init = getattr(config, "init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in INITS:
        names.append("init_lora_weights")
    return sorted(names)


def _is_default(field: dataclasses.Field, value: object) -> bool:
    """Whether a field has its default, or an empty list or table in place of none."""
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    is_empty = value is None or value is False or (isinstance(value, (list, tuple, dict, set)) and not value)
    return value == default or (is_empty and default in (None, False))


# ---- values of the wrong type: PEFT reads a config from a file without checking it


def damages(config: Config, rules: dict[str, Rule] = RULES) -> list[Refusal]:
    """The refusals of values that no fresh load can work with; ``rules`` are those of the fields to check."""
    nested = {name: value for name, value in vars(config).items() if isinstance(value, (dict, list))}
    if deep := [name for name, value in nested.items() if _is_deeper(value, MAX_DEPTH)]:
        expected = f"lists or tables within one another, {MAX_DEPTH} deep at most"
        return [
            refusal("config_damaged", name=name, value="a value that is nested deeper", expected=expected)
            for name in deep
        ]
    refusals = []
    for name, (is_right, expected) in rules.items():
        value = getattr(config, name)
        with contextlib.suppress(Exception):  # a check may raise any error for a value of the wrong type
            if is_right(value):
                continue
        refusals.append(refusal("config_damaged", name=name, value=value, expected=expected))
    return [*refusals, *(_broken_expressions(config) if config.peft_type == PeftType.LORA else ())]


def damaged_values(config: Config) -> list[Refusal]:
    """The :func:`damages` of an adapter of any method. Of others than LoRA, PEFT checks the rest when it loads it."""
    if config.peft_type == PeftType.LORA:
        return damages(config, RULES | MORE_RULES)
    finite = Rule(math.isfinite, "a finite number")
    return damages(config, {name: finite for name, value in vars(config).items() if isinstance(value, float)})


def _is_deeper(value: object, levels: int) -> bool:
    """Whether lists and dicts are nested more than ``levels`` deep."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return inner is not None and (levels == 0 or any(_is_deeper(item, levels - 1) for item in inner))


def _broken_expressions(config: Config) -> Iterator[Refusal]:
    whole = ("target_modules", "exclude_modules")
    for name in (*whole, "layers_pattern", "modules_to_save", *PATTERNS):
        value: Any = getattr(config, name)
        several = isinstance(value, (list, tuple, set, dict)) and name not in whole
        for expression in value if several else [value]:
            try:
                re.compile(expression if isinstance(expression, str) else "")
            except Exception as error:  # too many parentheses or repetitions raise other errors than re.error
                yield refusal("broken_expression", expression=expression, error=error)
