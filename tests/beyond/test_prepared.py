"""Rank padding for whatever has a rank: all kinds of LoRA that can be had, and LoHa, LoKr, HiRA, AdaLoRA."""

from __future__ import annotations

import pytest
import torch
from adapters import ALL, CONFIGS, FEW, save_all, save_random_adapter_of
from lengths import few_of
from lora_kinds import MODELS
from models import KINDS, Convolutions, Kind, call, load
from oracle import assert_equals_fresh_load, assert_same_outputs, assert_same_tensors
from peft import LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, PeftConfig, get_peft_model_state_dict
from refusals import refused
from torch import nn

from hotswap_lab import (
    RecompileWatch,
    hotswap_adapter,
    prepare_model_for_compiled_hotswap,
    resolve_slot,
    save_adapter,
    verify_hotswap,
)


class Wide(nn.Module):
    """Wide enough that LoKr has factors of several ranks."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


LLAMA = KINDS["llama"]
WIDE = Kind(Wide, lambda: torch.randn(3, 64), ("first", "last"))
PLAIN_CONVOLUTIONS = Kind(Convolutions, KINDS["conv"].make_inputs, ("conv1d", "conv2d", "conv3d"))


def _lora(modules: list[str], **arguments) -> list[PeftConfig]:
    """Higher, lower, on fewer layers, with another scaling and dropout."""
    changes = [dict(r=4), dict(r=8, lora_alpha=4), dict(r=2, target_modules=modules[:1]), dict(lora_dropout=0.1, r=4)]
    changes[3]["use_rslora"] = True
    return [LoraConfig(**{"target_modules": modules, **arguments, **each}) for each in changes]


#: the model, and a family whose members have different ranks; the first is the one that is loaded
FAMILIES: dict[str, tuple[Kind, list[PeftConfig]]] = {
    "DoRA": (LLAMA, _lora(["q_proj", "k_proj", "v_proj"], use_dora=True)),
    "DoRA on embeddings": (KINDS["embedding"], _lora(["embed", "head"], use_dora=True)),
    "DoRA on convolutions": (PLAIN_CONVOLUTIONS, _lora(["conv1d", "conv2d", "conv3d"], use_dora=True)),
    "lora_bias": (KINDS["linear"], _lora(["first", "blocks.1", "last"], lora_bias=True)),
    "SEQ_CLS": (MODELS["classifier"], _lora(["q_proj", "k_proj", "v_proj"], task_type="SEQ_CLS")),
    "modules_to_save and DoRA": (LLAMA, _lora(["q_proj", "v_proj"], modules_to_save=["lm_head"], use_dora=True)),
    "trainable tokens": (LLAMA, _lora(["q_proj", "v_proj"], trainable_token_indices=[1, 2, 3])),
    "LoKr": (WIDE, [LoKrConfig(r=rank, alpha=3, target_modules=["first", "last"]) for rank in (2, 3, 1)]),
    # those of CONFIGS differ in their dropout, too, which a graph would notice
    "LoHa": (
        LLAMA,
        [
            # whose scalings PEFT rounds to float32
            LoHaConfig(r=rank, alpha=rank * rank // 2, target_modules=modules, rank_pattern={"q_proj": 2 * rank})
            for rank, modules in ((4, ALL), (6, ALL), (2, FEW))
        ],
    ),
    **{name: (LLAMA, CONFIGS[name]) for name in ("HiRA", "AdaLoRA")},
}
#: of these, layers that only other members have are not reserved
NOT_RESERVED = ("LoKr", "LoHa", "HiRA", "AdaLoRA")
#: for these, a higher rank than prepared for needs another way to prepare
OTHERS = [name for name in FAMILIES if name not in ("DoRA", "DoRA on embeddings", "DoRA on convolutions", "lora_bias")]


@pytest.mark.parametrize("name", few_of(FAMILIES, ("lora_bias",)))
def test_ranks_grow_and_shrink_without_a_recompile(tmp_path, name):
    """Also from an adapter on few layers: those that only the others have are reserved."""
    (kind, configs), loaded = FAMILIES[name], 0 if name in NOT_RESERVED else 2
    folders = save_all(tmp_path, *configs, kind=kind)
    model = load(kind, folders[loaded])
    prepare_model_for_compiled_hotswap(model, adapters=folders)
    assert_equals_fresh_load(model, kind, folders[loaded], prepared=True, margin=10)
    addresses = {key: each.data_ptr() for key, each in model.named_parameters()}
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    call(compiled, kind.inputs())
    with RecompileWatch(allow=0):
        for number in (*range(1, len(folders)), 0, 2, 1, 2, 0):
            hotswap_adapter(compiled, folders[number], "default")
            assert_same_outputs(compiled, load(kind, folders[number]), kind, margin=10)
            assert_equals_fresh_load(model, kind, folders[number], prepared=True, margin=10)
    assert {key: each.data_ptr() for key, each in model.named_parameters()} == addresses
    assert verify_hotswap(model, folders[0], inputs=kind.inputs())
    hotswap_adapter(model, folders[2], "default")
    save_adapter(model, tmp_path / "saved")
    assert_same_outputs(model, load(kind, str(tmp_path / "saved")), kind, margin=10)


@pytest.mark.parametrize("name", OTHERS)
def test_higher_ranks_than_prepared_for_are_refused(tmp_path, name):
    kind, configs = FAMILIES[name]
    _, high, low = save_all(tmp_path, *configs[:3], kind=kind)
    model = load(kind, low)
    prepare_model_for_compiled_hotswap(model, target_rank=4 if name in CONFIGS and kind is LLAMA else 2)
    refused("can't be done in a prepared model", hotswap_adapter, model, high, "default", add_layers=True)


def test_factors_of_other_shapes_are_refused(tmp_path):
    """No rank makes them fit."""
    configs = (LoKrConfig(r=rank, target_modules=["first"], decompose_factor=of) for rank, of in ((3, -1), (2, 4)))
    old, new = save_all(tmp_path, *configs, kind=WIDE)
    prepare_model_for_compiled_hotswap(model := load(WIDE, old), target_rank=3)
    refused("can't be done in a prepared model", hotswap_adapter, model, new)


HEAD = LoraConfig(r=4, target_modules=ALL, modules_to_save=["lm_head"])
TOKENS = LoraConfig(r=4, target_modules=ALL, trainable_token_indices=[1, 2])
LORA_CONFIG = LoraConfig(r=4, target_modules=ALL)
LOHA, OFT = LoHaConfig(r=4, target_modules=ALL), OFTConfig(oft_block_size=4, target_modules=ALL)


@pytest.mark.parametrize(
    ("loaded", "arguments", "match"),
    [
        (LOHA, dict(target_rank=2), "the original rank is larger"),
        (LORA_CONFIG, dict(adapters=[HEAD]), "another kind than the loaded one"),
        (HEAD, dict(adapters=[LoraConfig(target_modules=ALL, modules_to_save=["norm"])]), "saves other modules"),
        (TOKENS, dict(adapters=[LoraConfig(target_modules=ALL, trainable_token_indices=[1, 3])]), "other tokens"),
        (LOHA, dict(adapters=[LoHaConfig(r=16, target_modules=ALL)], target_rank=8), "the original rank is larger"),
        (LOHA, dict(adapters=[LoHaConfig(r=2.5, target_modules=ALL)]), "an invalid rank"),
        (LOHA, dict(adapters=[LoraConfig(r=4, target_modules=ALL)]), "Incompatible PEFT types found: LOHA and LORA"),
        # zeros beyond the rank would change what it computes
        (OFT, dict(target_rank=8, adapter_name="default"), "can't be prepared for adapters of type OFT"),
    ],
)
def test_families_that_can_not_be_had(tmp_path, loaded, arguments, match):
    model = load(LLAMA, save_random_adapter_of(loaded, tmp_path, 1))
    refused(match, prepare_model_for_compiled_hotswap, model, **arguments)


def test_a_model_that_peft_prepared_keeps_its_sizes(tmp_path):
    """With saved modules, too, where the new adapter is loaded next to the model."""
    from peft.utils.hotswap import prepare_model_for_compiled_hotswap as pefts

    first, *others = save_all(
        tmp_path,
        # it keeps scalings in float32, where 7 / 8 and 7 / 4 are exact
        *(LoraConfig(r=r, lora_alpha=7, target_modules=ALL, modules_to_save=["lm_head"]) for r in (2, 8, 4)),
    )
    model = load(LLAMA, first)
    pefts(model, target_rank=8)
    model.eval()  # what it makes is in training
    addresses = resolve_slot(model, "default").data_ptrs()
    for folder in others:  # a higher rank and then a lower one, so that there is something to clear
        hotswap_adapter(model, folder, "default")
        assert_same_tensors(get_peft_model_state_dict(model), get_peft_model_state_dict(load(LLAMA, folder)))
        assert verify_hotswap(model, folder, inputs=LLAMA.inputs())
    assert resolve_slot(model, "default").data_ptrs() == addresses
