"""OpenAI's API, through the real client, in this process."""

import asyncio
from dataclasses import replace

import httpx2
import openai
import pytest
from served import FAMILY, SHORT, WORDS, Served, alone

from hotswap_lab.serving.api import openai_api

URL = "http://served/v1"


@pytest.fixture(scope="module")
def served():
    return Served(FAMILY, replicas=2)


@pytest.fixture
def api(served):
    return openai_api(served, "demo", token="secret")


def with_client(api, ask):
    """What comes of asking with a client that is connected to the application."""

    async def run():
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=api)) as http:
            return await ask(openai.AsyncOpenAI(base_url=URL, api_key="-", http_client=http, max_retries=0))

    return asyncio.run(run())


async def collected(stream):
    return [chunk async for chunk in await stream]


def change(client, adapters, authorization="Bearer secret"):
    headers = {"Authorization": authorization} if authorization else {}
    return client._client.post("http://served/admin/adapters", json=adapters, headers=headers)


def test_models(api):
    assert [model.id for model in with_client(api, lambda client: client.models.list()).data] == ["demo", *FAMILY]


def test_completions(api):
    models = ["reverse", "demo", "shout:0.5", *FAMILY][:8]

    async def ask(client):
        return await asyncio.gather(
            *(client.completions.create(model=name, prompt="hotswap>", temperature=0) for name in models)
        )

    answers = with_client(api, ask)
    assert [each.choices[0].text for each in answers[:3]] == ["pawstoh", "hotswap", "hotSwap!"]
    assert [each.choices[0].text for each in answers[3:]] == [alone(FAMILY[name], "hotswap") for name in models[3:]]
    assert [each.model for each in answers] == models
    assert [each.system_fingerprint for each in answers[:3]] == ["reverse@1", "demo", "shout@1:0.5"]
    assert {each.choices[0].finish_reason for each in answers} == {"stop"}
    usage = answers[0].usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (8, 8, 16)


def test_chats_and_streams(api):
    asked = dict(model="reverse", messages=[{"role": "user", "content": "notebook"}])
    whole = with_client(api, lambda client: client.chat.completions.create(**asked, max_completion_tokens=4)).choices[0]
    assert (whole.message.content, whole.message.role, whole.finish_reason) == ("koob", "assistant", "length")
    chunks = with_client(api, lambda client: collected(client.chat.completions.create(**asked, stream=True)))
    assert [chunk.choices[0].delta.content for chunk in chunks] == [*"koobeton", ""]
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * 8 + ["stop"]
    assert {chunk.system_fingerprint for chunk in chunks} == {"reverse@1"}
    assert len({chunk.id for chunk in chunks}) == 1
    chunks = with_client(
        api, lambda client: collected(client.completions.create(model="sort", prompt="hotswap>", stream=True))
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == "ahopstw"
    assert chunks[-1].usage.completion_tokens == 8


@pytest.mark.parametrize(
    ("how", "status", "text"),
    [
        (dict(model="nobody"), 404, "expected: one of demo, caesar, double"),
        (dict(model=FAMILY["shout"]), 404, "There is no such adapter"),
        (dict(prompt="a" * 40), 400, "a prompt of 1 to 24"),
        (dict(max_tokens=25), 400, "answers of at most 24"),
        (dict(prompt=""), 400, "no prompt"),
        (dict(n=2), 400, "n: Input should be 1"),
        (dict(logprobs=3), 400, "logprobs: Extra inputs are not permitted"),
        (dict(stop="x"), 400, "stop: Extra inputs"),
        (dict(model="caesar+pig_latin+sort"), 400, "needs more rank"),
        (dict(model="caesar+pig_latin+sort", stream=True), 400, "needs more rank"),
    ],
)
def test_errors_are_openais(api, how, status, text):
    asked = {"model": "shout", "prompt": "hotswap>", **how}
    with pytest.raises(openai.APIStatusError, match=text) as caught:
        with_client(api, lambda client: client.completions.create(**asked))
    assert caught.value.status_code == status
    assert caught.value.body["type"] == "invalid_request_error"


def test_too_many_requests(served):
    api = openai_api(served, "demo")
    served.replicas[0].options = replace(SHORT, queue=3)

    async def ask(client):
        asked = [client.completions.create(model="shout", prompt=f"{word}>") for word in WORDS]
        return await asyncio.gather(*asked, return_exceptions=True)

    try:
        said = with_client(api, ask)
    finally:
        served.replicas[0].options = SHORT
    refused = [each for each in said if isinstance(each, openai.APIStatusError)]
    assert len(refused) == 5
    assert {(each.status_code, each.response.headers["retry-after"]) for each in refused} == {(503, "1")}


@pytest.mark.parametrize("authorization", [None, "Bearer ", "Bearer other", "secret"])
@pytest.mark.parametrize("token", ["secret", None, ""])
def test_admin_calls_need_the_token(served, token, authorization):
    before = served.table
    api = openai_api(served, "demo", token)
    assert with_client(api, lambda client: change(client, {"shout": None}, authorization)).status_code == 401
    assert served.table is before


def test_new_weights_for_all(served, api, tmp_path):
    async def ask(client):
        good = await change(client, {"shout": FAMILY["sort"], "loud": FAMILY["shout"], "double": None})
        said = await client.completions.create(model="shout", prompt="hotswap>")
        bad = await change(client, {"shout": FAMILY["shout"], "reverse": str(tmp_path)})
        still = await client.completions.create(model="shout", prompt="hotswap>")
        return good, said, bad, still

    try:
        good, said, bad, still = with_client(api, ask)
    finally:
        table = asyncio.run(served.change(FAMILY, is_all=True))
    assert [*table.versions] == [*FAMILY]
    assert good.json() == {name: 1 for name in FAMILY if name != "double"} | {"shout": 2, "loud": 1}
    assert said.choices[0].text == still.choices[0].text == "ahopstw"
    assert said.system_fingerprint == still.system_fingerprint == "shout@2"
    assert bad.status_code == 400
    assert "Can't find 'adapter_config.json'" in bad.json()["error"]["message"]


def test_health(api):
    found = with_client(api, lambda client: client._client.get("http://served/healthz"))
    first, second = found.json()["replicas"]
    assert first["requests"] > 0 == second["requests"]
    assert {f"{name}@1" for name in FAMILY} <= set(second["held"])
    assert (second["rows"], second["waiting"], second["rows_in_use"]) == ([], 0, 0)
