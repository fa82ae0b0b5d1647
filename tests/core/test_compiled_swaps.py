"""Swaps into compiled models: every output equals a fresh load, and nothing is ever compiled again."""

from __future__ import annotations

import random
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lengths import few_of
from models import ARCHITECTURES, KINDS, Kind, call, load, save_random_adapter
from peft import LoraConfig, get_peft_model
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora import LoraLayer
from refusals import refused

from hotswap_lab import (
    HotswapError,
    RecompileWatch,
    demo,
    get_strength,
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
    plan_hotswap,
    prepare_model_for_compiled_hotswap,
    resolve_slot,
    set_strength,
    verify_hotswap,
)
from hotswap_lab.files.reading import Adapter

pytestmark = pytest.mark.usefixtures("fresh_compiler")
LLAMA, LINEAR = KINDS["llama"], KINDS["linear"]


@pytest.fixture
def folders(tmp_path):
    """Other rank, other alpha, other layers, other dropout, rsLoRA."""
    return [
        save_random_adapter(LLAMA, tmp_path / "a", seed=1, r=4, lora_alpha=6),
        save_random_adapter(LLAMA, tmp_path / "b", seed=2, r=8, lora_alpha=5, lora_dropout=0.3),
        save_random_adapter(LLAMA, tmp_path / "c", seed=3, r=2, use_rslora=True, target_modules=["q_proj", "up_proj"]),
        save_random_adapter(LLAMA, tmp_path / "d", seed=4, r=3, target_modules=["down_proj"]),
    ]


def prepared(kind: Kind, folders: list[str], first: int = 0):
    model = load(kind, folders[first])
    prepare_model_for_compiled_hotswap(model, adapters=folders)
    return model


def expected_outputs(kind: Kind, folders: list[str]) -> list[torch.Tensor]:
    """What fresh loads compute, made sure to differ from one another and from the base model by far."""
    outputs = [call(load(kind, folder), kind.inputs()) for folder in folders]
    for number, one in enumerate(outputs):
        for other in (*outputs[:number], call(kind.base(), kind.inputs())):
            assert (one - other).abs().max() > 100 * TOLERANCE * one.abs().max()
    return outputs


TOLERANCE = 1e-5


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE * expected.abs().max().item())


def assert_swaps_without_recompiling(kind, compiled, folders, order, inputs=None) -> None:
    """The first calls compile; then each swap of ``order`` gives the output of a fresh load, from the same graph."""
    expected = expected_outputs(kind, folders)
    slot = resolve_slot(compiled, "default")
    call(compiled, kind.inputs())
    addresses = slot.data_ptrs()
    with RecompileWatch(allow=0) as watch:
        for step, number in enumerate(order):
            if step % 2:
                new = Adapter.load(folders[number])
                hotswap_adapter_from_state_dict(compiled, new.tensors, "default", new.config)
            else:
                hotswap_adapter(compiled, folders[number], "default")
            assert_close(call(compiled, kind.inputs()), expected[number])
    assert (watch.compiles, watch.recompiles) == (0, 0)
    assert slot.data_ptrs() == addresses


MODULES = KINDS["llama"].modules


@st.composite
def families(draw) -> list[dict]:
    """Configs of a family: any ranks, alphas and patterns, targets that overlap or don't."""
    family = []
    for _ in range(draw(st.integers(3, 6))):
        targets = draw(st.lists(st.sampled_from(MODULES), min_size=1, max_size=7, unique=True))
        ranks, alphas = st.integers(1, 32), st.integers(16, 64)
        family.append(
            dict(
                r=draw(ranks),
                lora_alpha=draw(alphas),
                use_rslora=draw(st.booleans()),
                lora_dropout=draw(st.sampled_from([0.0, 0.1, 0.5])),
                target_modules=targets,
                layers_to_transform=draw(st.sampled_from([None, [0], [1]])),
                rank_pattern=draw(st.dictionaries(st.sampled_from(targets), ranks, max_size=2)),
                alpha_pattern=draw(st.dictionaries(st.sampled_from(targets), alphas, max_size=2)),
            )
        )
    return family


def _assert_any_order(folder, family, seed, swaps):
    torch.compiler.reset()
    folders = [
        save_random_adapter(LLAMA, folder / str(number), seed=seed + number, **config)
        for number, config in enumerate(family)
    ]
    generator = random.Random(seed)
    compiled = torch.compile(prepared(LLAMA, folders, generator.randrange(len(folders))), backend="aot_eager")
    order = [generator.randrange(len(folders)) for _ in range(swaps)]
    assert_swaps_without_recompiling(LLAMA, compiled, folders, order)


@pytest.mark.long
@settings(max_examples=3, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
@given(family=families(), seed=st.integers(0, 2**31))
def test_any_family_in_any_order(tmp_path_factory, family, seed):
    _assert_any_order(tmp_path_factory.mktemp("family"), family, seed, swaps=200)


def test_a_family_in_any_order(tmp_path):
    family = [
        dict(r=3, lora_alpha=40, lora_dropout=0.1, target_modules=["q_proj", "up_proj"], layers_to_transform=[1]),
        dict(r=17, lora_alpha=20, use_rslora=True, target_modules=list(MODULES), rank_pattern={"k_proj": 5}),
        dict(r=8, lora_alpha=33, target_modules=["down_proj"], alpha_pattern={"down_proj": 60}),
    ]
    _assert_any_order(tmp_path, family, seed=7, swaps=30)


@pytest.mark.long
def test_without_preparation_the_watch_does_see_recompiles(folders):
    compiled = torch.compile(load(LLAMA, folders[0]), backend="aot_eager")
    expected = expected_outputs(LLAMA, folders[:3])
    call(compiled, LLAMA.inputs())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with RecompileWatch() as watch:
            for number in (1, 2):
                hotswap_adapter(compiled, folders[number], "default")
                assert_close(call(compiled, LLAMA.inputs()), expected[number])
    assert watch.recompiles == 2
    assert any("another shape" in reason or "Python number" in reason for reason in watch.reasons)
    hotswap_adapter(compiled, folders[0], "default")
    with RecompileWatch(allow=0):
        call(compiled, LLAMA.inputs())  # the graph of the first adapter is still there
    hotswap_adapter(compiled, folders[1], "default", add_layers=False)
    torch.compiler.reset()


@pytest.mark.parametrize("name", few_of({**KINDS, **ARCHITECTURES}, ("gpt2", "conv", "embedding", "shared")))
def test_kinds_of_layers_and_architectures(name, tmp_path):
    kind = KINDS.get(name) or ARCHITECTURES[name]
    family = [dict(r=4, lora_alpha=6), dict(r=8, lora_alpha=5), dict(r=12, use_rslora=True)]
    family += [dict(r=4, target_modules=[kind.modules[place]]) for place in (0, -1) if len(kind.modules) > 1]
    folders = [save_random_adapter(kind, tmp_path / str(n), n, **lora) for n, lora in enumerate(family)]
    compiled = torch.compile(prepared(kind, folders), backend="aot_eager")
    assert_swaps_without_recompiling(kind, compiled, folders, [*range(1, len(folders)), 0, *range(len(folders))[::-1]])


MODES = {
    "default": {},
    "dynamic": dict(dynamic=True),
    "reduce-overhead": dict(mode="reduce-overhead"),
    "max-autotune-no-cudagraphs": dict(mode="max-autotune-no-cudagraphs"),
    "fullgraph": dict(fullgraph=True),
}


@pytest.mark.parametrize("mode", few_of(MODES, ()))
def test_modes_of_inductor(mode, folders):
    compiled = torch.compile(prepared(LLAMA, folders), backend="inductor", **MODES[mode])
    assert_swaps_without_recompiling(LLAMA, compiled, folders, (1, 2, 3, 0, 3, 2, 1))


def compiled_regions(model):
    """Each block for itself: shorter to compile, and the blocks share graphs."""
    for block in model.get_base_model().model.layers:
        block.compile(backend="inductor")
    return model


FORMS = {
    "regions": compiled_regions,
    "in place": lambda model: model.compile(backend="aot_eager") or model,
}


@pytest.mark.long
@pytest.mark.parametrize("form", FORMS)
def test_other_forms_of_compiling(folders, form):
    assert_swaps_without_recompiling(LLAMA, FORMS[form](prepared(LLAMA, folders)), folders, (1, 2, 3, 0, 3, 2, 1))


@pytest.mark.long
def test_swapped_through_the_original(folders):
    model, expected = prepared(LLAMA, folders), expected_outputs(LLAMA, folders)
    wrapper = torch.compile(model, backend="aot_eager")
    call(wrapper, LLAMA.inputs())
    with RecompileWatch(allow=0):
        for number in (2, 1, 3):
            hotswap_adapter(model, folders[number], "default")
            assert_close(call(wrapper, LLAMA.inputs()), expected[number])


@pytest.mark.long
def test_several_lengths_of_input(folders):
    """Each kind of input is compiled once; swaps add nothing to that."""
    compiled = torch.compile(prepared(LLAMA, folders), backend="aot_eager", dynamic=True)
    inputs = [{"input_ids": torch.randint(0, 40, (2, length))} for length in (5, 9, 17)]
    expected = [[call(load(LLAMA, folder), each) for each in inputs] for folder in folders]
    for each in inputs:
        call(compiled, each)
    with RecompileWatch(allow=0):
        for number in (1, 2, 3, 0):
            hotswap_adapter(compiled, folders[number], "default")
            for each, output in zip(inputs, expected[number], strict=True):
                assert_close(call(compiled, each), output)


@pytest.mark.long
def test_training_a_compiled_model_between_swaps(folders):
    """Forward and backward: one graph each, for all adapters without dropout."""
    few = [folders[0], folders[2], folders[3]]
    model = load(LLAMA, few[0], is_trainable=True)
    prepare_model_for_compiled_hotswap(model, adapters=few)
    compiled = torch.compile(model, backend="aot_eager")
    compiled(**LLAMA.inputs()).logits.sum().backward()
    gradients = {}
    with RecompileWatch(allow=0) as watch:
        for number in (1, 2, 0):
            hotswap_adapter(compiled, few[number], "default")
            assert all(parameter.grad is None for parameter in model.parameters())
            compiled(**LLAMA.inputs()).logits.sum().backward()
            gradients[number] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert not watch.compilations
    for number, folder in enumerate(few):
        fresh = load(LLAMA, folder, is_trainable=True)
        fresh(**LLAMA.inputs()).logits.sum().backward()
        for name, parameter in fresh.named_parameters():
            if parameter.grad is not None:
                own = tuple(slice(size) for size in parameter.shape)
                torch.testing.assert_close(gradients[number][name][own], parameter.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.long  # notebooks/03_compiled_swap.ipynb does the same
def test_the_embedded_family_on_inductor():
    names = demo.adapter_names()
    model, _ = demo.load("caesar")
    prepare_model_for_compiled_hotswap(model, adapters=[demo.adapter_path(name) for name in names])
    compiled = torch.compile(model, backend="inductor", fullgraph=True)
    with torch.no_grad():
        compiled(**model.get_base_model().dummy_inputs)
        with RecompileWatch(allow=0):
            for name in (*names, *reversed(names)):
                hotswap_adapter(compiled, demo.adapter_path(name), "default")
                assert verify_hotswap(compiled, demo.adapter_path(name), base=demo.load_base)


# ---- strength, and PEFT's own ways to change a scaling


def lora_layers(model) -> list[LoraLayer]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def with_strength(kind: Kind, folder: str, strength: float) -> torch.Tensor:
    """The truth: a fresh load whose scalings are Python floats."""
    fresh = load(kind, folder)
    for layer in lora_layers(fresh):
        layer.scaling["default"] *= strength
    return call(fresh, kind.inputs())


@pytest.mark.long
def test_strength_changes_without_recompiling(folders):
    """By ours, and by PEFT's own ways, which write floats."""
    model = prepared(LLAMA, folders)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    call(compiled, LLAMA.inputs())
    addresses = [layer.scaling["default"].data_ptr() for layer in lora_layers(model)]

    def assert_strength(strength: float, number: int = 1) -> None:
        assert_close(call(compiled, LLAMA.inputs()), with_strength(LLAMA, folders[number], strength))
        assert [layer.scaling["default"].data_ptr() for layer in lora_layers(model)] == addresses

    def on_each(change) -> None:
        for layer in lora_layers(model):
            change(layer)

    with RecompileWatch(allow=0):
        for number in (2, 0, 3):
            hotswap_adapter(compiled, folders[number], "default")
            assert get_strength(compiled) == 1
            for strength in (0, 0.3, 1, 2.5, -1):
                set_strength(compiled, strength)
                assert_strength(strength, number)
                assert get_strength(compiled) == strength
        hotswap_adapter(compiled, folders[1], "default")
        on_each(lambda layer: layer.set_scale("default", 0.4))
        assert_strength(0.4)
        on_each(lambda layer: layer.scale_layer(3.0))
        assert_strength(1.2)
        on_each(lambda layer: layer.unscale_layer(3.0))
        assert_strength(0.4)
        on_each(lambda layer: layer.unscale_layer())
        assert_strength(1)
        with rescale_adapter_scale(model, 0.25):
            assert_strength(0.25)
            with rescale_adapter_scale(model, 2):
                assert_strength(0.5)
        assert_strength(1)


def test_scaling_up_and_down_a_thousand_times_ends_where_it_started(folders):
    """diffusers scales before and after each call."""
    model = prepared(LLAMA, folders)
    layer = lora_layers(model)[0]
    trained = float(layer.scaling["default"])
    for scale in (0.7, 0.3, 1.9) * 333:
        layer.scale_layer(scale)
        layer.unscale_layer(scale)
    assert float(layer.scaling["default"]) == pytest.approx(trained, rel=1e-6)


# ---- what a compiled graph would not notice


@pytest.mark.long
@pytest.mark.parametrize("how", ["options", "config"])
def test_freezing_keeps_the_old_adapter_and_is_refused(folders, how):
    """If PyTorch ever changes the reason for it, the refusal can go."""
    folders, match = _linear_folders(folders), r"would go on with the old adapter(.|\n)*freezing"
    model = prepared(LINEAR, folders)
    with torch._inductor.config.patch(freezing=how == "config"):
        compiled = torch.compile(model, options={"freezing": True} if how == "options" else None)
        before = call(compiled, LINEAR.inputs())
        refused(match, hotswap_adapter, compiled, folders[1], "default")
        assert torch.equal(call(compiled, LINEAR.inputs()), before)
    if how == "config":
        refused("compiled with freezing", hotswap_adapter, compiled, folders[1], "default")
        hotswap_adapter(model, folders[1], "default")  # the original does not know that it was compiled
        assert torch.equal(call(compiled, LINEAR.inputs()), before)
        assert not torch.allclose(call(model, LINEAR.inputs()), before)


@pytest.mark.parametrize("ready", [False, True])
def test_missing_guards_speak_against_a_plan_unless_only_values_change(folders, ready):
    model = prepared(LLAMA, folders) if ready else load(LLAMA, folders[0])
    compiled = torch.compile(model, backend="eager", options={"guard_filter_fn": lambda entries: entries})
    assert plan_hotswap(compiled, folders[1]).ok == ready


@pytest.mark.long
@pytest.mark.parametrize("way", ["guards are not evaluated", "guards may be missing"])
def test_missing_guards_are_refused_unless_only_values_change(folders, way):
    options = None if "evaluated" in way else {"guard_filter_fn": lambda entries: [False] * len(entries)}
    models = load(LLAMA, folders[0]), prepared(LLAMA, folders)
    unprepared, ready = (torch.compile(model, backend="eager", options=options) for model in models)
    if "evaluated" in way:
        for model in (unprepared, ready):
            call(model, LLAMA.inputs())
        torch.compiler.set_stance(skip_guard_eval_unsafe=True)
    try:
        refused(way, hotswap_adapter, unprepared, folders[1], "default")
        hotswap_adapter(ready, folders[1], "default")
    finally:
        torch.compiler.set_stance("default")
    assert_close(call(ready, LLAMA.inputs()), call(load(LLAMA, folders[1]), LLAMA.inputs()))


def test_an_unprepared_compiled_model_says_once_that_it_recompiles(folders):
    compiled = torch.compile(load(LLAMA, folders[0]), backend="eager")
    with pytest.warns(UserWarning, match="call prepare_model_for_compiled_hotswap") as caught:
        _swap_in_turn(compiled, folders[1:3])
    assert len(caught) == 1
    assert caught[0].filename == __file__


def _swap_in_turn(model, folders):
    for folder in folders:
        hotswap_adapter(model, folder, "default")


def test_no_warning_where_nothing_recompiles(tmp_path, folders, recwarn):
    twin = save_random_adapter(LLAMA, tmp_path / "twin", seed=9, r=4, lora_alpha=6)
    hotswap_adapter(torch.compile(load(LLAMA, folders[0]), backend="eager"), twin, "default")
    hotswap_adapter(torch.compile(prepared(LLAMA, folders), backend="eager"), folders[1], "default")
    hotswap_adapter(load(LLAMA, folders[0]), folders[1], "default")
    assert not [each for each in recwarn if "prepare_model" in str(each.message)]


def test_layers_that_were_not_reserved_are_refused(folders):
    model = load(LLAMA, folders[2])
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    compiled = torch.compile(model, backend="eager")
    refused(r"(?s)unexpected keys found.*among `adapters`", hotswap_adapter, compiled, folders[0], "default")
    with pytest.raises(HotswapError, match="Layers can't be added to a compiled model") as caught:
        hotswap_adapter(compiled, folders[0], "default", add_layers=True)
    assert len(caught.value.refusals) == 1
    assert "among `adapters`" in caught.value.refusals[0].next_step


def test_a_base_that_was_compiled_before_peft_wrapped_it(tmp_path, folders):
    """Compiled lazily, so there is still time to prepare it."""
    folders = _linear_folders(folders)
    base = torch.compile(LINEAR.base(), backend="aot_eager")
    model = get_peft_model(base, LoraConfig(r=2, target_modules=list(LINEAR.modules))).eval()
    prepare_model_for_compiled_hotswap(model, target_rank=8, check_compiled="ignore")
    hotswap_adapter(model, folders[0], "default")
    assert_swaps_without_recompiling(LINEAR, model, folders, (1, 0, 1))


def _linear_folders(folders: list[str]) -> list[str]:
    parent = Path(folders[0]).parent
    return [save_random_adapter(LINEAR, parent / f"linear{rank}", seed=rank, r=rank) for rank in (4, 8)]
