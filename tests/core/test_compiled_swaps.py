"""Swaps into compiled models: every output equals a fresh load, and nothing is ever compiled again."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from lengths import few_of, long
from models import ARCHITECTURES, KINDS, Kind, call, load, lora_layers, save_family
from oracle import assert_close, assert_same_outputs, rounding_of_inductor
from peft import LoraConfig, get_peft_model
from peft.helpers import rescale_adapter_scale
from refusals import refused

from hotswap_lab import (
    AdapterPool,
    HotswapError,
    RecompileWatch,
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
    plan_hotswap,
    prepare_model_for_compiled_hotswap,
    resolve_slot,
)
from hotswap_lab.core.compiled import frozen
from hotswap_lab.files.reading import Adapter

pytestmark = pytest.mark.usefixtures("fresh_compiler")
LLAMA, LINEAR = KINDS["llama"], KINDS["linear"]


@pytest.fixture
def folders(sources):
    """Other rank, other alpha, other layers, other dropout, rsLoRA."""
    return [*sources.values()]


def prepared(kind: Kind, folders: list[str], first: int = 0):
    model = load(kind, folders[first])
    prepare_model_for_compiled_hotswap(model, adapters=folders)
    return model


def assert_swaps_without_recompiling(kind, compiled, folders, order, tolerance: float | None = None) -> None:
    """The first calls compile; then each swap of ``order`` gives the output of a fresh load, from the same graph.

    Each second swap is that of a state dict into the model as it was before it was wrapped.
    """
    original = getattr(compiled, "_orig_mod", compiled)
    fresh = [load(kind, folder) for folder in folders]
    slot = resolve_slot(compiled, "default")
    call(compiled, kind.inputs())
    addresses = slot.data_ptrs()
    with RecompileWatch(allow=0) as watch:
        for step, number in enumerate(order):
            if step % 2:
                new = Adapter.load(folders[number])
                hotswap_adapter_from_state_dict(original, new.tensors, "default", new.config)
            else:
                hotswap_adapter(compiled, folders[number], "default")
            assert_same_outputs(compiled, fresh[number], kind, tolerance, margin=100)
    assert (watch.compiles, watch.recompiles) == (0, 0)
    assert slot.data_ptrs() == addresses


@pytest.mark.parametrize("seed", [1, *map(long, range(2, 6))])
def test_any_family_in_any_order(tmp_path, seed):
    """Any ranks, alphas and patterns, targets that overlap or don't."""
    draw, family = random.Random(seed), []
    for _ in range(3 if seed == 1 else draw.randint(3, 6)):
        targets = draw.sample(LLAMA.modules, draw.randint(1, 7))
        family.append(
            dict(
                r=draw.randint(1, 32),
                lora_alpha=draw.randint(16, 64),
                use_rslora=draw.random() < 0.5,
                lora_dropout=draw.choice([0.0, 0.1, 0.5]),
                target_modules=targets,
                layers_to_transform=draw.choice([None, [0], [1]]),
                rank_pattern={draw.choice(targets): draw.randint(1, 32)},
                alpha_pattern={draw.choice(targets): draw.randint(16, 64)},
            )
        )
    folders = save_family(LLAMA, tmp_path, *family)
    compiled = torch.compile(prepared(LLAMA, folders), backend="eager")
    order = [draw.randrange(len(folders)) for _ in range(6 if seed == 1 else 200)]
    assert_swaps_without_recompiling(LLAMA, compiled, folders, order)


@pytest.mark.parametrize("name", few_of({**KINDS, **ARCHITECTURES}, ("shared",)))
def test_kinds_of_layers_and_architectures(name, tmp_path):
    kind = KINDS.get(name) or ARCHITECTURES[name]
    family = [dict(r=4, lora_alpha=6), dict(r=8, lora_alpha=5), dict(r=12, use_rslora=True)]
    family += [dict(r=4, target_modules=[kind.modules[place]]) for place in (0, -1) if len(kind.modules) > 1]
    folders = save_family(kind, tmp_path, *family)
    compiled = torch.compile(prepared(kind, folders), backend="eager")
    assert_swaps_without_recompiling(kind, compiled, folders, [*range(1, len(folders)), 0, *range(len(folders))[::-1]])


def compiled_regions(model):
    """Each block for itself: shorter to compile, and the blocks share graphs."""
    base = model.get_base_model()
    for block in getattr(base, "blocks", None) or base.model.layers:
        block.compile(backend="inductor")
    return model


def compiled_forward(model):
    model.forward = torch.compile(model.forward)
    return model


FORMS = {
    "default": torch.compile,
    "reduce-overhead": lambda model: torch.compile(model, mode="reduce-overhead"),
    "max-autotune-no-cudagraphs": lambda model: torch.compile(model, mode="max-autotune-no-cudagraphs"),
    "fullgraph": lambda model: torch.compile(model, fullgraph=True),
    "regions": compiled_regions,
    "in place": lambda model: model.compile(backend="aot_eager") or model,
    "dynamic": lambda model: torch.compile(model, dynamic=True),
    "forward": compiled_forward,
    "inference mode": lambda model: torch.inference_mode()(torch.compile(model)),
}


@pytest.mark.long
@pytest.mark.parametrize("form", [form for form in FORMS if form != "inference mode"])  # a function has no adapter
def test_forms_of_compiling(folders, form):
    compiled = FORMS[form](prepared(LLAMA, folders))
    tolerance = max(rounding_of_inductor(load(LLAMA, each), LLAMA.inputs()) for each in folders)
    assert_swaps_without_recompiling(LLAMA, compiled, folders, (1, 2, 3, 0, 3, 2, 1), tolerance)


#: other ranks, alphas and layers
ABC = {
    "a": dict(r=4, lora_alpha=8),
    "b": dict(r=8, lora_alpha=6, target_modules=["first", "blocks.0"]),
    "c": dict(r=2, use_rslora=True, target_modules=["blocks.1", "last"]),
}


@pytest.fixture(scope="module")
def abc(tmp_path_factory):
    folder = tmp_path_factory.mktemp("abc")
    folders = dict(zip(ABC, save_family(LINEAR, folder, *ABC.values()), strict=True))
    return folders, {name: call(load(LINEAR, each), LINEAR.inputs()) for name, each in folders.items()}


def swap_by(ready: str, model, folders: dict[str, str]) -> Callable[[str], object]:
    """Make a model that has ``a`` ready, and return what swaps another one in."""
    if ready in ("as it is", "prepared"):
        if ready == "prepared":
            prepare_model_for_compiled_hotswap(model, adapters=list(folders.values()))
        return lambda name: hotswap_adapter(model, folders[name], "default")
    pool = AdapterPool(model, adapters=folders, rows=5 if ready == "rows" else 1, progress=False)
    # the first row is the one to look at, the others have other adapters
    return pool.swap if ready == "a pool" else lambda name: pool.assign([name, "a", "b", "c", "a"])


def assert_follows(swap: Callable[[str], object], compiled, abc) -> None:
    expected = abc[1]
    for name in "abcac":
        swap(name)
        assert_close(call(compiled, LINEAR.inputs())[:1], expected[name][:1])
    assert min((expected[one] - expected[other]).abs().max() for one, other in ("ab", "bc", "ac")) > 0.1


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:Swap:UserWarning")
@pytest.mark.parametrize("ready", ["as it is", "prepared", "a pool", "rows"])
@pytest.mark.parametrize("form", FORMS)
def test_forms_of_compiling_in_every_state(abc, form, ready):
    model = load(LINEAR, abc[0]["a"])
    swap = swap_by(ready, model, abc[0])
    assert_follows(swap, FORMS[form](model), abc)


@pytest.mark.long
def test_training_a_compiled_model_between_swaps(folders):
    """Forward and backward: one graph each, for all adapters without dropout."""
    few = [folders[0], folders[2], folders[3]]
    model = load(LLAMA, few[0], is_trainable=True)
    prepare_model_for_compiled_hotswap(model, adapters=few)
    compiled = torch.compile(model, backend="aot_eager")
    compiled(**LLAMA.inputs()).logits.sum().backward()
    with RecompileWatch(allow=0) as watch:
        for number in (1, 2, 0):
            hotswap_adapter(compiled, few[number], "default")
            fresh = load(LLAMA, few[number], is_trainable=True)
            for each in (compiled, fresh):
                each(**LLAMA.inputs()).logits.sum().backward()
            gradients = {name: each.grad for name, each in model.named_parameters()}
            for name, parameter in fresh.named_parameters():
                if parameter.grad is not None:
                    own = gradients[name][tuple(map(slice, parameter.shape))]
                    assert_close(own, parameter.grad, 1e-8)
    assert not watch.compilations


# ---- strength, and PEFT's own ways to change a scaling


@pytest.mark.long
def test_pefts_own_ways_to_set_a_strength_do_not_recompile(folders):
    """They write floats. With ours, the crossings of strength and compiled do not."""
    model, fresh = prepared(LLAMA, folders, first=1), load(LLAMA, folders[1])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    call(compiled, LLAMA.inputs())
    trained = [layer.scaling["default"] for layer in lora_layers(fresh)]  # Python floats
    addresses = [layer.scaling["default"].data_ptr() for layer in lora_layers(model)]

    def assert_strength(strength: float) -> None:
        for layer, scaling in zip(lora_layers(fresh), trained, strict=True):
            layer.scaling["default"] = scaling * strength
        assert_same_outputs(compiled, fresh, LLAMA, margin=0)
        assert [layer.scaling["default"].data_ptr() for layer in lora_layers(model)] == addresses

    with RecompileWatch(allow=0):
        for change, strength in (
            (lambda layer: layer.set_scale("default", 0.4), 0.4),
            (lambda layer: layer.scale_layer(3.0), 1.2),
            (lambda layer: layer.unscale_layer(3.0), 0.4),
            (lambda layer: layer.unscale_layer(), 1),
        ):
            for layer in lora_layers(model):
                change(layer)
            assert_strength(strength)
        with rescale_adapter_scale(model, 0.25):
            assert_strength(0.25)
        assert_strength(1)


# ---- what a compiled graph would not notice


@pytest.mark.long
@pytest.mark.parametrize("how", ["options", "config"])
def test_freezing_is_refused(tmp_path, how):
    old, new = save_family(LINEAR, tmp_path, dict(r=4), dict(r=8))
    model = prepared(LINEAR, [old, new])
    with torch._inductor.config.patch(freezing=how == "config"):
        compiled = torch.compile(model, options={"freezing": True} if how == "options" else None)
        refused(r"would go on with the old adapter(.|\n)*freezing", hotswap_adapter, compiled, new, "default")
    refused("compiled with freezing", hotswap_adapter, compiled, new, "default")


def test_preparing_while_freezing_is_on_is_refused(tmp_path):
    """What will be compiled, or who compiles it, can't be seen yet."""
    model = load(LINEAR, *save_family(LINEAR, tmp_path, dict(r=4)))
    with torch._inductor.config.patch(freezing=True):
        refused("freezing is on", prepare_model_for_compiled_hotswap, model, target_rank=8)
    prepare_model_for_compiled_hotswap(model, target_rank=8)


@pytest.mark.long
def test_freezing_of_one_part_is_refused(tmp_path):
    old, new = save_family(LINEAR, tmp_path, dict(r=4), dict(r=8))
    model = prepared(LINEAR, [old, new])
    model.base_model.model.first.compile()
    hotswap_adapter(model, new, "default")
    model.base_model.model.last.compile(options={"freezing": True})
    refused("compiled with freezing", hotswap_adapter, model, old, "default")


@pytest.mark.parametrize("options", [dict(backend="eager"), dict(options={"freezing": True})], ids=["eager", "frozen"])
def test_a_compiled_forward_with_a_hook_around_it(tmp_path, options):
    """accelerate's hooks have all attributes of what they are around, and no closure."""
    hooks = pytest.importorskip("accelerate.hooks")
    old, new = save_family(LINEAR, tmp_path, dict(r=4), dict(r=8))
    model = load(LINEAR, old)
    base = model.get_base_model()
    base.forward = torch.compile(base.forward, **options)
    hooks.add_hook_to_module(base, hooks.ModelHook())
    if "options" in options:
        refused("compiled with freezing", hotswap_adapter, model, new, "default")
    else:
        hotswap_adapter(model, new, "default")
        assert_same_outputs(model, load(LINEAR, new), LINEAR)


#: what is compiled, and called while freezing is on
FROZEN = {
    "the model": torch.compile,
    "a layer": lambda model, **how: model.base_model.model.last.compile(**how) or model,
    "a forward": lambda model, **how: setattr(model, "forward", torch.compile(model.forward, **how)) or model,
    "a function": lambda model, **how: torch.compile(lambda inputs: model(inputs), **how),
    "a layer alone": lambda model, **how: torch.compile(model.base_model.model.first, **how),
}


@pytest.mark.long
@pytest.mark.parametrize("ready", ["as it is", "prepared", "a pool", "rows"])
@pytest.mark.parametrize("form", FROZEN)
def test_freezing_that_was_on_only_while_compiling(tmp_path, form, ready):
    """No setting of the model or of the compiler shows it afterwards."""
    old, new = save_family(LINEAR, tmp_path, dict(r=4, lora_alpha=8), dict(r=4, lora_alpha=16))
    model, other, inputs = load(LINEAR, old), torch.compile(load(LINEAR, old), backend="eager"), LINEAR.inputs()[:2]
    swap, given = partial(hotswap_adapter, model, new, "default"), model
    if ready == "prepared":
        prepare_model_for_compiled_hotswap(model)
    elif ready != "as it is":
        pool = AdapterPool(model, adapters={"new": new}, rows=2 if ready == "rows" else 1, progress=False)
        swap = partial(pool.assign, ["new", "new"]) if ready == "rows" else partial(pool.swap, "new")
    compiled = FROZEN[form](model, backend="eager")
    with torch._inductor.config.patch(freezing=True):
        before = call(compiled, inputs)
    refused("was on, which copies the weights", lambda _: swap(), given)
    if form != "a function":  # which may be of any model
        hotswap_adapter(other, new, "default")
    torch.compiler.reset()
    swap()
    fresh = load(LINEAR, new)
    expected = call(fresh.base_model.model.first if form == "a layer alone" else fresh, inputs)
    assert_close(call(compiled, inputs), expected)
    assert not torch.allclose(call(compiled, inputs), before, atol=1e-2)
    torch.compiler.reset()  # which makes PyTorch forget all that listen
    with torch._inductor.config.patch(freezing=True):
        call(compiled, inputs)
    refused("was on, which copies the weights", lambda _: swap(), given)


#: a process whose first plan comes after compiling
FIRST_PLAN = """
import sys, torch
from peft import PeftModel
from hotswap_lab import HotswapError, hotswap_adapter
model = PeftModel.from_pretrained(torch.nn.Sequential(torch.nn.Linear(8, 8)), sys.argv[1]).eval()
compiled = torch.compile(model, backend="eager")
with torch._inductor.config.patch(freezing=True), torch.no_grad():
    compiled(torch.ones(2, 8))
try:
    hotswap_adapter(compiled, sys.argv[2])
except HotswapError as error:
    print("freezing was on" in str(error))
"""


@pytest.mark.long
def test_freezing_before_the_first_plan_of_a_process(tmp_path):
    kind = Kind(lambda: torch.nn.Sequential(torch.nn.Linear(8, 8)), lambda: torch.ones(2, 8), ("0",))
    folders = save_family(kind, tmp_path, dict(r=4), dict(r=4))
    run = subprocess.run([sys.executable, "-c", FIRST_PLAN, *folders], capture_output=True, text=True, timeout=300)
    assert run.stdout == "True\n", run.stderr


@pytest.mark.long
def test_freezing_keeps_the_old_adapter(tmp_path):
    """If PyTorch ever changes that, the refusals can go. It leaves float64 alone."""
    kind = replace(LINEAR, dtype=torch.float32)
    old, new = save_family(kind, tmp_path, dict(r=4), dict(r=8))
    model = prepared(kind, [old, new])
    compiled = torch.compile(model)
    with torch._inductor.config.patch(freezing=True):
        before = call(compiled, kind.inputs())
    frozen.clear()  # as if it had not been seen
    hotswap_adapter(compiled, new, "default")
    assert torch.equal(call(compiled, kind.inputs()), before)
    assert not torch.allclose(call(model, kind.inputs()), before)


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
    assert_same_outputs(ready, load(LLAMA, folders[1]), LLAMA)


def test_missing_guards_are_refused_where_compiled_code_is_around_the_model(tmp_path):
    """It leaves no trace in the model, but the setting is one of the process."""
    settings = dict(r=4, lora_alpha=8), dict(r=4, lora_alpha=16), dict(r=4, lora_alpha=8)
    old, new, alike = save_family(LINEAR, tmp_path, *settings)
    model = load(LINEAR, old)
    around = torch.compile(lambda x: model(x), backend="eager")
    call(around, LINEAR.inputs())
    torch.compiler.set_stance(skip_guard_eval_unsafe=True)
    try:
        refused("guards are not evaluated", hotswap_adapter, model, new, "default")
        hotswap_adapter(model, alike, "default")  # only values
        assert_same_outputs(around, load(LINEAR, alike), LINEAR)
    finally:
        torch.compiler.set_stance("default")
    hotswap_adapter(model, new, "default")
    assert_same_outputs(around, load(LINEAR, new), LINEAR)


def test_an_unprepared_compiled_model_says_once_that_it_recompiles(folders):
    compiled = torch.compile(load(LLAMA, folders[0]), backend="eager")
    with pytest.warns(UserWarning, match="call prepare_model_for_compiled_hotswap") as caught:
        hotswap_adapter(compiled, folders[1], "default")
    assert [each.filename for each in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hotswap_adapter(compiled, folders[2], "default")


@pytest.mark.long
def test_another_rank_alone_recompiles_an_unprepared_model(tmp_path):
    """PyTorch 2.8 checks the size of a parameter again only where something in its module has changed."""
    folders = save_family(LINEAR, tmp_path, dict(r=4, lora_alpha=8), dict(r=8, lora_alpha=16))
    model = load(LINEAR, folders[0]).eval()
    compiled = torch.compile(model, backend="eager", dynamic=False)
    for _ in range(3):
        call(compiled, LINEAR.inputs())
    with RecompileWatch() as watch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hotswap_adapter(compiled, folders[1], "default")
        assert_same_outputs(compiled, load(LINEAR, folders[1]), LINEAR)
    assert watch.recompiles == 1
    assert all("hotswap_resized" not in module._parameters for module in model.modules())


def test_layers_that_were_not_reserved_are_refused(folders):
    model = load(LLAMA, folders[2])
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    compiled = torch.compile(model, backend="eager")
    refused(r"(?s)unexpected keys found.*among `adapters`", hotswap_adapter, compiled, folders[0], "default")
    with pytest.raises(HotswapError, match="Layers can't be added to a compiled model") as caught:
        hotswap_adapter(compiled, folders[0], "default", add_layers=True)
    assert len(caught.value.refusals) == 1
    assert "among `adapters`" in caught.value.refusals[0].next_step


def test_a_base_that_was_compiled_before_peft_wrapped_it(tmp_path):
    """Compiled lazily, so there is still time to prepare it."""
    folders = save_family(LINEAR, tmp_path, dict(r=4), dict(r=8))
    base = torch.compile(LINEAR.base(), backend="eager")
    model = get_peft_model(base, LoraConfig(r=2, target_modules=list(LINEAR.modules))).eval()
    prepare_model_for_compiled_hotswap(model, target_rank=8, check_compiled="ignore")
    hotswap_adapter(model, folders[0], "default")
    assert_swaps_without_recompiling(LINEAR, model, folders, (1, 0, 1))


#: a process that swaps in a compiled model, in memory that only it has, with code that others may have compiled
WITH_A_CACHE = """
import sys, torch
sys.path[:0] = [{tests!r}]
torch.set_num_threads(1)
from models import KINDS, call, load
from oracle import assert_close
from hotswap_lab import hotswap_adapter, prepare_model_for_compiled_hotswap
kind, ready, folders = KINDS["linear"], sys.argv[1], sys.argv[2:]
model = load(kind, folders[0])
if ready == "prepared":
    prepare_model_for_compiled_hotswap(model, adapters=folders)
compiled = torch.compile(model)
call(compiled, kind.inputs())
for folder in [*folders, *folders]:
    hotswap_adapter(compiled, folder)
    expected = call(load(kind, folder), kind.inputs())
    assert_close(call(compiled, kind.inputs()), expected)
print("right")
"""


@pytest.mark.long
def test_processes_that_share_one_folder_of_compiled_code(abc, tmp_path):
    code, around = WITH_A_CACHE.format(tests=str(Path(__file__).parents[1])), dict(stdout=-1, stderr=-1, text=True)
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    ways = ["prepared", "prepared", "as it is"]
    command = [sys.executable, "-W", "ignore", "-c", code]
    started = [subprocess.Popen([*command, way, *abc[0].values()], env=environment, **around) for way in ways]
    said = [each.communicate(timeout=400) for each in started]
    assert [out for out, _ in said] == ["right\n"] * 3, said
    assert list(tmp_path.iterdir())
