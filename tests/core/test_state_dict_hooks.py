"""Layers that are turned off, and rows of padding: not in what is saved, nor missed by what is loaded."""

from __future__ import annotations

import contextlib
import warnings

import pytest
import torch
from adapters import save_random_adapter_of
from faults import run_with_fault
from lengths import few_of, long
from models import COPIES, KINDS, call, copied, load, save_family, save_random_adapter
from oracle import assert_close, assert_same, assert_same_outputs, assert_same_tensors, contents, identities, untouched
from peft import LoHaConfig, LoKrConfig, LoraConfig, set_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter as pefts_hotswap
from peft.utils.save_and_load import load_peft_weights
from refusals import refused

from hotswap_lab import AdapterPool, hotswap_adapter, prepare_model_for_compiled_hotswap, save_adapter
from hotswap_lab.core.tensors import OFF_ATTRIBUTE

LLAMA = KINDS["llama"]


@pytest.fixture
def folders(tmp_path):
    return save_family(LLAMA, tmp_path, dict(r=4), dict(r=4, target_modules=["q_proj"]))


@pytest.fixture
def model(folders):
    model = load(LLAMA, folders[0])
    hotswap_adapter(model, folders[1], "default")
    return model


@pytest.mark.parametrize("room", [None, 8])
@pytest.mark.parametrize("way", few_of([None, *COPIES], [None, "deepcopy"]))
def test_a_state_dict_goes_back_in_strictly(model, folders, room, way):
    """Into the model and into a copy of it, which leaves the model alone."""
    if room:
        prepare_model_for_compiled_hotswap(model, target_rank=room)
    twin = copied(model, way) if way else model
    assert twin.state_dict().keys() == model.state_dict().keys()
    with untouched(model) if way else contextlib.nullcontext():
        state = {key: value.clone() for key, value in twin.state_dict().items()}
        for name, parameter in twin.named_parameters():
            if "q_proj.lora_" in name:
                parameter.data.normal_()
        result = twin.load_state_dict(state, strict=True)
        assert not result.missing_keys
        assert not result.unexpected_keys
        assert_same_outputs(twin, load(LLAMA, folders[1]), LLAMA)
        if not room:  # and a full one, from before the layers were turned off
            twin.load_state_dict(load(LLAMA, folders[0]).state_dict(), strict=True)
        hotswap_adapter(twin, folders[0], "default", add_layers=True)
        assert_same_outputs(twin, load(LLAMA, folders[0]), LLAMA)


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("config", [LoraConfig, LoHaConfig])
def test_nothing_around_what_is_saved_goes_into_a_checkpoint(tmp_path, config, rank):
    config = config(r=rank, target_modules=list(LLAMA.modules))
    model = load(LLAMA, save_random_adapter_of(config, tmp_path / "made", seed=1))
    expected = {key: value.clone() for key, value in model.state_dict().items()}
    prepare_model_for_compiled_hotswap(model, target_rank=64)
    assert_same_tensors(model.state_dict(), expected)
    for key, value in model.state_dict().items():
        assert value.untyped_storage().nbytes() == value.nbytes, key


MLP = KINDS["linear"]
#: forms of LoRA with tensors that have a gradient although A and B are zero
FORMS = {"DoRA": dict(use_dora=True), "lora_bias": dict(lora_bias=True)}
WAYS = ("swap", "prepared", "reserved", "pool", "with a fresh load")


def trained(model) -> dict[str, bool]:
    return {name: each.requires_grad for name, each in model.named_parameters() if ".lora_" in name}


def turned_off(tmp_path, form: dict, way: str):
    """A model in training, some of whose layers an adapter has turned off; and that adapter."""
    everywhere = {"target_modules": ["first", "blocks.1", "last"], **form}
    full = save_random_adapter(MLP, tmp_path / "full", seed=1, r=4, **everywhere)
    few = save_random_adapter(MLP, tmp_path / "few", seed=2, r=4, **{**everywhere, "target_modules": ["first"]})
    if way == "with a fresh load":
        saved = {**everywhere, "target_modules": ["first"], "modules_to_save": ["blocks.0"]}
        few = save_random_adapter(MLP, tmp_path / "saved", seed=2, r=4, **saved)
    model = load(MLP, few if way == "reserved" else full, is_trainable=True)
    if way in ("prepared", "reserved"):
        prepare_model_for_compiled_hotswap(model, adapters=[full], target_rank=6)
    if way == "pool":
        AdapterPool(model, adapters={"few": few}, progress=False).swap("few")
    elif way != "reserved":
        hotswap_adapter(model, few, "default")
    return model, full, few


def train(model, steps: int = 5) -> None:
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(MLP.inputs()).square().mean().backward()
        optimizer.step()
    model.eval()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("way", WAYS)
def test_a_magnitude_or_bias_is_not_trained_where_its_layer_is_off(tmp_path, way, form):
    model, full, few = turned_off(tmp_path, FORMS[form], way)
    fresh = load(MLP, few, is_trainable=True)
    live = trained(model)
    assert all(live[name] is value for name, value in trained(fresh).items())
    for each in (model, fresh):
        train(each)
    assert_close(call(model, MLP.inputs()), call(fresh, MLP.inputs()))
    save_adapter(model, tmp_path / "trained")
    assert_close(call(load(MLP, str(tmp_path / "trained")), MLP.inputs()), call(model, MLP.inputs()))
    hotswap_adapter(model, full, "default", add_layers=True)
    assert trained(model) == trained(load(MLP, full, is_trainable=True))
    assert_same_outputs(model, load(MLP, full), MLP)


def test_a_first_swap_that_fails_leaves_no_hooks(folders, monkeypatch):
    model = load(LLAMA, folders[0])
    hooks = {key: [*each] for key, each in vars(model.get_base_model()).items() if "state_dict" in key}

    def fails(*_):
        raise MemoryError

    monkeypatch.setattr("hotswap_lab.core.change.copy_all", fails)
    with untouched(model), pytest.raises(MemoryError):
        hotswap_adapter(model, folders[1], "default")
    assert {key: [*each] for key, each in vars(model.get_base_model()).items() if "state_dict" in key} == hooks


@pytest.mark.parametrize("form", few_of(FORMS, ("lora_bias",)))
@pytest.mark.parametrize("way", ["swap", long("pool")])
def test_what_is_frozen_is_unfrozen_after_an_error(tmp_path, way, form):
    model, full, few = turned_off(tmp_path, FORMS[form], way)
    for folder in (full, few):
        flags, step, faults = trained(model), 1, 0
        before = {"contents": contents(model), "objects": identities(model)}  # writes that were undone are counted
        while run_with_fault(lambda folder=folder: hotswap_adapter(model, folder, "default"), step):
            if trained(model) != flags:
                break  # everything was written before this line
            assert_same({"contents": contents(model), "objects": identities(model)}, before)
            step, faults = step + 37, faults + 1
        assert faults > 3


@pytest.mark.parametrize("way", ["swap", "prepared"])
def test_pefts_set_adapter_unfreezes_a_magnitude_that_has_no_gradient(tmp_path, way):
    model, _, few = turned_off(tmp_path, FORMS["DoRA"], way)
    model.set_adapter("default")
    train(model)
    train(fresh := load(MLP, few, is_trainable=True))
    torch.testing.assert_close(call(model, MLP.inputs()), call(fresh, MLP.inputs()))
    save_adapter(model, tmp_path / "saved")
    torch.testing.assert_close(call(load(MLP, str(tmp_path / "saved")), MLP.inputs()), call(model, MLP.inputs()))


def test_pefts_set_adapter_unfreezes_a_bias(tmp_path):
    """Then what is trained is not what would be saved, which is said, until the next swap."""
    model, _, few = turned_off(tmp_path, FORMS["lora_bias"], "swap")
    flags = trained(model)
    model.set_adapter("default")
    save_adapter(model, tmp_path / "still right")
    train(model)
    refused(r"off on a layer, but its .* there was written to", save_adapter, model, tmp_path / "saved")
    with pytest.warns(UserWarning, match="set_adapter lets it be trained"):
        model.state_dict()
    hotswap_adapter(model, few, "default")
    assert trained(model) == flags
    train(model)
    save_adapter(model, tmp_path / "saved")


@pytest.mark.parametrize("form", [*FORMS, "LoKr"])
def test_a_layer_that_was_off_and_gets_weights_is_saved_with_them(tmp_path, form):
    configs = [
        LoKrConfig(r=2, target_modules=of) if form == "LoKr" else LoraConfig(target_modules=of, **FORMS[form])
        for of in (["first", "last"], ["first"])
    ]
    full, few = (save_random_adapter_of(each, tmp_path / str(n), n, MLP) for n, each in enumerate(configs))
    prepare_model_for_compiled_hotswap(model := load(MLP, full))
    hotswap_adapter(model, few, "default")
    written = load(MLP, full).state_dict()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, each in model.named_parameters():
            each.copy_(written[name])
        assert_same_tensors(model.state_dict(), written)


@pytest.mark.parametrize("way", ["swap", "prepared"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("what", ["base_layer", "lora_", "."])
def test_what_is_off_in_an_offloaded_model(tmp_path, what, form, way):
    """accelerate leaves no values to look at."""
    accelerate = pytest.importorskip("accelerate")
    model, _, few = turned_off(tmp_path, FORMS[form], way)
    for path, module in [*model.named_modules()]:
        if what in path and module._parameters:
            accelerate.cpu_offload(module, torch.device("cpu"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        keys, expected = model.state_dict().keys(), load(MLP, few).state_dict().keys()
    assert {key for key in keys if "lora_" in key} == {key for key in expected if "lora_" in key}


@pytest.mark.parametrize("of", ["last", "last.lora_B.default"])
def test_what_was_trained_while_off_and_then_offloaded_is_not_left_out(tmp_path, of):
    accelerate = pytest.importorskip("accelerate")
    model, _, _ = turned_off(tmp_path, {}, "swap")
    assert "base_model.model.last.lora_B.default.weight" not in model.state_dict()
    model.get_base_model().last.lora_B["default"].weight.data.fill_(1)
    accelerate.cpu_offload(model.get_base_model().get_submodule(of), torch.device("cpu"))
    assert "base_model.model.last.lora_B.default.weight" in model.state_dict()


def test_what_is_off_stays_off_in_another_precision(tmp_path):
    """The magnitude is rounded then, and so are the base weights that it is the norm of."""
    model, _, _ = turned_off(tmp_path, FORMS["DoRA"], "swap")
    model.to(torch.bfloat16)
    save_adapter(model, tmp_path / "saved")


#: ways to lose all values of a model, before a state dict gives it others
EMPTIED = {
    "to_empty": lambda model: model.to_empty(device="cpu"),
    "meta, to_empty": lambda model: model.to("meta").to_empty(device="cpu"),
    "meta": lambda model: model.to("meta"),
}


@pytest.mark.parametrize("form", few_of(["LoRA", *FORMS], ["LoRA", "DoRA"]))
@pytest.mark.parametrize("way", ["swap", "prepared", "reserved", "pool"])
@pytest.mark.parametrize("emptied", EMPTIED)
def test_a_model_that_was_emptied_takes_its_state_dict(tmp_path, monkeypatch, emptied, way, form):
    """What is off stays off, padding is zero, and a scaling outlasts it, as the Python float of a fresh load does."""
    model, full, few = turned_off(tmp_path, {} if form == "LoRA" else FORMS[form], way)
    expected = {key: each.clone() for key, each in model.state_dict().items()}
    made = torch.empty_like
    with monkeypatch.context() as patch:  # values that nobody has written
        patch.setattr(torch, "empty_like", lambda like, **how: made(like, **how).fill_(7))
        EMPTIED[emptied](model)
    assert model.state_dict().keys() == expected.keys()
    model.load_state_dict(expected, assign=emptied == "meta")
    assert_same_tensors(model.state_dict(), expected)
    model.eval()
    torch.testing.assert_close(call(model, MLP.inputs()), call(load(MLP, few), MLP.inputs()))
    hotswap_adapter(model, full, "default", add_layers=True)
    torch.testing.assert_close(call(model, MLP.inputs()), call(load(MLP, full), MLP.inputs()))


#: PEFT's own ways to load a file into an adapter, which look up the keys of the file among those of the model
LOADS = {
    "load_adapter": lambda model, folder: model.load_adapter(folder, "default"),
    "low_cpu_mem_usage": lambda model, folder: model.load_adapter(folder, "default", low_cpu_mem_usage=True),
    "ignore_mismatched_sizes": lambda model, folder: model.load_adapter(
        folder, "default", ignore_mismatched_sizes=True
    ),
    "set_peft_model_state_dict": lambda model, folder: set_peft_model_state_dict(model, load_peft_weights(folder)),
}


@pytest.mark.parametrize("form", ["LoRA", *FORMS])
@pytest.mark.parametrize("load_by_peft", LOADS)
def test_peft_loads_weights_into_layers_that_are_off(tmp_path, load_by_peft, form):
    """PEFT dropped them, because it did not find their keys."""
    model, full, few = turned_off(tmp_path, {} if form == "LoRA" else FORMS[form], "swap")
    result = LOADS[load_by_peft](model.double(), full)
    assert not result.unexpected_keys
    fresh = load(MLP, full).double()
    inputs = [MLP.inputs().double()]
    assert_close(call(model.eval(), *inputs), call(fresh, *inputs))
    assert_same_tensors(model.state_dict(), fresh.state_dict())
    # the config is still that of the last swap, so that a fresh load would ignore what was filled
    refused("its config does not target blocks.1", save_adapter, model, tmp_path / "saved")
    hotswap_adapter(model, few, "default")
    save_adapter(model, tmp_path / "saved")
    assert trained(model).keys() == trained(fresh).keys()  # they are still there, but are not shown
    assert not any("last.lora_" in key for key in model.state_dict())


@pytest.mark.parametrize("way", WAYS[:4])  # a fresh load leaves no layer that is off
def test_pefts_hotswap_into_layers_that_are_off(tmp_path, way):
    model, full, _ = turned_off(tmp_path, {}, way)
    pefts_hotswap(model, full, "default")
    assert_same_outputs(model.eval(), load(MLP, full), MLP)


@pytest.mark.parametrize("load_by_peft", LOADS)
@pytest.mark.parametrize("way", ["prepared", "pool"])
def test_peft_loads_no_weights_into_layers_that_are_off_in_a_prepared_model(tmp_path, way, load_by_peft):
    """Their scaling is unknown, and compiled code may rely on their zeros."""
    model, full, _ = turned_off(tmp_path, {}, way)
    with untouched(model):
        refused("nothing for a layer that is turned off", LOADS[load_by_peft], model, full)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_an_adapter_with_the_name_of_a_deleted_one_is_on_everywhere(tmp_path, way, low_cpu_mem_usage):
    model, full, few = turned_off(tmp_path, {}, way)
    model.load_adapter(few, "other")
    model.delete_adapter("default")
    assert not any(module.__dict__.get(OFF_ATTRIBUTE) for module in model.modules())
    model.load_adapter(full, "default", low_cpu_mem_usage=low_cpu_mem_usage)
    model.set_adapter("default")
    assert_same_outputs(model.eval(), load(MLP, full), MLP)


@pytest.mark.parametrize("way", ["swap", "prepared"])
def test_weights_that_were_written_where_it_is_off_are_moved(tmp_path, way):
    model, _, _ = turned_off(tmp_path, {}, way)
    weight = model.get_base_model().last.lora_B["default"].weight
    weight.data.fill_(1)
    model.to(torch.float64)
    assert model.get_base_model().last.lora_B["default"].weight.sum() == weight.numel()
