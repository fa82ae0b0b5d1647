"""The good adapters that the fuzzer damages: one folder for each kind of file and each way that it is swapped in."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import torch
from adapters import CONFIGS, kind_for, save_random_adapter_of
from lora_kinds import FAMILIES
from models import KINDS, Kind
from peft import LoraConfig, PeftConfig
from safetensors.torch import load_file

CONFIG, WEIGHTS, BIN = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"


class Seed(NamedTuple):
    """The adapter that is in the model, and the one to damage."""

    kind: Kind
    loaded: PeftConfig
    new: PeftConfig

    @property
    def ways(self) -> tuple[str, ...]:
        """How it can be swapped in: also into a prepared model, and so into a pool, if it is plain LoRA."""
        is_plain = type(self.new) is LoraConfig and not self.new.use_dora and not self.new.modules_to_save
        return ("hotswap", "plan", *(("pool", "prepare") if is_plain else ()))


LINEAR, FEW = list(KINDS["linear"].modules), ["q_proj", "down_proj"]
PATTERNS = dict(rank_pattern={"blocks.0": 5, "^last": 2}, alpha_pattern={r"blocks\.[01]": 12}, use_rslora=True)
PLAIN = Seed(KINDS["linear"], LoraConfig(r=4, target_modules=LINEAR), LoraConfig(r=6, target_modules=LINEAR))
SEEDS = {
    "linear": PLAIN,
    "bin": PLAIN,
    "patterns": PLAIN._replace(new=LoraConfig(r=3, target_modules=r"first|blocks\.\d|last", **PATTERNS)),
    "llama": Seed(
        KINDS["llama"], *(LoraConfig(r=rank, lora_alpha=5 * rank - 7, target_modules=FEW) for rank in (2, 3))
    ),
    **{name: Seed(KINDS["llama"], *FAMILIES[name][1][:2]) for name in ("DoRA", "modules_to_save")},
    **{name: Seed(kind_for(name), *CONFIGS[name][:2]) for name in ("IA3", "LoHa", "PromptTuning")},
}


def make_seeds(root: Path) -> None:
    """Saves all of them with PEFT alone: ``<root>/<name>/new`` and ``<root>/<name>/loaded``."""
    for name, seed in SEEDS.items():
        for part, number in (("loaded", 1), ("new", 2)):
            folder = save_random_adapter_of(getattr(seed, part), root / name / part, number, seed.kind)
            if name == "bin":
                torch.save(load_file(f"{folder}/{WEIGHTS}"), f"{folder}/{BIN}")
                os.remove(f"{folder}/{WEIGHTS}")
