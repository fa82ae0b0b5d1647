"""The application in Ray Serve: replicas in processes of their own, one of which may be lost at any time."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import openai
import pytest

pytest.importorskip("ray")

from both_kinds import BothKinds
from lengths import eventually
from replica_faults import ADAPTERS, trial
from running import TOKEN, change, running, states
from served import FAMILY, WORDS

from hotswap_lab.lessons.serving import lose

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore")]
HEADER = {"Authorization": f"Bearer {TOKEN}"}
LOCAL = "http://127.0.0.1:8123"
CONFIG = Path(__file__).parents[2] / "hotswap_lab/serving/serve.yaml"


@pytest.fixture(scope="module")
def address():
    with running(replicas=2, adapters=ADAPTERS, queue=40) as address:
        yield address


@pytest.fixture
def client(address):
    return openai.OpenAI(base_url=f"{address}/v1", api_key="-", max_retries=0)


class TestRay(BothKinds):
    pass


def test_too_many_requests(address):
    async def ask_all():
        client = openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="-", max_retries=0, timeout=60)
        asked = [client.completions.create(model="two", prompt="notebooks>") for _ in range(160)]
        return await asyncio.gather(*asked, return_exceptions=True)

    said = asyncio.run(ask_all())
    refused = [each for each in said if isinstance(each, openai.APIStatusError)]
    assert {each.choices[0].text for each in said if each not in refused} == {"notebooks" * 2}
    assert {(each.status_code, each.response.headers["retry-after"]) for each in refused} == {(503, "1")}


def test_new_weights_for_all_and_for_who_comes_later(client, address):
    version = change(address, {"one": FAMILY["shout"]}).json()["one"]
    lose(states(address)[0]["replica"])
    assert eventually(lambda: len(states(address)) == 2)
    before = [each["requests"] for each in states(address)]
    for _ in range(3):
        for word in WORDS:
            answer = client.completions.create(model="one", prompt=f"{word}>")
            assert (answer.choices[0].text, answer.system_fingerprint) == (f"{word.upper()}!", f"one@{version}")
    assert all(each["requests"] > then for each, then in zip(states(address), before, strict=True))
    change(address, {"one": FAMILY["caesar"]})


def test_a_register_that_is_lost_starts_with_what_was_in_force(client, address):
    import ray
    from ray import serve

    version = f"six@{change(address, {'six': FAMILY['sort']}).json()['six']}"
    names = [each["name"] for each in ray.util.list_named_actors(all_namespaces=True)]
    (register,) = [name for name in names if name.startswith("SERVE_REPLICA::default#Register#")]
    ray.kill(ray.get_actor(register, namespace="serve"))
    assert client.completions.create(model="six", prompt="hotswap>").system_fingerprint == version
    assert eventually(lambda: change(address, {"five": FAMILY["shout"]}).status_code == 200, 60)
    assert client.completions.create(model="six", prompt="hotswap>").system_fingerprint == version
    assert client.completions.create(model="five", prompt="hotswap>").choices[0].text == "HOTSWAP!"
    assert serve.status().applications["default"].status == "RUNNING"


def test_no_answer_is_lost_or_wrong(address):
    told = trial(address, 240, kill_every=100, update_every=1)
    assert (told["asked"], told["wrong"], told["lost"]) == (240, 0, 0)
    assert told["kills"] > 0 < told["updates"]


def test_more_adapters_than_a_replica_holds():
    with running(replicas=2, rows=2, held=4) as address:
        told = trial(address, 120)
        assert (told["asked"], told["retried"], told["wrong"], told["lost"]) == (120, 0, 0, 0)
        replicas = states(address)
        assert [len(each["held"]) for each in replicas] == [4, 4]
        assert all(each["requests"] for each in replicas)


def test_all_adapters_removed_and_the_only_replica_lost():
    """It starts again without adapters. Meanwhile, nobody waits for longer than the timeout."""
    with running(timeout=2) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="-", max_retries=0)
        assert change(address, dict.fromkeys(FAMILY)).json() == {}
        lose(states(address)[0]["replica"])
        start = time.monotonic()
        with pytest.raises(openai.InternalServerError, match=r"no answer in time|was lost"):
            client.completions.create(model="demo", prompt="hotswap>")
        assert time.monotonic() - start < 6
        start = time.monotonic()
        assert httpx2.get(f"{address}/healthz", timeout=30).status_code == 503
        assert time.monotonic() - start < 6
        assert eventually(lambda: states(address))
        assert client.completions.create(model="demo", prompt="hotswap>").choices[0].text == "hotswap"
        assert change(address, {"shout": FAMILY["shout"]}).json() == {"shout": 2}
        answer = client.completions.create(model="shout", prompt="hotswap>")
        assert (answer.choices[0].text, answer.system_fingerprint) == ("HOTSWAP!", "shout@2")


def test_both_fronts_know_a_change_when_it_is_answered():
    with running(replicas=4, rows=2) as address:
        for number in range(2, 12):
            path = FAMILY["sort" if number % 2 else "shout"]
            assert change(address, {"reverse": path}).json()["reverse"] == number
            for _ in range(6):  # a connection each, so that both fronts are asked
                asked = {"model": "reverse", "prompt": "hotswap>", "max_tokens": 1}
                answer = httpx2.post(f"{address}/v1/completions", json=asked, timeout=30).json()
                assert answer["system_fingerprint"] == f"reverse@{number}"


@pytest.mark.usefixtures("python_sigint")  # which the server inherits
def test_a_config_file(tmp_path):
    """As from a terminal: with new weights by deploying the file again, and an adapter that nobody can read."""
    serve = Path(sys.executable).with_name("serve")
    env = os.environ | {"PYTHONPATH": str(CONFIG.parents[2]), "HOTSWAP_ADMIN_TOKEN": TOKEN}
    first, second, third = (tmp_path / f"{n}.yaml" for n in range(3))
    first.write_text(CONFIG.read_text().replace("8000", "8123").replace("num_replicas: 2", "num_replicas: 1"))
    user_config = "      - name: Register\n        user_config: {adapters: {reverse: %s}}\n"
    second.write_text(first.read_text() + user_config % FAMILY["shout"])
    third.write_text(first.read_text() + user_config % "/nowhere")
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen([serve, "run", first], env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        assert _said_by("reverse@1") == "pawstoh", (tmp_path / "log").read_text()
        replicas = states(LOCAL)
        subprocess.run([serve, "deploy", second], env=env, check=True, capture_output=True)
        assert _said_by("reverse@2") == "HOTSWAP!"
        subprocess.run([serve, "deploy", third], env=env, check=True, capture_output=True)
        time.sleep(5)
        assert _said_by("reverse@2") == "HOTSWAP!"
        assert [each["replica"] for each in states(LOCAL)] == [each["replica"] for each in replicas]
        load = {"lora_name": "loud", "lora_path": FAMILY["shout"]}
        loaded = httpx2.post(f"{LOCAL}/v1/load_lora_adapter", json=load, headers=HEADER, timeout=60)
        assert loaded.json()["loud"] == 1
        time.sleep(2)
        log = (tmp_path / "log").read_text()
        assert "The adapters stay as they are." in log
        # a line for what a person did, and none for what the deployments ask each other
        assert [log.count(each) for each in ("user_config: reverse@2", "/v1/load_lora_adapter: loud@1")] == [1, 1]
        assert not [line for line in log.splitlines() if "CALL" in line and "Front" not in line]
        assert "POST /v1/completions 200" in log
    finally:
        os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(120)
        finally:
            with contextlib.suppress(ProcessLookupError):  # else the next test asks this server
                os.killpg(process.pid, signal.SIGKILL)


def _said_by(version):
    """What the server says once this version is in force."""

    def said():
        with contextlib.suppress(httpx2.HTTPError):
            asked = {"model": "reverse", "prompt": "hotswap>"}
            answer = httpx2.post(f"{LOCAL}/v1/completions", json=asked, timeout=30)
            if answer.status_code == 200 and answer.json()["system_fingerprint"] == version:
                return answer.json()["choices"][0]["text"]

    return eventually(said, 180)
