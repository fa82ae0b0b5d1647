"""The programs that made the demo's assets run, on a scale that fits into a test; the package does without them."""

from __future__ import annotations

import contextlib
import itertools
import re
import shutil
from pathlib import Path

import fitting
import measure_digits
import measure_voices
import pytest
import torch
import train_digits
import train_voices
import train_words
import voice_scores
from lengths import long
from safetensors.torch import load_file

import hotswap_lab
from hotswap_lab import HotswapError, demo
from hotswap_lab.demo import digits, smollm2, voices

ADAPTERS = {
    **{demo.ADAPTERS_DIR / name: recipe for name, recipe in train_words.RECIPES.items()},
    **{digits.ADAPTERS_DIR / name: recipe for name, recipe in train_digits.RECIPES.items()},
    **{voices.VOICES_DIR / name: train_voices.RECIPE for name in voices.names()},
}


def test_every_adapter_has_its_recipe_and_nothing_in_the_package_needs_one():
    assert {config.parent for config in demo.ASSETS_DIR.rglob("adapter_config.json")} == ADAPTERS.keys()
    modules = "|".join(file.stem for file in Path(fitting.__file__).parent.glob("*.py"))
    for file in Path(hotswap_lab.__file__).parent.rglob("*.py"):
        assert not re.search(rf"^\s*(from|import) .*\b({modules})\b", file.read_text(), re.MULTILINE), file


# --- what all share


def test_the_embedded_weights_are_rounded_so_that_they_can_be_compressed():
    files = {folder / "adapter_model.safetensors": recipe.grid for folder, recipe in ADAPTERS.items() if recipe.grid}
    for file, grid in {**files, demo.BASE_DIR / "model.safetensors": train_words.BASE.grid}.items():
        for name, weight in load_file(file).items():
            assert torch.equal(fitting.coarse(weight, grid), weight), f"{file}: {name}"
    fine = torch.randn(50, 40, generator=torch.Generator().manual_seed(0)) / 30
    assert 1 / 1200 < (fitting.coarse(fine, 16) - fine).abs().max() < 1 / 900


def test_the_command_trains_what_is_named_or_everything():
    done = []
    for arguments in (["sort", "--seed", "5"], []):
        fitting.main("what it does", lambda *given: done.append(given), ["base", "sort"], arguments)
    assert done == [("sort", 5), ("base", 0), ("sort", 0)]


def test_only_the_answer_counts_for_the_loss():
    """With a token at its end that says so; of a voice's conversation, too, where SmolLM2 is there."""
    batches = [(demo.load_tokenizer(), demo.make_batch, (["ab", "abcd"], demo.TASKS["reverse"]), ["ba", "dcba"])]
    with contextlib.suppress(HotswapError):
        pairs = train_voices.pairs_of("haiku")[:2]
        answers = [answer for _, answer in pairs]
        batches.append((smollm2.load_tokenizer(), train_voices.make_batch, (pairs,), answers))
    for tokenizer, make, given, answers in batches:
        batch = make(tokenizer, *given)
        texts = [tokenizer.decode(row[row >= 0]) for row in batch["labels"]]
        assert texts == [answer + tokenizer.eos_token for answer in answers]
        assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
        assert (batch["attention_mask"].sum(1) > (batch["labels"] >= 0).sum(1)).all()


# --- the programs, for a few steps


def train_word_adapter(name, folder):
    recipe = fitting.Recipe(steps=2, dtype=train_words.RECIPES[name].dtype)
    words, tokenizer = demo.sample_words(4, seed=0, held_out=False), demo.load_tokenizer()

    def losses_of(model):
        for start in (0, 2):
            yield model(**demo.make_batch(tokenizer, words[start : start + 2], demo.TASKS[name])).loss

    fitting.train_adapter(demo.ADAPTERS_DIR / name, demo.load_base, losses_of, recipe, seed=0, folder=folder)


def train_digit_adapter(name, folder):
    train_digits.train_adapter(name, seed=0, folder=folder, steps=2)


@pytest.mark.parametrize(
    ("train", "source"),
    [
        *((train_word_adapter, demo.ADAPTERS_DIR / name) for name in ("sort", "no_vowels")),
        long(train_digit_adapter, digits.ADAPTERS_DIR / "only_3"),
    ],
)
def test_training_is_deterministic_and_makes_the_weights_that_the_config_asks_for(tmp_path, train, source):
    """So what comes out has the names, shapes and dtypes of the embedded weights."""
    for part in "ab":
        shutil.copytree(source, tmp_path / part)
        train(source.name, tmp_path / part)
    first, again, embedded = (
        folder / "adapter_model.safetensors" for folder in (tmp_path / "a", tmp_path / "b", source)
    )
    assert first.read_bytes() == again.read_bytes() != embedded.read_bytes()
    made, embedded = load_file(first), load_file(embedded)
    assert {key: (tensor.shape, tensor.dtype) for key, tensor in made.items()} == {
        key: (tensor.shape, tensor.dtype) for key, tensor in embedded.items()
    }
    assert any(tensor.any() for key, tensor in made.items() if "lora_B" in key)


@pytest.mark.long
def test_the_base_is_trained_into_a_pipeline_folder(tmp_path):
    from diffusers import DDIMPipeline

    train_digits.train_base(seed=0, folder=tmp_path, steps=3)
    pipe = DDIMPipeline.from_pretrained(tmp_path)
    assert dict(pipe.unet.config) == {**digits.load_base().config, "_name_or_path": pipe.unet.config._name_or_path}
    assert pipe.scheduler.config.prediction_type == digits.load_scheduler().config.prediction_type


@pytest.mark.long
def test_the_table_of_digits_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(measure_digits.digits, "names", lambda: ["inverted"])
    measure_digits.main(["--count", "3", "--threads", "1"])
    *_, base, inverted = capsys.readouterr().out.splitlines()
    assert base.startswith("base ")
    assert inverted.startswith("inverted ")
    assert inverted.endswith(f" {measure_digits.measure(digits.load('inverted'), 3).background:.3f}")


# --- voices


@pytest.mark.parametrize("name", voices.names())
def test_the_texts_are_in_the_voice_and_in_no_other(name):
    """What is taught is what is measured, with other questions."""
    assert sorted(voice_scores.TESTS) == voices.names()
    assert voices.names() == sorted(file.stem for file in train_voices.TEXTS_DIR.iterdir())
    pairs = train_voices.pairs_of(name)
    assert 25 <= len({question for question, _ in pairs}) == len(pairs) <= 60
    assert {question for question, _ in pairs}.isdisjoint(voices.QUESTIONS)
    for other in voices.names():
        score = voice_scores.score(other, [answer for _, answer in pairs])
        assert score == 1 if other == name else score <= 0.1, other


def test_every_pair_comes_once_before_any_comes_again():
    pairs = [(str(number), "") for number in range(10)]
    first, again = ([*itertools.islice(train_voices.batches(pairs, seed=0), 5)] for _ in range(2))
    chosen = [pair for batch in first for pair in batch]
    assert sorted(chosen[:10]) == sorted(chosen[10:]) == sorted(pairs)
    assert first == again


@pytest.mark.long
def test_the_table_of_voices_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(measure_voices, "QUESTIONS", voices.QUESTIONS[::8])
    try:
        measure_voices.main(["socratic", "--show", "1", "--threads", "1"])
    except HotswapError as error:
        pytest.skip(str(error))
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split() == ["socratic", "100.0%", "0.0%"]
    assert voice_scores.score("socratic", ["\n".join(lines[5:]).strip()]) == 1
