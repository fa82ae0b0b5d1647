"""Turns a GGUF file into an ordinary model folder, once, and keeps it.

``transformers`` can load a GGUF file by itself, but does all of it again at every start and holds the whole model
twice meanwhile. Here it is read tensor by tensor, and what comes out is a folder for ``from_pretrained``.

The names and the order of the rows follow llama.cpp's converter for Llama models
(https://github.com/ggml-org/llama.cpp, ``convert_hf_to_gguf.py``): it stores the rows of the query and key weights
so that the two halves of each rotary pair lie side by side, and this undoes it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import hashlib
import os
import shutil
import tempfile
import time
from pathlib import Path

import torch
from safetensors import SafetensorError

from ...core.errors import refuse

CACHE_VARIABLE = "HOTSWAP_LAB_CACHE"
#: counted up whenever the same GGUF file would give other files
FORMAT = 1
#: What the weights are stored in. Of the real file, 58 % of the weights fit exactly, and the next-token distributions
#: stay within a KL divergence of 6e-6 of those of float32; with bfloat16, which is no smaller, it was 2e-4.
STORED_DTYPE = torch.float16
#: a conversion takes seconds; a folder of one that was killed may go after this many
LEFTOVER_AGE = 3600.0

LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def cache_dir() -> Path:
    """Where the converted model is kept: ``$HOTSWAP_LAB_CACHE``, or ``hotswap_lab`` in the user's cache folder."""
    if os.environ.get(CACHE_VARIABLE):
        return Path(os.environ[CACHE_VARIABLE]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "hotswap_lab"


def dequantised(file: Path) -> Path:
    """The model folder made from a GGUF file; made now if it isn't in the cache.

    The folder appears under its name only when it is complete: it is written beside and then renamed. Two
    processes that start at once both write, and the second one takes what the first one made. One that is killed
    leaves a folder whose name starts with a dot, which a later conversion removes.

    Raises
    ------
    HotswapError
        If the file can't be read as a GGUF file of a Llama model, if the ``gguf`` package is missing, or if
        nothing can be written to the cache.
    """
    folder = cache_dir() / f"{file.stem}-{_fingerprint(file)}"
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder.parent)
        partial = Path(tempfile.mkdtemp(prefix=f".{file.stem}-", dir=folder.parent))
    except OSError as error:
        raise _cannot_write(folder.parent, error) from error
    try:
        convert(file, partial)
        _give_memory_back()
        _move_into_place(partial, folder)
    except (OSError, SafetensorError) as error:  # the latter when the disk is full
        raise _cannot_write(folder.parent, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _give_memory_back() -> None:
    """The reader's 100,000 small objects leave holes; without this, 340 MB more stay in use for good (glibc only)."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _move_into_place(partial: Path, folder: Path) -> None:
    partial.chmod(0o755)  # mkdtemp's folders are closed to others
    try:
        partial.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process was faster, and its files are as good
            raise


def _remove_leftovers(folder: Path) -> None:
    for leftover in folder.glob(".*-*"):
        if leftover.is_dir() and time.time() - leftover.stat().st_mtime > LEFTOVER_AGE:
            shutil.rmtree(leftover, ignore_errors=True)


def _cannot_write(folder: Path, error: Exception):
    return refuse(
        "The dequantised weights could not be cached.",
        f"{folder}: {getattr(error, 'strerror', None) or error}",
        "a folder that can be written, with 300 MB of room",
        f"set {CACHE_VARIABLE} to one",
    )


def _fingerprint(file: Path) -> str:
    """Tells this file, and this way of converting it, from another. Reads two megabytes, not all of it."""
    size, block = file.stat().st_size, 2**20
    digest = hashlib.sha256(f"{FORMAT} {STORED_DTYPE} {size}".encode())
    with file.open("rb") as stream:
        digest.update(stream.read(block))
        stream.seek(max(0, size - block))
        digest.update(stream.read(block))
    return digest.hexdigest()[:12]


def convert(file: Path, folder: Path) -> None:
    """Writes config, tokenizer and weights of a GGUF file as an ordinary model folder."""
    from safetensors.torch import save_file

    reader = _open(file)
    _write_config(reader, folder)
    _write_tokenizer(reader, folder)
    tensors = {name: tensor.to(STORED_DTYPE) for name, tensor in tensors_of(reader)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _open(file: Path):
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise refuse(
            "The weights come as a GGUF file, and the package that reads it is missing.",
            "no package `gguf`",
            "gguf 0.10 or newer",
            "`pip install --no-deps gguf`",
        ) from error
    try:
        reader = GGUFReader(file)
    except Exception as error:  # the reader raises whatever numpy does on a file that is cut short
        raise refuse(
            f"{file.name} can't be read.", f"{type(error).__name__}: {error}", "a complete GGUF file", "get it again"
        ) from error
    architecture = _value(reader, "general.architecture")
    if architecture != "llama":
        raise refuse(f"{file.name} is another kind of model.", f"{architecture}", "llama", "use a GGUF file of SmolLM2")
    return reader


def _value(reader, key: str, default=None):
    field = reader.get_field(key)
    return default if field is None else field.contents()


def tensors_of(reader):
    """Each weight under the name that ``LlamaForCausalLM`` has for it, in float32, one at a time."""
    from gguf.quants import dequantize

    heads = {
        "attn_q": _value(reader, "llama.attention.head_count"),
        "attn_k": _value(reader, "llama.attention.head_count_kv"),
    }
    for each in reader.tensors:
        stem, _, part = each.name.rpartition(".")
        tensor = torch.from_numpy(dequantize(each.data, each.tensor_type).copy()).float()
        if stem.startswith("blk."):
            _, layer, kind = stem.split(".")
            if kind in heads:
                tensor = _halves_apart(tensor, heads[kind])
            yield f"model.layers.{layer}.{LAYER_NAMES[kind]}.{part}", tensor
        elif stem in TOP_NAMES:  # and nothing else: tables that the model computes for itself
            yield f"{TOP_NAMES[stem]}.{part}", tensor


def _halves_apart(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows of each head from rotary pairs side by side to first halves, then second halves.

    >>> _halves_apart(torch.tensor([[0.0], [2.0], [1.0], [3.0]]), heads=1).flatten().tolist()
    [0.0, 1.0, 2.0, 3.0]
    """
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns).contiguous()


def _write_config(reader, folder: Path) -> None:
    from transformers import GenerationConfig, LlamaConfig

    special = {
        "bos_token_id": _value(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": _value(reader, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": _value(reader, "tokenizer.ggml.padding_token_id"),
    }
    config = LlamaConfig(
        vocab_size=len(_value(reader, "tokenizer.ggml.tokens")),
        hidden_size=_value(reader, "llama.embedding_length"),
        intermediate_size=_value(reader, "llama.feed_forward_length"),
        num_hidden_layers=_value(reader, "llama.block_count"),
        num_attention_heads=_value(reader, "llama.attention.head_count"),
        num_key_value_heads=_value(reader, "llama.attention.head_count_kv"),
        max_position_embeddings=_value(reader, "llama.context_length"),
        # stored in single precision; this is the decimal number that was meant
        rms_norm_eps=float(f"{_value(reader, 'llama.attention.layer_norm_rms_epsilon'):.6g}"),
        rope_parameters={"rope_type": "default", "rope_theta": float(_value(reader, "llama.rope.freq_base"))},
        tie_word_embeddings=not any(each.name == "output.weight" for each in reader.tensors),
        architectures=["LlamaForCausalLM"],
        dtype=STORED_DTYPE,
        **special,
    )
    config.save_pretrained(folder)
    GenerationConfig(**special).save_pretrained(folder)


def _write_tokenizer(reader, folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = _value(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in _value(reader, "tokenizer.ggml.merges")]
    kinds = _value(reader, "tokenizer.ggml.token_type")
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    # SmolLM's tokenizer takes numbers apart digit by digit; a GGUF file has only a name for that
    digits = [pre_tokenizers.Digits(individual_digits=True)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # gguf.TokenType.CONTROL
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == control
        ]
    )

    def named(key: str) -> str | None:
        index = _value(reader, f"tokenizer.ggml.{key}")
        return None if index is None else tokens[index]

    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=named("bos_token_id"),
        eos_token=named("eos_token_id"),
        pad_token=named("padding_token_id"),
        unk_token=named("unknown_token_id"),
        chat_template=_value(reader, "tokenizer.chat_template"),
        model_max_length=_value(reader, "llama.context_length"),
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)
