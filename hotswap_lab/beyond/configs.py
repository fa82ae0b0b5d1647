"""Configs that ask for more than plain LoRA: refusals, and fields that add state."""

from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftConfig, PeftType

from ..core.errors import Refusal, refusal
from ..core.host import kind_of
from ..core.settings import BASE_CHANGING_INITS, damaged_values, is_rank, unusual

#: ranks up to this one are allowed in any layer, however small; a rank of 10**9 from a damaged config would take 64 GB
#: of memory in a layer of 8 x 8
POINTLESS = 1024
#: the only module that a config may make PEFT import
MEGATRON = "megatron.core"
#: fields that change only the tensors of a layer: DoRA's magnitude, a bias
FORMS = ("use_dora", "lora_bias")
#: config fields that add something besides B @ A, which no scaling applies to
NOT_SCALED = ("modules_to_save", "trainable_token_indices", "bias", "layer_replication")
#: the other fields that add state beyond the tensors and scalars of a layer. Any other field is from a later PEFT; then
#: a fresh load decides, and the adapter can't be scaled
KNOWN = {
    *FORMS,
    *NOT_SCALED,
    *("target_parameters", "ensure_weight_tying", "megatron_config", "use_qalora", "init_lora_weights"),
    *("velora_config", "alora_invocation_tokens", "monteclora_config", "use_bdlora", "arrow_config", "kasa_config"),
}


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
    damaged = [] if role == "loaded" else damaged_values(config)
    yield from damaged or (_unsupported(config, role) if is_lora else ())
    if config.peft_type == PeftType.XLORA:
        yield refusal("method_refused", role=role)
    if is_lora and loaded is not None and form_for(config) != form_for(loaded):
        found, expected = (f"use_dora={either.use_dora}, lora_bias={either.lora_bias}" for either in (config, loaded))
        yield refusal("no_common_graph", found=found, expected=expected)
    elif is_lora and not damaged and loaded:
        new, old = set(extra_state(config)), set(extra_state(loaded))
        lacking = (new - old, "which the loaded adapter lacks"), (old - new, "which only the loaded adapter has")
        if new != old:
            differences = [f"{', '.join(sorted(fields))}, {which}" for fields, which in lacking if fields]
            yield refusal("member_of_another_kind", found="; ".join(differences))


def form_for(config: PeftConfig) -> tuple[bool, bool]:
    """Whether layers of LoRA with this config have a magnitude (DoRA), and whether they have a bias."""
    return bool(config.use_dora), bool(config.lora_bias)


def pointless_rank(rank: Any, path: str, module: torch.nn.Module) -> Iterator[Refusal]:
    """Refuse a rank far above any that this layer's update can have: it might take more memory than the model."""
    most = max([POINTLESS, *(2 * max(parameter.shape, default=0) for parameter in module.parameters())])
    if not is_rank(rank) or rank > most:
        yield refusal("pointless_rank", rank=rank, path=path, most=most)


# ---- more than LoRA's own tensors


def _unsupported(config: PeftConfig, role: str) -> Iterator[Refusal]:
    """Refusals because of fields of LoRA's config that can't be swapped."""
    if getattr(config, "arrow_config", None):
        yield refusal("arrow_router", role=role)
    if getattr(config, "megatron_config", None) and config.megatron_core != MEGATRON:
        yield refusal("imports_a_module", role=role, megatron_core=config.megatron_core, allowed=MEGATRON)
    init = config.init_lora_weights
    if isinstance(init, str) and init.lower().startswith(BASE_CHANGING_INITS):
        yield refusal("changes_base_weights", role=role, found=f"init_lora_weights={init!r}")
    elif getattr(config, "kasa_config", None):
        yield refusal("changes_base_weights", role=role, found="a kasa_config")


def unknown(config: PeftConfig) -> list[str]:
    """The fields of LoRA's config that are not at their defaults, and that only a later PEFT knows."""
    return [name for name in unusual(config) if name not in KNOWN]


def extra_state(config: PeftConfig) -> list[str]:
    """The fields of LoRA's config that add state beyond the tensors and scalars of its layers."""
    return [name for name in unusual(config) if name not in FORMS]


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
    found = unusual(config)
    if present := [*(name for name in NOT_SCALED if name in found), *unknown(config)]:
        return f"an adapter with {' and '.join(present)}, which would stay at full strength"
    return None
