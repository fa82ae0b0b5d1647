"""Refusals that are given in more than one place."""

from __future__ import annotations

from collections.abc import Iterable

from peft import PeftConfig

from .errors import Refusal, listing


def merged(adapter_name: str) -> Refusal:
    """Why an adapter that is merged can't be swapped, in PEFT's words."""
    return Refusal(
        f"Cannot hot-swap adapter '{adapter_name}' because it is currently merged into the base weights.",
        found="base weights that contain the old adapter",
        expected="an unmerged adapter: unmerging after a swap would subtract the wrong weights",
        next_step="call model.unmerge_adapter() (diffusers: unfuse_lora()) first",
    )


def merged_beside(adapter_name: str, others: Iterable[str]) -> Refusal:
    """Why a swap that goes by the base weights has to wait until they are the base model's own again."""
    return Refusal(
        f"Cannot hot-swap adapter '{adapter_name}' while {listing(map(repr, others))} is merged into the base weights.",
        found="base weights that contain another adapter",
        expected="the base model's own weights: what this swap writes is worked out from them",
        next_step="call model.unmerge_adapter() (diffusers: unfuse_lora()) first",
    )


def incompatible_types(loaded: PeftConfig, new: PeftConfig, adapter_name: str, found: str, next_step: str) -> Refusal:
    """Why an adapter of one method can't take the place of one of another, in PEFT's words."""
    old, kind = (getattr(config.peft_type, "value", config.peft_type) for config in (loaded, new))
    return Refusal(
        f"Incompatible PEFT types found: {old} and {kind}",
        found=f"{found} of type {kind}",
        expected=f"type {old}, as the adapter {adapter_name!r} in the model",
        next_step=next_step,
    )


def too_low(target_rank: int, own: int, path: str) -> Refusal:
    """Why there can't be room for less than an adapter takes, in PEFT's words."""
    return Refusal(
        f"Trying to pad the adapter to the target rank {target_rank}, but the original rank is larger ({own}). This is "
        "not possible.",
        found=f"rank {own} at {path}",
        expected=f"a target rank of {own} at least",
        next_step="pass the highest rank of all adapters as target_rank, the loaded one included",
    )


def damaged(name: str, value: object, expected: str) -> Refusal:
    """What in a config has a value of the wrong kind."""
    return Refusal(
        f"The adapter's config is damaged at {name}.",
        found=f"{name}={value!r}",
        expected=expected,
        next_step="get an undamaged copy of adapter_config.json",
    )


def unexpected_keys(keys: Iterable[str], found: str, expected: str, next_step: str) -> Refusal:
    """Why tensors can't be left over, in PEFT's words."""
    return Refusal(
        f"Hot swapping the adapter did not succeed, unexpected keys found: {listing(keys, 4)}.",
        found,
        expected,
        next_step,
    )


def needs_originals(found: str, expected: str, next_step: str) -> Refusal:
    """Why base weights that an adapter's file has overwritten can't be put back."""
    return Refusal(
        "The adapter in the model came with base weights of its own, and the new one needs the originals back.",
        found,
        expected,
        next_step,
    )
