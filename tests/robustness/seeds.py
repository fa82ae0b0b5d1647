"""The good adapters that the fuzzer damages: one folder for each kind of file and each way that it is swapped in."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from adapters import save_random_adapter_of
from models import KINDS
from peft import IA3Config, LoHaConfig, LoraConfig, PeftConfig, PromptTuningConfig
from safetensors.torch import load_file

CONFIG, WEIGHTS, BIN = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"

LINEAR = list(KINDS["linear"].modules)
FEW = ["q_proj", "down_proj"]


@dataclass(frozen=True)
class Seed:
    """An adapter to damage, and the one that is in the model before."""

    kind: str
    loaded: PeftConfig
    new: PeftConfig
    is_bin: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether it goes into a prepared model, and so into a pool."""
        return type(self.new) is LoraConfig and not self.new.use_dora and not self.new.modules_to_save


SEEDS = {
    "linear": Seed("linear", LoraConfig(r=4, target_modules=LINEAR), LoraConfig(r=6, target_modules=LINEAR)),
    "llama": Seed("llama", LoraConfig(r=2, target_modules=FEW), LoraConfig(r=3, lora_alpha=5, target_modules=FEW)),
    "patterns": Seed(
        "linear",
        LoraConfig(r=4, target_modules=LINEAR),
        LoraConfig(
            r=3,
            target_modules=r"first|blocks\.\d|last",
            rank_pattern={"blocks.0": 5, "^last": 2},
            alpha_pattern={r"blocks\.[01]": 12},
            use_rslora=True,
        ),
    ),
    "dora": Seed(
        "llama",
        LoraConfig(r=2, target_modules=FEW, use_dora=True),
        LoraConfig(r=3, target_modules=FEW, use_dora=True),
    ),
    "ia3": Seed(
        "llama",
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ),
    "loha": Seed("linear", LoHaConfig(r=2, target_modules=LINEAR), LoHaConfig(r=3, alpha=4, target_modules=LINEAR)),
    "saved module": Seed(
        "llama",
        LoraConfig(r=2, target_modules=FEW, modules_to_save=["lm_head"]),
        LoraConfig(r=3, target_modules=FEW, modules_to_save=["lm_head"]),
    ),
    "prompt": Seed(
        "llama",
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    ),
    "bin": Seed("linear", LoraConfig(r=4, target_modules=LINEAR), LoraConfig(r=6, target_modules=LINEAR), is_bin=True),
}


def make_seeds(root: Path) -> None:
    """Saves all of them with PEFT alone: ``<root>/<name>/new`` and ``<root>/<name>/loaded``."""
    for name, seed in SEEDS.items():
        for part, number in (("loaded", 1), ("new", 2)):
            folder = save_random_adapter_of(getattr(seed, part), root / name / part, number, KINDS[seed.kind])
            if seed.is_bin:
                torch.save(load_file(f"{folder}/{WEIGHTS}"), f"{folder}/{BIN}")
                os.remove(f"{folder}/{WEIGHTS}")
