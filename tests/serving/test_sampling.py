"""Each row's tokens are those that transformers' ``generate`` chooses for it alone, with the same random numbers."""

import asyncio
import sys
from importlib.util import find_spec, module_from_spec

import pytest
import torch
import transformers
from lengths import long
from refusals import refused
from served import FAMILY, SHORT, WORDS, Served, alone, fresh, little, logged, replica_of, text_of

from hotswap_lab import demo
from hotswap_lab.serving import Replica, Request, Version

HOT = dict(temperature=4.0)
#: the fields of requests that share batches
ASKED = [
    dict(HOT, seed=1),
    dict(HOT, seed=2, top_k=3),
    dict(HOT, seed=3, top_p=0.8),
    dict(HOT, seed=4, min_p=0.2),
    dict(HOT, seed=5, top_k=9, top_p=0.9, min_p=0.05, repetition_penalty=1.7),
    dict(HOT, seed=6, logit_bias={7: 9.0}, repetition_penalty=0.5),
    dict(HOT, seed=7, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0),
    dict(HOT, seed=8, frequency_penalty=1.5, presence_penalty=0.5, repetition_penalty=1.2),
    {},
    dict(seed=3),
    dict(temperature=0, repetition_penalty=1.9),
    dict(repetition_penalty=5.0, logit_bias={5: 100, 9: -100.0}),
    dict(frequency_penalty=2.0, logit_bias={5: 20}),
    dict(presence_penalty=2.0, logit_bias={5: 20, 6: 19}),
    dict(presence_penalty=-2.0, frequency_penalty=-1),
]


def generated(model, ids, asked):
    """What ``generate`` chooses. OpenAI's two penalties are computed here, token by token."""
    how, after = dict(asked), []
    frequency, presence = how.pop("frequency_penalty", 0), how.pop("presence_penalty", 0)

    def penalize(said, scores):
        answer = said[0, len(ids) :].tolist()
        for token in set(answer):
            scores[0, token] -= frequency * answer.count(token) + presence
        return scores

    torch.manual_seed(how.pop("seed", 0))
    if how.get("temperature"):
        how = {"top_k": 0, **how, "do_sample": True}
        # what is given comes after what generate makes itself
        after = [transformers.TemperatureLogitsWarper(how.pop("temperature"))] if frequency or presence else []
    if bias := how.pop("logit_bias", None):
        how["sequence_bias"] = [[[token], float(by)] for token, by in bias.items()]
    said = model.generate(torch.tensor([ids]), max_new_tokens=12, logits_processor=[penalize, *after], **how)
    return said[0, len(ids) :].tolist()


def said_by(replica, requests):
    """The answers to requests that come at once."""

    async def ask_all():
        return await asyncio.gather(*(text_of(replica.answer(each)) for each in requests))

    return asyncio.run(ask_all())


#: a model's own values; where a request leaves a field out, it has them, one by one
DEFAULTS = dict(do_sample=True, temperature=5.0, top_k=4, repetition_penalty=1.5)


@pytest.mark.long
@pytest.mark.parametrize("defaults", [{}, DEFAULTS, DEFAULTS | dict(do_sample=False)])
def test_rows_with_values_of_their_own(defaults):
    served = Served(FAMILY)
    (replica,) = served.replicas
    replica.defaults.update(**defaults)
    own = {name: value for name, value in defaults.items() if name != "do_sample"}
    if not defaults.get("do_sample"):
        own["temperature"] = 0
    requests, expected, plain = [], [], []
    for number, asked in enumerate(ASKED):
        name, word, how = [*FAMILY, "demo"][number % 9], WORDS[number % 8], dict(seed=0) | asked
        requests.append(Request(prompt=f"{word}>", shares=served.table.shares(name, "demo"), max_tokens=12, **how))
        ids = generated(fresh(FAMILY.get(name)), replica.tokenizer(f"{word}>")["input_ids"], own | how)
        expected.append(replica.tokenizer.decode(ids, skip_special_tokens=True))
        plain.append(alone(FAMILY.get(name), word)[:12])
    assert said_by(replica, requests) == expected
    for number in range(0, len(requests), 4 if defaults else 1):
        assert said_by(replica, [requests[number]]) == [expected[number]]
    assert sum(a != b for a, b in zip(expected, plain, strict=True)) >= 10


DRAWN = dict(HOT, do_sample=True, top_k=0)
#: what only a model's own ``generation_config`` can ask for
OWN = [
    dict(encoder_repetition_penalty=1.5, no_repeat_ngram_size=2),
    dict(exponential_decay_length_penalty=(2, 1.5), min_new_tokens=3),
    dict(suppress_tokens=[*range(5, 60)], begin_suppress_tokens=[60], bad_words_ids=[[61], [62]]),
    dict(sequence_bias=[[[7], 3.0]], renormalize_logits=True),
    DRAWN | dict(typical_p=0.3),
    DRAWN | dict(top_h=0.3),
]


@pytest.mark.parametrize(("kind", "penalty"), [("Llama", 0.5), long("Rwkv", 1.2)], ids=["Llama", "Rwkv"])
def test_what_a_model_asks_for_itself_counts_once(tmp_path, kind, penalty):
    """Also where ``generate`` answers, which would do it again."""
    load, _, replica = little(kind, tmp_path)
    ids, before = replica.tokenizer("hotswap>")["input_ids"], replica.defaults.to_dict()
    plain = [generated(load(), ids, how) for how in ({}, DRAWN, dict(repetition_penalty=penalty**2))]
    for own in (dict(repetition_penalty=penalty), *OWN):
        vars(replica.defaults).update(before | own)
        model = load()
        vars(model.generation_config).update(own)
        expected = generated(model, ids, {})
        assert expected not in plain, own
        said = replica.tokenizer.decode(expected, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert said_by(replica, [Request(prompt="hotswap>", max_tokens=12, seed=0)]) == [said], own


@pytest.mark.parametrize("by", ["the request", "the model"])
def test_temperature_one_is_drawn_too(tmp_path, by):
    """Transformers has no step for it, so nothing but the draw tells it from the most probable token."""
    load, _, replica = little("Llama", tmp_path)
    how = dict(temperature=1.0, top_k=0)
    expected = generated(load(), replica.tokenizer("hotswap>")["input_ids"], dict(how, seed=3))
    assert expected != generated(load(), replica.tokenizer("hotswap>")["input_ids"], {})
    if by == "the model":
        vars(replica.defaults).update(how, do_sample=True)
    asked = Request(prompt="hotswap>", max_tokens=12, seed=3, **(how if by == "the request" else {}))
    said = replica.tokenizer.decode(expected, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert said_by(replica, [asked]) == [said]


def test_what_no_sampler_can_do_is_said(tmp_path):
    model, tokenizer = demo.load("shout")
    model.generation_config.num_beams = 3
    with logged() as messages:
        replica = Replica(model, tokenizer, [Version.of("shout", FAMILY["shout"])], SHORT)
    assert "num_beams" in messages[0]
    assert said_by(replica, [Request(prompt="hotswap>")]) == ["hotswap"]


def test_tokens_that_are_not_there():
    replica = replica_of({"shout": FAMILY["shout"]}, SHORT)
    last = replica.pool.model.config.vocab_size - 1
    for token in (-1, last + 1):
        asked = [Request(prompt="hotswap>", logit_bias={token: 1.0})]
        refused(rf"logit_bias.*\n.*\[{token}\]\n.*from 0 to {last}", said_by, replica, asked)
    assert said_by(replica, [Request(prompt="hotswap>", logit_bias={last: 0.0})]) == ["hotswap"]


def test_without_pydantic_the_import_says_what_to_install(monkeypatch):
    spec = find_spec("hotswap_lab.serving.sampling")
    monkeypatch.setitem(sys.modules, "pydantic", None)
    with pytest.raises(ImportError, match=r': pip install "hotswap_lab\[serve\]"$'):
        spec.loader.exec_module(module_from_spec(spec))
