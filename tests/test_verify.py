"""The oracle must say no whenever something differs, and yes only when it has seen a difference it could miss."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections import OrderedDict
from dataclasses import replace
from html import unescape

import pytest
import torch
from models import ARCHITECTURES, KINDS, Embedded, load, save_random_adapter
from oracle import assert_equals_fresh_load, untouched
from peft import LoraConfig, PeftModel, get_peft_model
from refusals import refused
from torch.testing._internal.two_tensor import TwoTensor

from hotswap_lab import (
    Adapter,
    RecompileError,
    RecompileWatch,
    Verification,
    hotswap_adapter,
    prepare_model_for_compiled_hotswap,
    verify_hotswap,
)
from hotswap_lab.figures import DARK
from hotswap_lab.figures.equality import equality
from hotswap_lab.figures.palette import BASE

KIND = KINDS["linear"]


@pytest.fixture
def new(tmp_path):
    return save_random_adapter(KIND, tmp_path / "new", seed=2, r=6, lora_alpha=3)


@pytest.fixture
def model(tmp_path, new):
    return swapped(KIND, tmp_path, new)


def swapped(kind, folder, new):
    model = load(kind, save_random_adapter(kind, folder / "old", seed=1, r=4))
    hotswap_adapter(model, new, "default")
    return model


def verify(model, new, **kwargs):
    return verify_hotswap(model, new, **dict(inputs=KIND.inputs()) | kwargs)


#: for what needs a higher precision than a model's own, or is not for float64
SINGLE = replace(KIND, dtype=torch.float32)


def test_merging_and_unmerging_rounds_base_weights(model, new):
    weight = model.get_base_model().first.base_layer.weight
    before = weight.detach().clone()
    model.merge_adapter()
    model.unmerge_adapter()
    assert not torch.equal(weight, before)
    assert verify(model, new, base=KIND.base)
    with torch.no_grad():
        weight.mul_(1.001)
    assert not verify(model, new, base=KIND.base)


@pytest.mark.parametrize("training", [False, True])
def test_yes(model, new, training):
    model.train(training)
    model.get_base_model().last.eval()
    with untouched(model):
        verdict = verify(model, new)
        assert verdict
        assert verdict.difference <= verdict.tolerance < verdict.change / 100
        assert str(verdict) == "matches a fresh load: True"
        assert verify(model, new, base=KIND.base)
        assert verify(model, Adapter.load(new))
        # gray all over, drawn only on demand: a yes is one line
        assert (len(verdict.layers), red_tiles(verdict.figure())) == (4, 0)
        assert verdict._repr_mimebundle_() == {"text/plain": str(verdict)}
        assert "≠" not in verdict.figure().svg


#: what is done to a layer or its model, how many tiles of the picture are red then, and what it says
DAMAGES = {
    "a weight": (lambda model, layer: layer.lora_A["default"].weight.data[0, 0].add_(1e-6), 1, "Not equal"),
    "a precision": (
        lambda model, layer: [layer.lora_A["default"].double(), layer.lora_B["default"].double()],
        *(0, "≠ zeros on one side only, or another dtype (1 of 4 layers)"),
    ),
    "a scaling": (
        lambda model, layer: layer.scaling.update(default=1.001 * layer.scaling["default"]),
        *(0, "≠ scaling is "),
    ),
    "a table": (lambda model, layer: layer.r.update(default=7), 0, "≠ r is 7, fresh 6 (1 of 4 layers)"),
    "the config": (
        lambda model, layer: setattr(model.peft_config["default"], "lora_alpha", 4),
        *(0, ">config.lora_alpha is 4"),
    ),
    "the base": (
        lambda model, layer: layer.base_layer.weight.data.add_(0.01),
        *(0, "1 tensors differ from a fresh load, such as the base model"),
    ),
    "a dead layer": (lambda model, layer: layer.lora_A["default"].weight.data.zero_(), 1, "Not equal"),
    "a hook": (lambda model, layer: layer.register_forward_hook(lambda *given: 1.01 * given[-1]), 0, "outputs differ"),
}


def red_tiles(figure) -> int:
    return len(re.findall(r"<rect [^>]*fill='(?!#d5dde5)#\w+'><title>", figure.svg))


@pytest.mark.parametrize("part", DAMAGES)
def test_no(tmp_path, new, part):
    damage, red, words = DAMAGES[part]
    kind = SINGLE if part == "a precision" else KIND
    model = swapped(kind, tmp_path, new)
    damage(model, model.get_base_model().first)
    verdict = verify(model, new, inputs=kind.inputs(), base=kind.base if part in ("the base", "a hook") else None)
    assert not verdict
    assert str(verdict).startswith("matches a fresh load: False\n")
    svg = verdict.figure().svg
    assert verdict._repr_mimebundle_()["image/svg+xml"].replace(DARK, "") == svg
    assert red_tiles(verdict.figure()) == red
    assert words in svg
    assert max(map(len, re.findall(r"<text[^>]*>([^<]*)<", unescape(svg)))) <= 64, "it is cut off at the right"


def test_a_layer_whose_name_begins_like_anothers(tmp_path):
    def two() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(OrderedDict(l1=torch.nn.Linear(8, 8), l10=torch.nn.Linear(8, 8)))

    config = LoraConfig(r=4, target_modules=["l1", "l10"], init_lora_weights=False)
    get_peft_model(two(), config).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(two(), tmp_path)
    model.get_base_model().l10.lora_A["default"].weight.data.add_(1)
    verdict = verify_hotswap(model, tmp_path, inputs=(torch.ones(2, 8),))
    assert not verdict
    assert [(path, share > 0) for path, share, *_ in verdict.layers] == [("l1", False), ("l10", True)]


def test_verdicts_next_to_each_other(model, new):
    """The same layers at the same heights, each column with its verdict, and no text beyond the picture."""
    right = verify(model, new)
    for part in ("the config", "a scaling", "a weight"):
        DAMAGES[part][0](model, model.get_base_model().first)
    verdicts = {"by hand": verify(model, new), "by PEFT": verify(model, new), "by us": right}
    figure, wrong = equality(verdicts), "Not equal to a fresh load"
    assert str(figure) == f"by hand: {wrong}. by PEFT: {wrong}. by us: Equal to a fresh load"
    tiles = re.findall(r"<rect x='([\d.]+)' y='([\d.]+)' [^>]*fill='(#\w+)'><title>(\w+)", figure.svg)
    columns = [tiles[start : start + 4] for start in (0, 4, 8)]
    assert [[each[1::2] for each in column] for column in columns] == [[each[1::2] for each in columns[0]]] * 3
    assert len({each[:2] for each in tiles}) == 12
    assert [sum(fill != BASE for _, _, fill, _ in column) for column in columns] == [1, 1, 0]
    width = int(re.search(r"width='(\d+)'", figure.svg)[1])
    texts = re.findall(r"<text x='([\d.]+)' y='[\d.]+' font-size='(\d+)' text-anchor='start'[^>]*>([^<]*)<", figure.svg)
    assert "≠ scaling is " in "".join(text for *_, text in texts)
    assert all(float(x) + 0.5 * int(size) * len(unescape(text)) <= width for x, size, text in texts)


class Counted(Embedded):
    """With a buffer, and outputs that are integers."""

    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.zeros(2))

    def forward(self, ids):
        return ids, ids > 0, super().forward(ids)


DIFFER = "differ from a fresh load"
#: what changes no output, what a verdict says of it, and its name
UNSEEN = [
    (lambda base, rows: base.embed.base_layer.weight.data.index_fill_(0, rows, 1), DIFFER, "embed.weight"),
    (lambda base, rows: base.steps.add_(1), DIFFER, "steps"),
    (lambda base, rows: setattr(base, "steps", base.steps.int()), DIFFER, "steps"),
    (lambda base, rows: setattr(base, "steps", base.steps[None]), DIFFER, "steps"),
    (lambda base, rows: delattr(base, "steps"), "of a fresh load are missing", "steps"),
    (lambda base, rows: base.register_buffer("more", torch.zeros(2)), "that a fresh load lacks", "more"),
]


@pytest.mark.parametrize(("change", "words", "name"), UNSEEN)
def test_base_weights_that_no_output_depends_on(tmp_path, change, words, name):
    """All rows of an embedding but those of the inputs, a buffer, and a whole base model that was scaled."""
    kind = replace(KINDS["embedding"], make_random=Counted)
    folder = save_random_adapter(kind, tmp_path / "one", seed=1, r=4)
    model = load(kind, folder)
    unseen = torch.tensor(sorted({*range(20)} - {*kind.inputs().flatten().tolist()}))
    assert verify_hotswap(model, folder, inputs=kind.inputs(), base=kind.base)
    change(model.get_base_model(), unseen)
    verdict = verify_hotswap(model, folder, inputs=kind.inputs(), base=kind.base)
    assert verdict.difference == 0
    assert verdict.mismatches == (f"1 tensors {words}, such as the base model's {name}",)
    for name, parameter in model.get_base_model().named_parameters():
        parameter.data *= 1 if "lora_" in name else 1.3
    # as the docstring says: without a base, it is the adapter alone that is compared
    assert verify_hotswap(model, folder, inputs=kind.inputs())
    assert not verify_hotswap(model, folder, inputs=kind.inputs(), base=kind.base)


#: a buffer of the live base model and of a fresh one, of other classes or offloaded, and whether they count as equal
ONES, META, TWICE = torch.ones(2), torch.ones(2, device="meta"), TwoTensor(torch.ones(2), torch.ones(2))
BUFFERS = [(TWICE, ONES, True), (META, ONES, True), (ONES, META, True), (TWICE, TwoTensor(ONES, ONES + 1e-6), False)]


@pytest.mark.parametrize(("live", "fresh", "is_equal"), BUFFERS)
def test_buffers_that_are_no_plain_tensors(tmp_path, live, fresh, is_equal):
    kind = replace(KINDS["embedding"], make_random=Counted)
    folder = save_random_adapter(kind, tmp_path / "one", seed=1, r=4)
    model, base = load(kind, folder), kind.base()
    model.get_base_model().steps, base.steps = live, fresh
    verdict = verify_hotswap(model, folder, inputs=kind.inputs(), base=lambda: base)
    assert bool(verdict) == is_equal, verdict


#: fields of a config with a dict or a list, or without one where a fresh load has one, and the other way round
FIELDS = [
    *(("rank_pattern", None), ("rank_pattern", {"query": 3}), ("megatron_config", {"rank": 1})),
    *(("layers_to_transform", [0]), ("layer_replication", [(0, 2)])),
]


@pytest.mark.parametrize(("field", "value"), FIELDS)
def test_fields_with_dicts_and_lists(tmp_path, field, value):
    bert, what = ARCHITECTURES["bert"], dict(target_modules=["query"], rank_pattern={"query": 4})
    folder = save_random_adapter(bert, tmp_path / "one", seed=1, layers_to_transform=[0, 1], **what)
    model = load(bert, folder)
    assert verify_hotswap(model, folder, inputs=bert.inputs())
    fresh = getattr(model.peft_config["default"], field)
    setattr(model.peft_config["default"], field, value)
    verdict = verify_hotswap(model, folder, inputs=bert.inputs())
    assert verdict.mismatches == (f"config.{field} is {value!r}, fresh {fresh!r}",)


#: what of the package may run in the oracle: what finds an adapter, reads names, and guards against side effects
ASKED = {
    *(f"core.{each}" for each in ("host", "compiled", "journal", "slot", "tensors", "wrappers")),
    *(f"beyond.{each}" for each in ("lora", "shards", "guards", "base_twin")),
    *(f"files.{each}" for each in ("reading", "sources", "hub", "saving")),
    *(
        "core.prepared",
        "core.lora",
        "core.lora_method",
        "core.state_dict_hooks",
        "verify",
        "compat",
        "threads",
        "threads.turns",
        "swap",
    ),
}


#: how tables that belong to a live model stay out of its copies
COPYING = ("__deepcopy__", "__reduce__")


@pytest.mark.parametrize("prepared", [False, True])
def test_nothing_that_decides_a_swap_runs_here(model, new, prepared):
    if prepared:
        prepare_model_for_compiled_hotswap(model, target_rank=8)
    ran = set()

    def note(frame, event, _) -> None:
        name = frame.f_globals.get("__name__", "")
        if event == "call" and name.startswith("hotswap_lab.") and frame.f_code.co_name not in COPYING:
            ran.add(name.removeprefix("hotswap_lab."))

    sys.setprofile(note)
    try:
        assert verify(model, new, base=KIND.base)
        assert verify(model, new)
    finally:
        sys.setprofile(None)
    assert {"verify", "files.saving"} <= ran <= ASKED, ran - ASKED


def test_a_graph_for_other_shapes(tmp_path):
    """Where nothing may be compiled again, the model's own example inputs have to be of a shape that was compiled."""
    torch.compiler.reset()
    kind = KINDS["embedding"]
    folder = save_random_adapter(kind, tmp_path / "one", seed=1, r=4)
    model = load(kind, folder)
    model.get_base_model().dummy_inputs = {"ids": torch.ones((3, 5), dtype=torch.int64)}
    compiled = torch.compile(model, backend="eager", dynamic=False)
    inputs = {"ids": torch.arange(8)[None]}
    with torch.no_grad():
        compiled(**inputs)
    with RecompileWatch(allow=0), pytest.raises(RecompileError, match="a tensor has another shape"):
        verify_hotswap(compiled, folder)
    with RecompileWatch(allow=0):
        assert verify_hotswap(compiled, folder, inputs=inputs, base=kind.base)
    assert verify_hotswap(compiled, folder)


def test_what_peft_fills_in_when_it_saves_is_no_difference(model, tmp_path):
    """The base model's name, and for a model without a task, the class that it has."""
    model.get_base_model().name_or_path = "somewhere/else"
    model.peft_config["default"].auto_mapping = None
    model.save_pretrained(tmp_path / "saved")
    assert verify(model, tmp_path / "saved")


def test_names_that_peft_turns_into_a_set(tmp_path):
    """As it does with some fields, for architectures that it knows, be there names or none."""
    mixtral = ARCHITECTURES["mixtral"]
    old, new = (save_random_adapter(mixtral, tmp_path / f"{seed}", seed=seed) for seed in (1, 2))
    config = json.loads((tmp_path / "2" / "adapter_config.json").read_text())
    (tmp_path / "2" / "adapter_config.json").write_text(json.dumps({**config, "target_parameters": []}))
    model = load(mixtral, old)
    hotswap_adapter(model, new, "default")
    assert isinstance(load(mixtral, new).peft_config["default"].target_parameters, set)
    verdict = verify_hotswap(model, new, inputs=mixtral.inputs(), base=mixtral.base)
    assert verdict, verdict


def test_inconclusive_when_the_adapter_changes_nothing(tmp_path):
    """B = 0, as LoRA starts: everything equals everything."""
    model = get_peft_model(KIND.base(), LoraConfig(r=4, target_modules=["first"]))
    model.save_pretrained(tmp_path / "zero")
    verdict = verify(model, tmp_path / "zero")
    assert not verdict
    assert "inconclusive" in str(verdict)


def test_two_active_adapters_are_refused_with_advice_that_works(model, new):
    hotswap_adapter(model, new, "default")
    model.load_adapter(new, "other")
    model.base_model.set_adapter(["default", "other"])
    error = refused(r"active adapters \['default', 'other'\]", verify, model, new)
    assert "call model.set_adapter('default') first" in error.refusals[0].next_step
    model.set_adapter("default")
    assert verify(model, new)


def test_what_can_not_be_verified(model, new):
    refused("can't be verified without inputs.*\n.*TypeError: .* missing", verify_hotswap, model, new)
    model.get_base_model().dummy_inputs = {"ids": torch.ones(1)}  # as of Whisper, whose features are not among them
    refused("without inputs.*\n.*TypeError: .*'ids'", verify_hotswap, model, new)
    model.train()  # which it is again after an error
    with untouched(model), pytest.raises(TypeError, match="ids"):
        verify_hotswap(model, new, inputs=model.get_base_model().dummy_inputs)
    # a name is easily taken for a folder; the Hub is not asked for minutes where there is no network
    refused(r"Can't find 'adapter_config\.json' at 'shout'", verify, model, "shout")
    model.load_adapter(new, "other")
    model.set_adapter("other")
    refused(r"set_adapter\('default'\) first", verify, model, new)
    model.set_adapter("default")
    model.base_model.disable_adapter_layers()
    refused("disabled: True", verify, model, new)
    model.base_model.enable_adapter_layers()
    model.merge_adapter(adapter_names=["default"])
    refused(r"disabled: False, merged: \['default'\]", verify, model, new)


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(tmp_path, new, dtype, autocast):
    old = save_random_adapter(KIND, tmp_path / "older", seed=3, r=2)
    kind = replace(KIND, make_random=lambda: KIND.make_random().to(dtype))
    model = load(kind, old, autocast_adapter_dtype=autocast)
    hotswap_adapter(model, new, "default")
    verdict = verify_hotswap(model, new, inputs=KIND.inputs().to(dtype))
    assert (verdict.difference, verdict.mismatches) == (0, ())
    fresh = load(kind, new, autocast_adapter_dtype=autocast)
    assert [each.dtype for each in model.parameters()] == [each.dtype for each in fresh.parameters()]
    next(each for each in model.modules() if hasattr(each, "lora_A")).lora_A["default"].weight.data.mul_(2)
    assert "tensors differ" in verify_hotswap(model, new, inputs=KIND.inputs().to(dtype)).mismatches[0]


def test_a_long_list_of_mismatches_is_cut_short():
    verdict = Verification(difference=0.0, change=1.0, tolerance=1e-5, mismatches=tuple(map(str, range(72))))
    assert str(verdict).splitlines() == ["matches a fresh load: False", *"0123456789", "and 62 more, see `mismatches`"]
    assert verdict._repr_mimebundle_() == {"text/plain": str(verdict)}  # no picture without layers, as of prompts


def test_an_adapter_that_acts_by_the_base_models_biases(tmp_path):
    """The reference starts from the biases that the model had before: or the adapter would seem to change nothing."""
    bert = ARCHITECTURES["bert"]
    plain = save_random_adapter(bert, tmp_path / "plain", seed=1, target_modules=["query"])
    biased = get_peft_model(bert.base(), LoraConfig(target_modules=["query"], bias="all"))
    for name, parameter in biased.named_parameters():
        parameter.data += 0.5 * name.endswith("bias")
    biased.save_pretrained(tmp_path / "biased")
    model = load(bert, plain)
    hotswap_adapter(model, tmp_path / "biased", "default")
    verdict = verify_hotswap(model, tmp_path / "biased", inputs=bert.inputs())
    assert verdict, verdict


class Noisy(torch.nn.Linear):
    """A layer that never computes the same twice."""

    noise = 0.01

    def forward(self, x):
        outputs = super().forward(x)
        return outputs + self.noise * torch.rand(outputs.shape, generator=GENERATOR)


GENERATOR = torch.Generator().manual_seed(0)


@pytest.mark.parametrize("noise", [0.001, 1.0])
def test_a_model_that_is_not_deterministic(model, new, tmp_path, noise, monkeypatch):
    """Noise is not taken for a wrong swap, nor a wrong swap for noise."""
    monkeypatch.setattr(Noisy, "noise", noise)
    other = save_random_adapter(KIND, tmp_path / "other", seed=4, r=6, lora_alpha=30)
    model.get_base_model().blocks[0].get_base_layer().__class__ = Noisy
    verdict, wrong = verify(model, new), verify(model, other)
    assert bool(verdict) == (noise < 0.1)
    assert verdict.conclusive == (noise < 0.1)
    assert "not deterministic: two calls of the fresh one differ by up to" in str(verdict)
    assert not wrong
    assert wrong.difference > wrong.tolerance or noise > 0.1


class Amplifying(torch.nn.Module):
    """A model whose outputs amplify rounding, as random adapters in deep models do."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(12, 12)

    def forward(self, x):
        return torch.sin(300 * self.first(x))


def rounding_otherwise(layer):
    """Round a live model's base layer in a different way: more exactly, or only to float32."""
    base, own = layer.base_layer, layer.base_layer.weight.dtype
    other = {torch.float32: torch.float64, torch.float64: torch.float32}[own]
    base.forward = lambda x: torch.nn.functional.linear(*(each.to(other) for each in (x, base.weight, base.bias))).to(
        own
    )


def with_stale_scaling(layer):
    """As if a graph had an adapter's scaling as a constant: no table shows it."""
    layer.register_forward_hook(lambda layer, given, out: out + 1e-3 * (out - layer.base_layer(*given)))


#: a precision; what runs in the place of the live model, if not that; and whether it may round as float32 does
ROUNDING = [(torch.float32, None, True), (torch.float64, "eager", True), (torch.float64, None, False)]


@pytest.mark.parametrize(("dtype", "backend", "may_round"), ROUNDING)
def test_rounding_is_measured_where_outputs_differ(tmp_path, dtype, backend, may_round):
    """A right swap that rounds otherwise is right; a scaling that only the outputs show is wrong."""
    torch.compiler.reset()
    kind = replace(KIND, make_random=Amplifying, modules=("first",), dtype=dtype)
    folder = save_random_adapter(kind, tmp_path / "one", seed=1, r=4)

    def verdict_of(damage, **kwargs):
        layer = (model := load(kind, folder)).get_base_model().first
        damage(layer)
        weights = [each.clone() for each in model.parameters()]
        model = torch.compile(model, backend=backend) if backend else model
        verdict = verify_hotswap(model, folder, inputs=kind.inputs(), base=kind.base, **kwargs)
        assert all(map(torch.equal, model.parameters(), weights))
        return verdict

    verdict = verdict_of(rounding_otherwise)
    limit = {torch.float32: 2e-5, torch.float64: 1e-10}[dtype]
    assert verdict.difference > limit, "this model must round otherwise for the test to mean anything"
    assert bool(verdict) == may_round, verdict
    assert (verdict.tolerance > limit, verdict.margin) == ((True, 1000) if may_round else (False, 100))
    assert not verdict_of(rounding_otherwise, tolerance=limit)
    wrong = verdict_of(with_stale_scaling)
    assert (bool(wrong), wrong.conclusive, wrong.mismatches) == (False, True, ())
    assert wrong.difference > wrong.tolerance


@pytest.mark.long
def test_what_inductor_rounds_is_no_mistake(tmp_path):
    """It rounds in a different way what a float64 model computes in float32: norms and ropes."""
    torch.compiler.reset()
    kind = KINDS["llama"]
    folder = save_random_adapter(kind, tmp_path / "one", seed=1, r=4)
    verdict = verify_hotswap(torch.compile(load(kind, folder)), folder, inputs=kind.inputs())
    assert verdict.difference > 1e-10
    assert verdict, verdict


def mica() -> bool:
    field = next(each for each in dataclasses.fields(LoraConfig) if each.name == "init_lora_weights")
    return "mica" in field.metadata.get("lora_variants", ())


@pytest.mark.skipif(not mica(), reason="this version of PEFT has no MiCA")
@pytest.mark.parametrize("is_trainable", [True, False])
def test_weights_that_peft_freezes(tmp_path, is_trainable):
    """MiCA trains lora_A alone; the swap follows it, and the oracle compares it."""
    folders = [
        save_random_adapter(SINGLE, tmp_path / str(seed), seed=seed, r=4, target_modules=["first"], **arguments)
        for seed, arguments in enumerate([{}, dict(init_lora_weights="mica"), {}])
    ]
    model = load(SINGLE, folders[0], is_trainable=is_trainable)
    layer = model.get_base_model().first
    for number in (1, 2, 1, 0):
        hotswap_adapter(model, folders[number], "default")
        trained = [getattr(layer, table)["default"].weight.requires_grad for table in ("lora_A", "lora_B")]
        assert trained == [is_trainable, is_trainable and number != 1]
        assert_equals_fresh_load(model, SINGLE, folders[number], is_trainable=is_trainable)
        assert verify(model, folders[number], inputs=SINGLE.inputs())
        layer.lora_B["default"].requires_grad_(is_trainable and number == 1)
        verdict = verify(model, folders[number], inputs=SINGLE.inputs())
        assert bool(verdict) != is_trainable
        assert "requires_grad in lora_B" in str(verdict) or not is_trainable
        layer.lora_B["default"].requires_grad_(is_trainable and number != 1)
    model.requires_grad_(False)  # for inference
    assert verify(model, folders[0], inputs=SINGLE.inputs())
