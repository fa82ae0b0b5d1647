"""Rows at different places read as the model itself does. Compiled, in two graphs."""

from __future__ import annotations

import copy
import sys
from importlib.util import find_spec, module_from_spec

import pytest
import torch
import transformers
from exercises import logits_of, some_ids
from oracle import assert_close

from hotswap_lab import demo
from hotswap_lab.generating import Reader
from hotswap_lab.lessons.real_llm import ByLayer

CHUNK, LONGEST = 4, 20
#: its norms compute in float32, whatever the model has
TOLERANCE = 1e-6


@pytest.fixture
def model():
    return demo.load("reverse")[0].double()


def letters(count):
    return some_ids(count).tolist()


def read_all(reader, texts, sizes):
    """Reads the text of each row, in parts of its own size; gives the logits after each."""
    last, done = [None] * len(texts), [0] * len(texts)
    while any(start < len(text) for start, text in zip(done, texts, strict=True)):
        parts = [text[start : start + size] for text, start, size in zip(texts, done, sizes, strict=True)]
        logits = reader.read(parts)
        for row, part in enumerate(parts):
            last[row] = logits[row] if part else last[row]
            done[row] += len(part)
    return last


def test_rows_at_different_places_read_as_the_model_itself(model):
    texts = [letters(count) for count in (9, 1, 4, 17)]
    reader = Reader(model, rows=4, chunk=CHUNK, longest=LONGEST)
    for row, logits in enumerate(read_all(reader, texts, sizes=(4, 1, 3, 2))):
        assert_close(logits, logits_of(model, texts[row]), TOLERANCE)
    assert reader.lengths.tolist() == [9, 1, 4, 17]


SIZE = dict(hidden_size=16, intermediate_size=16, num_attention_heads=2, num_key_value_heads=2, vocab_size=64)
SIZE |= dict(num_hidden_layers=2, max_position_embeddings=64, initializer_range=0.3, pad_token_id=0)
ROPE = dict(factor=2.0, rope_theta=10000.0, original_max_position_embeddings=20)
ROPE |= dict(short_factor=[1.0] * 4, long_factor=[2.0] * 4, low_freq_factor=1.0, high_freq_factor=4.0)
LOCAL = dict(num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]])
EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)


def roped(kind):
    return dict(rope_parameters=ROPE | {"rope_type": kind}, max_position_embeddings=20)


#: what a model of transformers is, and whether a text of 40 tokens is computed in another way than one of 16
LENGTHS = {
    "doge": ("Doge", dict(keep_window_size=20), True),
    "mistral": ("Mistral", dict(sliding_window=20), True),
    "qwen2": ("Qwen2", dict(sliding_window=20, use_sliding_window=True, max_window_layers=0), True),
    "qwen2, not used": ("Qwen2", dict(sliding_window=20, use_sliding_window=False), False),
    "starcoder2": ("Starcoder2", dict(sliding_window=20), True),
    "phi3": ("Phi3", dict(sliding_window=20), True),
    "gemma2": ("Gemma2", dict(sliding_window=20, head_dim=8), True),
    "cohere2": ("Cohere2", dict(sliding_window=20), True),
    "gpt_oss": ("GptOss", dict(sliding_window=20, head_dim=8, **EXPERTS), True),
    "gpt_neo": ("GPTNeo", dict(window_size=20, **LOCAL), True),
    "llama, chunked": ("Llama4Text", dict(attention_chunk_size=20, head_dim=8, **EXPERTS), True),
    "dynamic": ("Llama", roped("dynamic"), True),
    "longrope": ("Llama", roped("longrope"), True),
    "yarn": ("Llama", roped("yarn"), False),
    "linear": ("Llama", roped("linear"), False),
    "llama3": ("Llama", roped("llama3"), False),
    "opt": ("OPT", dict(word_embed_proj_dim=16, ffn_dim=16), False),
    "neox": ("GPTNeoX", {}, False),
}


@pytest.mark.parametrize("name", LENGTHS)
def test_a_reader_is_tried_at_the_length_that_is_served(name):
    """By what the config says, and by a look at the logits."""
    kind, settings, differs = LENGTHS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZE | settings)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for longest, expected in ((16, True), (40, not differs)):
        reader = Reader(model, rows=3, longest=longest)
        assert (reader.agrees(), reader._agrees_in_trial(64)) == (expected, expected)
        assert reader.lengths.tolist() == [0, 0, 0]
    assert not Reader(model, rows=3, longest=3).agrees()


def test_a_row_that_is_given_on_leaves_no_trace_and_disturbs_nobody(model):
    reader = Reader(model, rows=2, chunk=CHUNK, longest=LONGEST)
    first, second, other = letters(7), letters(5), letters(12)
    read_all(reader, [first, other[:6]], sizes=(4, 1))
    for name, each in reader.named_buffers(recurse=False):
        if name != "places":
            each[0] = torch.nan  # as an adapter that is far too strong leaves it
    reader.forget(0)
    logits = read_all(reader, [second, other[6:]], sizes=(4, 2))
    assert_close(logits[0], logits_of(model, second), TOLERANCE)
    assert_close(logits[1], logits_of(model, other), TOLERANCE)


@pytest.mark.parametrize("part", [1, 3])
def test_a_token_too_many_is_refused_and_nothing_is_read(model, part):
    reader, text = Reader(model, rows=2, chunk=CHUNK, longest=LONGEST), letters(LONGEST)
    logits = read_all(reader, [text[: LONGEST + 1 - part], text], sizes=(4, 3))
    assert_close(logits[1], logits_of(model, text), TOLERANCE)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"{LONGEST + 1} tokens.*{LONGEST} at most"):
            reader.read([letters(part), []])
    logits = reader.read([text[LONGEST + 1 - part :], []])[0] if part > 1 else logits[0]
    assert_close(logits, logits_of(model, text), TOLERANCE)


@pytest.mark.parametrize("kind", [Reader, ByLayer])
def test_two_graphs_read_parts_of_all_lengths_and_compute_nothing_for_filling(model, kind):
    """The longest part decides the width, and the longest row how far tokens look; as when nothing is compiled."""
    reader, sizes, graphs = kind(copy.deepcopy(model), rows=2, chunk=CHUNK, longest=LONGEST), [], []

    def backend(graph, inputs):
        graphs.append(graph)

        def call(*values):
            sizes.append({int(each) for each in values if not isinstance(each, torch.Tensor)})
            return graph(*values)

        return call

    reader.compile(backend)
    texts = [letters(14), letters(6)]
    for row, logits in enumerate(read_all(reader, texts, sizes=(3, 2))):
        assert torch.allclose(logits, logits_of(model, texts[row]), atol=1e-4)
    for part in ([[7], []], [[], [3, 4, 5, 6]], [[1], [8]]):
        reader.read(part)
    assert len(graphs) == 2
    of_a_call = sizes[:: len(sizes) // 8]
    assert of_a_call == [{3}, {3, 6}, {3, 9}, {3, 12}, {2, 14}, {15}, {4, 19}, {16}]


def test_reading_needs_nothing_of_ahead(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "hotswap_lab.ahead", None)
    spec = find_spec("hotswap_lab.generating")
    alone = module_from_spec(spec)
    spec.loader.exec_module(alone)
    text = letters(5)
    assert_close(alone.Reader(model, rows=1).read([text])[0], logits_of(model, text), TOLERANCE)
