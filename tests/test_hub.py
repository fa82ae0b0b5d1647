"""Adapters from the Hub: the real client against a server on this machine, in a process of its own.

huggingface_hub reads HF_ENDPOINT and HF_HUB_OFFLINE once, when it is imported, so each test starts a Python.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hub_stand_in import StandInHub
from models import KINDS, save_random_adapter

KIND = KINDS["linear"]

PROGRAM = """
import json, sys, warnings
sys.path.insert(0, {tests!r})
warnings.simplefilter("ignore")
from models import KINDS, load
from oracle import assert_equals_fresh_load, assert_untouched, snapshot
from hotswap_lab import Adapter, HotswapError, hotswap_adapter, plan_hotswap
kind = KINDS["linear"]
model = load(kind, {old!r})

def refusal(*arguments, **kwargs):
    before = snapshot(model)
    try:
        hotswap_adapter(model, *arguments, adapter_name="default", **kwargs)
    except HotswapError as error:
        assert_untouched(model, before)
        return str(error)
    return "not refused"

result = None
{body}
print("RESULT" + json.dumps(result))
"""


@pytest.fixture
def hub(tmp_path):
    folders = {
        name: save_random_adapter(KIND, tmp_path / name, seed=number, r=2 + number)
        for number, name in enumerate(("old", "new", "second", "third", "secret"))
    }
    with StandInHub() as hub:
        hub.folders = folders
        hub.add("team/adapter", folders["new"])
        hub.add("team/adapter", folders["second"], revision="v2")
        hub.add("team/adapter", folders["third"], subfolder="inner")
        hub.add("team/secret", folders["secret"])
        hub.private["team/secret"] = "hf_right"
        yield hub


@pytest.fixture
def run(hub, tmp_path):
    def run(body: str, *, offline: bool = False):
        program = PROGRAM.format(tests=str(Path(__file__).parent), old=hub.folders["old"], body=textwrap.dedent(body))
        environment = {
            **os.environ,
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "hf_home"),
            "HF_HUB_OFFLINE": "1" if offline else "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        environment.pop("HF_TOKEN", None)
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.rpartition("RESULT")[2])

    return run


def test_repository_revision_subfolder_token_and_cache(hub, run, tmp_path):
    run(
        f"""
        hotswap_adapter(model, "team/adapter", "default")
        assert_equals_fresh_load(model, kind, {hub.folders["new"]!r})
        hotswap_adapter(model, "team/adapter", "default", revision="v2")
        assert_equals_fresh_load(model, kind, {hub.folders["second"]!r})
        hotswap_adapter(model, "team/adapter", "default", subfolder="inner")
        assert_equals_fresh_load(model, kind, {hub.folders["third"]!r})
        hotswap_adapter(model, "team/secret", "default", token="hf_right", cache_dir={str(tmp_path / "cache")!r})
        assert_equals_fresh_load(model, kind, {hub.folders["secret"]!r})
        """
    )
    assert list((tmp_path / "cache").glob("models--team--secret/snapshots/*/adapter_model.safetensors"))
    downloaded = {path.rpartition("/")[2] for command, path in hub.requests if command == "GET"}
    assert downloaded == {"adapter_config.json", "adapter_model.safetensors"}


def test_what_is_not_there_or_not_allowed_is_refused(hub, run):
    del hub.repositories["team/adapter"]["v2"]["adapter_model.safetensors"]
    refusals = run(
        """
        result = [
            refusal("team/nothing"),
            refusal("team/secret"),
            refusal("team/secret", token="hf_wrong"),
            refusal("team/adapter", revision="v9"),
            refusal("team/adapter", subfolder="outer"),
            refusal("team/adapter", revision="v2"),
            refusal("not a/valid/id"),
        ]
        """
    )
    assert all("found:" in text and "next:" in text for text in refusals)
    assert refusals[0].startswith("Can't find 'adapter_config.json' at 'team/nothing'")
    assert "RepositoryNotFoundError" in refusals[1]
    assert "RepositoryNotFoundError" in refusals[2]
    assert "RevisionNotFoundError" in refusals[3]
    assert "EntryNotFoundError" in refusals[4]
    assert refusals[5].startswith("Can't find weights for team/adapter")
    assert refusals[6].startswith("Can't find 'adapter_config.json'")


def test_offline_the_cache_is_used_and_nothing_is_asked(hub, run):
    run("hotswap_adapter(model, 'team/adapter', 'default')")
    hub.requests.clear()
    missing = run(
        f"""
        hotswap_adapter(model, "team/adapter", "default")
        assert_equals_fresh_load(model, kind, {hub.folders["new"]!r})
        result = refusal("team/secret")
        """,
        offline=True,
    )
    assert hub.requests == []
    assert missing.startswith("Can't find 'adapter_config.json' at 'team/secret'")


def test_bin_files_where_there_are_no_safetensors(hub, run, tmp_path):
    import torch
    from safetensors.torch import load_file

    files = hub.repositories["team/adapter"]["main"]
    tensors = load_file(Path(hub.folders["new"]) / "adapter_model.safetensors")
    torch.save(tensors, tmp_path / "adapter_model.bin")
    del files["adapter_model.safetensors"]
    files["adapter_model.bin"] = (tmp_path / "adapter_model.bin").read_bytes()
    run(
        f"""
        hotswap_adapter(model, "team/adapter", "default")
        assert_equals_fresh_load(model, kind, {hub.folders["new"]!r})
        """
    )


def test_a_family_on_the_hub_is_prepared_for_from_its_configs(run, hub):
    result = run("""
    from hotswap_lab import prepare_model_for_compiled_hotswap, resolve_slot
    prepare_model_for_compiled_hotswap(model, adapters=["team/adapter"], revision="v2")
    room = {tensor.capacity for tensor in resolve_slot(model, "default").tensors}
    result = sorted(room)
    """)
    assert result == [4]
    assert not [path for command, path in hub.requests if path.endswith(".safetensors")]
