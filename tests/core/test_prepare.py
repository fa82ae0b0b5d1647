"""prepare_model_for_compiled_hotswap, without a compiler: room for a family, and everything else as it was."""

from __future__ import annotations

import pickle
from functools import partial

import pytest
import torch
from models import COPIES, KINDS, Kind, call, copied, load, lora_layers, save_family
from oracle import (
    assert_close,
    assert_equals,
    assert_equals_fresh_load,
    assert_same_outputs,
    assert_same_tensors,
    nothing_else_changes,
    trained,
    untouched,
)
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from refusals import refused
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import prune

from hotswap_lab import (
    Adapter,
    AdapterPool,
    hotswap_adapter,
    plan_hotswap,
    prepare_model_for_compiled_hotswap,
    resolve_slot,
    save_adapter,
    verify_hotswap,
)

LLAMA, LINEAR, CONV = KINDS["llama"], KINDS["linear"], KINDS["conv"]
FIRST = dict(r=2, target_modules=["first"])


def test_layers_that_are_off_already_stay_off(tmp_path):
    folders = save_family(LINEAR, tmp_path, dict(r=4), dict(r=3, target_modules=["last"]))
    model = load(LINEAR, folders[0])
    hotswap_adapter(model, folders[1], "default")
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    assert [layer.rank_before for layer in plan_hotswap(model, folders[0]).layers].count(None) == 3
    assert_equals_fresh_load(model, LINEAR, folders[1], prepared=True)


@pytest.fixture
def family(kind, tmp_path):
    """Ranks that a grouped convolution can have, patterns, rsLoRA, dropout; and one layer at a time, on and off."""
    patterns = dict(rank_pattern={kind.modules[0]: 12}, alpha_pattern={kind.modules[-1]: 5}, use_rslora=True)
    return save_family(
        kind,
        tmp_path,
        *(dict(r=rank, lora_alpha=3 * rank - 5, lora_dropout=0.1) for rank in (4, 8, 16)),
        dict(r=8, lora_alpha=6, **patterns),
        *(dict(r=4, target_modules=[module]) for module in kind.modules if len(kind.modules) > 1),
    )


def test_every_kind_of_layer_swaps_in_any_order_at_the_same_addresses(kind, family):
    """Which of them are grouped convolutions makes a difference to what is left of a layer that is off."""
    model = load(kind, family[0])
    prepare_model_for_compiled_hotswap(model, target_rank=16, config=model.peft_config)
    with untouched(model):
        prepare_model_for_compiled_hotswap(model, target_rank=16)
        prepare_model_for_compiled_hotswap(model, target_rank=4)
    assert_equals_fresh_load(model, kind, family[0], prepared=True)
    slot = resolve_slot(model, "default")
    addresses, shapes = slot.data_ptrs(), [tensor.parameter.shape for tensor in slot.tensors]
    for number in (1, 0, 2, 3, *(each for few in range(4, len(family)) for each in (few, few % 4))):
        hotswap_adapter(model, family[number], "default")
        assert_equals_fresh_load(model, kind, family[number], prepared=True, margin=10)
        assert slot.data_ptrs() == addresses
        assert [tensor.parameter.shape for tensor in slot.tensors] == shapes


def test_what_preparing_leaves_alone(tmp_path):
    """All that a user could see, gradients in training included, and the parameters themselves."""
    (folder,) = save_family(CONV, tmp_path, dict(r=8, lora_dropout=0.1))
    model, twin = (load(CONV, folder, is_trainable=True) for _ in range(2))
    lora_layers(model)[0].register_forward_hook(hook := lambda *_: None)
    parameters = {name: id(each) for name, each in model.named_parameters()}
    with nothing_else_changes():
        prepare_model_for_compiled_hotswap(model, target_rank=16)
    assert_equals(model, twin, CONV, prepared=True)
    assert trained(model, CONV, True).keys() == trained(twin, CONV, True).keys()
    assert {name: id(each) for name, each in model.named_parameters()} == parameters
    assert hook in lora_layers(model)[0]._forward_hooks.values()


def test_a_family_with_other_layers_is_found_by_itself(tmp_path):
    """Adapters that have no layer in common, and another rank in each."""
    folders = save_family(
        LINEAR,
        tmp_path,
        dict(r=2, target_modules=["first"]),
        dict(r=6, target_modules=["blocks.0", "last"]),
        dict(r=3, target_modules=r"blocks\.1"),
        dict(r=4, rank_pattern={"first": 9}, use_rslora=True),
    )
    for first in range(4):
        model = load(LINEAR, folders[first])
        prepare_model_for_compiled_hotswap(model, adapters=folders)
        slot = resolve_slot(model, "default")
        room = {layer.path: layer.tensors[0].capacity for layer in slot.layers}
        assert room == {"first": 9, "blocks.0": 6, "blocks.1": 4, "last": 6}
        addresses = slot.data_ptrs()
        for folder in (folders[first], *(folders if first == 0 else folders[::2])):
            hotswap_adapter(model, folder, "default")
            assert_equals_fresh_load(model, LINEAR, folder, prepared=True)
        assert slot.data_ptrs() == addresses


class Whole(nn.Linear):
    """A layer with a layer inside."""

    def __init__(self):
        super().__init__(4, 4)
        self.inner = nn.ModuleDict({"part": nn.Linear(4, 4)})


def test_no_layer_is_added_inside_of_another():
    """No fresh load takes a config that names both."""
    config, other = (LoraConfig(r=2, target_modules=each) for each in (["0"], "0.*"))
    model = get_peft_model(nn.Sequential(Whole()), config)
    with pytest.raises(AttributeError, match="inner"):
        get_peft_model(nn.Sequential(Whole()), other)
    state = get_peft_model_state_dict(model)
    prepare_model_for_compiled_hotswap(model, adapters=[other])
    assert len(lora_layers(model)) == 1
    refused(
        "^Target module 0.base_layer.inner", hotswap_adapter, model, Adapter.from_state_dict(state, other), "default"
    )


def test_a_family_on_all_there_is(tmp_path):
    """An expression that fits each path is not for the model as a whole, nor for what is inside of its layers."""
    kind = Kind(lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), lambda: torch.randn(3, 4), ("0",))
    one, both = save_family(kind, tmp_path, dict(r=2), dict(r=2, target_modules=".*"))
    prepare_model_for_compiled_hotswap(model := load(kind, one), adapters=[one])
    prepare_model_for_compiled_hotswap(model, adapters=[both])  # of the same rank, and with another layer
    hotswap_adapter(model, both, "default")
    assert_equals_fresh_load(model, kind, both, prepared=True)


#: how a family can be given: functions of the folder of its only member
FORMS = {
    "folders": lambda folder: [folder],
    "adapters": lambda folder: [Adapter.load(folder)],
    "configs": lambda folder: [LoraConfig.from_pretrained(folder)],
    "one folder": lambda folder: folder,
    "a dict": lambda folder: {"second": folder},
}


@pytest.mark.parametrize("form", FORMS)
def test_the_family_in_any_form(tmp_path, form):
    first, second = save_family(LINEAR, tmp_path, FIRST, dict(r=5, target_modules=["last"]))
    model = load(LINEAR, first)
    prepare_model_for_compiled_hotswap(model, adapters=FORMS[form](second))
    hotswap_adapter(model, second, "default")
    assert_same_outputs(model, load(LINEAR, second), LINEAR)


@pytest.mark.long
@pytest.mark.parametrize("way", COPIES)
def test_copies_after_an_adapter_that_peft_has_loaded_beside_the_model(tmp_path, way):
    """What is noted then about the tables of the live model is of no use to a copy, and can't be pickled."""
    plain, *heads = save_family(LLAMA, tmp_path, *(dict(r=4, modules_to_save=head) for head in (None, ["lm_head"]) * 2))
    model = load(LLAMA, plain)
    prepare_model_for_compiled_hotswap(model)
    model.load_adapter(heads[0], "other")
    hotswap_adapter(model, heads[2], "other")
    twin = copied(model, way)
    hotswap_adapter(twin, heads[0], "other")
    for each, expected in ((model, heads[2]), (twin, heads[0])):
        for name, folder in (("other", expected), ("default", plain)):
            each.set_adapter(name)
            assert_same_outputs(each, load(LLAMA, folder), LLAMA)


def test_reserved_embeddings_are_not_saved(tmp_path):
    """PEFT's own saving takes the weight of any embedding that is wrapped."""
    targets = (["q_proj"], ["embed_tokens"], ["embed_tokens", "lm_head"])
    first, on_one, on_both = save_family(LLAMA, tmp_path, *(dict(r=2, target_modules=each) for each in targets))
    model = load(LLAMA, first)
    prepare_model_for_compiled_hotswap(model, adapters=[on_one, on_both])
    hotswap_adapter(model, on_one, "default")
    save_adapter(model, tmp_path / "saved")
    saved, expected = (load_file(f"{folder}/adapter_model.safetensors") for folder in (tmp_path / "saved", on_one))
    assert_same_tensors(saved, expected)
    assert verify_hotswap(model, on_one, inputs=LLAMA.inputs(), base=LLAMA.base)


def test_row_j_of_one_memory_holds_rank_component_j_of_each_parameter(tmp_path):
    model = load(LLAMA, *save_family(LLAMA, tmp_path, dict(r=3, rank_pattern={"q_proj": 6})))
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    parameters = [(each.parameter, each.rank_axis) for each in resolve_slot(model, "default").tensors]
    (memory,) = {each.untyped_storage().data_ptr(): each.untyped_storage() for each, _ in parameters}.values()
    (pitch,) = {each.stride(axis) for each, axis in parameters}
    (size,) = {each.itemsize for each, _ in parameters}
    assert pitch * size // 64 % 2 == 1, "an odd number of cache lines"
    assert memory.nbytes() >= 8 * pitch * size
    columns = []
    for each, _ in parameters:
        assert each.data_ptr() % 64 == 0
        start = (each.data_ptr() - memory.data_ptr()) // size
        columns += range(start, start + each.numel() // 8)
    assert len(columns) == len(set(columns)), "no two tensors share an element"
    assert max(columns) < pitch
    # and a pickle does not have the memory once for each of them
    assert len(pickle.dumps(model)) < 3 * sum(each.nbytes for each in model.parameters()) + 300_000


def test_a_swap_that_writes_saved_modules_too_is_noted(tmp_path):
    saved = dict(modules_to_save=["lm_head"], target_modules=["q_proj"])
    old, new = save_family(LLAMA, tmp_path, dict(r=3) | saved, dict(r=5) | saved)
    prepare_model_for_compiled_hotswap(model := load(LLAMA, old), target_rank=8)
    hotswap_adapter(model, new, "default")
    room = resolve_slot(model, "default").host.base.hotswap_slots["default"].room
    assert room.state.ranks == [5] * len(lora_layers(model))


# ---- several adapters


def test_only_the_named_adapter_is_prepared_or_all(tmp_path):
    (folder,) = save_family(LINEAR, tmp_path, dict(r=2))
    model = load(LINEAR, folder, "a")
    model.load_adapter(folder, "b")
    for name, room in (("b", {"a": {2}, "b": {4}}), (None, {"a": {4}, "b": {4}})):
        prepare_model_for_compiled_hotswap(model, target_rank=4, adapter_name=name)
        assert room == {each: {tensor.capacity for tensor in resolve_slot(model, each).tensors} for each in "ab"}
        assert isinstance(lora_layers(model)[0].scaling["a"], float) == bool(name)


def test_other_adapters_come_and_go_on_a_prepared_model(tmp_path):
    family = (*(dict(r=rank) for rank in (2, 4, 6)), dict(r=3, target_modules=["last"]))
    first, second, larger, few = save_family(LINEAR, tmp_path, *family)
    model = load(LINEAR, first)
    prepare_model_for_compiled_hotswap(model, target_rank=4)
    model.load_adapter(second, "second")
    model.set_adapter("second")
    assert_same_outputs(model, load(LINEAR, second, "second"), LINEAR)
    model.delete_adapter("second")
    model.set_adapter("default")
    hotswap_adapter(model, few, "default")
    assert_same_outputs(model, load(LINEAR, few), LINEAR)
    # the same name, used anew: what was noted about the old adapter must not stick to the new one
    model.delete_adapter("default")
    model.load_adapter(larger, "default")
    model.set_adapter("default")
    assert_equals_fresh_load(model, LINEAR, larger, activated=True)
    hotswap_adapter(model, second, "default")
    assert_same_outputs(model, load(LINEAR, second), LINEAR)
    assert {each.capacity for each in resolve_slot(model, "default").tensors} == {4}, "it is not prepared"


# ---- other models


def test_a_scaling_keeps_its_precision_and_its_value(tmp_path):
    """``test_cuda.py`` has a model that moves to another device."""
    model = load(LINEAR, *save_family(LINEAR, tmp_path, dict(r=2)))
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    lora_layers(model)[0].register_buffer("mine", torch.ones(3))
    lora_layers(model)[1].register_buffer("none", None)
    model = copied(model.to(torch.bfloat16), "deepcopy")
    assert lora_layers(model)[0].scaling["default"].dtype == torch.float64
    assert lora_layers(model)[0].mine.tolist() == [1, 1, 1]
    scalings = [float(layer.scaling["default"]) for layer in lora_layers(model)]
    model.to("meta")  # where a number has no value
    assert [float(layer.scaling["default"]) for layer in lora_layers(model)] == scalings
    assert model(LINEAR.inputs().to("meta", torch.bfloat16)).is_meta


@pytest.mark.parametrize("is_trainable", [False, True])
def test_inference_mode(tmp_path, is_trainable):
    """A model loaded in it, prepared outside and swapped in it; one prepared and swapped in it stays trainable."""
    first, second = save_family(LINEAR, tmp_path, dict(r=2), dict(r=5))
    with torch.inference_mode(not is_trainable):
        model = load(LINEAR, first, is_trainable=is_trainable)
    with torch.inference_mode(is_trainable):
        prepare_model_for_compiled_hotswap(model, target_rank=5)
    with torch.inference_mode():
        hotswap_adapter(model, second, "default")
    if is_trainable:
        assert_equals_fresh_load(model, LINEAR, second, prepared=True, is_trainable=True)
    hotswap_adapter(model, first, "default")
    assert_same_outputs(model, load(LINEAR, first), LINEAR)


@pytest.mark.parametrize("of_adapter", [False, True])
def test_an_adapter_or_its_base_in_inference_mode(tmp_path, of_adapter):
    """Each tensor stays what it was: in it, or not."""
    folders = save_family(LINEAR, tmp_path, dict(r=2), dict(r=5))
    with torch.inference_mode():
        base = LINEAR.base()
    with torch.inference_mode(of_adapter):
        model = PeftModel.from_pretrained(base, folders[0]).eval()
    hotswap_adapter(model, folders[1], "default")
    with torch.inference_mode():
        model.load_state_dict(model.state_dict())
    assert_same_outputs(model, load(LINEAR, folders[1]), LINEAR)
    assert {each.is_inference() for name, each in model.named_parameters() if "lora_" in name} == {of_adapter}


def test_a_model_that_peft_prepared(tmp_path):
    """diffusers calls PEFT's function in ``enable_lora_hotswap``; what it made can be swapped into just as well."""
    from peft.utils.hotswap import prepare_model_for_compiled_hotswap as pefts

    # it keeps scalings in float32, where 7 / 8 and 7 / 4 are exact
    folders = save_family(LLAMA, tmp_path, *(dict(r=rank, lora_alpha=7) for rank in (2, 8, 4, 9)))
    model = load(LLAMA, folders[0])
    pefts(model, target_rank=8)
    model.eval()  # what it makes is in training
    slot = resolve_slot(model, "default")
    addresses, scaling = slot.data_ptrs(), lora_layers(model)[0].scaling["default"].data_ptr()
    for folder in folders[1:3]:  # a higher rank and then a lower one, so that there is something to clear
        hotswap_adapter(model, folder, "default")
        assert_same_tensors(get_peft_model_state_dict(model), get_peft_model_state_dict(load(LLAMA, folder)))
        assert verify_hotswap(model, folder, inputs=LLAMA.inputs())
    assert slot.data_ptrs() == addresses
    assert lora_layers(model)[0].scaling["default"].data_ptr() == scaling
    match = r"(?s)higher than the model was prepared for.*rank 9.*rank 8.*target_rank=9"
    refused(match, hotswap_adapter, model, folders[3], "default")
    prepare_model_for_compiled_hotswap(model, target_rank=9)
    hotswap_adapter(model, folders[3], "default")
    assert_equals_fresh_load(model, LLAMA, folders[3], prepared=True)


def test_a_rank_above_the_room_is_named_with_its_layer(tmp_path):
    """The first layer without room is not the one of the highest rank, and has more room."""
    ranks = dict(r=2, rank_pattern={"first": 4}), dict(r=3, rank_pattern={"first": 5, "last": 6})
    old, new = save_family(LINEAR, tmp_path, *ranks)
    prepare_model_for_compiled_hotswap(model := load(LINEAR, old), adapters=[old])
    refused(r"(?s)at 4 layers.*rank 6, for example at last\n.*rank 2 at most", hotswap_adapter, model, new)


def test_configs_follow_as_with_peft_but_the_live_ones_never(tmp_path):
    model = load(LINEAR, *save_family(LINEAR, tmp_path, dict(r=2)))
    mine = LoraConfig(r=3, rank_pattern={"last": 1}, target_modules=["last"])
    prepare_model_for_compiled_hotswap(model, target_rank=6, config=mine)
    assert (mine.r, mine.rank_pattern) == (6, {"last": 6})
    other = LoraConfig(r=3, target_modules=["last"])
    prepare_model_for_compiled_hotswap(model, target_rank=6, config={"other": other, **model.peft_config})
    assert other.r == 6
    assert model.peft_config["default"].r == 2
    mine = LoraConfig(r=3)
    prepare_model_for_compiled_hotswap(model, config=mine)
    assert mine.r == 3


# ---- refusals: PEFT's words, and a model that is untouched

LARGER = "the original rank is larger"
REFUSALS = {
    "a target below the loaded rank": (
        dict(target_rank=1),
        rf"Trying to pad the adapter to the target rank 1, but {LARGER} \(2\)",
    ),
    "a target below the family": (
        dict(target_rank=4, adapters=[LoraConfig(**FIRST, rank_pattern={"first": 5})]),
        rf"{LARGER} \(5\)",
    ),
    **{f"no rank: {each}": (dict(target_rank=each), "not a rank") for each in (0, -1, 2.0, True, "8")},
    **{
        f"a family with {what}": (dict(target_rank=8, adapters=[LoraConfig(r=4, target_modules=["last"]), each]), match)
        for what, each, match in (
            ("layers that are nowhere", LoraConfig(r=2, target_modules=["nowhere"]), "no layer in this model"),
            ("DoRA", LoraConfig(r=2, target_modules=["last"], use_dora=True), "use_dora"),
            ("what is no layer", LoraConfig(r=2, target_modules=["blocks"]), "can't be added to the model"),
            ("IA3", IA3Config(target_modules=["last"], feedforward_modules=[]), "PEFT types found: LORA and IA3"),
        )
    },
    "a family that can't be read": (dict(adapters=["nothing/here"]), "Can't find 'adapter_config.json'"),
    "a target that does not fit a grouped convolution": (
        dict(target_rank=6),
        "(?s)with groups=4 to target rank 6, but the target rank is not divisible by 4.*target_rank=8",
    ),
    "another value of check_compiled": (
        dict(check_compiled="no"),
        "check_compiles should be one of 'error', 'warn', or 'ignore', got 'no' instead",
    ),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_what_can_not_be_prepared(tmp_path, what):
    arguments, match = REFUSALS[what]
    kind, lora = (CONV, dict(r=4)) if "grouped" in what else (LINEAR, FIRST)
    refused(match, prepare_model_for_compiled_hotswap, load(kind, *save_family(kind, tmp_path, lora)), **arguments)


NO_LAYERS = "No adapter layers found on the model, make sure call"


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (LoraConfig(r=2, target_modules=["last"], bias="all"), "can't be prepared for the loaded adapter"),
        (IA3Config(target_modules=["last"], feedforward_modules=[]), NO_LAYERS),
        (None, NO_LAYERS),
    ],
    ids=["every bias", "IA3", "no adapter"],
)
def test_models_that_can_not_be_prepared(config, match):
    model = get_peft_model(LINEAR.base(), config) if config else LINEAR.base()
    refused(match, prepare_model_for_compiled_hotswap, model, target_rank=8)


def test_the_plan_says_what_is_padded_and_off(tmp_path):
    full, small, few = save_family(LLAMA, tmp_path, dict(r=8), dict(r=3), dict(r=8, target_modules=["q_proj"]))
    model = load(LLAMA, full)
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    assert plan_hotswap(model, small).counts == {"copy": 0, "pad": 14, "resize": 0, "off": 0, "add": 0}
    hotswap_adapter(model, small, "default")
    assert plan_hotswap(model, few).rows == [("copy", 2, "3 -> 8", "1"), ("off", 12, "3 -> off", "-")]
    hotswap_adapter(model, few, "default")
    assert ("pad", 12, "none -> 3", f"{8 / 3:.4g}") in plan_hotswap(model, small).rows
    assert ("off", 12, "off", "-") in plan_hotswap(model, few).rows


# ---- a model that is compiled already


def attach(module, name: str, part: object) -> None:
    """Compile a part of a module. transformers keeps the call that ``generate`` compiles as ``_compiled_call``."""
    setattr(module, name, torch.compile(part, backend="eager"))


COMPILED = {
    "by generate": lambda model: attach(model.get_base_model(), "_compiled_call", model.get_base_model().__call__),
    "wrapper": lambda model: torch.compile(model, backend="eager"),
    "in place": lambda model: model.compile(backend="eager"),
    "a layer": lambda model: model.get_base_model().first.compile(backend="eager"),
    "a wrapped part": lambda model: attach(model.get_base_model(), "blocks", model.get_base_model().blocks),
    "forward": lambda model: attach(model, "forward", model.forward),
    "the base, before PEFT wrapped it": lambda model: get_peft_model(
        torch.compile(LINEAR.base(), backend="eager"), LoraConfig(r=2, target_modules=["last"])
    ),
}


@pytest.mark.parametrize("form", COMPILED)
def test_a_compiled_model_is_noticed_in_every_form(tmp_path, form):
    model = load(LINEAR, *save_family(LINEAR, tmp_path, dict(r=2)))
    compiled = COMPILED[form](model)
    compiled = model if compiled is None else compiled
    with pytest.raises(ValueError, match=r"Call prepare_model_for_compiled_hotswap \*before\* compiling the model"):
        prepare_model_for_compiled_hotswap(compiled, target_rank=4)
    with pytest.warns(UserWarning, match="called with a model that is already compiled"):
        prepare_model_for_compiled_hotswap(compiled, target_rank=4, check_compiled="warn")
    prepare_model_for_compiled_hotswap(compiled, target_rank=6, check_compiled="ignore")
    assert {tensor.capacity for tensor in resolve_slot(compiled, "default").tensors} == {6}


def test_a_scaling_is_a_named_buffer(tmp_path):
    folders = save_family(LLAMA, tmp_path, dict(r=2), dict(r=5))
    model = load(LLAMA, folders[0])
    keys = model.state_dict().keys()
    prepare_model_for_compiled_hotswap(model, adapters=folders)
    hotswap_adapter(model, folders[1], "default")
    scalings = {name: each for name, each in model.named_buffers() if "hotswap_scaling" in name}
    assert len(scalings) == len(lora_layers(model))
    assert model.state_dict().keys() == keys, "a state dict is that of a fresh load"
    # who puts other values in the place of a model's, an export too, reaches the scalings
    off = {name: torch.zeros_like(each) for name, each in scalings.items()}
    without = torch.func.functional_call(model, off, kwargs={**LLAMA.inputs(), "use_cache": False}).logits
    assert_close(without, call(LLAMA.base(), LLAMA.inputs()))
    program = torch.export.export(model, (), {**LLAMA.inputs(), "use_cache": False}, strict=False)
    assert set(program.graph_signature.buffers) >= scalings.keys()
    model.delete_adapter("default")
    assert not [name for name, _ in model.named_buffers() if "hotswap_scaling" in name]


@pytest.mark.parametrize("rows", [1, 2])
def test_what_is_prepared_is_as_exact_as_the_model(tmp_path, rows):
    # 5 / 3 and 7 / sqrt(5) are not exact in float32
    folders = save_family(LLAMA, tmp_path, dict(r=3, lora_alpha=5), dict(r=5, lora_alpha=7, use_rslora=True))
    model = load(LLAMA, folders[0])
    pool = AdapterPool(model, adapters=dict(zip("ab", folders, strict=True)), rows=rows, progress=False)
    pool.swap("b")
    fresh = load(LLAMA, folders[1])
    assert_same_outputs(model, fresh, LLAMA, tolerance=1e-14)
    pool.strength = 0.3
    for layer in lora_layers(fresh):
        layer.scaling["default"] *= 0.3
    assert_same_outputs(model, fresh, LLAMA, tolerance=1e-14)


def as_a_pool(model, folders, **how):
    pool = AdapterPool(model, adapters={"new": folders[1]}, progress=False, **how)
    return {"swap": lambda: pool.swap("new"), **({"assign": lambda: pool.assign(["new"])} if how else {})}


#: how a model is made ready, and what a pool then does
READY = {
    "as it is": lambda model, folders: {},
    "swapped": lambda model, folders: hotswap_adapter(model, folders[0], "default") or {},
    "prepared": lambda model, folders: prepare_model_for_compiled_hotswap(model, target_rank=8) or {},
    "a pool": as_a_pool,
    "rows": partial(as_a_pool, rows=2),
}


@pytest.mark.parametrize("which", ["lora_A", "lora_B"])
@pytest.mark.parametrize("ready", READY)
def test_a_parameter_that_pruning_took_out_of_its_table(tmp_path, ready, which):
    """It is there under another name, so its address alone says that all is well."""
    folders = save_family(LINEAR, tmp_path, dict(r=4), dict(r=8))
    model = load(LINEAR, folders[0])
    of_pool = READY[ready](model, folders)
    prune.identity(getattr(model.base_model.model.first, which)["default"], "weight")
    refused(f"no {which}.weight_orig", hotswap_adapter, model, folders[1], "default")
    assert not plan_hotswap(model, folders[1]).ok
    for action in of_pool.values():
        refused("under other names: moved, converted, pruned", lambda _, action=action: action(), model)
    if ready == "rows":
        refused("under other names: the model was moved", lambda _: model(LINEAR.inputs()), model)
