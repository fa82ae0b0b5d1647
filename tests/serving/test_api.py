"""OpenAI's API, through the real client, in this process."""

import asyncio
import json
import time
from dataclasses import replace

import httpx2
import openai
import pytest
from refusals import refused
from served import FAMILY, SHORT, WORDS, Served, alone, logged

from hotswap_lab.core.errors import refusal
from hotswap_lab.serving import BusyError, Piece, Register, Table, Version
from hotswap_lab.serving.api import openai_api
from hotswap_lab.serving.replica import Token

URL = "http://served/v1"
CHAT = {"role": "user", "content": "p"}
TOKENS = (Token("h", -0.5, (("h", -0.5), ("x", -1.5))), Token("é", -0.25, (("é", -0.25), ("y", float("-inf")))))


class Fake:
    """A backend whose answer to a request is its seed, letter by letter; ``requests`` are those that came."""

    def __init__(self, error=None, tokens=(), after=0):
        self.table = Table({"shout": Version("shout", "folder", "1f")})
        self.requests, self.error, self.tokens, self.after, self.closed = [], error, tokens, after, 0

    async def answer(self, request):
        self.requests.append(request)
        text, count = f"{request.seed}", 0
        try:
            for letter in text if request.is_streamed else ():
                count += 1
                await asyncio.sleep(0)
                if self.error and count > self.after:
                    raise self.error
                yield Piece(letter, None, 3, count, self.tokens)
            if self.error and count <= self.after:
                raise self.error
            yield Piece("" if count else text, "stop", 3, len(text) + 1, () if count else self.tokens)
        finally:
            self.closed += 1

    async def states(self):
        return []


@pytest.fixture(scope="module")
def served():
    return Served(FAMILY, replicas=2)


@pytest.fixture
def api(served):
    return openai_api(served, "demo", token="secret")


def asked_of(fake, kind="completions", **how):
    """What the real client gets from a fake backend."""
    asked = {"model": "shout", **({"prompt": "p"} if kind == "completions" else {"messages": [dict(CHAT)]}), **how}

    async def ask(client):
        calls = client.completions if kind == "completions" else client.chat.completions
        answer = await calls.create(**asked)
        return [chunk async for chunk in answer] if how.get("stream") else answer

    return with_client(openai_api(fake, "demo"), ask)


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


def lora(client, call, asked, authorization="Bearer secret"):
    """vLLM's call."""
    headers = {"Authorization": authorization} if authorization else {}
    return client._client.post(f"{URL}/{call}_lora_adapter", json=asked, headers=headers)


def test_models(api):
    assert [model.id for model in with_client(api, lambda client: client.models.list()).data] == ["demo", *FAMILY]


def test_completions(api):
    models = ["reverse", "demo", "shout:0.5", *FAMILY][:8]

    async def ask(client):
        return await asyncio.gather(
            *(client.completions.create(model=name, prompt="hotswap>", temperature=0) for name in models)
        )

    answers = with_client(api, ask)
    assert [each.choices[0].text for each in answers[:3]] == ["pawstoh", "hotswap", "HotSwap!"]
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
        api,
        lambda client: collected(
            client.completions.create(
                model="sort", prompt="hotswap>", stream=True, stream_options={"include_usage": True}
            )
        ),
    )
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == "ahopstw"
    assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], 8)


@pytest.mark.parametrize(
    ("how", "status", "text"),
    [
        (dict(model="nobody"), 404, "expected: one of demo, caesar, double"),
        (dict(model=FAMILY["shout"]), 404, "There is no such adapter"),
        (dict(prompt="a" * 40), 400, "a prompt of 1 to 24"),
        (dict(max_tokens=25), 400, "an answer of 1 to 24"),
        (dict(prompt=""), 400, "no prompt"),
        (dict(prompt=[]), 400, "prompt.*at least 1 item"),
        (dict(prompt=["a", "b"]), 400, "prompt.*at most 1 item"),
        (dict(prompt=[1, 2]), 400, "prompt.*valid string"),
        (dict(n=0), 400, "n: Input should be greater"),
        (dict(n=9), 400, "n: Input should be less"),
        (dict(logprobs=6), 400, "logprobs: Input should be less"),
        (dict(stop=list("abcde")), 400, "stop.*at most 4"),
        (dict(stop=""), 400, "stop.*at least 1"),
        (dict(top_p=0), 400, "top_p: Input should be greater"),
        (dict(top_p=1.1), 400, "top_p: Input should be less"),
        (dict(temperature=2.1), 400, "temperature: Input should be less"),
        (dict(temperature=-1), 400, "temperature: Input should be greater"),
        (dict(seed=2**64), 400, "seed: Input should be less"),
        (dict(max_tokens=0), 400, "max_tokens: Input should be greater"),
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


def test_numbers_that_are_0_in_float32_end_no_answer(api):
    async def ask(client):
        asked = [dict(temperature=1.0, top_p=1e-46), dict(temperature=1e-40, top_p=1e-46, seed=0), dict(temperature=0)]
        return await asyncio.gather(
            *(client.completions.create(model="shout", prompt="hotswap>", **how) for how in asked)
        )

    assert [each.choices[0].text for each in with_client(api, ask)] == ["HOTSWAP!"] * 3


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


# ---- what clients send


def test_what_a_request_asks_for_reaches_the_replica():
    fake = Fake()
    how = dict(stop=["a", "b"], seed=7, top_p=0.5, max_tokens=3, temperature=1.5, logprobs=2, user="me")
    asked_of(fake, **how, extra_body={"nobody_knows": 1})
    asked_of(fake, prompt=["p"], stop="a", temperature=9e-4)
    (first, second) = fake.requests
    assert (first.prompt, first.stop, first.seed, first.top_p, first.max_tokens) == ("p", ("a", "b"), 7, 0.5, 3)
    assert (first.temperature, first.logprobs, first.is_streamed) == (1.5, 2, False)
    assert (second.prompt, second.stop, second.seed, second.top_p, second.max_tokens) == ("p", ("a",), None, 1, None)
    assert (second.temperature, second.logprobs) == (9e-4, None)


def test_what_a_chat_asks_for_reaches_the_replica():
    fake = Fake()
    parts = {"role": "user", "content": [{"type": "text", "text": "o"}, {"type": "text", "text": "ne"}]}
    asked_of(fake, "chat", messages=[parts, CHAT], max_completion_tokens=3, max_tokens=9, logprobs=True, top_logprobs=4)
    asked_of(fake, "chat", logprobs=True)
    asked_of(fake, "chat", logprobs=False, top_logprobs=4)
    assert fake.requests[0].prompt == [{"role": "user", "content": "one"}, CHAT]
    assert fake.requests[0].max_tokens == 3
    assert [request.logprobs for request in fake.requests] == [4, 0, None]
    picture = [{"type": "image_url", "image_url": {"url": "http://x"}}]
    with pytest.raises(openai.BadRequestError, match=r"messages\.0\.content"):
        asked_of(fake, "chat", messages=[{"role": "user", "content": picture}])


@pytest.mark.parametrize(
    ("field", "nothing", "something"),
    [
        ("presence_penalty", 0.0, 0.5),
        ("frequency_penalty", 0, -1),
        ("logit_bias", {}, {"5": 100}),
        ("echo", False, True),
        ("suffix", "", "x"),
        ("best_of", 1, 2),
        ("top_k", -1, 5),
        ("tools", [], [{"type": "function"}]),
        ("response_format", {"type": "text"}, {"type": "json_object"}),
        ("repetition_penalty", 1.0, 1.1),
    ],
)
def test_fields_that_would_change_the_answer(field, nothing, something):
    fake = Fake()
    for value in (nothing, None):
        asked_of(fake, extra_body={field: value})
    with pytest.raises(openai.BadRequestError, match=f"{field}' would change the answer") as caught:
        asked_of(fake, extra_body={field: something})
    assert f"found:    {field} = {something!r}" in str(caught.value)
    assert len(fake.requests) == 2


def test_several_choices():
    fake = Fake()
    answer = asked_of(fake, n=3, seed=8)
    assert [(each.index, each.text) for each in answer.choices] == [(0, "8"), (1, "9"), (2, "10")]
    assert [request.seed for request in fake.requests] == [8, 9, 10]
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (3, 7, 10)
    assert [each.message.content for each in asked_of(Fake(), "chat", n=2).choices] == ["None"] * 2


@pytest.mark.parametrize("kind", ["completions", "chat"])
def test_several_choices_in_one_stream(kind):
    fake = Fake()
    *chunks, last = asked_of(fake, kind, n=2, seed=99, stream=True, stream_options={"include_usage": True})
    texts, ends, order = ["", ""], ["", ""], []
    for chunk in chunks:
        (choice,) = chunk.choices
        texts[choice.index] += choice.text if kind == "completions" else choice.delta.content
        ends[choice.index] = choice.finish_reason
        order.append(choice.index)
        assert chunk.usage is None
    assert (texts, ends) == (["99", "100"], ["stop", "stop"])
    assert order != sorted(order)  # as they come
    assert (last.choices, last.usage.total_tokens) == ([], 3 + 3 + 4)
    assert len({chunk.id for chunk in [*chunks, last]}) == 1
    assert all(chunk.choices for chunk in asked_of(Fake(), kind, seed=9, stream=True))


def test_one_choice_that_fails_ends_the_others():
    fake = Fake(_busy())
    with pytest.raises(openai.InternalServerError, match="Too many requests wait"):
        asked_of(fake, n=4)
    with pytest.raises(openai.InternalServerError):
        asked_of(fake, n=4, stream=True)  # before the first piece: a status of its own
    assert fake.closed == len(fake.requests)


def test_one_choice_that_fails_does_not_wait_for_the_others():
    class Waiting(Fake):
        async def answer(self, request):
            try:
                await asyncio.sleep(60 * request.seed)
                yield Piece("", None, 1, 1)
                raise self.error
            finally:
                self.closed += 1

    fake, start = Waiting(_busy()), time.monotonic()
    for is_streamed in (False, True):
        with pytest.raises(openai.APIError, match="Too many requests wait"):
            asked_of(fake, n=3, seed=0, stream=is_streamed)
    assert fake.closed == 6
    assert time.monotonic() - start < 30


def test_an_error_after_the_first_piece_ends_the_stream_with_an_event():
    fake = Fake(_busy(), after=2)
    asking = openai_api(fake, "demo")

    async def lines(client):
        asked = {"model": "shout", "prompt": "p", "seed": 12345, "stream": True}
        return (await client._client.post(f"{URL}/completions", json=asked)).text.split("\n\n")

    *pieces, error, rest = with_client(asking, lines)
    assert (len(pieces), rest) == (2, "")
    assert "Too many requests wait" in error
    assert "server_error" in error
    with pytest.raises(openai.APIError, match="Too many requests wait"):
        asked_of(fake, seed=12345, stream=True)


def test_logprobs_of_completions():
    (choice,) = asked_of(Fake(tokens=TOKENS), logprobs=2).choices
    assert choice.logprobs.tokens == ["h", "é"]
    assert choice.logprobs.token_logprobs == [-0.5, -0.25]
    assert choice.logprobs.top_logprobs == [{"h": -0.5, "x": -1.5}, {"é": -0.25, "y": -9999.0}]
    assert choice.logprobs.text_offset == [0, 1]
    chunks = asked_of(Fake(tokens=TOKENS), logprobs=2, seed=77, stream=True)
    assert [chunk.choices[0].logprobs.text_offset for chunk in chunks[:2]] == [[0, 1], [1, 2]]
    assert asked_of(Fake()).choices[0].logprobs is None


def test_logprobs_of_chats():
    for answer in (
        asked_of(Fake(tokens=TOKENS), "chat", logprobs=True, top_logprobs=2),
        asked_of(Fake(tokens=TOKENS), "chat", logprobs=True, top_logprobs=2, seed=7, stream=True)[0],
    ):
        first, second = answer.choices[0].logprobs.content
        assert (first.token, first.logprob, first.bytes) == ("h", -0.5, [104])
        assert [(each.token, each.logprob) for each in first.top_logprobs] == [("h", -0.5), ("x", -1.5)]
        assert (second.token, second.bytes, second.top_logprobs[1].logprob) == ("é", [195, 169], -9999.0)


def _busy():
    return BusyError(refusal("too_many_wait"))


def test_langchain(api):
    langchain = pytest.importorskip("langchain_openai")

    async def ask(client):
        how = dict(base_url=URL, api_key="-", http_async_client=client._client)
        chat = langchain.ChatOpenAI(model="reverse", seed=1, top_p=0.9, stop=["w"], logprobs=True, **how)
        whole = await chat.ainvoke("hotswap")
        streamed = langchain.ChatOpenAI(model="reverse", stream_usage=True, **how)
        return whole.content, [each async for each in streamed.astream("hotswap")]

    text, chunks = with_client(api, ask)
    assert text == "pa"
    assert "".join(chunk.content for chunk in chunks) == "pawstoh"
    assert sum(chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata) == 8


# ---- what would stop the server


@pytest.mark.parametrize(
    "model",
    ["9" * 100_000, "shout:" + "9" * 100_000, "+" * 100_000, "shout+" * 9 + "shout", "shout:" + "0" * 999 + "1"],
)
def test_names_are_read_in_linear_time(served, model):
    start = time.perf_counter()
    error = refused("no such mix", served.table.shares, model, "demo")
    assert time.perf_counter() - start < 0.1
    assert len(str(error)) < 2500


@pytest.mark.parametrize(
    "model", ["shout:1e30", "shout:-1", "shout:inf", "shout:nan", "shout:101", "shout:60+shout:60"]
)
def test_weights_have_a_range(served, model):
    refused("weights from 0 to 100", served.table.shares, model, "demo")


def test_a_mix_of_eight(served):
    names = list(FAMILY)[:8]
    assert len(served.table.shares("+".join(names), "demo")) == 8
    assert [*served.table.shares("shout:1e-1", "demo").values()] == [0.1]


def test_bodies_are_limited_also_without_a_length():
    fake = Fake()
    api = openai_api(fake, "demo", longest_prompt=16)
    most = 16 * 64 + 2**16

    async def post(client, length, is_chunked):
        body = b'{"model": "shout", "prompt": "'
        body += b"a" * (length - len(body) - 2) + b'"}'

        async def parts():
            for start in range(0, length, 10_000):
                yield body[start : start + 10_000]

        content = parts() if is_chunked else body
        headers = {"Content-Type": "application/json"}
        return await client._client.post(f"{URL}/completions", content=content, headers=headers)

    for is_chunked in (False, True):
        short, long = (with_client(api, lambda c: post(c, most + more, is_chunked)) for more in (0, 1))  # noqa: B023
        assert (short.status_code, long.status_code) == (200, 413)
        assert f"at most {most:,} bytes" in long.json()["error"]["message"]
    assert len(fake.requests) == 2


def posted(api, path, body):
    """The answer to a body that no client would send."""
    headers = {"Content-Type": "application/json", "Authorization": "Bearer secret"}
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    return with_client(api, lambda client: client._client.post(f"http://served{path}", content=body, headers=headers))


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[" * 9_000, b"\xff", b"null", b'{"n": ' + b"9" * 5_000 + b"}", b'{"n": 1}']
)
def test_bodies_that_nobody_can_read(api, body):
    answer = posted(api, "/v1/completions", body)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("field", ["temperature", "top_p"])
@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e999", "-1e-40"])
def test_numbers_that_are_none(api, field, value):
    body = b'{"model": "shout", "prompt": "p", "%s": %s}' % (field.encode(), value.encode())
    assert f"{field}: Input should be" in posted(api, "/v1/completions", body).json()["error"]["message"]


def test_half_a_surrogate_pair_is_no_text(api):
    half = {"role": "user", "content": "\ud800"}
    for path, how in (
        ("completions", {"prompt": "\ud800"}),
        ("completions", {"prompt": "p", "stop": ["\ud800"]}),
        ("chat/completions", {"messages": [half]}),
        ("chat/completions", {"messages": [CHAT | {"role": "\ud800"}]}),
    ):
        answer = posted(api, f"/v1/{path}", {"model": "shout", **how})
        assert answer.status_code == 400
        assert "is not text" in answer.text or "unicode string" in answer.text
    assert posted(api, "/v1/completions", {"model": "\ud800", "prompt": "p"}).status_code == 404


def test_addresses_that_are_none(api):
    answer = with_client(api, lambda client: client._client.get(f"{URL}/nothing"))
    assert (answer.status_code, answer.json()["error"]["message"]) == (404, "Not Found")


# ---- for administrators


@pytest.mark.parametrize("authorization", [None, "Bearer ", "Bearer other", "secret"])
@pytest.mark.parametrize("token", ["secret", None, ""])
def test_admin_calls_need_the_token(served, token, authorization):
    before = served.table
    api = openai_api(served, "demo", token)
    assert with_client(api, lambda client: change(client, {"shout": None}, authorization)).status_code == 401
    for call, asked in (("load", {"lora_name": "x", "lora_path": FAMILY["shout"]}), ("unload", {"lora_name": "shout"})):
        assert with_client(api, lambda c: lora(c, call, asked, authorization)).status_code == 401  # noqa: B023
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


def test_what_vllms_clients_call(served, api):

    async def ask(client):
        loaded = await lora(client, "load", {"lora_name": "new", "lora_path": FAMILY["shout"], "load_inplace": True})
        said = await client.completions.create(model="new", prompt="hotswap>")
        unloaded = await lora(client, "unload", {"lora_name": "new", "lora_int_id": 3})
        again = await lora(client, "unload", {"lora_name": "new"})
        unnamed = await lora(client, "load", {"lora_name": "new"})
        return said, [each.status_code for each in (loaded, unloaded, again, unnamed)]

    with logged() as messages:
        said, statuses = with_client(api, ask)
    assert (said.choices[0].text, statuses) == ("HOTSWAP!", [200, 200, 404, 400])
    assert messages == ["/v1/load_lora_adapter: new@1", "/v1/unload_lora_adapter: new removed"]
    assert [*served.table.versions] == [*FAMILY]


@pytest.mark.parametrize("name", ["", "a+b", "a:b", "demo", "a" * 201, "\ud800", "a\nb", "\u202e"])
def test_names_that_no_adapter_may_have(served, api, name):
    before = served.table
    answer = posted(api, "/admin/adapters", {"loud": FAMILY["shout"], name: FAMILY["shout"]})
    assert answer.status_code == 400
    assert "can't have the name" in answer.json()["error"]["message"]
    assert served.table is before


def test_names_that_an_adapter_may_have():
    for name in ("a" * 200, "org/adapter-v1.5", "été"):
        assert Version.of(name, FAMILY["shout"]).name == name


def test_a_path_that_is_no_folder(served, api):
    answer = with_client(api, lambda client: change(client, {"loud": "/dev/null"}))
    assert (answer.status_code, "Not a directory" in answer.text) == (400, True)


def test_a_version_number_never_comes_twice():
    register = Register("demo")

    async def change_all():
        for path in (FAMILY["sort"], FAMILY["shout"], None, FAMILY["sort"]):
            await register.change({"sort": path})
        other = Register("demo")  # one that starts anew
        await other.change({"sort": FAMILY["reverse"]})
        await other.adopt(register.table)
        await other.change({"sort": None})
        return await other.change({"sort": FAMILY["shout"]})

    assert str(asyncio.run(change_all()).versions["sort"]) == "sort@4"
    assert str(register.table.versions["sort"]) == "sort@3"


def test_health_without_a_replica():
    answer = with_client(openai_api(Fake(), "demo"), lambda client: client._client.get("http://served/healthz"))
    assert (answer.status_code, answer.json()) == (503, {"replicas": []})


def test_health(api):
    found = with_client(api, lambda client: client._client.get("http://served/healthz"))
    first, second = found.json()["replicas"]
    assert first["requests"] > 0 == second["requests"]
    assert {f"{name}@1" for name in FAMILY} <= set(second["held"])
    assert (second["rows"], second["waiting"], second["rows_in_use"]) == ([None] * 8, 0, 0)
