"""Chapter 05: generation in fixed shapes is generation, in two graphs.

All of it on the embedded model. What needs SmolLM2 is in the chapter itself.
"""

from __future__ import annotations

import pytest
import torch
from exercises import logits_of, some_ids
from peft import PeftModel

from hotswap_lab import AdapterPool, RecompileWatch, demo, hotswap_adapter, verify_hotswap
from hotswap_lab.lessons.real_llm import Chat, same_base

CHUNK, ROOM = 8, 24


class Letters:
    """The embedded model's tokenizer with a chat template: the last message, and the sign that an answer follows."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self.eos_token_id = tokenizer.eos_token_id

    def apply_chat_template(self, messages, *, add_generation_prompt, tokenize):
        assert add_generation_prompt
        assert not tokenize
        return messages[-1]["content"] + demo.SEPARATOR

    def __call__(self, text, *, return_tensors, add_special_tokens):
        return self._tokenizer(text, return_tensors=return_tensors)

    def decode(self, ids, skip_special_tokens):
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)


@pytest.fixture
def chat():
    model, tokenizer = demo.load("reverse")
    return Chat(model, Letters(tokenizer), chunk=CHUNK, room=ROOM)


@pytest.fixture
def model(chat):
    return chat.model


@pytest.mark.parametrize("count", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3, ROOM])
def test_reading_gives_the_logits_of_the_model_itself(chat, model, count):
    ids = some_ids(count)
    assert torch.allclose(chat.read(ids), logits_of(model, ids), atol=1e-4)
    assert chat.length == count


def test_reading_on_gives_the_logits_of_all_that_was_read(chat, model):
    ids = some_ids(ROOM)
    for start, stop in ((0, 3), (3, 4), (4, 14), (14, 15), (15, 16), (16, ROOM)):
        assert torch.allclose(chat.read(ids[start:stop]), logits_of(model, ids[:stop]), atol=1e-4)


def test_there_is_an_end_to_the_room(chat):
    chat.read(some_ids(ROOM - 1))
    with pytest.raises(ValueError, match=f"no room for 2 more tokens: {ROOM - 1} of {ROOM} are taken"):
        chat.read(some_ids(2))
    assert chat.length == ROOM - 1


@pytest.mark.parametrize("name", ["reverse", "pig_latin", "caesar"])
def test_answers_are_those_of_the_demo(name):
    model, tokenizer = demo.load(name)
    chat = Chat(model, Letters(tokenizer), chunk=CHUNK, room=ROOM)
    assert chat.ask("hotswap") == demo.ask(model, tokenizer, "hotswap")
    assert chat.ask([{"role": "user", "content": "no"}, {"role": "user", "content": "adapter"}]) == demo.ask(
        model, tokenizer, "adapter"
    )


def test_an_answer_grows_and_is_printed_as_it_grows(chat, capsys):
    assert list(chat.stream("abc")) == ["c", "cb", "cba"]
    assert chat.say("abc") == "cba"
    assert capsys.readouterr().out == "cba\n"


def test_half_a_letter_is_not_shown(chat):
    shown = iter(["\ufffd", "ñ", "ña", "ña"])
    chat.tokenizer.decode = lambda ids, skip_special_tokens: next(shown)
    assert list(chat.stream("abc")) == ["ñ", "ña"]


def test_an_answer_ends_at_its_limit_and_with_the_room(chat):
    assert chat.ask("abcdef", max_new_tokens=2) == "fe"
    prompt = "a" * (ROOM - 3)
    tokens = len(chat.ids(prompt))
    # what comes last need not be read
    assert len(list(chat.stream(prompt, max_new_tokens=ROOM))) == ROOM - tokens + 1
    assert chat.length == ROOM


@pytest.mark.long
def test_two_graphs_do_for_all_voices_and_lengths():
    model, tokenizer = demo.load("reverse")
    family = {name: demo.adapter_path(name) for name in ("reverse", "pig_latin", "caesar")}
    pool = AdapterPool(model, adapters=family, progress=False)
    chat = Chat(model, Letters(tokenizer), chunk=CHUNK, room=ROOM)
    torch.compiler.reset()
    chat.compile("aot_eager")
    with RecompileWatch() as watch:
        chat.ask("word", max_new_tokens=2)
    # one for the four layers together, for each of the two shapes
    assert (watch.compiles, watch.recompiles) == (1, 1)
    with RecompileWatch(allow=0) as watch:
        for name in pool:
            pool.swap(name)
            for word in ("hotswap", "a", "notebook"):
                assert chat.ask(word) == demo.TASKS[name](word)
    assert watch.compiles == 0
    chat.uncompile()
    with RecompileWatch() as watch:
        chat.ask("word")
    assert not watch.compilations
    # and it no longer counts as compiled: this makes more room, which is refused in a compiled model
    AdapterPool(model, adapters={"sort": demo.adapter_path("sort")}, target_rank=64, progress=False)


def test_the_oracle_with_the_base_that_shares_its_weights():
    model, _ = demo.load("reverse")
    hotswap_adapter(model, demo.adapter_path("double"), "default")
    live = {name: tensor.clone() for name, tensor in model.named_parameters()}
    fresh = lambda: same_base(model)  # noqa: E731
    assert verify_hotswap(model, demo.adapter_path("double"), base=fresh)
    assert not verify_hotswap(model, demo.adapter_path("reverse"), base=fresh)
    assert live.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(tensor, live[name]) for name, tensor in model.named_parameters())


def test_the_base_that_shares_its_weights_is_the_base():
    model, _ = demo.load("reverse")
    base = same_base(model)
    ids = some_ids(9)
    assert torch.equal(logits_of(base, ids), logits_of(demo.load_base(), ids))
    live = {tensor.data_ptr() for tensor in model.parameters()}
    assert {tensor.data_ptr() for tensor in base.parameters()} <= live
    # an adapter in it is none in the live model
    PeftModel.from_pretrained(base, demo.adapter_path("shout"))
    assert torch.allclose(
        logits_of(model, ids),
        logits_of(PeftModel.from_pretrained(demo.load_base(), demo.adapter_path("reverse")), ids),
        atol=1e-5,
    )


def test_what_was_saved_is_restored_in_the_same_memory(chat, model):
    ids = some_ids(11)
    chat.read(ids[:7])
    memory = [cache.keys.data_ptr() for cache in chat._caches]
    saved = chat.save()
    chat.forget()
    chat.read(some_ids(9))
    chat.restore(saved)
    assert chat.length == 7
    assert torch.allclose(chat.read(ids[7:]), logits_of(model, ids), atol=1e-4)
    assert [cache.keys.data_ptr() for cache in chat._caches] == memory
    chat.restore(saved)  # reading on has not changed the copy
    assert torch.allclose(chat.read(ids[7:]), logits_of(model, ids), atol=1e-4)
