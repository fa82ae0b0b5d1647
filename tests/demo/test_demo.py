"""The embedded model does what its cards say, on words it has never seen."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from refusals import refused
from train_words import ALPHABET, exact_match

from hotswap_lab import demo, hotswap_adapter
from hotswap_lab.demo.tasks import SEPARATOR, is_held_out

NAMES = demo.adapter_names()


@pytest.fixture(scope="module")
def live():
    """One model for all of them: every adapter is swapped in."""
    return demo.load("reverse")


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_exact_match_on_held_out_words(live, name):
    model, _ = live
    hotswap_adapter(model, demo.adapter_path(name), "default")
    score = exact_match(model, name)
    assert min(score, exact_match(demo.load_base(), "copy")) >= 0.98
    card = (Path(demo.adapter_path(name)) / "README.md").read_text()
    claimed = float(re.search(r"never trained on: ([\d.]+)%", card).group(1)) / 100
    assert score == pytest.approx(claimed, abs=0.005)


def test_no_word_is_both_trained_on_and_held_out():
    held_out = demo.sample_words(300, seed=1, held_out=True)
    trained = demo.sample_words(3000, seed=2, held_out=False)
    assert not set(held_out) & set(trained)
    assert all(is_held_out(word) for word in held_out)
    assert demo.sample_words(300, seed=1, held_out=True) == held_out


def test_the_tokenizer_knows_every_character():
    tokenizer = demo.load_tokenizer()
    ids = tokenizer(ALPHABET)["input_ids"]
    assert len({*ids}) == len(ALPHABET)
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == ALPHABET


def test_generate_gives_the_same_answers_as_ask():
    """``ask`` has its own short loop, which works for compiled wrappers; transformers' own must agree."""
    model, tokenizer = demo.load("pig_latin")
    words = ["a", "hotswap", "notebook"]
    batch = tokenizer([word + SEPARATOR for word in words], return_tensors="pt", padding=True)
    ids = model.generate(**batch, max_new_tokens=20, do_sample=False)
    texts = tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    assert demo.ask_all(model, tokenizer, words) == texts == [demo.TASKS["pig_latin"](word) for word in words]


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="there is no embedded adapter 'nothing'; choose one of caesar, double"):
        demo.load("nothing")


@pytest.mark.parametrize("word", ["", "Anna", "na\u00efve", "two words", 5, None])
def test_words_that_the_model_can_not_know_are_refused(live, word):
    refused("does not know this word", demo.ask, *live, word)


def test_long_words_come_with_a_warning(live):
    with pytest.warns(UserWarning, match="over 10 letters"):
        demo.ask(*live, "understanding")
