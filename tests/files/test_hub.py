"""Adapters from the Hub: the real client against a server on this machine, in processes of its own."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest
import torch
from hub_stand_in import Fault, StandInHub
from hub_worker import Worker
from models import KINDS, save_random_adapter
from safetensors.torch import load_file, save_file

KIND = KINDS["linear"]
NAMES = ("old", "new", "second", "third", "secret")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Adapters of rank 2, 3, 4, ..."""
    root = tmp_path_factory.mktemp("adapters")
    return {
        name: save_random_adapter(KIND, root / name, seed=number, r=2 + number) for number, name in enumerate(NAMES)
    }


@pytest.fixture(scope="module")
def server():
    with StandInHub() as hub:
        yield hub


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("hf_home")


@pytest.fixture(scope="module")
def workers(server, home):
    environment = {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": None,
        "HF_HUB_DOWNLOAD_TIMEOUT": "1",
        "HF_HUB_ETAG_TIMEOUT": "2",
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": None,
        "NO_PROXY": "127.0.0.1,localhost",
    }
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    with Worker(environment) as first, Worker({**environment, **offline}) as second:
        yield {"online": first, "offline": second}


@pytest.fixture
def hub(server, folders, home):
    server.reset()
    shutil.rmtree(home, ignore_errors=True)
    server.add("team/adapter", folders["new"])
    server.add("team/adapter", folders["second"], revision="v2")
    server.add("team/adapter", folders["third"], subfolder="inner")
    server.add("team/secret", folders["secret"])
    server.private["team/secret"] = "hf_right"
    return server


@pytest.fixture
def run(hub, workers, folders, home):
    def run(body: str, *, where: str = "online", **given: object):
        given = {"home": str(home), **folders, **given}
        return workers[where].run(body, **given).result

    return run


def downloads(hub: StandInHub) -> list[str]:
    """The files that were asked for, not only asked about."""
    return [path.rpartition("/")[2] for command, path in hub.requests if command == "GET" and "api/" not in path]


# ---- one adapter


def test_repository_revision_subfolder_token_and_cache(hub, run, tmp_path):
    run(
        """
        hotswap_adapter(model, "team/adapter", "default")
        assert_is(new)
        hotswap_adapter(model, "team/adapter", "default", revision="v2")
        assert_is(second)
        hotswap_adapter(model, "team/adapter", "default", subfolder="inner")
        assert_is(third)
        hotswap_adapter(model, "team/secret", "default", token="hf_right", cache_dir=cache)
        assert_is(secret)
        hotswap_adapter(model, "team/adapter", "default", revision=commit)
        assert_is(second)
        """,
        cache=str(tmp_path / "cache"),
        commit=hub.commit("team/adapter", "v2"),
    )
    assert list((tmp_path / "cache").glob("models--team--secret/snapshots/*/adapter_model.safetensors"))
    # each file once, and nothing else of the repository
    assert sorted(downloads(hub)) == 4 * ["adapter_config.json"] + 4 * ["adapter_model.safetensors"]


def test_tokens_are_not_sent_to_where_the_large_files_are(hub, run):
    run('hotswap_adapter(model, "team/secret", "default", token="hf_right"); assert_is(secret)')
    sent = {(request.path.split("/")[0], request.headers.get("authorization")) for request in hub.log}
    assert sent == {("team", "Bearer hf_right"), ("storage", None)}


@pytest.mark.long
def test_what_is_cached_takes_one_question(hub, run):
    run('hotswap_adapter(model, "team/adapter", "default")')
    hub.log.clear()
    run('hotswap_adapter(model, "team/adapter", "default"); assert_is(new)')
    assert hub.requests == [("HEAD", "team/adapter/resolve/main/adapter_config.json")]


def test_the_older_name_of_token(run):
    run('hotswap_adapter(model, "team/secret", "default", use_auth_token="hf_right"); assert_is(secret)')


def test_what_is_not_there_or_not_allowed_is_refused(hub, run, folders):
    del hub.repositories["team/adapter"]["v2"]["adapter_model.safetensors"]
    hub.add("team/gated", folders["new"])
    hub.gated.add("team/gated")
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
            refusal("team/gated"),
            refusal("team/adapter", local_files_only=True, revision="v9"),
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
    assert "GatedRepoError" in refusals[7]
    assert "local_files_only" in refusals[8]


@pytest.mark.long
def test_offline_the_cache_is_used_and_nothing_is_asked(hub, run):
    run('hotswap_adapter(model, "team/adapter", "default")')
    hub.log.clear()
    missing = run(
        """
        hotswap_adapter(model, "team/adapter", "default")
        assert_is(new)
        result = refusal("team/secret")
        """,
        where="offline",
    )
    assert hub.requests == []
    assert missing.startswith("Can't find 'adapter_config.json' at 'team/secret'")
    assert "offline" in missing
    assert "unset HF_HUB_OFFLINE" in missing


@pytest.mark.long
def test_bin_files_where_there_are_no_safetensors(hub, run, folders, tmp_path):
    files = hub.repositories["team/adapter"]["main"]
    torch.save(load_file(Path(folders["new"]) / "adapter_model.safetensors"), tmp_path / "adapter_model.bin")
    del files["adapter_model.safetensors"]
    files["adapter_model.bin"] = (tmp_path / "adapter_model.bin").read_bytes()
    body = 'hotswap_adapter(model, "team/adapter", "default"); assert_is(new)'
    run(body)
    run(body, where="offline")
    assert sorted(downloads(hub)) == ["adapter_config.json", "adapter_model.bin"]


@pytest.mark.long
def test_a_renamed_repository(hub, run):
    hub.renamed["team/old-name"] = "team/adapter"
    body = 'hotswap_adapter(model, "team/old-name", "default"); assert_is(new)'
    run(body)
    run(body, where="offline")


def test_a_repository_that_was_pushed_to(hub, run, folders):
    body = """
        adapter = Adapter.load("team/adapter")
        hotswap_adapter(model, "team/adapter", "default")
        result = adapter.revision
        assert_is(expected)
    """
    first = run(body, expected=folders["new"])
    assert first == hub.commit("team/adapter")
    hub.add("team/adapter", folders["second"])
    second = run(body, expected=folders["second"])
    assert second == hub.commit("team/adapter") != first
    # pinned, it is what it was; with the files at hand, the Hub isn't even asked
    hub.log.clear()
    run(
        'hotswap_adapter(model, "team/adapter", "default", revision=pinned); assert_is(new)',
        pinned=first,
    )
    assert hub.requests == []


def test_config_and_weights_are_of_one_commit(hub, run, folders):
    """Somebody pushes in between."""
    hub.on_request = lambda request: (
        hub.add("team/adapter", folders["second"]) if request.path.endswith("/adapter_model.safetensors") else None
    )
    run('hotswap_adapter(model, "team/adapter", "default"); assert_is(new)')
    assert hub.repositories["team/adapter"]["main"]["adapter_config.json"] != _config(folders["new"])
    run('hotswap_adapter(model, "team/adapter", "default"); assert_is(second)')


def test_a_folder_is_never_looked_for_on_the_hub(hub, run, folders, tmp_path):
    """Nor are its files mixed with those of a repository of the same name."""
    shutil.copytree(folders["second"], tmp_path / "team" / "adapter")
    for name, summary in (
        ("adapter_model.safetensors", "Can't find weights for team/adapter"),
        ("adapter_config.json", "Can't find 'adapter_config.json' at 'team/adapter'"),
    ):
        (tmp_path / "team" / "adapter" / name).unlink()
        text = run(
            """
            import os
            before = os.getcwd()
            os.chdir(folder)
            try:
                result = refusal("team/adapter")
            finally:
                os.chdir(before)
            """,
            folder=str(tmp_path),
        )
        assert text.startswith(summary)
    assert hub.requests == []


def test_a_family_on_the_hub_is_prepared_for_from_its_configs(run, hub):
    result = run("""
    from hotswap_lab import prepare_model_for_compiled_hotswap, resolve_slot
    prepare_model_for_compiled_hotswap(model, adapters=["team/adapter"], revision="v2")
    room = {tensor.capacity for tensor in resolve_slot(model, "default").tensors}
    result = sorted(room)
    """)
    assert result == [4]
    assert downloads(hub) == ["adapter_config.json"]


@pytest.mark.long
def test_progress_is_shown_once_for_each_download(hub, workers, folders):
    body = 'hotswap_adapter(model, "team/adapter", "default"); assert_is(new)'
    shown = workers["online"].run(body, **folders).terminal
    assert "adapter_model.safetensors: 100%" in shown
    assert "adapter_config.json: 100%" in shown
    assert "%" not in workers["online"].run(body, **folders).terminal  # from the cache


@pytest.mark.long
def test_progress_bars_can_be_disabled(hub, workers, folders):
    body = """
        from huggingface_hub import constants
        constants.HF_HUB_OFFLINE = False  # this once
        try:
            hotswap_adapter(model, "team/adapter", "default")
            assert_is(new)
        finally:
            constants.HF_HUB_OFFLINE = True
    """
    assert "%" not in workers["offline"].run(body, **folders).terminal
    assert len(downloads(hub)) == 2


# ---- networks and servers that fail


@pytest.mark.long
def test_a_download_that_was_cut_is_resumed(hub, run, folders, tmp_path):
    """The client writes 10 MiB at a time, and goes on after the last one that it has in full."""
    tensors = load_file(Path(folders["new"]) / "adapter_model.safetensors")
    save_file(tensors, tmp_path / "adapter_model.safetensors", {"format": "pt", "note": "a long story " * 2_000_000})
    shutil.copy(Path(folders["new"]) / "adapter_config.json", tmp_path)
    hub.add("team/large", tmp_path)
    hub.faults["adapter_model.safetensors"] = Fault("cut", times=1)
    run('hotswap_adapter(model, "team/large", "default"); assert_is(new)')
    stored = [request for request in hub.log if request.path.startswith("storage/")]
    assert [request.headers.get("range") for request in stored] == [None, f"bytes={10 << 20}-"]
    # a smaller file is asked for again as a whole
    hub.faults["adapter_model.safetensors"] = Fault("cut", times=2)
    hub.log.clear()
    run('hotswap_adapter(model, "team/adapter", "default"); assert_is(new)')
    assert downloads(hub) == ["adapter_config.json", *3 * ["adapter_model.safetensors"]]


@pytest.mark.long
def test_what_fails_for_good_is_refused_and_works_when_the_hub_does(hub, run, folders, home):
    """All at once, since huggingface_hub repeats most requests for some seconds."""
    kinds = {
        "cut": Fault("empty"),
        "error": Fault(500, ("HEAD", "GET")),
        "busy": Fault(429, ("HEAD", "GET")),
        "hanging": Fault("hang", ("HEAD", "GET")),
        "stuck": Fault("hang", ("GET",)),
    }
    for name, fault in kinds.items():
        hub.add(f"faulty/{name}", folders["new"])
        hub.faults[f"faulty/{name}/" if name != "cut" else "storage/"] = fault
    body = """
        import time
        from concurrent.futures import ThreadPoolExecutor
        def attempt(name):
            start = time.perf_counter()
            text = refusal("faulty/" + name, model=load(kind, old))
            return text, time.perf_counter() - start
        with ThreadPoolExecutor(len(kinds)) as threads:
            result = dict(zip(kinds, threads.map(attempt, kinds)))
    """
    refused = run(body, kinds=list(kinds))
    for name, (text, seconds) in refused.items():
        assert text.startswith("Can't find weights" if name == "cut" else "Can't find 'adapter_config.json'"), name
        assert text.count("found:") == 1
        assert seconds < 40, (name, seconds)
    assert "RemoteProtocolError" in refused["cut"][0]
    assert "500" in refused["error"][0]
    assert "429" in refused["busy"][0]
    assert "Timeout" in refused["hanging"][0]
    assert "Timeout" in refused["stuck"][0]
    assert refused["hanging"][1] < 10
    # nothing half downloaded is left, or taken for a file
    assert not list(Path(home).rglob("*.incomplete"))
    hub.faults.clear()
    for name in kinds:
        run('hotswap_adapter(model, "faulty/" + name, "default"); assert_is(new)', name=name)


@pytest.mark.long
def test_where_the_hub_fails_the_cache_is_used(hub, run):
    run('hotswap_adapter(model, "team/adapter", "default")')
    for kind in (500, 429, "hang"):
        hub.faults["team/adapter"] = Fault(kind, ("HEAD", "GET"))
        hub.log.clear()
        run('hotswap_adapter(model, "team/adapter", "default"); assert_is(new)')
        assert len(hub.log) == 1


# ---- many adapters


@pytest.mark.long
def test_a_pool_of_private_adapters_survives_without_the_hub(hub, run, folders):
    hub.add("team/secret", folders["second"], revision="v2")
    hub.private["team/adapter"] = "hf_right"
    body = """
        family = {"a": "team/secret", "b": "team/adapter", "here": old}
        pool = AdapterPool(
            model, adapters=family, revision="v2", token="hf_right", target_rank=8, max_bytes=nbytes, progress=False
        )
        result = []
        for name in ("a", "b", "here", "a", "b"):
            result.append(sorted(row[0] for row in pool.table if row[-2] == "in its files"))
            pool.swap(name)
            assert_is({"a": second, "b": second, "here": old}[name], prepared=True)
    """
    nbytes = sum(tensor.nbytes for tensor in load_file(Path(folders["second"]) / "adapter_model.safetensors").values())
    before = run(body, nbytes=2 * nbytes)
    assert sum(map(len, before)) >= 3  # some had to be read again
    assert sorted(downloads(hub)) == 2 * ["adapter_config.json"] + 2 * ["adapter_model.safetensors"]
    hub.log.clear()
    assert run(body, nbytes=2 * nbytes, where="offline") == before
    assert hub.requests == []


def test_a_pool_reads_again_what_it_has_read_before(hub, run, folders):
    """Though somebody has pushed to the repository since, and without asking the Hub."""
    run(
        """
        kept["pool"] = pool = AdapterPool(
            model, adapters={"a": "team/adapter", "here": old}, target_rank=8, max_bytes=2000, progress=False
        )
        kept["model"] = model
        pool.swap("here")
        assert ("a", "in its files") in [(row[0], row[-2]) for row in pool.table]
        """
    )
    hub.add("team/adapter", folders["second"])
    hub.log.clear()
    run(
        """
        model = kept["model"]
        kept["pool"].swap("a")
        oracle.assert_equals_fresh_load(model, kind, new, prepared=True)
        """
    )
    assert hub.requests == []


def test_a_pool_that_may_not_read_an_adapter_leaves_the_model_alone(run):
    text = run(
        """
        from oracle import untouched
        with untouched(model):
            try:
                AdapterPool(model, adapters={"a": "team/adapter", "b": "team/secret"}, progress=False)
            except HotswapError as error:
                result = str(error)
        """
    )
    assert text.startswith("Can't find 'adapter_config.json' at 'team/secret'")


# ---- diffusers' own format


def test_a_file_for_a_pipeline(hub, run, tmp_path):
    lora = {"A.weight": torch.ones(2, 4), "B.weight": torch.ones(8, 2)}
    lora = {f"transformer.x_embedder.lora_{key}": tensor for key, tensor in lora.items()}
    save_file(lora, tmp_path / "pytorch_lora_weights.safetensors")
    hub.add("team/style", tmp_path)
    hub.add("team/own-style", tmp_path)
    hub.private["team/own-style"] = "hf_right"
    refused = run(
        """
        import torch
        from diffusers import FluxPipeline, FluxTransformer2DModel
        transformer = FluxTransformer2DModel(
            in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=1,
            joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4),
        )
        pipe = FluxPipeline(None, None, None, None, None, None, transformer)
        named = dict(weight_name="pytorch_lora_weights.safetensors")
        try:
            read_pipeline_lora(pipe, "team/own-style", **named)
        except HotswapError as error:
            result = str(error)
        for repository, arguments in (("team/style", {}), ("team/own-style", dict(named, token="hf_right"))):
            adapter = read_pipeline_lora(pipe, repository, **arguments)["transformer"]
            assert adapter.config.r == 2
            assert all(tensor.eq(1).all() for tensor in adapter.tensors.values())
        """
    )
    assert refused.startswith("The LoRA from team/own-style can't be loaded")
    assert downloads(hub) == 2 * ["pytorch_lora_weights.safetensors"]


# ---- which there are


BASE = "lab/base-model"


@pytest.fixture
def library(hub, folders):
    """Repositories for a base, most of them with a LoRA adapter, and one for another base."""
    for number, name in enumerate(
        ("tiny", "patterned", "private", "gated", "broken", "other-base", "ia3", "diffusion")
    ):
        hub.add(f"zoo/{name}", folders["new"])
        hub.about[f"zoo/{name}"] = {
            "tags": ["peft", f"base_model:{BASE}", f"base_model:adapter:{BASE}", "license:apache-2.0"],
            "downloads": 1000 * (9 - number),
            "lastModified": f"2025-06-0{number + 1}T12:00:00.000Z",
        }
    files = {name: hub.repositories[f"zoo/{name}"]["main"] for name in ("patterned", "broken", "ia3", "diffusion")}
    config = files["patterned"]["adapter_config.json"]
    files["patterned"]["adapter_config.json"] = config.replace(b'"rank_pattern": {}', b'"rank_pattern": {"a": 64}')
    files["broken"]["adapter_config.json"] = b"<html>"
    files["ia3"]["adapter_config.json"] = config.replace(b'"LORA"', b'"IA3"')
    del files["diffusion"]["adapter_config.json"]
    hub.about["zoo/other-base"]["tags"] = ["peft", "base_model:adapter:lab/other"]
    hub.about["zoo/broken"]["tags"] = hub.about["zoo/broken"]["tags"][:-1]
    hub.about["zoo/gated"]["gated"] = "manual"
    hub.gated.add("zoo/gated")
    hub.private["zoo/private"] = "hf_right"
    return hub


FIND = """
    found = find_adapters(base, **arguments)
    rows = [(each.repo_id, each.rank, each.max_rank, each.nbytes, each.licence) for each in found]
    result = [rows, str(found), found._repr_html_(), found.note]
"""


def test_adapters_for_a_base_are_listed(library, run, folders):
    rows, text, html, note = run(FIND, base=BASE, arguments={})
    size = (Path(folders["new"]) / "adapter_model.safetensors").stat().st_size
    assert rows == [
        ["zoo/tiny", 3, 3, size, "apache-2.0"],
        ["zoo/patterned", 3, 64, size, "apache-2.0"],
        ["zoo/gated", None, None, size, "apache-2.0"],
        ["zoo/broken", None, None, size, None],
    ]
    assert note == "4 of 6 repositories; left out: 1 of another kind, 1 without adapter_config.json"
    lines = text.splitlines()
    assert lines[0] == f"LoRA adapters for {BASE}: {note}"
    assert lines[1].split() == ["adapter", "rank", "size", "licence", "downloads", "updated"]
    assert lines[2].split() == ["zoo/tiny", "3", f"{size / 1000:.2f}kB", "apache-2.0", "9,000", "2025-06-01"]
    assert "3, up to 64" in lines[3]
    assert lines[4].startswith("zoo/gated (gated)  -")
    assert len(lines) == 6
    assert html.count("<tr>") == 5
    # two questions for each that has a config, no weights
    assert not [path for _, path in library.requests if "safetensors" in path]
    assert len(library.requests) == 1 + 2 * 5 + 1


def test_a_token_shows_private_adapters_as_well(library, run):
    rows = run(FIND, base=BASE, arguments={"token": "hf_right"})[0]
    assert ["zoo/private", 3, 3] in [row[:3] for row in rows]


def test_limits_and_orders(library, run):
    rows = run(FIND, base=BASE, arguments={"limit": 3})[0]
    assert [row[0] for row in rows] == ["zoo/tiny", "zoo/patterned", "zoo/gated"]
    rows = run(FIND, base=BASE, arguments={"limit": 4, "sort": "last_modified"})[0]
    assert [row[0] for row in rows] == ["zoo/broken", "zoo/gated"]  # the other two are left out


def test_what_is_found_can_be_swapped_in(library, run):
    run(
        """
        found = find_adapters(base, limit=1)
        assert found[0].revision == commit
        hotswap_adapter(model, found[0].repo_id, "default", revision=commit)
        assert_is(new)
        """,
        base=BASE,
        commit=library.commit("zoo/tiny"),
    )


@pytest.mark.long
def test_one_line_where_the_hub_cannot_be_asked(library, run):
    rows, text, html, _ = run(FIND, base=BASE, arguments={}, where="offline")
    assert rows == []
    assert "\n" not in text
    assert "HF_HUB_OFFLINE" in text
    assert "HF_HUB_OFFLINE" in html
    for kind, word in ((429, "429"), (500, "500"), (401, "401"), ("hang", "Timeout")):
        library.faults = {"api/models": Fault(kind)}
        start = time.perf_counter()
        rows, text, *_ = run(FIND, base=BASE, arguments={})
        assert rows == []
        assert "\n" not in text
        assert word in text
        assert time.perf_counter() - start < 20
    library.faults.clear()
    unreachable = """
    from huggingface_hub import constants
    constants.ENDPOINT = "http://127.0.0.1:9"
    """
    try:
        rows, text, *_ = run(unreachable + FIND, base=BASE, arguments={})
    finally:
        run("from huggingface_hub import constants; constants.ENDPOINT = url", url=library.url)
    assert rows == []
    assert "ConnectError" in text


def test_one_repository_that_fails_does_not_hide_the_others(library, run):
    library.faults["zoo/tiny"] = Fault(500)
    rows = run(FIND, base=BASE, arguments={})[0]
    assert [row[:4] for row in rows][:2] == [["zoo/tiny", None, None, None], ["zoo/patterned", 3, 64, rows[1][3]]]


def test_nothing_found(hub, run):
    assert run(FIND, base=BASE, arguments={})[1] == f"LoRA adapters for {BASE}: 0 repositories"


def test_a_base_that_is_no_id():
    from hotswap_lab import find_adapters

    with pytest.raises(ValueError, match="/home/me/base"):
        find_adapters("/home/me/base")


def _config(folder: str) -> bytes:
    return (Path(folder) / "adapter_config.json").read_bytes()
