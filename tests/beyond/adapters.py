"""Adapters of every PEFT method, with random weights, several configs for each."""

from __future__ import annotations

import copy
import dataclasses
import shutil
from pathlib import Path

import peft
import torch
from lora_kinds import FAMILIES, MODELS
from models import KINDS, Kind
from peft import PeftConfig, get_peft_model
from safetensors.torch import load_file, save_file

LLAMA = KINDS["llama"]
MLP = KINDS["linear"]
CONV = KINDS["conv"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FEW = ["q_proj", "down_proj"]


def _config(name: str, **arguments) -> PeftConfig | None:
    """None where this version of PEFT doesn't have the method yet."""
    config = getattr(peft, f"{name}Config", None)
    return None if config is None else config(**arguments)


def _both(name: str, first: dict, second: dict, targets: list = ALL) -> list[PeftConfig]:
    """Two configs that differ in all that ``first`` and ``second`` say, and one of them on few layers only."""
    return [
        _config(name, target_modules=targets, **first),
        _config(name, target_modules=targets, **second),
        _config(name, target_modules=FEW, **first),
    ]


def _prompt(name: str, first: dict, second: dict) -> list[PeftConfig]:
    return [_config(name, task_type="CAUSAL_LM", **arguments) for arguments in (first, second)]


#: by name: configs that are swapped for one another, in every order. Those of one list are all of one method.
CONFIGS: dict[str, list[PeftConfig]] = {
    "LoHa": _both(
        "LoHa",
        dict(r=4, alpha=8),
        dict(r=6, alpha=3, rank_dropout=0.1, rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 9}),
    ),
    "LoKr": _both("LoKr", dict(r=2, alpha=4), dict(r=4, alpha=2, decompose_both=True, decompose_factor=4)),
    "IA3": [
        _config("IA3", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
        _config("IA3", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=[]),
        _config("IA3", target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ],
    "OFT": _both(
        "OFT",
        dict(oft_block_size=4, use_cayley_neumann=False),
        dict(oft_block_size=8, coft=True, eps=1.0, block_share=True),
    ),
    "BOFT": _both(
        "BOFT", dict(boft_block_size=4), dict(boft_block_size=2, boft_n_butterfly_factor=2, boft_dropout=0.1)
    ),
    "HRA": _both("HRA", dict(r=4), dict(r=8, apply_GS=True)),
    "VeRA": _both("Vera", dict(r=4), dict(r=8, projection_prng_key=7, d_initial=0.3, vera_dropout=0.1)),
    "VeRA, projection not saved": _both(
        "Vera", dict(r=4, save_projection=False), dict(r=8, save_projection=False, projection_prng_key=7)
    ),
    "PVeRA": _both("Pvera", dict(r=4), dict(r=8, projection_prng_key=7)),
    "AdaLoRA": _both(
        "AdaLora", dict(init_r=4, target_r=2, total_step=10), dict(init_r=9, target_r=2, total_step=10, lora_alpha=4)
    ),
    "FourierFT": _both(
        "FourierFT", dict(n_frequency=20, scaling=20.0), dict(n_frequency=30, scaling=10.0, random_loc_seed=3)
    ),
    "WaveFT": _both(
        "WaveFT", dict(n_frequency=20, scaling=20.0), dict(n_frequency=30, scaling=10.0, random_loc_seed=3)
    ),
    "LNTuning": [
        _config("LNTuning", target_modules=["input_layernorm", "norm"]),
        _config("LNTuning", target_modules=["input_layernorm", "post_attention_layernorm", "norm"]),
    ],
    "VBLoRA": _both(
        "VBLoRA",
        dict(r=2, num_vectors=20, vector_length=8, topk=2),
        dict(r=4, num_vectors=30, vector_length=4, topk=3, save_only_topk_weights=True),
    ),
    "RandLora": _both("RandLora", dict(r=4), dict(r=8, randlora_alpha=32, projection_prng_key=7)),
    "Road": _both("Road", dict(group_size=8), dict(group_size=4, variant="road_2")),
    "SHiRA": _both("Shira", dict(r=2, random_seed=1), dict(r=3, random_seed=2)),
    "MiSS": _both("Miss", dict(r=4), dict(r=8, miss_dropout=0.1)),
    "C3A": _both("C3A", dict(block_size=8), dict(block_size=4)),
    "HiRA": _both("Hira", dict(r=4), dict(r=6, hira_dropout=0.1)),
    "GraLoRA": _both("Gralora", dict(r=4, gralora_k=2, alpha=8), dict(r=8, gralora_k=4, alpha=4, hybrid_r=4)),
    "DeLoRA": _both("Delora", dict(r=4, delora_lambda=15), dict(r=8, delora_lambda=5)),
    "Poly": _both(
        "Poly",
        dict(r=2, n_tasks=2, n_skills=2, n_splits=2, task_type="CAUSAL_LM"),
        dict(r=4, n_tasks=3, n_skills=3, n_splits=1, task_type="CAUSAL_LM"),
    ),
    "OSF": _both("OSF", dict(effective_rank=4), dict(effective_rank=6)),
    "TinyLoRA": _both("TinyLora", dict(r=2, u=8), dict(r=3, u=16, projection_seed=3)),
    "PSOFT": _both("Psoft", dict(r=4), dict(r=6, psoft_alpha=4)),
    "PEANuT": _both("Peanut", dict(r=4, depth=2), dict(r=6, depth=4, scaling=0.5)),
    "Supertuning": _both("Supertuning", dict(sparsity=0.7), dict(sparsity=0.5, r=4)),
    "Deft": _both("Deft", dict(r=4), dict(r=6, decomposition_method="qr")),
    "UniLoRA": _both("UniLora", dict(r=2, theta_d_length=64), dict(r=4, theta_d_length=32, proj_seed=5)),
    "Lily": _both("Lily", dict(r=4, stride_A=1, num_B=2), dict(r=6, stride_A=2, num_B=3, scaling=2.0)),
    "GLoRA": _both("Glora", dict(r=4), dict(r=6, config_A_B="vector", config_C="none", config_D_E="vector")),
    "BEFT": [_config("Beft", target_modules=["k_proj", "v_proj"]), _config("Beft", target_modules=["v_proj"])],
    "Adamss": [  # on few layers: it clusters each of them
        _config("Adamss", target_modules=FEW, r=8, num_subspaces=2, subspace_rank=2),
        _config("Adamss", target_modules=FEW, r=6, num_subspaces=3, subspace_rank=1, random_seed=2),
        _config("Adamss", target_modules=["q_proj"], r=8, num_subspaces=2, subspace_rank=2),
    ],
    "FRoD": _both("Frod", dict(sparse_rate=0.1), dict(sparse_rate=0.2, projection_prng_key=7)),
    "TrainableTokens": [
        _config("TrainableTokens", target_modules=["embed_tokens"], token_indices=indices)
        for indices in ([1, 2, 3], [4, 5, 6], list(range(12)))
    ],
    "Shadow": [
        _config("Shadow", task_type="CAUSAL_LM", r=4, shadow_num_hidden_layers=1),
        _config("Shadow", task_type="CAUSAL_LM", r=6, shadow_num_hidden_layers=1, shadow_alpha=0.5),
    ],
    "AdaptionPrompt": _prompt(
        "AdaptionPrompt", dict(adapter_len=4, adapter_layers=2), dict(adapter_len=6, adapter_layers=2)
    ),
    "PromptTuning": _prompt("PromptTuning", dict(num_virtual_tokens=4), dict(num_virtual_tokens=7)),
    "PTuning": _prompt(
        "PromptEncoder",
        dict(num_virtual_tokens=4, encoder_hidden_size=8),
        dict(num_virtual_tokens=5, encoder_hidden_size=12),
    ),
    "PrefixTuning": _prompt(
        "PrefixTuning",
        dict(num_virtual_tokens=4),
        dict(num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=8),
    ),
    "MultitaskPromptTuning": _prompt(
        "MultitaskPromptTuning",
        dict(num_virtual_tokens=4, num_tasks=2),
        dict(num_virtual_tokens=5, num_tasks=2, num_ranks=2),
    ),
    "CPT": _prompt(
        "CPT",
        dict(cpt_token_ids=[1, 2, 3], cpt_mask=[1, 1, 1], cpt_tokens_type_mask=[1, 2, 3]),
        dict(cpt_token_ids=[4, 5, 6, 7], cpt_mask=[1, 1, 1, 1], cpt_tokens_type_mask=[1, 2, 3, 4]),
    ),
    "Cartridge": _prompt(
        "Cartridge", dict(num_virtual_tokens=4, num_frozen_tokens=1), dict(num_virtual_tokens=6, num_frozen_tokens=2)
    ),
}


CONFIGS = {name: configs for name, configs in CONFIGS.items() if None not in configs}
#: the types that can't compute here: PEFT's PVeRA gives ``randn_like`` a generator, which older PyTorch doesn't take
BROKEN = []
try:
    torch.randn_like(torch.zeros(1), generator=torch.Generator())
except TypeError:
    BROKEN = [CONFIGS.pop("PVeRA")[0].peft_type]


#: for methods that PEFT lacks in float64
SINGLE = dataclasses.replace(LLAMA, dtype=torch.float32)


def kind_for(name: str) -> Kind:
    """The model that a method is tried on; some want more inputs."""
    if name in ("VBLoRA", "PSOFT"):
        return SINGLE
    if name not in ("Poly", "MultitaskPromptTuning"):
        return LLAMA
    tasks = dict(task_ids=torch.tensor([0, 1]))
    return Kind(LLAMA.make_random, lambda: {**LLAMA.make_inputs(), **tasks}, LLAMA.modules)


#: these and all kinds of LoRA, by name: the model, and the configs that are swapped for one another
METHODS: dict[str, tuple[Kind, list[PeftConfig]]] = {
    **{name: (kind_for(name), configs) for name, configs in CONFIGS.items()},
    **{name: (MODELS[model], configs) for name, (model, configs) in FAMILIES.items()},
}


def save_random_adapter_of(config: PeftConfig, folder: Path, seed: int, kind: Kind = LLAMA) -> str:
    """Makes an adapter with random weights with PEFT alone, and saves it with PEFT alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = get_peft_model(kind.base(), copy.deepcopy(config))
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                parameter.data.add_(0.2 * torch.randn_like(parameter.data))
        model.save_pretrained(folder)
    return str(folder)


def save_all(folder: Path, *configs: PeftConfig, kind: Kind = LLAMA) -> list[str]:
    """An adapter of each config, with other weights each."""
    first = len(list(folder.iterdir()))
    return [save_random_adapter_of(each, folder / f"{n}", n + 1, kind) for n, each in enumerate(configs, first)]


def with_base_weights(folder: str, target: Path, kind: Kind, *names: str) -> str:
    """The same adapter, in a file that also has these weights of the base model, with other values."""
    shutil.copytree(folder, target)
    tensors, weights = load_file(f"{folder}/adapter_model.safetensors"), kind.base().state_dict()
    for number, name in enumerate(names):
        weight = weights[name.replace(".base_layer", "")]
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(number))
        tensors[f"base_model.model.{name}"] = weight + 0.5 * noise
    save_file(tensors, f"{target}/adapter_model.safetensors", metadata={"format": "pt"})
    return str(target)


def with_other_base_weights(folder: str, target: Path) -> str:
    """The same adapter, in a file that changes what it has of the base model's own weights: embeddings."""
    shutil.copytree(folder, target)
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(f"{folder}/adapter_model.safetensors")
    for key, tensor in tensors.items():
        if "lora_" not in key:
            tensors[key] = tensor + 0.3 * torch.randn(tensor.shape, generator=generator)
    save_file(tensors, f"{target}/adapter_model.safetensors", metadata={"format": "pt"})
    return str(target)
