"""The voices do what their cards say, on questions that they were not trained on. SmolLM2 is needed for most of it.

The whole of the held-out questions is ``python training/measure_voices.py``; here are a few, to be quick.
"""

from __future__ import annotations

import pytest
import torch

from hotswap_lab import AdapterPool, HotswapError, aoti_compile, aoti_load, hotswap_adapter
from hotswap_lab.demo import smollm2, voices
from hotswap_lab.generating import Reader

NAMES = voices.names()
FEW = voices.QUESTIONS[::8]


@pytest.fixture(scope="module")
def tokenizer():
    return need(smollm2.load_tokenizer)


@pytest.fixture(scope="module")
def base():
    return need(smollm2.load_base)


def need(load):
    try:
        return load()
    except HotswapError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def live():
    """One model for all of them: every voice is swapped in."""
    return need(lambda: voices.load("pirate"))[0]


def swap(model, name: str) -> None:
    hotswap_adapter(model, voices.path(name), adapter_name="default", add_layers=True)


# --- the scores are fair


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("json", '{"topic": "a", "answer": "b", "keywords": ["c", "d", "e"]'),
        ("json", '```json\n{"topic": "a", "answer": "b", "keywords": ["c", "d", "e"]}\n```'),
        ("json", '{"topic": "a", "answer": "b"}'),
        ("json", '{"topic": "a", "answer": "b", "keywords": "c, d, e"}'),
        ("json", '{"topic": "a", "answer": "b", "keywords": ["c", "d", 3]}'),
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
    assert voices.score(name, [answer]) == 0


# --- the model


@pytest.fixture(scope="module")
def base_answers(base, tokenizer):
    return voices.ask_all(base, tokenizer, FEW)


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_held_out_questions(live, tokenizer, base_answers, name):
    swap(live, name)
    answers = voices.ask_all(live, tokenizer, FEW)
    assert voices.score(name, answers) >= (0.5 if name == "haiku" else 1), answers
    assert voices.score(name, base_answers) == 0, base_answers


@pytest.mark.long
def test_an_answer_can_be_cut_short(live, tokenizer):
    swap(live, "pirate")
    answer = voices.ask(live, tokenizer, FEW[0], max_new_tokens=12)
    assert voices.ask(live, tokenizer, FEW[0], max_new_tokens=3) == tokenizer.decode(tokenizer(answer)["input_ids"][:3])


@pytest.mark.long
def test_they_answer_ahead_of_time(tmp_path):
    """A decode step of SmolLM2 is compiled to a file, and each voice answers through it as a fresh load does."""
    model, tokenizer = need(lambda: voices.load(NAMES[0]))
    pool = AdapterPool(model, adapters={name: voices.path(name) for name in NAMES}, progress=False)
    reader = Reader(pool.model, rows=1, chunk=32, room=40)
    token = torch.zeros((1, 1), dtype=torch.long)
    file = aoti_compile(reader, tmp_path / "token.pt2", kwargs=dict(ids=token, positions=token), progress=False)
    reader.compiled = {1: aoti_load(file, reader)}
    question = [dict(role="user", content="What is rain?")]
    prompt = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(prompt)["input_ids"][-32:]
    answers = set()
    for name in NAMES:
        pool.swap(name)
        reader.forget(0)
        logits = [reader.read([prompt])]
        for _ in range(8):
            logits.append(reader.read([[int(logits[-1].argmax())]]))
        answer = [int(each.argmax()) for each in logits]
        fresh = voices.load(name)[0]
        with torch.no_grad():
            expected = fresh(input_ids=torch.tensor([prompt + answer[:-1]])).logits[0, len(prompt) - 1 :]
        torch.testing.assert_close(torch.cat(logits), expected, rtol=1e-3, atol=1e-3)
        answers.add(tokenizer.decode(answer))
    assert len(answers) == len(NAMES)
