"""Where an adapter is off, a layer is as without it: PEFT merges nothing there, and base weights may change."""

from __future__ import annotations

import pytest
import torch
from lengths import few_of
from models import COPIES, KINDS, call, copied, load, save_family
from refusals import refused

from hotswap_lab import (
    Adapter,
    AdapterPool,
    RecompileWatch,
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
    plan_hotswap,
    prepare_model_for_compiled_hotswap,
)

MLP, CONVOLUTIONS, EMBEDDED = KINDS["linear"], KINDS["conv"], KINDS["embedding"]


def _exact(folder: str, kind=MLP):
    return load(kind, folder).double()


def _answer(model, kind=MLP) -> torch.Tensor:
    torch.manual_seed(0)
    inputs = kind.inputs()
    return call(model, inputs.double() if inputs.is_floating_point() else inputs)


def _assert_equal(model, fresh, kind=MLP) -> None:
    torch.testing.assert_close(_answer(model, kind), _answer(fresh, kind), rtol=0, atol=1e-9)


def _with(model, other: str):
    """Both adapters are active."""
    model.load_adapter(other, "other")
    model.base_model.set_adapter(["default", "other"])
    return model


def _swapped(full: str, few: str, other: str):
    hotswap_adapter(model := _with(_exact(full), other), few, "default")
    return model


def _reserved(full: str, few: str, other: str):
    prepare_model_for_compiled_hotswap(model := _exact(few), adapters=[full])
    return _with(model, other)


def _in_pool(full: str, few: str, other: str):
    model = _with(_exact(full), other)
    AdapterPool(model, "default", adapters={"few": few}, progress=False).swap("few")
    return model


def _prepared(full: str, few: str, other: str):
    prepare_model_for_compiled_hotswap(model := _with(_exact(full), other), adapters=[few], adapter_name="default")
    hotswap_adapter(model, few, "default")
    return model


WAYS = {"swapped": _swapped, "reserved": _reserved, "in a pool": _in_pool, "prepared": _prepared}
FORMS = {"LoRA": {}, "DoRA": dict(use_dora=True), "lora_bias": dict(lora_bias=True)}
#: arguments of PEFT's merge_adapter
MERGES = (
    {},
    dict(safe_merge=True),
    dict(adapter_names=["default"]),
    dict(adapter_names=["default"], safe_merge=True),
    dict(adapter_names=["other"]),
    dict(adapter_names=["other", "default"]),
    dict(adapter_names=["default", "other"], safe_merge=True),
)


def _family(tmp_path, form: dict) -> list[str]:
    # of the layers where "default" is off, "other" is on one, and there is none on the other
    targets = ["first", "blocks.1", "last"], ["first"], ["last", "first"]
    settings = [dict(r=r, target_modules=each) for r, each in zip((4, 3, 2), targets, strict=True)]
    return save_family(MLP, tmp_path, *({**each, **form} for each in settings[:2]), settings[2])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("copy", few_of(["none", *COPIES], ["none", "deepcopy"]))
def test_what_is_off_stays_out_of_pefts_merge(tmp_path, copy, way, form):
    full, few, other = _family(tmp_path, FORMS[form])
    model, fresh = WAYS[way](full, few, other), _with(_exact(few), other)
    if copy != "none":
        model = copied(model, copy)
    _assert_equal(model, fresh)
    for how in MERGES:
        for each in (model, fresh):
            each.merge_adapter(**how)
        _assert_equal(model, fresh)
        for each in (model, fresh):
            each.unmerge_adapter()
        _assert_equal(model, fresh)
    model.merge_adapter(["other"])  # of a layer that merges its adapters one after the other
    model.merge_adapter(["default"])
    fresh.merge_adapter(["other", "default"])
    _assert_equal(model, fresh)
    for each in (model, fresh):
        each.unmerge_adapter()
    unloaded = [each.merge_and_unload(adapter_names=["default"], safe_merge=True) for each in (model, fresh)]
    _assert_equal(*unloaded)


def test_a_layer_that_is_on_again_is_merged(tmp_path):
    full, few, other = _family(tmp_path, {})
    model, fresh = _swapped(full, few, other), _with(_exact(full), other)
    hotswap_adapter(model, full, "default")
    for each in (model, fresh):
        each.merge_adapter(["default"])
    _assert_equal(model, fresh)
    with pytest.raises(TypeError, match="list of strings"):
        model.get_base_model().last.merge(adapter_names="default")


# ---- base weights that change


def _change_base(*models) -> None:
    """As by a checkpoint that is copied into the base model."""
    for model in models:
        for name, tensor in sorted(model.get_base_model().named_parameters()):
            if "lora_" not in name:
                generator = torch.Generator().manual_seed(len(name.replace(".base_layer", "")))
                tensor.data += torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)


def _doras(tmp_path, kind) -> list[str]:
    targets = ["first", "blocks.1", "last"] if kind is MLP else ["conv1d", "conv2d", "conv3d"]
    targets = ["head", "embed"] if kind is EMBEDDED else targets  # the embedding is turned off
    dora = dict(use_dora=True)
    return save_family(
        kind, tmp_path, dict(r=4, target_modules=targets, **dora), dict(r=4, target_modules=targets[:1], **dora)
    )


@pytest.mark.parametrize("kind", [MLP, CONVOLUTIONS, EMBEDDED], ids=["linear", "conv", "embedding"])
@pytest.mark.parametrize("way", ["swap", "reserved", "pool", "pool, base changed before", "compiled"])
def test_where_dora_is_off_the_base_may_change(tmp_path, way, kind):
    full, few = _doras(tmp_path, kind)
    model, fresh = _exact(few if way == "reserved" else full, kind), _exact(few, kind)
    if way == "swap":
        hotswap_adapter(model, few)
    elif way == "reserved":
        prepare_model_for_compiled_hotswap(model, adapters=[full])
    else:
        pool = AdapterPool(model, "default", adapters={"few": few}, progress=False)
        if way == "compiled":
            model.get_base_model().compile(backend="aot_eager")
            _answer(model, kind)
        if way == "pool, base changed before":
            _change_base(model, fresh)
        pool.swap("few")
    _assert_equal(model, fresh, kind)
    _change_base(model, fresh)
    _assert_equal(model, fresh, kind)
    hotswap_adapter(model, full, "default")
    fresh = _exact(full, kind)
    if way == "pool, base changed before":
        _change_base(fresh)
    _change_base(fresh)
    _assert_equal(model, fresh, kind)


def test_turning_dora_off_recompiles_a_model_that_is_not_prepared_once(tmp_path):
    full, few = _doras(tmp_path, MLP)
    model, fresh = _exact(full), _exact(few)
    plan = plan_hotswap(model, few)
    assert not plan.will_recompile
    model.get_base_model().compile(backend="aot_eager")
    _answer(model)
    for folder, recompiles in ((few, True), (full, False), (few, False)):
        assert plan_hotswap(model, folder).will_recompile == recompiles
        with RecompileWatch() as watch:
            hotswap_adapter(model, folder)
            _answer(model)
        assert bool(watch.recompiles) == recompiles
    _assert_equal(model, fresh)


def test_magnitudes_that_are_zero_are_refused(tmp_path):
    """A fresh load of them removes the layer from the model."""
    full, _ = _doras(tmp_path, MLP)
    adapter = Adapter.load(full)
    zero = {key: each * 0 if "first" in key else each for key, each in adapter.tensors.items()}
    model = _exact(full)
    refused(
        "1 magnitudes of DoRA that are zero", hotswap_adapter_from_state_dict, model, zero, "default", adapter.config
    )
    magnitude = model.get_base_model().first.lora_magnitude_vector["default"].weight
    magnitude.data.zero_()
    refused("magnitudes of DoRA that are zero", prepare_model_for_compiled_hotswap, model, target_rank=8)
