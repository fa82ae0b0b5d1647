"""Another adapter in each row, on every kind of layer and model: each row as a fresh load computes it."""

from __future__ import annotations

import functools

import pytest
import torch
from lengths import few_of, long
from models import ARCHITECTURES, KINDS, Kind, call, load
from row_truth import Truth, assert_close, family
from torch import nn

from hotswap_lab import AdapterPool

ROWS = 6


class Convolution(nn.Module):
    """Strides, padding, kernels that are not square, and one of a single point."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, (3, 5), padding=(1, 2), stride=(2, 1))
        self.blocks = nn.ModuleList([nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.Conv2d(8, 4, 1)])

    def forward(self, x):
        return self.blocks[1](torch.tanh(self.blocks[0](torch.tanh(self.first(x)))))


def clip() -> nn.Module:
    from test_pipeline import text_encoder

    return text_encoder()


def _ids(rows: int = ROWS, high: int = 40):
    return {"input_ids": torch.randint(0, high, (rows, 5))}


#: with a batch of six, all of whose rows differ
ROW_KINDS: dict[str, Kind] = {
    "linear": Kind(KINDS["linear"].make_random, lambda: torch.randn(ROWS, 12), KINDS["linear"].modules),
    "conv2d": Kind(Convolution, lambda: torch.randn(ROWS, 3, 9, 7), ("first", "blocks.0", "blocks.1")),
    "embedding": Kind(
        KINDS["embedding"].make_random, lambda: torch.randint(0, 20, (ROWS, 7)), KINDS["embedding"].modules
    ),
    **{
        name: Kind(ARCHITECTURES[name].make_random, _ids, ARCHITECTURES[name].modules)
        for name in ("llama", "gpt2", "bert", "qwen", "mixtral")
    },
    "clip": Kind(clip, lambda: _ids(high=52), ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")),
}


@functools.cache
def scene(name: str, folder) -> tuple[Kind, dict[str, str], Truth]:
    kind = ROW_KINDS[name]
    folders = family(kind, folder)
    return kind, folders, Truth(kind, folders, kind.inputs())


@pytest.fixture(params=few_of(ROW_KINDS, ("linear", "conv2d", "embedding", "gpt2", "clip")))
def trio(request, tmp_path):
    return scene(request.param, tmp_path)


def first_rows(inputs, count: int):
    return {key: value[:count] for key, value in inputs.items()} if isinstance(inputs, dict) else inputs[:count]


def test_each_row_is_as_a_fresh_load(trio):
    kind, folders, truth = trio
    model = load(kind, folders["a"])
    pool = AdapterPool(model, adapters=folders, rows=ROWS, target_rank=14, progress=False)
    for wanted in (
        ["a", "b", "c", "d", "e", None],
        [None, "e", "e"],
        ["d"],
        [{"a": 0.7, "b": 0.3}, "b", {"e": -1.0, "c": 2, "d": 0.5}, "a", {"b": 1}],
    ):
        pool.assign(wanted)
        truth.check(call(model, first_rows(truth.inputs, len(wanted))), wanted)
    pool.assign(["a", "b", "c"], strengths=[0.5, 0, -2])
    truth.check(call(model, first_rows(truth.inputs, 3)), ["a", "b", "c"], [0.5, 0, -2])
    pool.swap("d")
    assert_close(call(model, truth.inputs), truth.of("d"))
    pool.swap({"a": 0.7, "b": 0.3})
    assert_close(call(model, truth.inputs), truth.of({"a": 0.7, "b": 0.3}))


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=40,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=None,
    )
    model = T5ForConditionalGeneration(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)  # or it says the same whatever adapter it has
    return model


def test_generate(tmp_path):
    """Several answers for each row, by beams, after an encoder. Other ways: ``robustness/test_architectures.py``."""
    kind = Kind(t5, _ids, ("q", "k", "v", "o", "wi", "wo"))
    folders, wanted = family(kind, tmp_path), ["a", "b", None, "d", {"a": 0.7, "d": 0.6}, "b"]
    options = dict(max_new_tokens=6, min_new_tokens=6, pad_token_id=0, num_beams=4, num_return_sequences=2)

    def logits(model, inputs):
        return call(model, inputs | {"decoder_input_ids": inputs["input_ids"]})

    truth = Truth(kind, folders, kind.inputs(), logits)

    def ask(model):
        with torch.no_grad():
            return model.generate(**truth.inputs, **options).split(2)

    expected, base = [], ask(kind.base())
    for number, each in enumerate(wanted):
        weights = {each: 1.0} if isinstance(each, str) else each
        expected.append(ask(truth.model(tuple(weights.items())))[number] if weights else base[number])
    assert sum(not torch.equal(one, two) for one, two in zip(expected, base, strict=True)) >= 4
    pool = AdapterPool(load(kind, folders["a"]), adapters=folders, rows=ROWS, target_rank=14, progress=False)
    pool.assign(wanted)
    for _ in range(2):  # the second time, an encoder comes after a forward with repeated rows
        assert torch.equal(torch.cat(ask(pool.model)), torch.cat(expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, long(torch.float16)])
@pytest.mark.parametrize("name", ["linear", "embedding", "conv2d"])
def test_half_precision(name, dtype, tmp_path):
    """As near to a fresh load as that is to itself in float32."""
    kind = ROW_KINDS[name]
    half = Kind(lambda: kind.make_random().to(dtype), kind.make_inputs, kind.modules)
    inputs = kind.inputs()
    inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
    folders = family(kind, tmp_path)
    for autocast in (True, False):
        fresh = {name: load(half, folders[name], autocast_adapter_dtype=autocast) for name in "abc"}
        # PEFT lets cast parameters of embeddings be trained
        model = load(half, folders["a"], autocast_adapter_dtype=autocast).requires_grad_(False)
        pool = AdapterPool(model, adapters=folders, rows=ROWS, progress=False)
        wanted = ["a", "b", "c", "b", "a", "c"]
        pool.assign(wanted)
        output = call(model, inputs)
        expected = torch.stack([call(fresh[each], inputs)[n] for n, each in enumerate(wanted)])
        assert output.dtype == expected.dtype == dtype
        assert_close(output.float(), expected.float(), 0.03)
        assert (output - call(half.base(), inputs)).abs().max() > 0.1 * expected.abs().max()
