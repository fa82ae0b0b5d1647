"""Models that are compiled ahead of time: swaps reach them, in this process and in one without a compiler.

What is refused depends on no compiler, and is in ``test_ahead_checks.py``.
"""

from __future__ import annotations

import doctest
import inspect
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import KINDS, call, load, save_family
from oracle import untouched

import hotswap_lab
from hotswap_lab import AdapterPool, aoti_compile, aoti_load, hotswap_adapter
from hotswap_lab import prepare_model_for_compiled_hotswap as prepare

LLAMA, LINEAR = KINDS["llama"], KINDS["linear"]
AUTO = torch.export.Dim.AUTO
#: ten that have little in common
FAMILY = [
    *(dict(r=rank, lora_alpha=alpha) for rank, alpha in ((4, 6), (1, 3), (16, 8))),
    *(dict(r=2, use_rslora=True, target_modules=[name]) for name in ("q_proj", "down_proj")),
    dict(r=3, target_modules=["o_proj", "up_proj"], layers_to_transform=[1]),
    dict(r=5, rank_pattern={"k_proj": 9}, alpha_pattern={"v_proj": 2}),
    dict(r=8, lora_alpha=5, lora_dropout=0.3),
    dict(r=4, use_rslora=True, alpha_pattern={"gate_proj": 1}),
    dict(r=6, target_modules=["k_proj", "gate_proj"], layers_to_transform=[0]),
]


def ids(rows: int = 2, tokens: int = 9) -> dict:
    generator = torch.Generator().manual_seed(rows + 10 * tokens)
    return dict(input_ids=torch.randint(0, 40, (rows, tokens), generator=generator), use_cache=False)


@pytest.mark.long
def test_the_example_runs(tmp_path, monkeypatch):
    """The lines that compile are left out of the other examples' run, since they take long and need a compiler."""
    monkeypatch.chdir(tmp_path)
    text = inspect.getdoc(aoti_compile).replace("# doctest: +SKIP", "")
    test = doctest.DocTestParser().get_doctest(text, {}, "aoti_compile", None, None)
    assert doctest.DocTestRunner().run(test) == (0, len(test.examples))
    assert (tmp_path / "demo.pt2").exists()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save_family(LLAMA, tmp_path_factory.mktemp("family"), *FAMILY)


@pytest.fixture(scope="module")
def package(folders, tmp_path_factory):
    """A tiny Llama that was prepared for the family, in a file."""
    model = load(LLAMA, folders[0])
    prepare(model, adapters=folders)
    path = tmp_path_factory.mktemp("ahead") / "llama.pt2"
    with untouched(model):
        options = dict(dynamic_shapes={"input_ids": {0: AUTO, 1: AUTO}}, progress=False)
        return aoti_compile(model, path, kwargs=ids(), **options)


def assert_reached(ahead, model, fresh, *inputs: dict) -> None:
    """That the compiled code computes what a fresh load does, and that this is not what the base model does."""
    for each in inputs or (ids(), ids(3, 4)):
        expected = call(fresh, each)
        with fresh.disable_adapter():
            change = (call(fresh, each) - expected).abs().max()
        assert change > 1e-3
        torch.testing.assert_close(ahead(**each).logits, expected, rtol=1e-4, atol=1e-5)


def swap_in_turn(package: str, folders: list[str], swaps: int) -> None:
    """What :func:`test_a_process_without_a_compiler` runs there: the model has one adapter, and is not prepared."""
    model, draw = load(LLAMA, folders[3]), random.Random(0)
    ahead, fresh = aoti_load(package, model), [load(LLAMA, folder) for folder in folders]
    for number in [*range(len(folders)), *draw.choices(range(len(folders)), k=swaps)]:
        hotswap_adapter(model, folders[number], "default")
        assert_reached(ahead, model, fresh[number], ids(draw.randint(2, 5), draw.randint(2, 12)))
    print("all reached")


def in_a_process_without_a_compiler(code: str) -> str:
    paths = [*sys.path, str(Path(__file__).parent), str(Path(hotswap_lab.__file__).parent.parent)]
    env = {**os.environ, "PATH": "", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_process_without_a_compiler(package, folders):
    """Ten unlike adapters, and 200 swaps, into a model that the file itself says how to prepare."""
    code = f"import test_ahead\ntest_ahead.swap_in_turn({str(package)!r}, {folders!r}, 200)"
    assert in_a_process_without_a_compiler(code) == "all reached"


def test_inputs_that_lie_otherwise_in_memory(package, folders):
    ahead, given = aoti_load(package, load(LLAMA, folders[0])), ids()
    turned = given["input_ids"].t().contiguous().t()
    assert not turned.is_contiguous()
    assert torch.equal(ahead(turned, use_cache=False).logits, ahead(**given).logits)


# ---- in the long form


class Odd(torch.nn.Module):
    """Small tensors, which AOTInductor likes to write into the code, and one that no table has."""

    def __init__(self):
        super().__init__()
        self.first, self.last = torch.nn.Linear(12, 4), torch.nn.Linear(4, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)) * torch.tensor([1.0, -2.0, 0.5, 3.0]))


@pytest.mark.long
def test_small_tensors_are_read_from_memory(tmp_path):
    kind = type(LINEAR)(Odd, LINEAR.make_inputs, ("first", "last"))
    model = load(kind, *save_family(kind, tmp_path, dict(r=1, lora_alpha=4)))
    prepare(model, target_rank=3)
    path = aoti_compile(model, tmp_path / "odd.pt2", (kind.inputs(),), progress=False)
    with torch.no_grad():
        model.get_base_model().last.base_layer.bias += 5  # of the base model, not of the adapter
    ahead = aoti_load(path, model)
    torch.testing.assert_close(ahead(kind.inputs()), call(model, kind.inputs()))


@pytest.mark.long
def test_layers_one_by_one(folders, tmp_path):
    """Each kind of repeated layer is compiled once. Here there are two kinds: the family's ranks differ by layer.

    Only the length may differ; a block's other sizes are found to be fixed while it is exported.
    """
    model = load(LLAMA, folders[0])
    prepare(model, adapters=folders)
    options = dict(dynamic_shapes={"input_ids": {1: AUTO}}, repeated_blocks=True, progress=False)
    ahead = aoti_load(aoti_compile(model, tmp_path / "x.pt2", kwargs=ids(), **options), model)
    for folder in folders:
        hotswap_adapter(model, folder, "default")
        assert_reached(ahead, model, load(LLAMA, folder), ids(), ids(2, 4))


@pytest.mark.long
def test_a_diffusion_model(tmp_path):
    digits = pytest.importorskip("hotswap_lab.demo.digits")
    pytest.importorskip("diffusers")
    pool = AdapterPool(
        digits.load("bold"), adapters={name: digits.path(name) for name in digits.names()}, progress=False
    )
    given = dict(sample=digits.noise(4)[:2], timestep=torch.tensor(500))
    ahead = aoti_load(aoti_compile(pool, tmp_path / "unet.pt2", kwargs=given, progress=False), pool)
    for name in digits.names():
        pool.swap(name)
        expected = digits.load(name)(**given).sample
        torch.testing.assert_close(ahead(**given).sample, expected.detach(), rtol=1e-4, atol=1e-5)
