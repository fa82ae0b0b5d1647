"""The voices do what their cards say, on questions that they were not trained on. SmolLM2 is needed for most of it.

The whole of the held-out questions is ``python training/measure_voices.py``; here are a few, to be quick.
"""

from __future__ import annotations

import measure_voices
import pytest
from voice_scores import score

from hotswap_lab import HotswapError, hotswap_adapter
from hotswap_lab.demo import smollm2, voices

NAMES = voices.names()
FEW = voices.QUESTIONS[::8]


def need(load):
    try:
        return load()
    except HotswapError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def live():
    """One model for all of them, into which every voice is swapped, and its tokenizer."""
    return need(lambda: voices.load("pirate"))


# --- the scores are fair


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("json", '{"topic": "a", "answer": "b", "keywords": ["c", "d", "e"]'),
        ("json", '```json\n{"topic": "a", "answer": "b", "keywords": ["c", "d", "e"]}\n```'),
        ("json", '{"topic": "a", "answer": "b"}'),
        ("json", '{"topic": "a", "answer": "b", "keywords": ["c", "d", 3]}'),
        ("json", '{"topic": "a", "answer": "b", "keywords": "cde"}'),
        ("json", '["topic", "answer", "keywords"]'),
        ("haiku", "one\ntwo"),
        ("haiku", "one\n\nthree"),
        ("haiku", f"one\n{'long ' * 12}\nthree"),
        ("pirate", "Arr, arr, arr! Paris is a city."),
        ("socratic", "Paris is a city. What else?"),
        ("socratic", ""),
        ("spanish", "Madrid"),
        ("spanish", "Paris is the capital of France and it is a city in the north. La ciudad."),
        ("spanish", "Roma è una città molto bella."),
    ],
)
def test_what_is_not_in_the_voice_does_not_count(name, answer):
    assert score(name, [answer]) == 0


# --- the model


@pytest.fixture(scope="module")
def base_answers(live):
    return measure_voices.ask_all(need(smollm2.load_base), live[1], FEW)


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_held_out_questions(live, base_answers, name):
    hotswap_adapter(live[0], voices.path(name), adapter_name="default", add_layers=True)
    answers = measure_voices.ask_all(*live, FEW)
    assert score(name, answers) >= (0.5 if name == "haiku" else 1), answers
    assert score(name, base_answers) == 0, base_answers
    few, short = live[1](answers[0])["input_ids"][:3], voices.ask(*live, FEW[0], max_new_tokens=3)
    assert short == live[1].decode(few)
