"""Another adapter in each row, on every kind of layer and model: each row as a fresh load computes it."""

from __future__ import annotations

import pytest
import torch
from lengths import few_of, long
from models import KINDS, Kind, call, load
from oracle import rounding, rounding_of_inductor
from row_truth import Truth, assert_close, family
from torch import nn

from hotswap_lab import AdapterPool, RecompileWatch

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


def unet() -> nn.Module:
    from test_pipeline import SD

    return SD().unet


def _pictures():
    steps = torch.full((ROWS,), 3)
    return dict(sample=torch.randn(ROWS, 4, 8, 8), timestep=steps, encoder_hidden_states=torch.randn(ROWS, 5, 16))


def _ids(high: int = 40):
    return {"input_ids": torch.randint(0, high, (ROWS, 5))}


#: with a batch of six, all of whose rows differ. Other architectures: ``robustness/test_architectures.py``
ROW_KINDS: dict[str, Kind] = {
    "linear": Kind(KINDS["linear"].make_random, lambda: torch.randn(ROWS, 12), KINDS["linear"].modules),
    "conv2d": Kind(Convolution, lambda: torch.randn(ROWS, 3, 9, 7), ("first", "blocks.0", "blocks.1")),
    "embedding": Kind(
        KINDS["embedding"].make_random, lambda: torch.randint(0, 20, (ROWS, 7)), KINDS["embedding"].modules
    ),
    "gpt2": Kind(KINDS["gpt2"].make_random, _ids, KINDS["gpt2"].modules),
    "unet": Kind(unet, _pictures, ("to_q", "to_v", "conv1", "conv_shortcut", "time_emb_proj")),
    "clip": Kind(clip, lambda: _ids(high=52), ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")),
}


def first_rows(inputs, count: int):
    return {key: value[:count] for key, value in inputs.items()} if isinstance(inputs, dict) else inputs[:count]


@pytest.mark.parametrize("name", few_of(ROW_KINDS, ROW_KINDS.keys() - {"unet"}))
def test_each_row_is_as_a_fresh_load(name, tmp_path):
    kind = ROW_KINDS[name]
    folders = family(kind, tmp_path)
    truth = Truth(kind, folders, kind.inputs())
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


@pytest.mark.long
def test_pictures_from_one_graph(tmp_path, fresh_compiler):
    kind = ROW_KINDS["unet"]
    folders = family(kind, tmp_path)
    truth, model = Truth(kind, folders, kind.inputs()), load(kind, folders["a"])
    pool = AdapterPool(model, adapters=folders, rows=ROWS, progress=False)
    pool.assign(["a"] * ROWS)
    call(compiled := torch.compile(model, fullgraph=True), truth.inputs)
    tolerance = max(rounding_of_inductor(truth.model(((each, 1.0),)), truth.inputs) for each in folders)
    with RecompileWatch(allow=0):
        for wanted in (["a", "b", "c", None, "b", "a"], ["a", "b", None, "c", "d", "e"], ["c"] * ROWS):
            pool.assign(wanted)
            truth.check(call(compiled, truth.inputs), wanted, tolerance=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, long(torch.float16)])
@pytest.mark.parametrize("name", ["linear", "embedding", "conv2d"])
def test_half_precision(name, dtype, tmp_path):
    """As near to a fresh load as that is to itself in float64."""
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
        assert_close(output, expected, max(rounding(each, inputs) for each in fresh.values()))
        assert (output - call(half.base(), inputs)).abs().max() > 0.1 * expected.abs().max()
