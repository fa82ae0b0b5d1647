"""The training script runs, on a scale that fits into a test."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hotswap_lab import demo
from hotswap_lab.demo import train


@pytest.mark.long
def test_a_few_steps_of_training_lower_the_loss():
    torch.manual_seed(0)
    tokenizer = train.build_tokenizer()
    model = get_peft_model(demo.load_base(), LoraConfig(**train.RECIPES["double"].lora))
    batch = train.make_batch(tokenizer, demo.sample_words(64, seed=5, held_out=True), demo.TASKS["double"])
    with torch.no_grad():
        before = model(**batch).loss.item()
    train.fit(model, tokenizer, demo.TASKS["double"], steps=15, lr=4e-3, seed=0, alphabets=["abcdefgh"])
    with torch.no_grad():
        after = model(**batch).loss.item()
    assert after < 0.7 * before


def test_only_the_answer_counts_for_the_loss():
    tokenizer = train.build_tokenizer()
    batch = train.make_batch(tokenizer, ["ab", "abcd"], demo.TASKS["reverse"])
    texts = [tokenizer.decode([token for token in row if token >= 0]) for row in batch["labels"].tolist()]
    assert texts == ["ba<eos>", "dcba<eos>"]
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape


def test_the_tokenizer_is_the_one_that_is_embedded():
    assert train.build_tokenizer().get_vocab() == demo.load_tokenizer().get_vocab()
