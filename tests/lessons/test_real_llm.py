"""Chapter 05: generation in fixed shapes is generation, in two graphs.

All of it on the embedded model. What needs SmolLM2 is in the chapter itself.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from exercises import logits_of, some_ids
from oracle import assert_close

from hotswap_lab import demo, hotswap_adapter, verify_hotswap
from hotswap_lab.lessons.real_llm import Chat, same_base

CHUNK, ROOM = 8, 24


@pytest.fixture
def chat():
    """With a template that passes the last message on, and the sign that an answer follows."""
    model, tokenizer = demo.load("reverse")
    tokenizer.chat_template = (
        "{{ messages[-1]['content'] }}{% if add_generation_prompt %}" + demo.SEPARATOR + "{% endif %}"
    )
    model.double()  # all but its norms
    return Chat(model, tokenizer, chunk=CHUNK, room=ROOM)


@pytest.fixture
def model(chat):
    return chat.reader.model


@pytest.mark.parametrize(
    "ends", [*([count] for count in (1, CHUNK - 1, CHUNK, CHUNK + 1, ROOM)), [3, 4, 14, 15, 16, ROOM]]
)
def test_reading_gives_the_logits_of_the_model_itself(chat, model, ends):
    """At once, or one part after the other."""
    ids = some_ids(ROOM)
    for start, stop in itertools.pairwise([0, *ends]):
        assert_close(chat.read(ids[start:stop]), logits_of(model, ids[:stop]), 1e-6)
        assert chat.length == stop


def test_there_is_an_end_to_the_room(chat):
    chat.read(some_ids(ROOM - 1))
    with pytest.raises(ValueError, match=f"no room for 2 more tokens: {ROOM - 1} of {ROOM} are used"):
        chat.read(some_ids(2))
    assert chat.length == ROOM - 1


def test_answers_are_those_of_the_demo_and_are_shown_as_they_grow(chat, capsys):
    talk = [{"role": "user", "content": word} for word in ("no", "adapter")]
    assert chat.ask(talk) == demo.TASKS["reverse"]("adapter")
    assert list(chat.stream("abc")) == ["c", "cb", "cba"]
    assert chat.say("abc") == "cba"
    assert capsys.readouterr().out == "cba\n"


def test_half_a_letter_is_not_shown(chat, monkeypatch):
    shown = iter(["\ufffd", "ñ", "ña", "ña"])
    monkeypatch.setattr(chat.tokenizer, "decode", lambda ids, skip_special_tokens: next(shown))
    assert list(chat.stream("abc")) == ["ñ", "ña"]
    monkeypatch.setattr(chat.tokenizer, "decode", lambda ids, skip_special_tokens: "\ufffd")
    assert chat.ask("abc") == ""


def test_an_answer_ends_at_its_limit_and_with_the_room(chat):
    assert chat.ask("abcdef", max_new_tokens=2) == "fe"
    prompt = "a" * (ROOM - 3)
    tokens = len(chat.ids(prompt))
    # what comes last need not be read
    assert len(list(chat.stream(prompt, max_new_tokens=ROOM))) == ROOM - tokens + 1
    assert chat.length == ROOM


def test_the_base_that_shares_its_weights_is_the_base():
    model, _ = demo.load("reverse")
    base, ids = same_base(model), some_ids(9)
    assert torch.equal(logits_of(base, ids), logits_of(demo.load_base(), ids))
    assert {tensor.data_ptr() for tensor in base.parameters()} <= {tensor.data_ptr() for tensor in model.parameters()}
    hotswap_adapter(model, demo.adapter_path("double"), "default")
    live = {name: tensor.clone() for name, tensor in model.named_parameters()}
    for name in ("double", "reverse"):  # an adapter in it is none in the live model
        assert bool(verify_hotswap(model, demo.adapter_path(name), base=lambda: same_base(model))) is (name == "double")
    assert live.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(tensor, live[name]) for name, tensor in model.named_parameters())


def test_what_was_saved_is_restored_in_the_same_memory(chat, model):
    ids = some_ids(11)
    chat.read(ids[:7])
    memory = [each.data_ptr() for each in chat.reader.buffers(recurse=False)]
    saved = chat.save()
    chat.forget()
    chat.read(some_ids(9))
    chat.restore(saved)
    assert chat.length == 7
    assert_close(chat.read(ids[7:]), logits_of(model, ids), 1e-6)
    assert [each.data_ptr() for each in chat.reader.buffers(recurse=False)] == memory
    chat.restore(saved)  # reading on has not changed the copy
    assert_close(chat.read(ids[7:]), logits_of(model, ids), 1e-6)
