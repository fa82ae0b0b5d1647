"""The good adapters that the fuzzer damages: one folder for each kind of file and each way that it is swapped in."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from adapters import save_random_adapter_of
from models import KINDS, Kind
from peft import IA3Config, LoHaConfig, LoraConfig, PeftConfig, PromptTuningConfig
from safetensors.torch import load_file

CONFIG, WEIGHTS, BIN = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"


@dataclass(frozen=True)
class Seed:
    """An adapter to damage, and the one that is in the model before."""

    kind: Kind
    loaded: PeftConfig
    new: PeftConfig
    is_bin: bool = False

    @property
    def ways(self) -> tuple[str, ...]:
        """How it can be swapped in: also into a prepared model, and so into a pool, if it is plain LoRA."""
        is_plain = type(self.new) is LoraConfig and not self.new.use_dora and not self.new.modules_to_save
        return ("hotswap", "plan", *(("pool", "prepare") if is_plain else ()))


def _seed(kind: str, make: type[PeftConfig], both: dict, loaded: dict, new: dict, is_bin: bool = False) -> Seed:
    return Seed(KINDS[kind], make(**both, **loaded), make(**both, **new), is_bin)


LINEAR = dict(target_modules=list(KINDS["linear"].modules))
FEW = dict(target_modules=["q_proj", "down_proj"])
PATTERNS = dict(rank_pattern={"blocks.0": 5, "^last": 2}, alpha_pattern={r"blocks\.[01]": 12}, use_rslora=True)
IA3 = dict(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
SEEDS = {
    "linear": _seed("linear", LoraConfig, LINEAR, dict(r=4), dict(r=6)),
    "llama": _seed("llama", LoraConfig, FEW, dict(r=2), dict(r=3, lora_alpha=5)),
    "patterns": Seed(
        KINDS["linear"],
        LoraConfig(r=4, **LINEAR),
        LoraConfig(r=3, target_modules=r"first|blocks\.\d|last", **PATTERNS),
    ),
    "dora": _seed("llama", LoraConfig, FEW | dict(use_dora=True), dict(r=2), dict(r=3)),
    "ia3": _seed("llama", IA3Config, IA3, {}, {}),
    "loha": _seed("linear", LoHaConfig, LINEAR, dict(r=2), dict(r=3, alpha=4)),
    "saved module": _seed("llama", LoraConfig, FEW | dict(modules_to_save=["lm_head"]), dict(r=2), dict(r=3)),
    "prompt": _seed(
        "llama",
        PromptTuningConfig,
        dict(task_type="CAUSAL_LM"),
        dict(num_virtual_tokens=3),
        dict(num_virtual_tokens=4),
    ),
    "bin": _seed("linear", LoraConfig, LINEAR, dict(r=4), dict(r=6), is_bin=True),
}


def make_seeds(root: Path) -> None:
    """Saves all of them with PEFT alone: ``<root>/<name>/new`` and ``<root>/<name>/loaded``."""
    for name, seed in SEEDS.items():
        for part, number in (("loaded", 1), ("new", 2)):
            folder = save_random_adapter_of(getattr(seed, part), root / name / part, number, seed.kind)
            if seed.is_bin:
                torch.save(load_file(f"{folder}/{WEIGHTS}"), f"{folder}/{BIN}")
                os.remove(f"{folder}/{WEIGHTS}")
