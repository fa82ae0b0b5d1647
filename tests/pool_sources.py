"""Adapters for a pool that have little in common."""

from __future__ import annotations

from pathlib import Path

from models import KINDS, save_random_adapter

LLAMA = KINDS["llama"]
PATTERNS = dict(rank_pattern={"k_proj": 7}, alpha_pattern={"v_proj": 9})


def save_sources(folder: Path) -> dict[str, str]:
    """Other ranks, patterns, layers that don't overlap, dropout."""
    return {
        "a": save_random_adapter(LLAMA, folder / "a", seed=1, r=4, lora_alpha=6),
        "b": save_random_adapter(LLAMA, folder / "b", seed=2, r=8, lora_alpha=5, lora_dropout=0.3),
        "c": save_random_adapter(LLAMA, folder / "c", seed=3, r=2, use_rslora=True, target_modules=["q_proj"]),
        "d": save_random_adapter(LLAMA, folder / "d", seed=4, r=3, target_modules=["down_proj", "up_proj"]),
        "e": save_random_adapter(LLAMA, folder / "e", seed=5, r=4, **PATTERNS),
    }
