"""Trains the voices, with a fixed seed, on the texts in ``assets/voice_texts``.

    python -m hotswap_lab.demo.voices.train          # all of them
    python -m hotswap_lab.demo.voices.train pirate   # only this one

Each becomes an ordinary PEFT folder in ``assets/voices``, with a model card. Nothing here is needed to use them.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import time
from dataclasses import dataclass

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from .. import ASSETS_DIR, smollm2
from ..train import portable
from . import VOICES_DIR, ask_all
from .card import card
from .questions import QUESTIONS
from .recipes import RECIPES, Recipe
from .scores import score

#: a question after "? ", its answer below it, an empty line
TEXTS_DIR = ASSETS_DIR / "voice_texts"


@dataclass(frozen=True)
class Cost:
    """What a training took: seconds on the clock, and seconds of all CPU cores together."""

    wall: float
    cpu: float


def pairs_of(name: str) -> list[tuple[str, str]]:
    """The questions and answers that a voice is trained on.

    >>> pairs_of("haiku")[0][0]
    'What is the moon?'
    """
    blocks = (TEXTS_DIR / f"{name}.txt").read_text(encoding="utf-8").strip().split("\n\n")
    return [tuple(block.removeprefix("? ").split("\n", 1)) for block in blocks]


def make_batch(tokenizer, pairs: list[tuple[str, str]]) -> dict[str, torch.Tensor]:
    """Token ids of whole conversations; only the answers, and the token that ends them, count for the loss."""
    rows, labels = [], []
    for question, answer in pairs:
        messages = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        target = [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]
        rows.append(prompt + target)
        labels.append([-100] * len(prompt) + target)
    width = max(map(len, rows))
    return {
        "input_ids": torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
        "labels": torch.tensor([row + [-100] * (width - len(row)) for row in labels]),
    }


def batches(pairs: list[tuple[str, str]], *, steps: int, batch_size: int, seed: int):
    """Every pair once, in random order, before any comes again."""
    order, random_order = [], random.Random(seed)
    for _ in range(steps):
        while len(order) < batch_size:
            order += random_order.sample(pairs, len(pairs))
        yield order[:batch_size]
        order = order[batch_size:]


def fit(model, tokenizer, pairs: list[tuple[str, str]], recipe: Recipe, seed: int) -> Cost:
    """Trains whatever of ``model`` requires a gradient."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=recipe.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, total_steps=recipe.steps, pct_start=0.1)
    model.train()
    wall, cpu = time.perf_counter(), time.process_time()
    every = batches(pairs, steps=recipe.steps, batch_size=recipe.batch_size, seed=seed)
    for step, chosen in enumerate(every, start=1):
        loss = model(**make_batch(tokenizer, chosen)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 10 == 0:
            print(f"  step {step:4d}  loss {loss.item():.3f}  {time.perf_counter() - wall:4.0f} s", flush=True)
    model.eval()
    return Cost(time.perf_counter() - wall, time.process_time() - cpu)


def train(name: str, seed: int, *, base_answers: list[str] | None = None) -> None:
    """Trains one voice, measures it on the held-out questions and writes its folder."""
    recipe, tokenizer = RECIPES[name], smollm2.load_tokenizer()
    torch.manual_seed(seed)
    model = get_peft_model(smollm2.load_base(), LoraConfig(task_type="CAUSAL_LM", **recipe.lora))
    cost = fit(model, tokenizer, pairs_of(name), recipe, seed)
    print(f"{name}: {recipe.steps} steps, {cost.wall:.0f} s, {cost.cpu:.0f} s of CPU time", flush=True)
    folder = VOICES_DIR / name
    save_adapter_folder(model, folder)
    # what is measured is what is shipped, after rounding to bfloat16
    model.load_adapter(str(folder), "shipped")
    model.set_adapter("shipped")
    answers = ask_all(model, tokenizer, QUESTIONS)
    with model.disable_adapter():
        base_answers = base_answers or ask_all(model, tokenizer, QUESTIONS)
    scores = score(name, answers), score(name, base_answers)
    print(f"{name}: held-out score {scores[0]:.1%}, base {scores[1]:.1%}", flush=True)
    (folder / "README.md").write_text(card(name, recipe, cost, scores, seed, answers, len(pairs_of(name))))


def save_adapter_folder(model, folder) -> None:
    """An ordinary PEFT folder, in bfloat16, whose config names the base model and no path of this machine."""
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    weights = folder / "adapter_model.safetensors"
    tensors = {key: tensor.to(torch.bfloat16) for key, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    file = folder / "adapter_config.json"
    config = {"base_model_name_or_path": smollm2.MODEL_ID} | portable(json.loads(file.read_text()))
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"default: all of {', '.join(RECIPES)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name in arguments.names or RECIPES:
        train(name, arguments.seed)


if __name__ == "__main__":
    main()
