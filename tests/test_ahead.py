"""Models that are compiled ahead of time: swaps reach them, in this process and in one without a compiler."""

from __future__ import annotations

import doctest
import inspect
import itertools
import json
import os
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from lengths import long
from models import KINDS, call, load, save_family, save_random_adapter
from oracle import untouched
from refusals import refused

import hotswap_lab
from hotswap_lab import AdapterPool, aoti_compile, aoti_load, demo, hotswap_adapter, set_strength
from hotswap_lab import prepare_model_for_compiled_hotswap as prepare
from hotswap_lab.ahead.file import seal
from hotswap_lab.generating import Reader

LLAMA, LINEAR = KINDS["llama"], KINDS["linear"]
AUTO = torch.export.Dim.AUTO
LENGTH = torch.export.Dim("length", min=2, max=9)
#: inputs for :class:`Pair`
PAIR = dict(
    kwargs=dict(x=torch.randn(3, 12), y=torch.randn(6, 12)), dynamic_shapes={"x": {0: LENGTH}, "y": {0: 2 * LENGTH}}
)
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


@pytest.fixture
def bound(package, folders):
    """A model, and what is bound to it."""
    model = load(LLAMA, folders[0])
    return model, aoti_load(package, model)


def assert_reached(ahead, model, fresh, *inputs: dict) -> None:
    """That the compiled code computes what a fresh load does, and that this is not what the base model does."""
    for each in inputs or (ids(), ids(3, 4)):
        expected = call(fresh, each)
        with fresh.disable_adapter():
            change = (call(fresh, each) - expected).abs().max()
        assert change > 1e-3
        torch.testing.assert_close(ahead(**each).logits, expected, rtol=1e-4, atol=1e-5)


# ---- another process


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


# ---- what reaches it


def test_all_that_a_pool_does(package, folders):
    model = load(LLAMA, folders[0])
    prepare(model, adapters=folders)
    pool = AdapterPool(model, adapters=dict(zip("abc", folders, strict=False)), progress=False)
    ahead, base = aoti_load(package, pool), model.get_base_model()

    def assert_as_eager() -> torch.Tensor:
        output = ahead(**ids()).logits
        torch.testing.assert_close(output, call(base, ids()), rtol=1e-4, atol=1e-5)
        return output

    seen = []
    for action in (
        lambda: pool.swap("b"),
        lambda: setattr(pool, "strength", 0.5),
        pool.off,
        lambda: pool.swap("c"),
        lambda: pool.update("c", {key: each * 2 for key, each in _tensors(folders[2]).items()}),
        lambda: pool.swap({"a": 0.5, "b": 0.25}),
        lambda: hotswap_adapter(model, folders[5], "default"),
        lambda: set_strength(model, 0.5, adapter_name="default"),
    ):
        action()
        seen.append(assert_as_eager())
    assert all((one - other).abs().max() > 1e-3 for one, other in itertools.pairwise(seen))


def _tensors(folder: str) -> dict:
    return hotswap_lab.Adapter.load(folder).tensors


def test_arguments_by_position_and_by_default(bound):
    model, ahead = bound
    given = ids()
    expected = ahead(**given).logits
    assert torch.equal(ahead(given["input_ids"], use_cache=False).logits, expected)
    assert torch.equal(ahead(**given, attention_mask=None).logits, expected)
    assert type(ahead(**given)) is type(model(**given))


def test_inputs_that_lie_otherwise_in_memory(bound):
    ahead = bound[1]
    given = ids()
    turned = given["input_ids"].t().contiguous().t()
    assert not turned.is_contiguous()
    assert torch.equal(ahead(turned, use_cache=False).logits, ahead(**given).logits)


# ---- what does not


@pytest.mark.parametrize(
    ("match", "inputs"),
    [
        ("None", dict(input_ids=ids()["input_ids"])),
        ("int32", {**ids(), "input_ids": ids()["input_ids"].int()}),
        (r"\[9\]", {**ids(), "input_ids": ids()["input_ids"][0]}),
        (r"input_ids.shape[1] = 1", {**ids(), "input_ids": ids()["input_ids"][:, :1]}),
        ("attention_mask: [[2, 9]", {**ids(), "attention_mask": torch.ones(2, 9)}),
        ("the inputs input_ids", {**ids(), "color": 1}),
        ("None", dict(use_cache=False)),
        ("True", {**ids(), "use_cache": True}),
    ],
)
def test_inputs_of_another_form(bound, match, inputs):
    """Compiled code takes what it gets for what it was compiled for, and would compute anything."""
    model, ahead = bound
    error = refused("not compiled for such inputs", lambda _: ahead(**inputs), model)
    assert match.replace("\\", "") in str(error)


def merge(model):
    model.merge_adapter()


def move(model):
    layer = model.get_base_model().model.layers[1].mlp.up_proj
    layer.base_layer.weight.data = layer.base_layer.weight.data.clone()


def replace(model):
    model.get_base_model().model.norm.weight = torch.nn.Parameter(torch.ones(16))


def add_another(model):
    model.add_adapter("other", model.peft_config["default"])
    model.set_adapter("other")


CHANGES = {
    "training": (lambda model: model.train(), "training mode"),
    "disabled": (lambda model: model.base_model.disable_adapter_layers(), "adapters that are disabled"),
    "merged": (merge, "an adapter that is merged, 'default'"),
    "another adapter": (add_another, r"the active adapters \['other'\]"),
    "moved": (move, "moved, replaced or resized"),
    "replaced": (replace, "moved, replaced or resized"),
    "half precision": (lambda model: model.half(), "moved, replaced or resized"),
    "unloaded": (lambda model: model.unload(), "modules that were moved, replaced"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_has_changed_since(bound, change):
    model, ahead = bound
    before = ahead(**ids()).logits
    action, match = CHANGES[change]
    action(model)
    refused(match, lambda _: ahead(**ids()), model)
    assert before.isfinite().all()


def test_a_swap_out_of_the_prepared_memory_is_noticed(package, folders, tmp_path):
    """A rank above the prepared one is refused in a prepared model; where that is given up, so is the code."""
    model = load(LLAMA, folders[0])
    ahead = aoti_load(package, model)
    large = save_random_adapter(LLAMA, tmp_path / "large", seed=99, r=20)
    refused("rank", hotswap_adapter, model, large, "default")
    model.delete_adapter("default")
    model.load_adapter(large, "default")
    model.set_adapter("default")
    refused("moved, replaced or resized", lambda _: ahead(**ids()), model)


def other_model(folders):
    return load(LINEAR, save_random_adapter(LINEAR, Path(folders[0]) / "linear", seed=1))


def other_name(folders):
    return load(LLAMA, folders[0], "other")


def other_ranks(folders):
    model = load(LLAMA, folders[0])
    prepare(model, target_rank=32)
    return model


def other_dtype(folders):
    model = load(LLAMA, folders[0]).to(torch.float64)
    prepare(model, adapters=folders)
    return model


def larger_rank(folders):
    return load(LLAMA, save_random_adapter(LLAMA, Path(folders[0]) / "large", seed=1, r=40))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (other_model, "LlamaForCausalLM with 'default'"),
        (other_name, "LlamaForCausalLM with other"),
        (other_ranks, "was compiled for a model of another form"),
        (other_dtype, "torch.float64"),
        (larger_rank, "was compiled for a model of another form"),
        (lambda folders: LLAMA.base(), "no adapter"),
    ],
)
def test_models_of_another_form(package, folders, make, match):
    refused(match, lambda model: aoti_load(package, model), make(folders))


def rewritten(package: Path, target: Path, change) -> Path:
    """A file with other notes."""
    with zipfile.ZipFile(package) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith(("notes.json", "_metadata.json")):
                content = json.dumps(change(json.loads(content))).encode()
            new.writestr(name, content)
    seal(target)
    return target


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda notes: {**notes, "torch": "1.0"} if "torch" in notes else notes, "torch 1.0"),
        (lambda notes: {**notes, "rows": [4, 1]} if "torch" in notes else notes, r"AdapterPool\(..., rows=4\)"),
        pytest.param(
            lambda notes: {**notes, "AOTI_CPU_ISA": "AVX2 SSE4A"},
            "sse4a",
            marks=pytest.mark.skipif(
                not hasattr(torch.cpu, "get_capabilities") or torch.cpu.get_capabilities().get("sse4a") is not False,
                reason="this PyTorch doesn't say what the processor lacks, or it lacks nothing",
            ),
        ),
    ],
)
def test_files_that_are_not_for_here(package, folders, tmp_path, change, match):
    path = rewritten(package, tmp_path / "other.pt2", change)
    refused(match, lambda model: aoti_load(path, model), load(LLAMA, folders[0]))


def test_a_damaged_file(package, folders, tmp_path):
    """One byte anywhere: in a constant it would change an output, in machine code it would end the process."""
    content, damaged, model = package.read_bytes(), tmp_path / "damaged.pt2", load(LLAMA, folders[0])
    draw = random.Random(0)
    with zipfile.ZipFile(package) as archive:  # in each record, in its header, and anywhere
        starts = [each.header_offset for each in archive.infolist()]
        wheres = [each + at for each in starts for at in (0, 20, 90)] + draw.choices(range(len(content)), k=60)
    for where in wheres:
        damaged.write_bytes(content[:where] + bytes([content[where] ^ 1]) + content[where + 1 :])
        with pytest.raises(hotswap_lab.HotswapError, match="no file of aoti_compile, or a damaged one"):
            aoti_load(damaged, model)
    damaged.write_bytes(content[: len(content) // 2])
    refused("a damaged one", lambda model: aoti_load(damaged, model), model)


@pytest.mark.parametrize("record", ["notes.json", "values.safetensors", "_metadata.json"])
def test_a_rewritten_record(package, folders, tmp_path, record):
    with zipfile.ZipFile(package) as old, zipfile.ZipFile(tmp_path / "x.pt2", "w") as new:
        for name in old.namelist():
            new.writestr(name, b"{}" if name.endswith(record) else old.read(name))
    refused("a damaged one", lambda model: aoti_load(tmp_path / "x.pt2", model), load(LLAMA, folders[0]))


def test_no_file_of_ours(folders, tmp_path):
    (tmp_path / "file.pt2").write_bytes(b"PK\x03\x04 and nothing else")
    model = load(LLAMA, folders[0])
    for path in (tmp_path / "file.pt2", tmp_path / "none.pt2"):
        refused("no file of aoti_compile", lambda model, path=path: aoti_load(path, model), model)


def prepared(folders, change=lambda model: None):
    model = load(LLAMA, folders[0])
    prepare(model, adapters=folders)
    change(model)
    return model


@pytest.mark.parametrize(
    ("make", "options", "match"),
    [
        (lambda folders: load(LLAMA, folders[0]), {}, "Only a prepared model"),
        (lambda folders: prepared(folders, lambda model: model.train()), {}, "training mode"),
        (prepared, dict(dynamic_shapes={"ids": {0: AUTO}}), "dynamic_shapes for ids"),
        (prepared, dict(kwargs=dict(input_ids="text")), "can't be exported"),
        (
            lambda folders: prepared_mlp(folders),
            dict(kwargs=dict(x=torch.randn(5, 12)), repeated_blocks=True),
            "no layers that are known to be repeated",
        ),
    ],
)
def test_what_can_not_be_compiled(folders, tmp_path, make, options, match):
    refused(match, lambda model: aoti_compile(model, tmp_path / "x.pt2", **{"kwargs": ids(), **options}), make(folders))
    assert not list(tmp_path.iterdir())


class Pair(torch.nn.Module):
    """Two inputs, of which one is twice as long as the other."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(12, 12)

    def forward(self, x, y):
        return self.first(x) + y.unflatten(0, (-1, 2)).sum(1)


def prepared_pair(folders):
    kind = type(LINEAR)(Pair, lambda: PAIR["kwargs"], ("first",))
    model = load(kind, save_random_adapter(kind, Path(folders[0]) / "pair", seed=1))
    prepare(model, target_rank=8)
    return model


def prepared_mlp(folders):
    model = other_model(folders)
    prepare(model, target_rank=8)
    return model


# ---- in the long form


def windows_of_four(x):
    """A module that pads to windows, which an export decides once."""
    if x.shape[1] % 4:
        x = torch.nn.functional.pad(x, (0, 0, 0, 4 - x.shape[1] % 4))
    return x.view(x.shape[0], -1, 4, 12).sum(1)


class Windows(Pair):
    def forward(self, x):
        return windows_of_four(self.first(x))


@pytest.mark.long
def test_conditions_on_sizes_of_compiled_code(tmp_path):
    kind = type(LINEAR)(Windows, lambda: torch.randn(3, 8, 12), ("first",))
    model = load(kind, save_random_adapter(kind, tmp_path / "adapter", seed=1))
    prepare(model, target_rank=8)
    options = dict(dynamic_shapes={"x": {0: AUTO, 1: AUTO}}, progress=False)
    ahead = aoti_load(aoti_compile(model, tmp_path / "x.pt2", (kind.inputs(),), **options), model)
    for rows, length in itertools.product((2, 5), (8, 9, 10, 12, 16)):
        x = torch.randn(rows, length, 12)
        if length % 4:
            refused(r"x.shape\[1\]", lambda _, x=x: ahead(x), model)
        else:
            torch.testing.assert_close(ahead(x), call(model, x))


@pytest.mark.long
def test_sizes_that_depend_on_one_another(tmp_path):
    model = prepared_pair([str(tmp_path)])
    ahead = aoti_load(aoti_compile(model, tmp_path / "x.pt2", progress=False, **PAIR), model)
    for first, second in ((3, 6), (5, 10)):
        given = dict(x=torch.randn(first, 12), y=torch.randn(second, 12))
        torch.testing.assert_close(ahead(**given), call(model, given))
    refused("size|shape", lambda _: ahead(torch.randn(3, 12), torch.randn(8, 12)), model)


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
@pytest.mark.parametrize("repeated", [False, True])
def test_rows(folders, tmp_path, repeated):
    """Another adapter in each row, through a file, in a pool of another process's making."""
    family = {name: demo.adapter_path(name) for name in demo.adapter_names()}

    def pool():
        return AdapterPool(demo.load("reverse")[0], adapters=family, rows=6, progress=False)

    def tokens(rows):
        return dict(input_ids=torch.randint(0, 90, (rows, 7)), use_cache=False)

    options = dict(dynamic_shapes={"input_ids": {0: AUTO, 1: AUTO}}, repeated_blocks=repeated, progress=False)
    path = aoti_compile(pool(), tmp_path / "rows.pt2", kwargs=tokens(4), **options)
    mine = pool()
    ahead = aoti_load(path, mine)
    for rows in (["shout", "sort", None, "double"], ["caesar", "caesar", "reverse"], ["shout", "sort"]):
        mine.assign(rows)
        given = tokens(len(rows))
        output = ahead(**given).logits
        for row, name in enumerate(rows):
            fresh = demo.load(name)[0] if name else demo.load_base()
            expected = call(fresh, dict(input_ids=given["input_ids"][row : row + 1]))[0]
            torch.testing.assert_close(output[row], expected, rtol=1e-3, atol=1e-4)
        refused("not made of the rows", lambda _: ahead(**tokens(5)), mine)
    mine.swap("shout")
    torch.testing.assert_close(ahead(**given).logits, call(demo.load("shout")[0], given), rtol=1e-3, atol=1e-4)
    refused("AdapterPool", lambda model: aoti_load(path, model), demo.load("reverse")[0])
    with pytest.raises(hotswap_lab.HotswapError, match="exported by aoti_compile only"):
        torch.export.export(mine.model, (), tokens(2))


@pytest.mark.long
def test_layers_one_by_one(folders, tmp_path):
    """Each kind of repeated layer is compiled once. Here there are two kinds: the family's ranks differ by layer.

    Only the length may differ; a block's other sizes are found to be fixed while it is exported.
    """
    model = prepared(folders)
    options = dict(dynamic_shapes={"input_ids": {1: AUTO}}, repeated_blocks=True, progress=False)
    ahead = aoti_load(aoti_compile(model, tmp_path / "x.pt2", kwargs=ids(), **options), model)
    for folder in folders:
        hotswap_adapter(model, folder, "default")
        assert_reached(ahead, model, load(LLAMA, folder), ids(), ids(2, 4))


@pytest.mark.long
def test_reading_in_rows(tmp_path):
    """Eight words at once, each with an adapter of its own: chunks, then letter by letter."""
    names = demo.adapter_names()
    pool = AdapterPool(
        demo.load("reverse")[0], adapters={name: demo.adapter_path(name) for name in names}, rows=8, progress=False
    )
    Reader(pool.model, rows=8).compile_ahead(tmp_path)
    pool.assign(names)
    pool.model(input_ids=torch.ones((8, 2), dtype=torch.long))  # proves that its layers keep the rows apart
    readers = [Reader(pool.model, rows=8), Reader(pool.model, rows=8)]
    readers[1].load_ahead(tmp_path)
    parts = [[number + 1] * (1 + number) for number in range(8)]
    for _ in range(12):
        plain, ahead = (reader.read(parts) for reader in readers)
        torch.testing.assert_close(ahead, plain, rtol=1e-3, atol=1e-4)
        parts = [[letter] for letter in plain.argmax(-1).tolist()]
    letters = torch.ones((7, 1), dtype=torch.long)
    refused("not made of the rows", lambda _: readers[1].compiled[1](letters, letters), pool)


@pytest.mark.long
def test_a_plain_export_follows_swaps(folders, tmp_path):
    """Without any function of ours: exported, compiled, and bound by names."""
    model = prepared(folders)
    base = model.get_base_model()
    program = torch.export.export(base, (), ids(), strict=False)
    options = {"aot_inductor.package_constants_in_so": False}
    path = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "plain.pt2"), inductor_configs=options
    )
    code = torch._inductor.aoti_load_package(path)
    named = {**dict(base.named_parameters(remove_duplicate=False)), **dict(base.named_buffers(remove_duplicate=False))}
    code.load_constants(
        {name: named[name] for name in code.get_constant_fqns()}, check_full_update=True, user_managed=True
    )
    for folder in folders:
        hotswap_adapter(model, folder, "default")
        assert_reached(code, model, load(LLAMA, folder), ids())
    set_strength(model, 0.5, adapter_name="default")
    torch.testing.assert_close(code(**ids()).logits, call(base, ids()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [long(1)])
def test_a_diffusion_model(tmp_path, size):
    digits = pytest.importorskip("hotswap_lab.demo.digits")
    pytest.importorskip("diffusers")
    pool = AdapterPool(
        digits.load("bold"), adapters={name: digits.path(name) for name in digits.names()}, progress=False
    )
    given = dict(sample=digits.noise(4)[: 2 * size], timestep=torch.tensor(500))
    ahead = aoti_load(aoti_compile(pool, tmp_path / "unet.pt2", kwargs=given, progress=False), pool)
    for name in digits.names():
        pool.swap(name)
        expected = digits.load(name)(**given).sample
        torch.testing.assert_close(ahead(**given).sample, expected.detach(), rtol=1e-4, atol=1e-5)
