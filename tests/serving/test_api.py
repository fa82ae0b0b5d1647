"""OpenAI's API, through the real client, in this process."""

import asyncio
import itertools
import json
import re
import time
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import httpx2
import openai
import pytest
import torch
from openai.types import chat, completion_create_params
from openai.types.chat import ChatCompletionMessage
from refusals import refused
from running import numbers
from served import FAMILY, SHORT, WORDS, Served, logged
from transformers.convert_slow_tokenizer import bytes_to_unicode

from hotswap_lab.core.errors import refusal
from hotswap_lab.serving import BusyError, Piece, Request, Sampling, Table, Version
from hotswap_lab.serving.answers import Answer, Token
from hotswap_lab.serving.api import NOTHING, AskedChat, AskedText, openai_api
from hotswap_lab.serving.metrics import COUNTERS, GAUGES

SERVER = "http://served"
TEXT, CHATS, ADMIN = "/v1/completions", "/v1/chat/completions", "/admin/adapters"
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
CHAT = {"role": "user", "content": "p"}
TOKENS = (
    Token("h", -0.5, b"h", (Token("h", -0.5, b"h"), Token("x", -1.5, b"x"))),
    Token("é", -0.25, "é".encode(), (Token("é", -0.25, "é".encode()), Token("token_id:5", float("-inf"))), 1),
)


class Fake:
    """A backend whose answer to a request is its seed, letter by letter; ``requests`` are those that came.

    ``error`` comes after so many letters. The answer for a seed waits for as many minutes, if the backend is ``slow``.
    """

    def __init__(self, error=None, tokens=(), after=0, slow=False):
        self.table = Table({"shout": Version("shout", "folder", "1f")}, 1)
        self.requests, self.error, self.tokens, self.after, self.slow, self.closed = [], error, tokens, after, slow, 0

    async def answer(self, request):
        self.requests.append(request)
        text, count = f"{request.seed}", 0
        try:
            await asyncio.sleep(60 * request.seed if self.slow else 0)
            for letter in text if request.is_streamed else ():
                count += 1
                await asyncio.sleep(0)
                if self.error and count > self.after:
                    raise self.error
                yield Piece(letter, None, 3, count, self.tokens)
            if self.error and count <= self.after:
                raise self.error
            yield Piece("" if count else text, "length", 3, len(text) + 1, () if count else self.tokens)
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
    return asked(openai_api(fake, "demo"), kind, **how)


def asked(api, kind="completions", **how):
    how = {"model": "shout", **({"prompt": "p"} if kind == "completions" else {"messages": [dict(CHAT)]}), **how}

    async def ask(client):
        calls = client.completions if kind == "completions" else client.chat.completions
        answer = await calls.create(**how)
        return [chunk async for chunk in answer] if how.get("stream") else answer

    return with_client(api, ask)


def refusal_of(fake, kind, **how):
    """The text of the error with the status 400 that the real client gets."""
    with pytest.raises(openai.BadRequestError) as caught:
        asked_of(fake, kind, **how)
    return str(caught.value)


def with_client(api, ask):
    """What comes of asking with a client that is connected to the application."""

    async def run():
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=api)) as http:
            return await ask(openai.AsyncOpenAI(base_url=f"{SERVER}/v1", api_key="-", http_client=http, max_retries=0))

    return asyncio.run(run())


def sent(api, path, body=None, authorization="Bearer secret"):
    """The answer to what no client of OpenAI's would send: GET if there is no body."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": authorization} if authorization else {})
    content = json.dumps(body).encode() if isinstance(body, dict) else body
    how = dict(method="GET" if body is None else "POST", url=SERVER + path, headers=headers, content=content)
    return with_client(api, lambda client: client._client.request(**how))


def status_of(api, body, then):
    """The status that a client gets which sends a body, or a part of one, and then what ``then`` waits for."""
    path, messages, statuses = TEXT, [{"type": "http.request", "body": body, "more_body": b"}" not in body}], []
    scope = {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.4"}, "http_version": "1.1", "method": "POST"}
    scope |= {"path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "scheme": "http"}
    scope |= {"headers": [(b"content-type", b"application/json")], "server": ("served", 80), "client": ("other", 1)}

    async def receive():
        return messages.pop() if messages else await then()

    async def send(message):
        statuses.append(message.get("status"))

    asyncio.run(asyncio.wait_for(api(scope, receive, send), 60))
    return statuses[0]


def test_the_models(api, served, monkeypatch):
    """Each with the dtype that the replicas say; none while there is none that answers."""
    known = sent(api, "/v1/models").json()["data"]
    assert [(each["id"], each["dtype"]) for each in known] == [(name, "float32") for name in ("demo", *FAMILY)]
    monkeypatch.setattr(served, "states", mock.AsyncMock(return_value=[{"dtype": "bfloat16"}]))
    assert {each["dtype"] for each in sent(api, "/v1/models").json()["data"]} == {"bfloat16"}
    state = [{"dtype": "bfloat16"}]
    for states, table in (([], served.table), (state, Table())):
        monkeypatch.setattr(served, "states", mock.AsyncMock(return_value=states))
        monkeypatch.setattr(served, "table", table)
        models, health = sent(api, "/v1/models"), sent(api, "/healthz")
        assert (models.status_code, models.headers["retry-after"], health.status_code) == (503, "1", 503)
        assert "The server is starting" in models.json()["error"]["message"]


@pytest.mark.parametrize(
    ("headers", "found"),
    [({"Content-Type": "text/plain"}, "content-type: text/plain, where"), ({}, "content-type: None")],
)
def test_another_content_type(api, headers, found):
    how = dict(method="POST", url=SERVER + TEXT, headers=headers, content=b'{"model": "shout", "prompt": "p>"}')
    answer = with_client(api, lambda client: client._client.request(**how))
    assert (answer.status_code, found in answer.json()["error"]["message"]) == (400, True)


def test_who_goes_away_is_no_longer_computed_for(served, api):
    counts = served.replicas[0].counts
    before = counts["tokens"]

    async def leaves():
        while counts["tokens"] < before + 2:
            await asyncio.sleep(0)
        return {"type": "http.disconnect"}

    assert status_of(api, b'{"model": "double", "prompt": "notebook>"}', leaves) == 499
    assert before + 2 <= counts["tokens"] < before + 17
    assert served.replicas[0].state["waiting"] == 0
    served.assert_right(["double"])


def test_a_body_that_stops_halfway(api, monkeypatch):
    monkeypatch.setattr("hotswap_lab.serving.api.BODY_SECONDS", 0.05)
    assert status_of(api, b'{"model": ', asyncio.Event().wait) == 408


def test_a_long_stop_costs_no_more_than_the_text(served):
    class Stop(str):
        parts = 0

        def __getitem__(self, which):
            Stop.parts += 1
            return super().__getitem__(which)

    assert asyncio.run(served.ask("double", "notebook", stop=(Stop("a" * 65_000),))) == "notebooknotebook"
    assert 0 < Stop.parts <= 17 * 17


def test_a_token_in_utf_8(served):
    authorization = "Bearer Schlüssel".encode()
    assert sent(openai_api(served, "demo", token="Schlüssel"), ADMIN, {}, authorization).status_code == 200
    assert sent(openai_api(served, "demo", token="Schlussel"), ADMIN, {}, authorization).status_code == 401


def test_too_many_requests(served, monkeypatch):
    monkeypatch.setattr("hotswap_lab.serving.replica.GATHERING", 0.3)  # till all have come
    monkeypatch.setattr(served.replicas[0], "options", replace(SHORT, queue=3))
    api = openai_api(served, "demo")

    async def ask(client):
        asked = [client.completions.create(model="shout", prompt=f"{word}>") for word in WORDS]
        return await asyncio.gather(*asked, return_exceptions=True)

    said = with_client(api, ask)
    refused = [each for each in said if isinstance(each, openai.APIStatusError)]
    assert len(refused) == 5
    assert {(each.status_code, each.response.headers["retry-after"]) for each in refused} == {(503, "1")}


# ---- what is refused

#: fields that would change the answer: a value that doesn't, and one that does
FIELDS = {
    "suffix": ("", "x"),
    "best_of": (1, 2),
    "tools": ([], [{"type": "function"}]),
    "response_format": ({"type": "text"}, {"type": "json_object"}),
}
PICTURE = [{"type": "image_url", "image_url": {"url": "http://x"}}]
NO_NUMBERS = itertools.product(
    (b"temperature", b"top_p", b"min_p", b"repetition_penalty"), (b"NaN", b"Infinity", b"1e999", b"-1e-40")
)
BODIES = [b"", b"{", b"[" * 9_000, b"\xff\xfe", b"null", b"[]", b'"a"', b'{"n": ' + b"9" * 5_000 + b"}", b"a" * 200_000]
#: a path, what is sent, the status of the answer, and what it says
REFUSED = [
    (TEXT, dict(model="nobody"), 404, "expected: one of demo, caesar, double"),
    (TEXT, dict(model=FAMILY["shout"]), 404, "There is no such adapter"),
    (TEXT, dict(model="\ud800"), 404, "There is no such adapter"),
    (TEXT, dict(prompt="a" * 40), 400, "a prompt of 1 to 24"),
    (TEXT, dict(max_tokens=25), 400, "an answer of 1 to 24"),
    (TEXT, dict(prompt=""), 400, "no prompt"),
    (TEXT, dict(prompt=[]), 400, "prompt.*at least 1 item"),
    (TEXT, dict(prompt=["a", "b"]), 400, "prompt.*at most 1 item"),
    (TEXT, dict(prompt=[1, 2]), 400, "prompt.*valid string"),
    (TEXT, dict(n=0), 400, "n: Input should be greater"),
    (TEXT, dict(n=9), 400, "n: Input should be less"),
    (TEXT, dict(logprobs=6), 400, "logprobs: Input should be less"),
    (TEXT, dict(stop=list("abcde")), 400, "stop.*at most 4"),
    (TEXT, dict(stop=""), 400, "stop.*at least 1"),
    (TEXT, dict(top_p=0), 400, "top_p: Input should be greater"),
    (TEXT, dict(top_p=1.1), 400, "top_p: Input should be less"),
    (TEXT, dict(temperature=2.1), 400, "temperature: Input should be less"),
    (TEXT, dict(temperature=-1), 400, "temperature: Input should be greater"),
    (TEXT, dict(top_k=-2), 400, "top_k: Input should be greater"),
    (TEXT, dict(min_p=1.1), 400, "min_p: Input should be less"),
    (TEXT, dict(frequency_penalty=2.1), 400, "frequency_penalty: Input should be less"),
    (TEXT, dict(presence_penalty=-2.1), 400, "presence_penalty: Input should be greater"),
    (TEXT, dict(logit_bias={"5": 101}), 400, r"logit_bias\.5: Input should be less"),
    (TEXT, dict(logit_bias={"hotswap": 1}), 400, r"logit_bias\.hotswap.*valid integer"),
    (TEXT, dict(logit_bias={"98": 1}), 400, r"doesn't have\.\n.*\[98\]\n.*from 0 to 97"),
    (TEXT, dict(echo=True, logprobs=0), 400, "An echo has no log probabilities"),
    (CHATS, dict(messages=[CHAT], echo=True), 400, "echo' is not served"),
    (CHATS, dict(messages=[CHAT], top_logprobs=4), 400, "top_logprobs = 4, without logprobs"),
    (CHATS, dict(messages=[CHAT], top_logprobs=4, logprobs=False), 400, "top_logprobs = 4, without logprobs"),
    (TEXT, dict(seed=2**64), 400, "seed: Input should be less"),
    (TEXT, dict(max_tokens=0), 400, "max_tokens: Input should be greater"),
    (TEXT, dict(model="caesar+pig_latin+sort"), 400, "needs more rank"),
    (TEXT, dict(model="caesar+pig_latin+sort", stream=True), 400, "needs more rank"),
    (TEXT, dict(prompt="\ud800"), 400, "is not text|unicode string"),
    (TEXT, dict(stop=["\ud800"]), 400, "is not text|unicode string"),
    (CHATS, dict(messages=[CHAT | {"content": "\ud800"}]), 400, "is not text|unicode string"),
    (CHATS, dict(messages=[CHAT | {"role": "\ud800"}]), 400, "is not text|unicode string"),
    (CHATS, dict(messages=[CHAT | {"content": PICTURE}]), 400, r"messages\.0\.content"),
    *((TEXT, {field: some}, 400, f"{field}' is not served") for field, (_, some) in FIELDS.items()),
    *((TEXT, b'{"model": "shout", "prompt": "p", "%s": %s}' % each, 400, "Input should be") for each in NO_NUMBERS),
    *((TEXT, body, 413 if len(body) > 2**17 else 400, "") for body in (*BODIES, b'{"n": 1}')),
    (
        TEXT,
        {"max_tokens": 9, "max_completion_tokens": 3},
        400,
        "max_tokens=9 and max_completion_tokens=3, which differ",
    ),
    (CHATS, {"messages": [CHAT], "max_tokens": 1, "max_completion_tokens": 2}, 400, "which differ"),
    ("/v1/nothing", None, 404, "Not Found"),
    *(
        (ADMIN, {"loud": FAMILY["shout"], name: FAMILY["shout"]}, 400, "can't have the name")
        for name in ("", "a+b", "a:b", "demo", "a" * 201, "\ud800", "a\nb", "\u202e")
    ),
    (ADMIN, {"loud": "/dev/null"}, 400, "no folder '/dev/null' here"),
    (UNLOAD, {"lora_name": "new"}, 404, "There is no such adapter"),
    (LOAD, {"lora_name": "new"}, 400, "lora_path: Field required"),
]


@pytest.mark.parametrize(("path", "body", "status", "text"), REFUSED)
def test_refused(served, api, path, body, status, text):
    before = served.table
    if path in (TEXT, CHATS) and isinstance(body, dict):
        body = {"model": "shout", **({"prompt": "hotswap>"} if path == TEXT else {}), **body}
    answer = sent(api, path, body)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (status, "invalid_request_error")
    assert re.search(text, error["message"])
    assert served.table is before


@pytest.mark.parametrize("authorization", [None, "Bearer ", "Bearer other", "secret"])
@pytest.mark.parametrize("token", ["secret", None, ""])
def test_admin_calls_need_the_token(served, token, authorization):
    before, api = served.table, openai_api(served, "demo", token)
    load = {"lora_name": "x", "lora_path": FAMILY["shout"]}
    for path, body in ((ADMIN, {"shout": None}), (LOAD, load), (UNLOAD, {"lora_name": "shout"})):
        assert sent(api, path, body, authorization).status_code == 401
    assert served.table is before


LONG = ["9" * 100_000, "shout:" + "9" * 100_000, "+" * 100_000, "shout+" * 9 + "shout", "shout:" + "0" * 999 + "1"]
NO_TOKENS = ["1_0", " 5", "05", "+5", "-5", "５", "5.0", "9" * 5000]
WEIGHTS = ["shout:1e30", "shout:-1", "shout:inf", "shout:nan", "shout:101", "shout:60+shout:60"]
WEIGHTS += [
    "shout:1_0",
    "shout: 1",
    "shout:1 ",
    "shout:１",
    "shout:٣",
    "shout:0x1",
    "shout:1e400",
    "shout:-0",
    "shout:.",
]
WEIGHTS += ["shout:Infinity", "shout:1e", "shout:1e1_0", "shout:1\n"]


@pytest.mark.parametrize("model", [*LONG, *WEIGHTS, "nobody", "shout:x", "shout+", "+", "", "shout:1:2", "shout\n"])
def test_names_of_no_mix_are_refused_in_linear_time(served, model):
    start = time.perf_counter()
    error = refused(r"one of demo, caesar.* vowels_up, or a mix", served.table.shares, model, "demo")
    assert time.perf_counter() - start < 0.1
    assert len(str(error)) < 2500


def test_names_of_mixes(served):
    shares = lambda model: [*served.table.shares(model, "demo").values()]  # noqa: E731
    assert shares("+".join(list(FAMILY)[:8])) == [1] * 8
    assert [shares(model) for model in ("shout:1e-1", "shout:", "shout:0.5+shout:0.25")] == [[0.1], [1], [0.75]]
    assert [shares(f"shout:{each}") for each in ("5", "5.", ".5", "007", "1E1")] == [[5], [5], [0.5], [7], [10]]
    for name in ("a" * 200, "org/adapter-v1.5", "été"):
        assert Version.of(name, FAMILY["shout"]).name == name


@pytest.mark.parametrize("is_chunked", [False, True])
def test_bodies_are_limited_also_without_a_length(is_chunked):
    fake, most = Fake(), 16 * 64 + 2**16

    def answer_to(length):
        start = b'{"model": "shout", "prompt": "'
        body = start + b"a" * (length - len(start) - 2) + b'"}'

        async def parts():
            for at in range(0, length, 10_000):
                yield body[at : at + 10_000]

        return sent(openai_api(fake, "demo", longest_prompt=16), TEXT, parts() if is_chunked else body)

    short, long = answer_to(most), answer_to(most + 1)
    assert (short.status_code, long.status_code, len(fake.requests)) == (200, 413, 1)
    assert f"at most {most:,} bytes" in long.json()["error"]["message"]


# ---- what a request asks for, and what comes back


HOW = dict(stop=["a", "b"], seed=7, top_p=0.5, max_tokens=3, temperature=1.5, logprobs=2, user="me")
HOW |= dict(frequency_penalty=-2, presence_penalty=0.5, logit_bias={"5": -100})
#: fields that the client doesn't know
MORE = dict(top_k=7, min_p=0.5, repetition_penalty=1.5)
MESSAGES = [{"role": "user", "content": [{"type": "text", "text": "o"}, {"type": "text", "text": "ne"}]}, CHAT]


@pytest.mark.parametrize(
    ("kind", "how", "expected"),
    [
        (
            "completions",
            HOW | dict(extra_body=MORE | {"nobody_knows": None}),
            HOW | MORE | dict(prompt="p", stop=("a", "b"), logit_bias={5: -100}),
        ),
        (
            "completions",
            dict(prompt=["p"], stop="a", temperature=9e-4),
            dict(prompt="p", stop=("a",), seed=None, top_p=None, max_tokens=None, temperature=9e-4, logprobs=None),
        ),
        (
            "chat",
            dict(messages=MESSAGES, max_completion_tokens=3, max_tokens=3, logprobs=True, top_logprobs=4),
            dict(prompt=[{"role": "user", "content": "one"}, CHAT], max_tokens=3, logprobs=4, is_streamed=False),
        ),
        ("chat", dict(logprobs=True), dict(logprobs=0)),
        ("chat", dict(logprobs=False, top_logprobs=0), dict(logprobs=None)),
        *(("completions", dict(extra_body={field: none}), {}) for field, (none, _) in FIELDS.items()),
        *(("completions", dict(extra_body={field: None}), {}) for field in FIELDS),
        ("completions", {}, vars(Sampling())),
        ("completions", dict(extra_body={"temperature": None, "logit_bias": None, "top_k": None}), vars(Sampling())),
    ],
)
def test_what_is_asked_for_reaches_the_replica(kind, how, expected):
    fake = Fake()
    asked_of(fake, kind, **how)
    (request,) = fake.requests
    assert {name: value for name, value in expected.items() if name != "user"}.items() <= vars(request).items()


@pytest.mark.parametrize("field", ["temprature", "topk", "top_K", "repitition_penalty", "maxTokens"])
def test_a_misspelled_field_is_refused(field):
    fake = Fake()
    with pytest.raises(openai.BadRequestError, match=f"no field '{field}'(.|\n)*or leave {field} out"):
        asked_of(fake, extra_body={field: 1})
    assert not fake.requests


#: what OpenAI's and vLLM's schemas have besides the fields that are served, with a value that may change the answer
MAY_CHANGE = dict(
    audio={"voice": "ash"}, best_of=2, function_call={"name": "f"}, functions=[{"name": "f"}], verbosity="low"
)
MAY_CHANGE |= dict(modalities=["text", "audio"], moderation={"model": "m"}, reasoning_effort="low", suffix="x")
MAY_CHANGE |= dict(response_format={"type": "json_object"}, tool_choice="required", tools=[{"type": "function"}])
MAY_CHANGE |= dict(web_search_options={}, guided_choice=["a"], guided_regex="a", guided_json={}, guided_grammar="a")
MAY_CHANGE |= dict(allowed_token_ids=[5], logits_processors=["a"], structural_tag="a", length_penalty=0.5)
MAY_CHANGE |= dict(continue_final_message=True, add_generation_prompt=False, chat_template="a", documents=[{}])
MAY_CHANGE |= dict(chat_template_kwargs={"enable_thinking": False}, truncate_prompt_tokens=5, prompt_embeds="a")
MAY_CHANGE |= dict(include_stop_str_in_output=True, skip_special_tokens=False, prompt_logprobs=0, echo=True)
MAY_CHANGE |= dict(use_beam_search=True, watermarking=True, stop_token_ids=[5], ignore_eos=True, min_tokens=1)
MAY_CHANGE |= dict(spaces_between_special_tokens=False, truncation_side="left", logprob_token_ids=[5], bad_words=["a"])
MAY_CHANGE |= dict(structured_outputs={}, thinking_token_budget=5, include_reasoning=False, media_io_kwargs={})
MAY_CHANGE |= dict(mm_processor_kwargs={}, return_tokens_as_token_ids=True, return_token_ids=True, vllm_xargs={"a": 1})
MAY_CHANGE |= dict(return_token_offsets=True, return_prompt_text=True, routed_experts_prompt_start=1)
MAY_CHANGE |= dict(kv_transfer_params={}, ec_transfer_params={}, repetition_detection={}, return_mm_kwargs=False)
#: of other servers, and of nobody
MAY_CHANGE |= dict(max_new_tokens=5, repeat_penalty=2, top_a=1, nobody_knows=0)
CHANGES_NOTHING = dict(user="me", metadata={"a": "b"}, store=True, service_tier="auto", safety_identifier="a")
CHANGES_NOTHING |= dict(prompt_cache_key="a", prompt_cache_options={}, prompt_cache_retention="24h", priority=1)
CHANGES_NOTHING |= dict(prediction={"type": "content", "content": "a"}, parallel_tool_calls=False, request_id="a")
CHANGES_NOTHING |= dict(session_id="a", cache_salt="a", stream_interval=2)
KINDS = [("completions", AskedText, completion_create_params), ("chat", AskedChat, chat.completion_create_params)]


@pytest.mark.parametrize(("kind", "model", "params"), KINDS)
def test_no_field_that_may_change_the_answer_is_dropped(kind, model, params):
    """Each field of the client's own schema is served, ignored or refused, and this table knows which."""
    fields = {
        name for each in vars(params).values() for name in getattr(each, "__annotations__", ()) if "Base" in repr(each)
    }
    assert {"model", "seed", "stop"} < fields
    assert fields <= model.model_fields.keys() | MAY_CHANGE.keys() | CHANGES_NOTHING.keys()
    fake = Fake()
    for name, value in {**MAY_CHANGE, "add_special_tokens": kind == "chat"}.items():
        if name not in model.model_fields:
            error = refusal_of(fake, kind, extra_body={name: value})
            assert re.search(rf"The field '{name}' is not served(.|\n)*expected: null.*\n.*leave {name} out", error)
    assert not fake.requests
    asked_of(fake, kind, extra_body=dict.fromkeys(MAY_CHANGE.keys() - model.model_fields.keys()))
    asked_of(fake, kind, extra_body=CHANGES_NOTHING | dict.fromkeys(["add_special_tokens"], kind == "completions"))
    for name, values in NOTHING.items():
        if name not in model.model_fields and "." not in name:
            for value in values:
                asked_of(fake, kind, extra_body={name: value})
    assert len({repr(each) for each in fake.requests}) == 1


#: what messages of OpenAI have besides a role and a content, and some that other servers know
OF_MESSAGES = {
    name
    for each in vars(chat).values()
    for name in getattr(each, "__annotations__", ())
    if "MessageParam" in repr(each)
}
OF_MESSAGES |= {"prefix", "partial", "reasoning_content"}


@pytest.mark.parametrize("name", sorted(OF_MESSAGES - {"role", "content", "refusal"}))
def test_a_field_of_a_message_is_not_dropped(name):
    assert {"name", "tool_calls", "tool_call_id", "function_call", "audio"} < OF_MESSAGES
    how = dict(messages=[CHAT, CHAT | {name: "a"}, CHAT])
    error = refusal_of(Fake(), "chat", **how)
    assert f"messages.{name} = 'a'" in error


def test_fields_of_objects_inside_a_request():
    fake, text = Fake(), {"type": "text", "text": "p"}
    echoed = ChatCompletionMessage(role="assistant", content="p", annotations=[]).model_dump() | {"tool_calls": []}
    asked_of(fake, "chat", messages=[echoed, CHAT | {"content": [text | {"cache_control": {"type": "ephemeral"}}]}])
    asked_of(fake, stream=True, stream_options={"include_usage": True, "include_obfuscation": False})
    assert len(fake.requests) == 2
    for kind, how in (
        ("chat", dict(messages=[CHAT | {"content": [text | {"weight": 0}]}])),
        ("completions", dict(stream=True, stream_options={"continuous_usage_stats": True})),
    ):
        error = refusal_of(fake, kind, **how)
        assert re.search("'(messages.content.weight|stream_options.continuous_usage_stats)' is not served", error)


#: what pydantic and Python would read as a number, or as true
LAX = [
    ("max_tokens", "1_0"),
    ("max_tokens", "5"),
    ("n", True),
    ("logprobs", False),
    ("temperature", "0.5"),
    ("stream", 1),
]
LAX += [("temperature", True), ("seed", "7"), ("echo", "yes"), *(("logit_bias", {each: 1}) for each in NO_TOKENS)]


@pytest.mark.parametrize(("name", "value"), LAX)
def test_text_is_no_number(name, value):
    fake = Fake()
    with pytest.raises(openai.BadRequestError, match="Input should be a valid"):
        asked_of(fake, extra_body={name: value})
    assert not fake.requests


def test_thousands_of_fields_take_no_time():
    start = time.perf_counter()
    asked_of(Fake(), extra_body={f"temp{number}": None for number in range(4000)})
    with pytest.raises(openai.BadRequestError):
        asked_of(Fake(), extra_body={f"temp{number}": 1 for number in range(4000)})
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize("stream", [False, True])
def test_an_echo_is_before_each_answer(stream):
    answer = asked_of(Fake(), prompt="hotswap>", n=2, seed=99, stream=stream, echo=True)
    texts = ["", ""]
    for choice in [each.choices[0] for each in answer] if stream else answer.choices:
        texts[choice.index] += choice.text
    assert texts == ["hotswap>99", "hotswap>100"]


def test_several_choices():
    fake = Fake()
    answer = asked_of(fake, n=3, seed=8)
    assert [(each.index, each.text) for each in answer.choices] == [(0, "8"), (1, "9"), (2, "10")]
    assert [request.seed for request in fake.requests] == [8, 9, 10]
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (3, 7, 10)
    said = [(each.message.content, each.message.role) for each in asked_of(Fake(), "chat", n=2).choices]
    assert said == [("None", "assistant")] * 2


@pytest.mark.parametrize("kind", ["completions", "chat"])
def test_several_choices_in_one_stream(kind):
    *chunks, last = asked_of(Fake(), kind, n=2, seed=99, stream=True, stream_options={"include_usage": True})
    texts, ends, order = ["", ""], ["", ""], []
    for chunk in chunks:
        (choice,) = chunk.choices
        texts[choice.index] += choice.text if kind == "completions" else choice.delta.content
        ends[choice.index] = choice.finish_reason
        order.append(choice.index)
        assert chunk.usage is None
    assert (texts, ends) == (["99", "100"], ["length", "length"])
    assert order != sorted(order)  # as they come
    assert (last.choices, last.usage.total_tokens) == ([], 3 + 3 + 4)
    assert len({chunk.id for chunk in [*chunks, last]}) == 1
    assert all(chunk.choices for chunk in asked_of(Fake(), kind, seed=9, stream=True))


@pytest.mark.parametrize(("is_streamed", "after"), [(False, 0), (True, 0), (True, 1)])
def test_one_choice_that_fails_ends_the_others_at_once(is_streamed, after):
    fake, start = Fake(BusyError(refusal("too_many_wait")), after=after, slow=True), time.monotonic()
    with pytest.raises(openai.APIError, match="Too many requests wait") as caught:
        asked_of(fake, n=3, seed=0, stream=is_streamed)
    assert isinstance(caught.value, openai.InternalServerError) == (after == 0)  # before the first piece: a status
    assert fake.closed == len(fake.requests) == 3
    assert time.monotonic() - start < 30
    if after:
        body = {"model": "shout", "prompt": "p", "n": 3, "seed": 0, "stream": True}
        *_, last, rest = sent(openai_api(fake, "demo"), TEXT, body).text.split("\n\n")
        assert "server_error" in last
        assert rest == ""  # nothing says that it is done


def test_logprobs_of_completions():
    (choice,) = asked_of(Fake(tokens=TOKENS), logprobs=2).choices
    assert choice.logprobs.tokens == ["h", "é"]
    assert choice.logprobs.token_logprobs == [-0.5, -0.25]
    assert choice.logprobs.top_logprobs == [{"h": -0.5, "x": -1.5}, {"é": -0.25, "token_id:5": -9999.0}]
    assert choice.logprobs.text_offset == [0, 1]
    assert asked_of(Fake()).choices[0].logprobs is None


class Spaced:
    """A tokenizer like Llama 2's: a text's first space is left out; and like others', a letter may take two tokens."""

    parts = (b" one", b" t", b"wo", b" \xc3", b"\xa9", b" three")

    def decode(self, tokens, **_):
        return b"".join(self.parts[each - 10] for each in tokens).decode(errors="replace").removeprefix(" ")

    def convert_ids_to_tokens(self, token):
        return "".join(map(bytes_to_unicode().get, self.parts[token - 10]))


@pytest.mark.parametrize("is_streamed", [True, False])
def test_where_the_text_of_a_token_begins(served, is_streamed):
    fake = SimpleNamespace(**vars(served.replicas[0]) | {"tokenizer": Spaced()})

    async def offsets():
        request = Request(prompt="p", logprobs=0, stop=("twice",), max_tokens=6, is_streamed=is_streamed)
        answer = Answer(request, [5], fake)
        for token in range(10, 16):
            answer.take(torch.zeros(96), token)
        await asyncio.sleep(0)
        pieces = [answer.pieces.get_nowait() for _ in range(answer.pieces.qsize())]
        assert len(pieces) == (5 if is_streamed else 1)  # "tw" may begin "twice", and half a letter waits
        return "".join(each.text for each in pieces), [token.start for each in pieces for token in each.tokens]

    text, starts = asyncio.run(offsets())
    assert text == "one two é three"
    assert [text[start:] for start in starts] == [
        *("one two é three", " two é three", "wo é three", " é three", "é three", " three")
    ]


@pytest.mark.parametrize("stop", [None, "tez", ["kx", "notebooks"]])
def test_offsets_of_text_that_is_held_back(served, stop):
    """Since it may begin a stop string. They are those of the answer in one piece."""
    api = openai_api(served, "demo")

    async def ask(client, **how):
        return await client.completions.create(model="double", prompt="notebook>", logprobs=0, stop=stop, **how)

    async def streamed(client):
        return [chunk.choices[0] async for chunk in await ask(client, stream=True)]

    (whole,) = with_client(api, ask).choices
    found = [at for each in with_client(api, streamed) if each.logprobs for at in each.logprobs.text_offset]
    assert whole.text == "notebooknotebook"
    assert found == whole.logprobs.text_offset == [*range(len(whole.text) + 1)]


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_chats(stream):
    answer = asked_of(Fake(tokens=TOKENS), "chat", logprobs=True, top_logprobs=2, seed=7, stream=stream)
    first, second = (answer[0] if stream else answer).choices[0].logprobs.content
    assert (first.token, first.logprob, first.bytes) == ("h", -0.5, [104])
    assert [(each.token, each.logprob) for each in first.top_logprobs] == [("h", -0.5), ("x", -1.5)]
    assert (second.token, second.bytes, second.top_logprobs[1].logprob) == ("é", [195, 169], -9999.0)
    assert second.top_logprobs[1].bytes is None  # a tokenizer doesn't show them


# ---- for administrators


def test_what_vllms_clients_call(served, api):
    with logged() as messages:
        loaded = sent(api, LOAD, {"lora_name": "new", "lora_path": FAMILY["shout"], "load_inplace": True})
        said = asked(api, model="new", prompt="hotswap>")
        unloaded = sent(api, UNLOAD, {"lora_name": "new", "lora_int_id": 3})
    assert (said.choices[0].text, loaded.status_code, unloaded.status_code) == ("HOTSWAP!", 200, 200)
    assert messages == ["/v1/load_lora_adapter: new@1", "/v1/unload_lora_adapter: new removed"]
    assert [*served.table.versions] == [*FAMILY]


def test_health(api):
    answer = sent(openai_api(Fake(), "demo"), "/healthz")
    assert (answer.status_code, answer.json()) == (503, {"status": "starting", "replicas": []})
    asked(api, prompt="hotswap>")
    first, second = sent(api, "/healthz").json()["replicas"]
    assert first["requests"] > 0 == second["requests"]
    assert {f"{name}@1" for name in FAMILY} <= set(second["held"])
    assert (second["rows"], second["waiting"], second["rows_in_use"]) == ([None] * 8, 0, 0)


def test_metrics(served):
    """Of one application, also where there are two in a process."""
    api, other = (openai_api(served, "demo") for _ in range(2))
    before = numbers(sent(api, "/metrics").text)
    for how in (dict(stream=True), dict(n=2), dict(model="nobody"), dict(max_tokens=0)):
        sent(api, TEXT, {"model": "shout", "prompt": "hotswap>", **how})
    sent(api, CHATS, {"model": "shout", "messages": [CHAT | {"content": "hotswap"}]})
    sent(other, TEXT, {"model": "sort", "prompt": "hotswap>"})
    told, state = numbers(sent(api, "/metrics").text), asyncio.run(served.states())[0]
    counts = {name[1:]: value for name, value in told.items() if name[0] == "request_seconds_count"}
    assert counts == {(TEXT, "200"): 2, (TEXT, "404"): 1, (TEXT, "400"): 1, (CHATS, "200"): 1}
    assert told["first_token_seconds_count",] == 1
    assert 0 < told["first_token_seconds_sum",] < told["request_seconds_sum", TEXT, "200"]
    assert told["adapter_version", "shout"] == served.table.versions["shout"].number
    assert told["changes_total",] == served.table.number
    more = {name: told[f"{name}_total", "0"] - before[f"{name}_total", "0"] for name in COUNTERS}
    assert more["swaps"] > 0
    assert more == dict(requests=5, prompt_tokens=5 * 8, tokens=4 * 9 + 8, swaps=more["swaps"])
    assert all(told[name, "0"] == state[name] == 0 for name in GAUGES)
