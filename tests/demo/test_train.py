"""The training runs, on a scale that fits into a test."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from hotswap_lab import demo
from hotswap_lab.demo import train, training, voices
from hotswap_lab.demo.voices import train as train_voices


@pytest.mark.long
def test_a_few_steps_of_training_lower_the_loss():
    torch.manual_seed(0)
    tokenizer, task = demo.load_tokenizer(), demo.TASKS["double"]
    config = LoraConfig.from_pretrained(demo.adapter_path("double"))
    config.inference_mode = False
    model = get_peft_model(demo.load_base(), config)
    batch = train.make_batch(tokenizer, demo.sample_words(64, seed=5, held_out=True), task)
    with torch.no_grad():
        before = model(**batch).loss.item()
    words = demo.sample_words(20 * 64, seed=0, held_out=False, alphabet="abcdefgh")
    training.fit(model, train.losses(model, tokenizer, words, task), steps=15, lr=4e-3)
    with torch.no_grad():
        after = model(**batch).loss.item()
    assert after < 0.7 * before


@pytest.mark.parametrize("name", ["sort", "no_vowels"])
def test_training_is_deterministic_and_makes_the_weights_that_the_config_asks_for(tmp_path, name):
    """Beside the config, so what comes out has the names, shapes and dtypes of the embedded weights."""
    source = demo.ADAPTERS_DIR / name
    recipe = training.Recipe(steps=2, dtype=train.RECIPES[name].dtype)
    words = demo.sample_words(4, seed=0, held_out=False)
    tokenizer = demo.load_tokenizer()

    def losses_of(model):
        for start in (0, 2):
            yield model(**train.make_batch(tokenizer, words[start : start + 2], demo.TASKS[name])).loss

    files = []
    for part in "ab":
        (tmp_path / part).mkdir()
        training.train_adapter(source, demo.load_base, losses_of, recipe, seed=0, folder=tmp_path / part)
        files.append(tmp_path / part / "adapter_model.safetensors")
    assert files[0].read_bytes() == files[1].read_bytes()
    made, embedded = load_file(files[0]), load_file(source / "adapter_model.safetensors")
    assert {key: (tensor.shape, tensor.dtype) for key, tensor in made.items()} == {
        key: (tensor.shape, tensor.dtype) for key, tensor in embedded.items()
    }
    assert any(tensor.any() for key, tensor in made.items() if "lora_B" in key)


def test_the_embedded_weights_are_rounded_so_that_they_can_be_compressed():
    recipes = {demo.ADAPTERS_DIR / name: recipe for name, recipe in train.RECIPES.items()}
    recipes |= {voices.VOICES_DIR / name: train_voices.RECIPE for name in voices.names()}
    files = {folder / "adapter_model.safetensors": recipe.grid for folder, recipe in recipes.items()}
    for file, grid in {**files, demo.BASE_DIR / "model.safetensors": train.BASE.grid}.items():
        for name, weight in load_file(file).items():
            assert torch.equal(training.coarse(weight, grid), weight), f"{file}: {name}"


def test_a_coarse_weight_is_near_and_on_a_grid():
    weight = torch.randn(50, 40, generator=torch.Generator().manual_seed(0)) / 30
    rounded = training.coarse(weight, 16)
    assert 1 / 1200 < (rounded - weight).abs().max() < 1 / 900
    assert len(rounded.unique()) < 200
    assert training.coarse(weight, 0) is weight
    assert not training.coarse(torch.zeros(3), 16).any()


def test_only_the_answer_counts_for_the_loss():
    tokenizer = demo.load_tokenizer()
    batch = train.make_batch(tokenizer, ["ab", "abcd"], demo.TASKS["reverse"])
    texts = [tokenizer.decode([token for token in row if token >= 0]) for row in batch["labels"].tolist()]
    assert texts == ["ba<eos>", "dcba<eos>"]
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    assert batch["attention_mask"].sum(1).tolist() == [len("ab>ba") + 1, len("abcd>dcba") + 1]


def test_the_command_trains_what_is_named_or_everything():
    done = []
    for arguments in (["sort", "--seed", "5"], []):
        training.main("what it does", lambda *given: done.append(given), ["base", "sort"], arguments)
    assert done == [("sort", 5), ("base", 0), ("sort", 0)]
