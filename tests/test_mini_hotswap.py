"""``notebooks/solutions/mini_hotswap.py``: right, as the package is, for what it says, and short."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch._dynamo.testing import CompileCounter

from hotswap_lab import demo

FOLDER = Path(__file__).parents[1] / "notebooks" / "solutions"
sys.path.append(str(FOLDER))
import mini_hotswap  # noqa: E402
from mini_hotswap import Pool, Rows, layers_of, plan, prepare, read, scalings_as_tensors, write  # noqa: E402

FOLDERS = {name: demo.adapter_path(name) for name in demo.adapter_names()}
INPUTS = torch.arange(24).view(2, 12)


@pytest.fixture(scope="module")
def family():
    return {name: read(folder) for name, folder in FOLDERS.items()}


@pytest.fixture(scope="module")
def expected():
    """What a fresh load of each adapter computes."""
    return {
        name: PeftModel.from_pretrained(demo.load_base(), folder).eval()(INPUTS).logits.detach()
        for name, folder in FOLDERS.items()
    }


def assert_is(model, expected, name):
    others = [(expected[name] - each).abs().max() for other, each in expected.items() if other != name]
    assert min(others) > 1  # another adapter would be far away
    torch.testing.assert_close(model(INPUTS).logits.detach(), expected[name], atol=1e-4, rtol=0)


@pytest.mark.parametrize("by", ["write", "pool"])
def test_each_adapter_is_as_a_fresh_load_and_nothing_is_compiled_again(family, expected, by):
    model = scalings_as_tensors(prepare(demo.load_base(), family.values()))
    pool = Pool(model, family) if by == "pool" else None
    addresses = [each.data_ptr() for each in model.parameters()]
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for name in [*FOLDERS, *FOLDERS]:
        pool.swap(name) if pool else write(plan(model, family[name]))
        assert_is(compiled, expected, name)
    assert counter.frame_count == 1
    assert [each.data_ptr() for each in model.parameters()] == addresses


def test_an_uncompiled_model_that_has_room_keeps_numbers_as_scalings(family, expected):
    model = PeftModel.from_pretrained(demo.load_base(), FOLDERS["vowels_up"]).eval()
    same = [name for name in FOLDERS if fits(model, family[name])]
    assert len(same) > 1
    for name in same:
        write(plan(model, family[name]))
        assert_is(model, expected, name)


def fits(model, adapter):
    try:
        return bool(plan(model, adapter))
    except ValueError:
        return False


def test_what_has_no_place_is_refused_before_the_first_write(family):
    model = PeftModel.from_pretrained(demo.load_base(), FOLDERS["shout"]).eval()
    before = {key: each.clone() for key, each in model.state_dict().items()}
    refused = [name for name in FOLDERS if not fits(model, family[name])]
    assert {"sort", "reverse"} <= {*refused}
    for name in refused:
        with pytest.raises(ValueError, match=r"the model has no adapter in|has no place in"):
            write(plan(model, family[name]))
    assert all(torch.equal(each, before[key]) for key, each in model.state_dict().items())


def test_patterns_and_rslora(tmp_path):
    base, layers = demo.load_base(), "model.layers"
    patterns = dict(rank_pattern={"layers.1.mlp.up_proj": 2}, alpha_pattern={"layers.0.self_attn.q_proj": 3})
    config = LoraConfig(r=4, lora_alpha=10, use_rslora=True, target_modules=["q_proj", "up_proj"], **patterns)
    model = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path)
    adapter = read(str(tmp_path))
    assert adapter[f"{layers}.0.self_attn.q_proj"][2] == pytest.approx(3 / 2)
    assert adapter[f"{layers}.1.mlp.up_proj"][2] == pytest.approx(10 / 2**0.5)
    for path, layer in layers_of(model).items():
        assert adapter[path][2] == pytest.approx(layer.scaling["default"])


def test_rows():
    linear = torch.nn.Linear(8, 6)
    rows, x = Rows(linear, 3, 4), torch.randn(3, 5, 8)
    adapters = [(torch.randn(rank, 8), torch.randn(6, rank), 0.5 * rank) for rank in (4, 1)]
    for row, (a, b, scaling) in enumerate(adapters):
        rows.assign(row, a, b, scaling)
        torch.testing.assert_close(rows(x)[row], linear(x[row]) + scaling * x[row] @ a.T @ b.T)
    assert torch.equal(rows(x)[2], linear(x)[2])
    assert torch.allclose(rows(x[:, 0]), rows(x)[:, 0])


def test_it_is_the_idea_and_no_more():
    lines = [line for line in Path(mini_hotswap.__file__).read_text().splitlines() if line.strip()]
    assert len(lines) <= 120
