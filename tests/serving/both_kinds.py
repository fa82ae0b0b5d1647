"""Tests of a server from outside, the same for one process and for Ray Serve: each kind has its own ``address``.

The server has the adapters of ``replica_faults.ADAPTERS``, and the token of ``running``.
"""

from __future__ import annotations

import httpx2
import openai
import pytest
from lengths import eventually, long
from replica_faults import ADAPTERS, NAMES, trial
from running import change, numbers, states
from served import FAMILY, WORDS, alone

from hotswap_lab.serving.metrics import COUNTERS, GAUGES


class BothKinds:
    @pytest.fixture
    def client(self, address):
        with openai.OpenAI(base_url=f"{address}/v1", api_key="-", max_retries=0) as client:
            yield client

    def test_the_real_client(self, client):
        assert [model.id for model in client.models.list().data] == ["demo", *NAMES]
        for name, word in zip([*NAMES, "demo"], WORDS, strict=False):
            pieces = list(client.completions.create(model=name, prompt=f"{word}>", stream=True))
            assert "".join(each.choices[0].text for each in pieces) == alone(ADAPTERS.get(name), word)
            whole = client.completions.create(model=name, prompt=f"{word}>", echo=True)
            assert whole.choices[0].text == f"{word}>" + alone(ADAPTERS.get(name), word)
            assert {each.model for each in [*pieces, whole]} == {name}
            assert {each.system_fingerprint for each in [*pieces, whole]} == {f"{name}@1" if name in NAMES else name}
        assert {whole.choices[0].finish_reason, pieces[-1].choices[0].finish_reason} == {"stop"}
        assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(word) + 1, len(word) + 1)
        mix = client.completions.create(model="five:0.5+six:0.5", prompt="hotswap>")
        assert mix.system_fingerprint == "five@1:0.5+six@1:0.5"
        messages = [{"role": "user", "content": "notebook"}]
        chunks = list(client.chat.completions.create(model="two", messages=messages, stream=True))
        assert len(chunks) == 17
        assert "".join(chunk.choices[0].delta.content for chunk in chunks) == "notebooknotebook"
        for how, status in (({"model": "nobody"}, 404), ({"max_tokens": 99}, 400), ({"model": "+".join(NAMES)}, 400)):
            with pytest.raises(openai.APIStatusError) as caught:
                client.completions.create(**{"model": "one", "prompt": "hotswap>", **how})
            assert caught.value.status_code == status
            assert "Traceback" not in caught.value.message

    def test_who_goes_away_stops_the_computing(self, client, address):
        before = sum(each["tokens"] for each in states(address))
        with client.completions.create(model="two", prompt="notebooks>", stream=True) as stream:
            next(iter(stream))
        # one more that takes as long as the first would have
        client.completions.create(model="two", prompt="notebooks>")
        assert 19 < sum(each["tokens"] for each in states(address)) - before < 2 * 19

    def test_metrics(self, client, address):
        list(client.completions.create(model="two", prompt="hotswap>", stream=True))

        def at_rest():  # for who has gone away, one more step may be computed
            told = numbers(httpx2.get(f"{address}/metrics").text)
            return not any(value for (name, *_), value in told.items() if name in GAUGES) and told

        assert (told := eventually(at_rest))
        assert 0 < told["first_token_seconds_count",] <= told["request_seconds_count", "/v1/completions", "200"]
        for replica in states(address):
            label = replica.get("replica", "")
            assert all(told[f"{name}_total", label] == replica[name] for name in COUNTERS)
            assert all(told[name, label] == 0 for name in GAUGES)
        assert {each[1] for each in told if each[0] == "adapter_version"} == {*NAMES}

    def test_new_weights(self, client, address):
        told = change(address, {"one": FAMILY["shout"], "two": None, "late": FAMILY["shout"]}).json()
        assert told.keys() == {*NAMES, "late"} - {"two"}
        version = told["one"]
        refused = change(address, {"one": FAMILY["sort"], "three": "/nowhere"})
        assert refused.status_code == 400
        assert "Can't find 'adapter_config.json'" in refused.json()["error"]["message"]
        answer = client.completions.create(model="one", prompt="hotswap>")
        assert (answer.choices[0].text, answer.system_fingerprint) == ("HOTSWAP!", f"one@{version}")
        assert all(f"one@{version}" in each["held"] for each in states(address))
        change(address, {**ADAPTERS, "late": None})

    @pytest.mark.parametrize("requests", [24, long(240)])
    def test_a_policy_that_learns_while_it_answers(self, address, requests):
        """Clients, some of which stream, know what each version of an adapter says; each answer is of one version."""
        told = trial(address, requests, update_every=0.02)
        change(address, ADAPTERS)
        assert (told["asked"], told["retried"], told["wrong"], told["lost"]) == (requests, 0, 0, 0)
        assert told["updates"] >= requests / 6
