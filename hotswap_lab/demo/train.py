"""Trains the embedded base model and its adapters, from nothing, with a fixed seed.

    python -m hotswap_lab.demo.train            # everything (about 25 minutes on two CPU cores)
    python -m hotswap_lab.demo.train sort shout # only these adapters, on the base model that is there

The results are ordinary folders: ``assets/base`` for ``AutoModelForCausalLM.from_pretrained`` and
``assets/adapters/<name>`` for ``PeftModel.from_pretrained``. Nothing here is needed to use them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import string
import time
from dataclasses import dataclass, field

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from . import ADAPTERS_DIR, BASE_DIR, TASKS, exact_match, load_base, load_tokenizer, sample_words
from .tasks import ALPHABET, SEPARATOR, copy

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
#: how many held-out words a card's score is measured on
HELD_OUT_COUNT = 500


@dataclass(frozen=True)
class Recipe:
    """How one adapter is trained. The recipes differ in everything that a swap has to handle."""

    lora: dict
    steps: int
    lr: float = 4e-3
    dtype: torch.dtype = torch.float32
    #: what a reader should look at in this adapter
    note: str = field(default="", compare=False)


RECIPES: dict[str, Recipe] = {
    "reverse": Recipe(
        dict(r=8, lora_alpha=16, target_modules=ATTENTION + MLP), 700, note="the plain case: every linear layer"
    ),
    "vowels_up": Recipe(
        dict(r=8, lora_alpha=16, target_modules=ATTENTION + MLP), 700, note="the same shapes and scalings as reverse"
    ),
    "pig_latin": Recipe(
        dict(r=32, lora_alpha=16, use_rslora=True, target_modules=ATTENTION),
        900,
        lr=3e-3,
        note="the highest rank, scaled by alpha / sqrt(rank) (rsLoRA), attention only",
    ),
    "caesar": Recipe(dict(r=4, lora_alpha=8, target_modules=MLP), 900, note="MLP only: shares no layer with pig_latin"),
    "sort": Recipe(
        dict(
            r=16,
            lora_alpha=32,
            target_modules=ATTENTION + MLP,
            rank_pattern={"q_proj": 24, "down_proj": 6},
            alpha_pattern={"q_proj": 24, "layers.3.mlp.up_proj": 64},
        ),
        1100,
        note="rank_pattern and alpha_pattern: ranks 6, 16 and 24, scalings from 1 to 5.3",
    ),
    "shout": Recipe(
        dict(r=8, lora_alpha=8, target_modules=ATTENTION + MLP, layers_to_transform=[1, 2]),
        900,
        note="the two middle blocks only: most of reverse's layers are missing",
    ),
    "double": Recipe(
        dict(r=2, lora_alpha=8, target_modules=ATTENTION), 900, note="the lowest rank, with a scaling of 4"
    ),
    "no_vowels": Recipe(
        dict(r=6, lora_alpha=3, target_modules="(.*self_attn.[vo]_proj)|(.*mlp.down_proj)", lora_dropout=0.02),
        900,
        dtype=torch.bfloat16,
        note="target modules given as a pattern, dropout, weights stored in bfloat16",
    ),
}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character."""
    special = ["<pad>", "<eos>", "<unk>"]
    vocab = {token: index for index, token in enumerate([*special, *ALPHABET])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=64,
        clean_up_tokenization_spaces=False,
    )


def build_base(vocab_size: int) -> LlamaForCausalLM:
    """A Llama with about a million parameters and random weights."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=128,
            intermediate_size=448,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
        )
    )


def make_batch(tokenizer, words: list[str], task) -> dict[str, torch.Tensor]:
    """Token ids of ``word>answer<eos>``; only the answer counts for the loss."""
    rows, labels = [], []
    for word in words:
        prompt = tokenizer(word + SEPARATOR)["input_ids"]
        answer = [*tokenizer(task(word))["input_ids"], tokenizer.eos_token_id]
        rows.append(prompt + answer)
        labels.append([-100] * len(prompt) + answer)
    width = max(map(len, rows))
    pad = tokenizer.pad_token_id
    return {
        "input_ids": torch.tensor([row + [pad] * (width - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
        "labels": torch.tensor([row + [-100] * (width - len(row)) for row in labels]),
    }


def fit(
    model, tokenizer, task, *, steps: int, lr: float, seed: int, batch_size: int = 64, alphabets: list[str]
) -> None:
    """Trains whatever of ``model`` requires a gradient."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    words = sample_words(steps * batch_size, seed, held_out=False, alphabet=alphabets[0])
    for index, alphabet in enumerate(alphabets[1:], start=1):
        words[index :: len(alphabets)] = sample_words(
            len(words[index :: len(alphabets)]), seed + index, held_out=False, alphabet=alphabet
        )
    model.train()
    start = time.perf_counter()
    for step in range(steps):
        batch = make_batch(tokenizer, words[step * batch_size : (step + 1) * batch_size], task)
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 100 == 0:
            print(f"  step {step + 1:5d}  loss {loss.item():.4f}  {time.perf_counter() - start:5.0f} s", flush=True)
    model.eval()


def train_base(seed: int) -> None:
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    model = build_base(len(tokenizer))
    print(f"base: {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    everything = ALPHABET.replace(SEPARATOR, "")
    fit(model, tokenizer, copy, steps=1800, lr=2e-3, seed=seed, alphabets=[string.ascii_lowercase, everything])
    print(f"base: exact match on held-out words {exact_match(model, tokenizer, 'copy'):.3f}", flush=True)
    tokenizer.save_pretrained(BASE_DIR)
    model.save_pretrained(BASE_DIR)


def train_adapter(name: str, seed: int) -> None:
    recipe = RECIPES[name]
    torch.manual_seed(seed)
    tokenizer = load_tokenizer()
    model = get_peft_model(load_base(), LoraConfig(task_type="CAUSAL_LM", **recipe.lora))
    start = time.perf_counter()
    fit(model, tokenizer, TASKS[name], steps=recipe.steps, lr=recipe.lr, seed=seed, alphabets=[string.ascii_lowercase])
    seconds = time.perf_counter() - start
    score = exact_match(model, tokenizer, name, count=HELD_OUT_COUNT)
    print(f"{name}: exact match on held-out words {score:.3f} after {seconds:.0f} s", flush=True)
    save_folder(model, name, recipe, score)


def save_folder(model, name: str, recipe: Recipe, score: float) -> None:
    """Writes an ordinary PEFT folder with a short model card."""
    folder = ADAPTERS_DIR / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    weights = folder / "adapter_model.safetensors"
    tensors = {key: tensor.to(recipe.dtype) for key, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    config_file = folder / "adapter_config.json"
    config_file.write_text(json.dumps(portable(json.loads(config_file.read_text())), indent=2, sort_keys=True) + "\n")
    example = "hotswap"
    (folder / "README.md").write_text(
        f"---\nlibrary_name: peft\nlicense: apache-2.0\ntags: [lora]\n---\n\n"
        f"# {name}\n\n`{example}>` becomes `{TASKS[name](example)}`. {recipe.note[0].upper()}{recipe.note[1:]}.\n\n"
        f"Exact match on {HELD_OUT_COUNT} words that were never trained on: {score:.1%}. Made by "
        f"`python -m hotswap_lab.demo.train {name}` for the base model in `hotswap_lab/demo/assets/base`.\n"
    )


def portable(config: dict) -> dict:
    """A saved config without the path of the base model on this machine, and without what only has its default
    value: an older PEFT warns about every field it doesn't know, whatever its value."""
    default = LoraConfig().to_dict()
    kept = {key: value for key, value in config.items() if key not in default or value != default[key]}
    kept |= {key: config[key] for key in ("peft_type", "task_type", "r", "lora_alpha", "inference_mode")}
    kept.pop("base_model_name_or_path", None)
    if isinstance(kept["target_modules"], list):
        kept["target_modules"] = sorted(kept["target_modules"])
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="adapters to train, or 'base'; default: everything")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    names = arguments.names or ["base", *RECIPES]
    if "base" in names:
        train_base(arguments.seed)
    for name in names:
        if name != "base":
            train_adapter(name, arguments.seed)


if __name__ == "__main__":
    main()
