"""Adapters from the Hub: the real client against a server on this machine."""

from __future__ import annotations

import inspect
import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hub_stand_in import Fault, StandInHub
from huggingface_hub import HfApi, ModelInfo, close_session, constants, hf_api, hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError
from lengths import long
from models import KINDS, load, save_random_adapter
from oracle import assert_equals_fresh_load
from peft import PeftModel
from refusals import refused

from hotswap_lab import (
    Adapter,
    AdapterPool,
    hotswap_adapter,
    prepare_model_for_compiled_hotswap,
    read_pipeline_lora,
    resolve_slot,
)

KIND = KINDS["linear"]
NAMES = ("old", "new", "second", "third", "secret")
WEIGHTS = "adapter_model.safetensors"
#: what is downloaded of one adapter
BOTH = ["adapter_config.json", WEIGHTS]
RECIPES = Path(__file__).parents[2] / "notebooks" / "recipes.ipynb"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Adapters of rank 2, 3, 4, ..."""
    root = tmp_path_factory.mktemp("adapters")
    return {name: save_random_adapter(KIND, root / name, seed, r=2 + seed) for seed, name in enumerate(NAMES)}


@pytest.fixture
def model(folders):
    return load(KIND, folders["old"])


@pytest.fixture(scope="module")
def server():
    with StandInHub() as hub:
        yield hub


@pytest.fixture
def hub(server, folders, tmp_path, monkeypatch):
    """The Hub of this test, with an empty cache. huggingface_hub has read its environment long ago."""
    settings = dict(
        ENDPOINT=server.url,
        HUGGINGFACE_CO_URL_TEMPLATE=server.url + "/{repo_id}/resolve/{revision}/{filename}",
        HF_HUB_CACHE=str(tmp_path / "hub"),
        HF_TOKEN_PATH=str(tmp_path / "token"),
        HF_HUB_DOWNLOAD_TIMEOUT=1,
        HF_HUB_ETAG_TIMEOUT=2,
        HF_HUB_OFFLINE=False,
    )
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(hf_api.api, "endpoint", server.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    close_session()
    server.reset()
    server.add("team/adapter", folders["new"])
    server.add("team/adapter", folders["second"], revision="v2")
    server.add("team/adapter", folders["third"], subfolder="inner")
    server.add("team/secret", folders["secret"])
    server.private["team/secret"] = "hf_right"
    yield server
    close_session()


@pytest.fixture
def swaps_in(model, folders):
    """A swap from the Hub, after which the model is a fresh load of one of the folders."""

    def swaps_in(expected: str, repository: str = "team/adapter", **arguments: object) -> None:
        hotswap_adapter(model, repository, "default", **arguments)
        assert_equals_fresh_load(model, KIND, folders[expected])

    return swaps_in


def go_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def downloads(hub: StandInHub) -> list[str]:
    """The files that were asked for, not only asked about."""
    return sorted(path.rpartition("/")[2] for command, path in hub.log if command == "GET" and "api/" not in path)


# ---- one adapter


def test_repository_revision_subfolder_token_cache_and_endpoint(hub, swaps_in, folders, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    hub.add("team/alone", folders["third"])
    swaps_in("third", "team/alone", cache_dir=cache)
    swaps_in("new")
    swaps_in("second", revision="v2")
    local = dict(revision="v2", local_dir=tmp_path / "local", cache_dir=tmp_path / "empty")
    swaps_in("second", **local)
    swaps_in("third", subfolder="inner")
    swaps_in("secret", "team/secret", token="hf_right", cache_dir=cache)
    swaps_in("secret", "team/secret", use_auth_token="hf_right")
    right = {"Authorization": "Bearer hf_right"}
    swaps_in("secret", "team/secret", token=False, headers=right, cache_dir=tmp_path / "again")
    swaps_in("second", revision=hub.commit("team/adapter", "v2"))
    nobody = "http://127.0.0.1:9"
    monkeypatch.setattr(constants, "ENDPOINT", nobody)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", nobody + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(hf_api.api, "endpoint", nobody)
    swaps_in("new", endpoint=hub.url, cache_dir=tmp_path / "another")
    swaps_in("third", "team/alone", cache_dir=cache)  # which alone has it, where the Hub can't be reached
    assert list(cache.glob(f"models--team--secret/snapshots/*/{WEIGHTS}"))
    # each file once, and nothing else of the repository
    assert downloads(hub) == sorted(9 * BOTH)
    go_offline(monkeypatch)
    swaps_in("second", **local)


@pytest.mark.parametrize(
    ("match", "repository", "arguments"),
    [
        (r"^Can't find 'adapter_config\.json' at 'team/nothing'", "team/nothing", {}),
        ("RepositoryNotFoundError", "team/secret", {}),
        ("RepositoryNotFoundError", "team/secret", dict(token="hf_wrong")),
        ("RevisionNotFoundError", "team/adapter", dict(revision="v9")),
        ("EntryNotFoundError", "team/adapter", dict(subfolder="outer")),
        ("^Can't find weights for team/adapter", "team/adapter", dict(revision="v2")),
        (r"^Can't find 'adapter_config\.json'", "not a/valid/id", {}),
        ("GatedRepoError", "team/gated", {}),
        ("local_files_only", "team/adapter", dict(local_files_only=True, revision="v9")),
    ],
)
def test_what_is_not_there_or_not_allowed_is_refused(hub, model, folders, match, repository, arguments):
    del hub.repositories["team/adapter"]["v2"][WEIGHTS]
    hub.add("team/gated", folders["new"])
    hub.gated.add("team/gated")
    error = refused(match, hotswap_adapter, model, repository, "default", **arguments)
    assert str(error).count("found:") == str(error).count("next:") == 1


def test_keys_without_a_prefix_are_refused_as_those_of_a_folder_are(hub, model, folders):
    """From memory they are taken; a fresh load of files would ignore them."""
    tensors = Adapter.load(folders["new"]).tensors
    bare = safetensors.torch.save({key.removeprefix("base_model.model."): each for key, each in tensors.items()})
    hub.repositories["team/adapter"]["main"][WEIGHTS] = bare
    refused("without the prefix", hotswap_adapter, model, "team/adapter", "default")


def test_what_is_cached_takes_one_question_and_offline_none(hub, model, swaps_in, monkeypatch):
    swaps_in("new")
    hub.log.clear()
    swaps_in("new")
    assert hub.log == [("HEAD", "team/adapter/resolve/main/adapter_config.json")]
    hub.log.clear()
    go_offline(monkeypatch)
    swaps_in("new")
    error = refused(r"^Can't find 'adapter_config\.json'", hotswap_adapter, model, "team/secret", "default")
    assert "offline" in str(error)
    assert "unset HF_HUB_OFFLINE" in str(error)
    assert hub.log == []


def test_bin_files_where_there_are_no_safetensors(hub, swaps_in, tmp_path, monkeypatch):
    files = hub.repositories["team/adapter"]["main"]
    torch.save(safetensors.torch.load(files.pop(WEIGHTS)), tmp_path / "adapter_model.bin")
    files["adapter_model.bin"] = (tmp_path / "adapter_model.bin").read_bytes()
    swaps_in("new")
    assert {"adapter_config.json", "adapter_model.bin"} == set(downloads(hub))
    go_offline(monkeypatch)
    swaps_in("new")


@pytest.mark.parametrize("is_known", [False, True])
def test_a_bin_file_alone_in_the_cache(hub, model, swaps_in, tmp_path, monkeypatch, is_known):
    """A fresh load takes it only if the repository has no safetensors: it asks the Hub, even with local_files_only."""
    files = hub.repositories["team/adapter"]["main"]
    torch.save(safetensors.torch.load(files[WEIGHTS]), tmp_path / "adapter_model.bin")
    files["adapter_model.bin"] = (tmp_path / "adapter_model.bin").read_bytes()
    if is_known:
        del files[WEIGHTS]
        swaps_in("new")
        swaps_in("new", local_files_only=True)
        return
    for name in ("adapter_config.json", "adapter_model.bin"):
        hf_hub_download("team/adapter", name)
    with pytest.raises(LocalEntryNotFoundError):
        PeftModel.from_pretrained(KIND.base(), "team/adapter", local_files_only=True)
    refused(
        "next: .*leave out local_files_only", hotswap_adapter, model, "team/adapter", "default", local_files_only=True
    )
    go_offline(monkeypatch)  # here a fresh load has nobody to ask, and takes it
    PeftModel.from_pretrained(KIND.base(), "team/adapter")
    swaps_in("new")


def test_a_repository_that_was_pushed_to(hub, swaps_in, folders):
    first = Adapter.load("team/adapter").revision
    assert first == hub.commit("team/adapter")
    swaps_in("new")
    hub.add("team/adapter", folders["second"])
    swaps_in("second")
    assert Adapter.load("team/adapter").revision == hub.commit("team/adapter") != first
    # pinned, it is what it was; with the files at hand, the Hub isn't even asked
    hub.log.clear()
    swaps_in("new", revision=first)
    assert hub.log == []


@pytest.mark.parametrize("arguments", [long({}), {"revision": "main"}, {"local_dir": "here"}])
@pytest.mark.parametrize("file", [WEIGHTS, "adapter_config.json"])
def test_config_and_weights_are_of_one_commit(hub, swaps_in, folders, file, arguments, tmp_path, monkeypatch):
    """Somebody pushes in between, also to the branch that is asked for."""
    monkeypatch.chdir(tmp_path)
    commit = hub.commit("team/adapter")

    def push(path: str) -> None:
        if path.endswith(file) and ("GET", path) in hub.log:
            hub.add("team/adapter", folders["second"])

    hub.on_request = push
    swaps_in("new", **arguments)
    asked = [path for _, path in hub.log if path.endswith(WEIGHTS)]
    assert asked
    assert all(commit in path for path in asked)
    hub.on_request = None
    swaps_in("second", **arguments)


def test_a_folder_is_never_looked_for_on_the_hub(hub, model, folders, tmp_path, monkeypatch):
    """Nor are its files mixed with those of a repository of the same name."""
    shutil.copytree(folders["second"], tmp_path / "team" / "adapter")
    monkeypatch.chdir(tmp_path)
    for name, match in (
        (WEIGHTS, "^Can't find weights for team/adapter"),
        ("adapter_config.json", r"^Can't find 'adapter_config\.json' at 'team/adapter'"),
    ):
        (tmp_path / "team" / "adapter" / name).unlink()
        refused(match, hotswap_adapter, model, "team/adapter", "default")
    assert hub.log == []


def test_a_family_on_the_hub_is_prepared_for_from_its_configs(hub, model):
    prepare_model_for_compiled_hotswap(model, adapters=["team/adapter"], revision="v2")
    assert {tensor.capacity for tensor in resolve_slot(model, "default").tensors} == {4}
    assert downloads(hub) == ["adapter_config.json"]
    # the weights aren't there yet
    at_hand = dict(revision="v2", local_files_only=True)
    refused("next: .*complete copy", hotswap_adapter, model, "team/adapter", "default", **at_hand)


# ---- networks and servers that fail


#: by the repository that fails: how, where the message begins, and what it says of the reason
FAILING = {
    "error": (Fault(500, ("HEAD", "GET")), "Can't find 'adapter_config.json'", "500"),
    "busy": (Fault(429, ("HEAD", "GET")), "Can't find 'adapter_config.json'", "429"),
    "hanging": (Fault("hang", ("HEAD", "GET")), "Can't find 'adapter_config.json'", "Timeout"),
    "stuck": (Fault("hang", ("GET",)), "Can't find 'adapter_config.json'", "Timeout"),
    "cut": (Fault("cut"), "Can't find weights", "RemoteProtocolError"),
}


@pytest.mark.long
def test_what_fails_for_good_is_refused_and_works_when_the_hub_does(hub, swaps_in, folders, tmp_path):
    """All at once, because huggingface_hub repeats most requests for some seconds."""
    for name, (fault, _, _) in FAILING.items():
        hub.add(f"faulty/{name}", folders["new"])
        hub.faults[f"faulty/{name}/" if name != "cut" else WEIGHTS] = fault

    def attempt(name: str) -> tuple[str, float]:
        start, model = time.perf_counter(), load(KIND, folders["old"])
        return str(refused(None, hotswap_adapter, model, f"faulty/{name}", "default")), time.perf_counter() - start

    with ThreadPoolExecutor(len(FAILING)) as threads:
        answers = dict(zip(FAILING, threads.map(attempt, FAILING), strict=True))
    for name, (text, seconds) in answers.items():
        assert text.startswith(FAILING[name][1])
        assert FAILING[name][2] in text
        assert text.count("found:") == 1
        assert seconds < (10 if name == "hanging" else 40), (name, seconds)
    # nothing half downloaded is left, or taken for a file
    assert not list(tmp_path.rglob("*.incomplete"))
    faults, hub.faults = hub.faults, {}
    for name in FAILING:
        swaps_in("new", f"faulty/{name}")
    # now where the Hub fails, the cache is used
    hub.faults = faults
    for name in ("error", "busy", "hanging"):
        hub.log.clear()
        swaps_in("new", f"faulty/{name}")
        assert len(hub.log) == 1


def test_how_long_the_first_answer_may_take(hub, model, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 60)
    hub.faults["team/adapter"] = Fault("hang", ("HEAD",))
    start = time.perf_counter()
    refused("[Tt]ime", hotswap_adapter, model, "team/adapter", "default", etag_timeout=0.1)
    assert time.perf_counter() - start < 60


# ---- many adapters


@pytest.mark.long
def test_a_pool_of_private_adapters_survives_without_the_hub(hub, folders, monkeypatch):
    """Though somebody has pushed to a repository since."""
    hub.add("team/secret", folders["second"], revision="v2")
    hub.private["team/adapter"] = "hf_right"
    expected = {"a": folders["second"], "b": folders["second"], "here": folders["old"]}
    options = dict(revision="v2", token="hf_right", target_rank=8, max_bytes=2 * Adapter.load(folders["second"]).nbytes)

    def dropped_on_the_way() -> list[list[str]]:
        model, dropped = load(KIND, folders["old"]), []
        family = {"a": "team/secret", "b": "team/adapter", "here": folders["old"]}
        pool = AdapterPool(model, adapters=family, progress=False, **options)
        hub.add("team/secret", folders["third"], revision="v2")
        for name in ("a", "b", "here", "a", "b"):
            dropped.append(sorted(row[0] for row in pool.table if row[-2] == "in its files"))
            pool.swap(name)
            assert_equals_fresh_load(model, KIND, expected[name], prepared=True)
        return dropped

    before = dropped_on_the_way()
    assert sum(map(len, before)) >= 3  # some had to be read again
    assert downloads(hub) == sorted(2 * BOTH)
    hub.log.clear()
    go_offline(monkeypatch)
    assert dropped_on_the_way() == before
    assert hub.log == []


def test_a_pool_that_may_not_read_an_adapter_leaves_the_model_alone(hub, model):
    adapters = {"a": "team/adapter", "b": "team/secret"}
    refused(r"^Can't find 'adapter_config\.json' at 'team/secret'", AdapterPool, model, adapters=adapters)


# ---- diffusers' own format


def test_a_file_for_a_pipeline(hub, monkeypatch):
    from test_pipeline import flux

    monkeypatch.setattr("diffusers.loaders.lora_base.HF_HUB_OFFLINE", False)  # as it was when diffusers was imported
    pipe, file = flux(), "pytorch_lora_weights.safetensors"
    lora = {"A": torch.ones(2, 16), "B": torch.ones(16, 2)}
    lora = {f"transformer.x_embedder.lora_{key}.weight": tensor for key, tensor in lora.items()}
    for repository in ("team/style", "team/own-style"):
        hub.repositories[repository] = {"main": {file: safetensors.torch.save(lora)}}
    hub.private["team/own-style"] = "hf_right"
    refused(
        "^The LoRA from team/own-style can't be loaded", read_pipeline_lora, pipe, "team/own-style", weight_name=file
    )
    for repository, options in (("team/style", {}), ("team/own-style", dict(weight_name=file, token="hf_right"))):
        adapter = read_pipeline_lora(pipe, repository, **options)["transformer"]
        assert adapter.config.r == 2
        assert all(tensor.eq(1).all() for tensor in adapter.tensors.values())
    assert downloads(hub) == 2 * [file]


# ---- which there are


def test_the_recipe_lists_the_adapters_for_a_base(monkeypatch, capsys):
    """In a text: nothing else runs it."""
    cells = json.loads(RECIPES.read_text(encoding="utf-8"))["cells"]
    (lines,) = (text for each in cells if "list_models(" in (text := "".join(each["source"])))
    signature, asked = inspect.signature(HfApi.list_models), []

    def list_models(*given, **named):
        asked.append(signature.bind(*given, **named).arguments)
        return [ModelInfo(id="zoo/tiny", downloads=1000)]

    monkeypatch.setattr(HfApi, "list_models", list_models)
    exec(lines.split("```python\n")[1].split("```")[0], {})
    assert asked[0]["filter"] == "base_model:adapter:HuggingFaceTB/SmolLM2-135M-Instruct"
    assert capsys.readouterr().out == "zoo/tiny 1000\n"
