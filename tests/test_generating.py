"""Rows at different places read as the model itself does. In two graphs, as chapter 08 shows."""

from __future__ import annotations

import sys
from importlib.util import find_spec, module_from_spec

import pytest
import torch
from exercises import logits_of, some_ids
from oracle import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from hotswap_lab import demo
from hotswap_lab.generating import Reader

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


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_that_depend_on_the_longest_row_are_noticed(kind):
    """Only where a row may be longer than the texts that the model was trained on."""
    rope = {"rope_type": kind, "factor": 2.0, "rope_theta": 10000.0}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 16}
    size = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
    model = LlamaForCausalLM(LlamaConfig(**size, max_position_embeddings=16, rope_parameters=rope)).eval()
    assert [Reader(model, rows=2, longest=longest).agrees() for longest in (12, 40)] == [True, False]


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


def test_reading_needs_nothing_of_ahead(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "hotswap_lab.ahead", None)
    spec = find_spec("hotswap_lab.generating")
    alone = module_from_spec(spec)
    spec.loader.exec_module(alone)
    text = letters(5)
    assert_close(alone.Reader(model, rows=1).read([text])[0], logits_of(model, text), TOLERANCE)
