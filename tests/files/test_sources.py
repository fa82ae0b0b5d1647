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


def test_what_is_found_and_what_to_do_next(tmp_path, monkeypatch):
    """Of two words, a string may be an id on the Hub, which has something to say then; a path can't."""
    names = sorted(Path(each).name for each in save_family(KINDS["linear"], tmp_path / "family", dict(r=4), dict(r=6)))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "style").mkdir()
    for file in ("family/x.safetensors", "style/pytorch_lora_weights.safetensors"):
        Path(file).touch()
    known = f"family has the adapters {', '.join(map(repr, names))}"
    one_of = f"pass one of them, such as 'family/{names[0]}'; all: AdapterPool(model, adapters={{name: folder}})"
    incomplete = "check the path, or get a complete copy of the adapter"
    pipeline = "; the LoRA of a diffusers pipeline is read by hotswap_lab.hotswap_pipeline"
    lacks, hub, weights = "no adapter_config.json in the folder", "; and the Hub: ", "adapter_model.safetensors"
    for source, found, next_step in (
        ("team/adapter", f"no folder 'team/adapter' here{hub}", None),
        (tmp_path / "adapter", f"no folder {str(tmp_path / 'adapter')!r} here", "check the path"),
        ("a/b/c", "no folder 'a/b/c' here", "check the path"),
        ("./adapter", "no folder './adapter' here", "check the path"),
        (Path("nobody"), "no folder 'nobody' here", "check the path"),
        ("family", f"{lacks} family; {known}", one_of),
        ("family/nobody", f"no folder 'family/nobody' here; {known}{hub}", one_of),
        (Path("family/nobody"), f"no folder 'family/nobody' here; {known}", one_of),
        (f"family/{names[0]}/{weights}", f"the file 'family/{names[0]}/{weights}'", "pass its folder"),
        ("family/x.safetensors", "the file 'family/x.safetensors'", f"pass its folder{pipeline}"),
        ("style", f"{lacks} style", incomplete + pipeline),
    ):
        refusal = refused(r"Can't find 'adapter_config\.json'", Adapter.load, source).refusals[0]
        assert refusal.found.partition(hub)[:2] == found.partition(hub)[:2]
        assert next_step in (None, refusal.next_step)
    os.remove(f"family/{names[0]}/{weights}")
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
