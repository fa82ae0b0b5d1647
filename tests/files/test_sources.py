"""What is found in a folder; and of a path with a typing error in it, what is there instead, then what the Hub says."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from models import KINDS, load, save_family
from oracle import assert_equals_fresh_load
from refusals import refused
from safetensors.torch import load_file

from hotswap_lab import Adapter, demo, hotswap_adapter
from hotswap_lab.files.summary import summary_of


def found(source: object) -> str:
    return refused(r"Can't find 'adapter_config\.json'", Adapter.load, source).refusals[0].found


def test_neither_a_folder_nor_on_the_hub(tmp_path):
    # the Hub has something to say of the first alone: the others can't be ids
    for source in ("team/adapter", tmp_path / "adapter", "a/b/c", "./adapter"):
        text, here = found(source), f"no folder {str(source)!r} here"
        is_id = source == "team/adapter"
        assert text.startswith(f"{here}; and the Hub: OfflineModeIsEnabled") if is_id else text == here


def test_a_folder_of_adapters_and_a_name_that_is_not_in_it(tmp_path, monkeypatch):
    save_family(KINDS["linear"], tmp_path / "family", dict(r=4), dict(r=6))
    monkeypatch.chdir(tmp_path)
    names = sorted(each.name for each in (tmp_path / "family").iterdir())
    known = f"family has the adapters {', '.join(map(repr, names))}"
    assert found("family") == f"no adapter_config.json in the folder family; {known}"
    for way in (str, Path):  # of two words, a string may be an id, and a path can't
        text = found(way("family/nobody"))
        assert text.startswith(f"no folder 'family/nobody' here; {known}")
        assert ("; and the Hub: " in text) is (way is str)
    assert found("./nobody") == "no folder './nobody' here"


def test_the_next_step_is_for_what_is_found(tmp_path, monkeypatch):
    names = [Path(each).name for each in save_family(KINDS["linear"], tmp_path / "family", dict(r=4), dict(r=6))]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "family" / "x.safetensors").touch()
    one_of = f"pass one of them, such as 'family/{min(names)}'; all: AdapterPool(model, adapters={{name: folder}})"
    incomplete = "check the path, or get a complete copy of the adapter"
    for source, next_step in (
        (f"family/{names[0]}/adapter_model.safetensors", "pass its folder"),
        (
            "family/x.safetensors",
            "pass its folder; the LoRA of a diffusers pipeline is read by hotswap_lab.hotswap_pipeline",
        ),
        ("family", one_of),
        ("family/nobody", one_of),
        ("a/b/c", "check the path"),
        (Path("nobody"), "check the path"),
    ):
        error = refused(r"Can't find 'adapter_config\.json'", Adapter.load, source)
        assert error.refusals[0].next_step == next_step
    (tmp_path / "family" / names[0] / "adapter_model.safetensors").unlink()
    error = refused("Can't find weights", Adapter.load, tmp_path / "family" / names[0])
    assert error.refusals[0].next_step == incomplete


def test_bin_files_are_read_where_there_are_no_safetensors(tmp_path):
    """What is in a pickle is never run: see ``robustness/test_bad_files.py``."""
    kind = KINDS["linear"]
    old, new = save_family(kind, tmp_path, dict(r=4), dict(r=6))
    tensors = load_file(f"{new}/adapter_model.safetensors")
    torch.save({"not": "read"}, f"{new}/adapter_model.bin")
    model = load(kind, old)
    hotswap_adapter(model, new, "default")
    assert_equals_fresh_load(model, kind, new)
    os.remove(f"{new}/adapter_model.safetensors")
    refused("str under 'not'", hotswap_adapter, model, new, "default")
    torch.save(tensors, f"{new}/adapter_model.bin")
    hotswap_adapter(model, old, "default")
    hotswap_adapter(model, new, "default")
    assert_equals_fresh_load(model, kind, new)


def test_a_summary_needs_the_head_of_the_file_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(Adapter, "load", None)
    summary = summary_of(demo.adapter_path("pig_latin"))
    assert (summary.name, summary.ranks, summary.layers) == ("pig_latin", (32,), 16)
