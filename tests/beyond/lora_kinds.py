"""LoRA adapters of every kind that PEFT has, on models that they go on."""

from __future__ import annotations

import dataclasses
from functools import partial

import torch
from models import ARCHITECTURES, KINDS, TINY, Kind, llama
from peft import LoraConfig
from peft.tuners.lora import config as lora_config
from torch import nn

LLAMA = KINDS["llama"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EMBED, MHA = "embed_tokens", ["attention", "head"]


def classifier() -> nn.Module:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    config = LlamaConfig(**TINY, num_key_value_heads=1, num_labels=3, pad_token_id=0)
    return LlamaForSequenceClassification(config)


def biased_bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(**TINY, max_position_embeddings=32, initializer_range=0.2, num_labels=3)
    model = BertForSequenceClassification(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)  # biases start at zero
    return model


class Attention(nn.Module):
    """PyTorch's own multi-head attention."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.attention(x, x, x)[0])


def _ids():
    return {"input_ids": torch.randint(1, 40, (2, 9))}


def _invocation():
    """Tokens among which are those that switch aLoRA on."""
    return {"input_ids": torch.tensor([[1, 2, 5, 6, 7, 3, 8, 9], [5, 6, 7, 10, 11, 12, 13, 14]])}


MODELS: dict[str, Kind] = {
    "llama": LLAMA,
    "invoked": Kind(llama, _invocation, LLAMA.modules),
    "tied": Kind(partial(llama, tie_word_embeddings=True), _ids, LLAMA.modules),
    "classifier": Kind(classifier, _ids, LLAMA.modules),
    "bert": Kind(biased_bert, _ids, ("query", "key", "value", "dense")),
    "mixtral": ARCHITECTURES["mixtral"],
    "conv": KINDS["conv"],
    "attention": Kind(Attention, lambda: torch.randn(2, 5, 8), ("attention", "head")),
}


def variant(name: str, **arguments):
    """The config of a variant of LoRA; None where this version of PEFT doesn't have it yet."""
    config = getattr(lora_config, name, None)
    return None if config is None else config(**arguments)


def _lora(**arguments) -> LoraConfig | None:
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    if not arguments.keys() <= known or None in arguments.values():
        return None
    return LoraConfig(**{"r": 4, "target_modules": ATTENTION, **arguments})


def _bert(**arguments) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": ["query", "value"], **arguments})


def _pair(**first: object) -> list[LoraConfig | None]:
    """One of rank 4, and one of rank 8."""
    return [_lora(**first), _lora(r=8, **first)]


def _bd(nblocks: int):
    targets = dict(target_modules_bd_a=["q_proj"], target_modules_bd_b=["o_proj"])
    return variant("BdLoraConfig", nblocks=nblocks, match_strict=False, **targets)


DORA_CONVOLUTIONS = dict(r=4, target_modules=["conv1d", "conv2d", "conv3d"])
TOKENS = dict(trainable_token_indices=[1, 2, 3]), dict(r=8, trainable_token_indices=[4, 5])
#: by name: the model, and the configs that are swapped for one another, in every order
FAMILIES: dict[str, tuple[str, list[LoraConfig]]] = {
    "DoRA": ("llama", [*_pair(use_dora=True), _lora(), _lora(use_dora=True, target_modules=["q_proj"])]),
    "DoRA on convolutions": ("conv", [LoraConfig(use_dora=dora, **DORA_CONVOLUTIONS) for dora in (True, False)]),
    "lora_bias": ("bert", [_bert(lora_bias=True), _bert(r=8, lora_bias=True), _bert()]),
    "bias": (
        "bert",
        [_bert(bias="all"), _bert(r=2, bias="lora_only"), _bert(r=8, bias="all", target_modules=["value"])],
    ),
    # of other target modules, the file has other keys
    "lora_only": (
        "bert",
        [_bert(bias="lora_only", target_modules=modules) for modules in (["query"], ["query", "value"], ["dense"])],
    ),
    "modules_to_save": (
        "llama",
        [*_pair(modules_to_save=["lm_head"]), _lora(), _lora(modules_to_save=["lm_head", "embed_tokens"])],
    ),
    "SEQ_CLS": (
        "classifier",
        [*_pair(task_type="SEQ_CLS"), _lora(r=2, task_type="SEQ_CLS", use_dora=True), _lora()],
    ),
    "embeddings, untied": (
        "llama",
        [_lora(target_modules=[*ATTENTION, EMBED]), _lora(r=6, target_modules=[EMBED, "lm_head"]), _lora()],
    ),
    "embeddings, tied": (
        "tied",
        [_lora(target_modules=[*ATTENTION, EMBED]), _lora(r=6, target_modules=[EMBED]), _lora()],
    ),
    "trainable tokens": (
        "llama",
        [*(_lora(**each) for each in TOKENS), _lora(trainable_token_indices={EMBED: [7, 8]}), _lora()],
    ),
    "trainable tokens, tied": ("tied", [*(_lora(**each) for each in TOKENS), _lora()]),
    "MultiheadAttention": (
        "attention",
        [LoraConfig(r=r, target_modules=modules) for r, modules in ((2, MHA), (4, MHA), (3, MHA[1:]))],
    ),
    "BD-LoRA": ("llama", [_lora(use_bdlora=_bd(2)), _lora(r=8, use_bdlora=_bd(4)), _lora()]),
    "aLoRA": (
        "invoked",
        [
            _lora(task_type="CAUSAL_LM", alora_invocation_tokens=[5, 6]),
            _lora(r=8, task_type="CAUSAL_LM", alora_invocation_tokens=[7]),
            _lora(task_type="CAUSAL_LM"),
        ],
    ),
    "VeLoRA": ("llama", [*_pair(velora_config=variant("VeloraConfig", num_groups=4)), _lora()]),
    "MonteCLoRA": ("llama", [*_pair(monteclora_config=variant("MontecloraConfig", buffer_size=8)), _lora()]),
    "QA-LoRA": (
        "llama",
        [_lora(use_qalora=True, qalora_group_size=4), _lora(r=8, use_qalora=True, qalora_group_size=8), _lora()],
    ),
    "layer_replication": (
        "llama",
        [_lora(layer_replication=[[0, 2], [1, 2]]), _lora(r=8, layer_replication=[[0, 2], [1, 2]])],
    ),
    "target_parameters": (
        "mixtral",
        [
            _lora(target_parameters=["experts.gate_up_proj", "experts.down_proj"]),
            _lora(r=8, target_parameters=["experts.gate_up_proj", "experts.down_proj"]),
            _lora(r=2, target_parameters=["experts.down_proj"]),
            _lora(),
        ],
    ),
}
FAMILIES = {name: family for name, family in FAMILIES.items() if None not in family[1]}
