"""Tiny models of every kind that LoRA goes on, and adapters with random weights for them.

LoRA starts with B = 0, so an adapter fresh from PEFT changes nothing and any swap of it would look right.
Every adapter made here has random, non-zero weights of a size that changes the outputs visibly.

Models are made in float64, before an adapter is loaded, unless they have half precision or are quantized: what float32
rounds depends on the processor, and hides small mistakes. No weight is a number of float32.
"""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

# No test here looks at a model card, and PEFT takes longer to write one than for the rest of a small adapter.
PeftModel.create_or_update_model_card = lambda model, output_dir: None

#: random inputs for a model in float64
randn = partial(torch.randn, dtype=torch.float64)

#: all threads share one generator of random numbers: who sets its seed must be alone until all is drawn
RANDOM = threading.RLock()


class Mlp(nn.Module):
    """Three linear layers, one of them without bias."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(12, 16)
        self.blocks = nn.ModuleList([nn.Linear(16, 16, bias=False), nn.Linear(16, 16)])
        self.last = nn.Linear(16, 6)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.last(x)


class Convolutions(nn.Module):
    """Conv1d, 2d and 3d, plain and grouped."""

    def __init__(self):
        super().__init__()
        self.conv1d = nn.Conv1d(4, 8, 3, padding=1)
        self.grouped1d = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.conv2d = nn.Conv2d(8, 8, 3, padding=1)
        self.grouped2d = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=4)
        self.conv3d = nn.Conv3d(8, 4, 3, padding=1)
        self.grouped3d = nn.Conv3d(4, 8, 1, groups=2)

    def forward(self, x):
        x = torch.tanh(self.grouped1d(torch.tanh(self.conv1d(x))))
        x = x.unflatten(-1, (4, 4))
        x = torch.tanh(self.grouped2d(torch.tanh(self.conv2d(x))))
        x = x.unsqueeze(-1)
        return self.grouped3d(torch.tanh(self.conv3d(x)))


class Embedded(nn.Module):
    """An embedding and a linear layer."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 10)
        self.head = nn.Linear(10, 20)

    def forward(self, ids):
        return self.head(torch.tanh(self.embed(ids)))


class SharedBlocks(nn.Module):
    """One block that is reached by two paths."""

    def __init__(self):
        super().__init__()
        self.early = nn.Sequential(nn.Linear(12, 12), nn.Tanh())
        self.late = self.early

    def forward(self, x):
        return self.late(self.early(x))


#: the size of the transformers models whose configs use these names
TINY = dict(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)


def _of_transformers(name: str, head: str = "ForCausalLM", **settings: object) -> nn.Module:
    import transformers

    return getattr(transformers, name + head)(getattr(transformers, f"{name}Config")(**settings))


FEW = TINY | dict(num_key_value_heads=1)
GPT2 = dict(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32)
OPT = dict(word_embed_proj_dim=16, ffn_dim=24, max_position_embeddings=32)
llama = partial(_of_transformers, "Llama", **FEW, tie_word_embeddings=False)
#: its layers are Conv1D: linear layers with transposed weights
gpt2 = partial(_of_transformers, "GPT2", "LMHeadModel", **GPT2)
#: with a smaller range, its attention hardly looks anywhere and adapters do nothing
bert = partial(_of_transformers, "Bert", "ForMaskedLM", **TINY, max_position_embeddings=32, initializer_range=0.2)
opt = partial(_of_transformers, "OPT", **TINY | OPT)
qwen = partial(_of_transformers, "Qwen2", **FEW)
#: a mixture of experts, which are parameters, not layers; LoRA goes on the attention
EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)
# the default implementation lacks float64
mixtral = partial(_of_transformers, "Mixtral", **FEW, **EXPERTS, experts_implementation="batched_mm")


def in_float64(model: nn.Module) -> nn.Module:
    """The same model in float64, if all of it is in float32. No weight but zero can be rounded to float32 unnoticed."""
    if any(each.dtype != torch.float32 for each in model.parameters() if each.is_floating_point()):
        return model
    model.double()
    for each in model.parameters():
        each.data *= 1 + 2**-30
    return with_exact_norms(model)


def with_exact_norms(model: nn.Module) -> nn.Module:
    """PyTorch's RMSNorm in place of transformers' own, which computes in float32 whatever the model has."""
    for path, module in [*model.named_modules()]:
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            norm = nn.RMSNorm(module.weight.shape, module.variance_epsilon).train(module.training)
            norm.weight = module.weight
            model.set_submodule(path, norm)
    return model


def converted(inputs: object, dtype: torch.dtype | None) -> object:
    """The same inputs, whose fractions are of this dtype."""
    if isinstance(inputs, dict):
        return {key: converted(each, dtype) for key, each in inputs.items()}
    if isinstance(inputs, (list, tuple)):
        return type(inputs)(converted(each, dtype) for each in inputs)
    return inputs.to(dtype) if dtype and torch.is_tensor(inputs) and inputs.is_floating_point() else inputs


@dataclass(frozen=True)
class Kind:
    """A model to test on: how to make it, what to call it with, which modules LoRA can go on."""

    make_random: Callable[[], nn.Module]
    make_inputs: Callable[[], object]
    modules: tuple[str, ...]
    #: float64 is for what is made in float32 alone; None leaves everything as it is made
    dtype: torch.dtype | None = field(default=torch.float64, kw_only=True)

    def base(self) -> nn.Module:
        """A fresh base model; the same weights every time."""
        with RANDOM, torch.random.fork_rng():
            torch.manual_seed(0)
            model = self.make_random().eval()
        if self.dtype == torch.float64:
            return in_float64(model)
        return model.to(self.dtype) if self.dtype else model

    def inputs(self):
        with RANDOM, torch.random.fork_rng():
            torch.manual_seed(1)
            return converted(self.make_inputs(), self.dtype)


def _ids():
    return {"input_ids": torch.randint(0, 40, (2, 9))}


KINDS: dict[str, Kind] = {
    "linear": Kind(Mlp, lambda: torch.randn(5, 12), ("first", "blocks.0", "blocks.1", "last")),
    "conv": Kind(
        Convolutions,
        lambda: torch.randn(2, 4, 16),
        ("conv1d", "grouped1d", "conv2d", "grouped2d", "conv3d", "grouped3d"),
    ),
    "embedding": Kind(Embedded, lambda: torch.randint(0, 20, (3, 7)), ("embed", "head")),
    "shared": Kind(SharedBlocks, lambda: torch.randn(5, 12), ("early.0",)),
    "llama": Kind(llama, _ids, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")),
    "gpt2": Kind(gpt2, _ids, ("c_attn", "attn.c_proj", "c_fc", "mlp.c_proj")),
}

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
#: more architectures of transformers, for what depends on how a model computes
ARCHITECTURES: dict[str, Kind] = {
    "llama": KINDS["llama"],
    "gpt2": KINDS["gpt2"],
    "bert": Kind(bert, _ids, ("query", "key", "value", "attention.output.dense", "intermediate.dense")),
    "opt": Kind(opt, _ids, ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")),
    "qwen": Kind(qwen, _ids, (*ATTENTION, "gate_proj", "up_proj", "down_proj")),
    "mixtral": Kind(mixtral, _ids, ATTENTION),
}


#: ways to copy a model
COPIES = ("deepcopy", "pickle", "torch.save")


def copied(model: nn.Module, way: str) -> nn.Module:
    if way == "deepcopy":
        return copy.deepcopy(model)
    if way == "pickle":
        return pickle.loads(pickle.dumps(model))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def randomize(model: nn.Module, adapter_name: str, seed: int) -> None:
    """Gives every tensor of the adapter random values, A and B alike."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name and adapter_name in name.split("."):
            value = torch.randn(parameter.shape, generator=generator).double() * 0.3
            parameter.data.copy_(value)


def save_random_adapter(kind: Kind, folder: Path, seed: int, config: LoraConfig | None = None, **lora) -> str:
    """Trains nothing: makes an adapter with random weights with PEFT alone, and saves it with PEFT alone."""
    config = config or LoraConfig(**{"target_modules": list(kind.modules), **lora})
    model = get_peft_model(kind.base(), config)
    randomize(model, "default", seed)
    model.save_pretrained(folder)
    return str(folder)


def save_family(kind: Kind, folder: Path, *family: dict) -> list[str]:
    """One adapter for each config, each with a seed and a folder of its own."""
    return [save_random_adapter(kind, folder / f"adapter {seed}", seed, **lora) for seed, lora in enumerate(family, 1)]


def load(kind: Kind, folder: str, adapter_name: str = "default", **kwargs) -> PeftModel:
    """What a user does: a fresh base model and PEFT's own loading."""
    return PeftModel.from_pretrained(kind.base(), folder, adapter_name=adapter_name, **kwargs).eval()


def lora_layers(model: nn.Module) -> list[LoraLayer]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def call(model: nn.Module, inputs) -> torch.Tensor:
    with torch.no_grad():
        return answer(model, inputs)


def answer(model: nn.Module, inputs) -> torch.Tensor:
    """The logits, or whatever else a model gives first."""
    outputs = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    if hasattr(outputs, "logits"):
        return outputs.logits
    return outputs if isinstance(outputs, torch.Tensor) else outputs[0]
