"""Every PEFT method: any adapter can be swapped for any other of its kind, and the model equals a fresh load."""

from __future__ import annotations

import contextlib
import itertools
from pathlib import Path

import pytest
import torch
from adapters import CONFIGS, kind_for, save_random_adapter_of
from models import call, load
from oracle import (
    assert_equals_fresh_load,
    assert_same_outputs,
    assert_untouched,
    nothing_else_changes,
    snapshot,
    untouched,
)
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from refusals import refused

from hotswap_lab import Adapter, hotswap_adapter, plan_hotswap, save_adapter, verify_hotswap

#: how the adapters of each method are called that are swapped here; what is not a method of its own is left out
ELSEWHERE = {PeftType.LORA: "test_lora_kinds.py", PeftType.XLORA: "test_what_is_refused"}

#: PEFT's own files of these lose precision, or cut off what is small: a reload differs a little from what was saved
LOSSY = ("VBLoRA",)
#: what PEFT doesn't load as trainable, or doesn't train any more; and AdaLoRA, whose budget is made anew for training
UNTRAINABLE = (
    "AdaLoRA",
    "PromptTuning",
    "PTuning",
    "PrefixTuning",
    "MultitaskPromptTuning",
    "CPT",
    "Cartridge",
    "VBLoRA",
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    cache: dict[str, list[str]] = {}

    def folders_of(name: str) -> list[str]:
        if name not in cache:
            root = tmp_path_factory.mktemp("adapters")
            cache[name] = [
                save_random_adapter_of(config, root / str(number), number + 1, kind_for(name))
                for number, config in enumerate(CONFIGS[name])
            ]
        return cache[name]

    return folders_of


def test_all_methods_of_this_peft_are_here():
    here = {config.peft_type for configs in CONFIGS.values() for config in configs}
    assert here | ELSEWHERE.keys() == set(PEFT_TYPE_TO_TUNER_MAPPING)


@pytest.mark.long
@pytest.mark.parametrize("name", CONFIGS)
def test_every_pair(folders, name):
    kind, paths = kind_for(name), folders(name)
    for old, new in itertools.product(paths, repeat=2):
        model = load(kind, old)
        call(model, kind.inputs())  # whatever a method caches is cached now
        hotswap_adapter(model, new, "default", add_layers=True)
        assert_equals_fresh_load(model, kind, new, margin=10)
        hotswap_adapter(model, old, "default")  # back, to layers that it was on before
        assert_equals_fresh_load(model, kind, old, margin=10)


@pytest.mark.parametrize("name", CONFIGS)
def test_there_and_back(folders, name, tmp_path):
    """One walk answers for a method: equal there and back, saved, verified, damaged files refused, values in place."""
    kind, (first, second, *_) = kind_for(name), folders(name)
    options = {} if name in UNTRAINABLE else dict(is_trainable=True)
    model = load(kind, first, **options)
    call(model, kind.inputs())
    with nothing_else_changes(Path(second), may_warn="not saved" in name):
        hotswap_adapter(model, second, "default", add_layers=True)
    assert_equals_fresh_load(model, kind, second, margin=10, **options)
    _assert_saved_and_verified(model, kind, first, second, tmp_path / "saved", is_lossy=name in LOSSY)
    _assert_damaged_are_refused(model, Adapter.load(first))

    hotswap_adapter(model, first, "default")
    assert_equals_fresh_load(model, kind, first, margin=10, **options)
    other = save_random_adapter_of(CONFIGS[name][0], tmp_path / "other", 9, kind)
    _assert_values_are_written_in_place(model, other)
    assert_equals_fresh_load(model, kind, other, margin=10, **options)


@pytest.mark.long
@pytest.mark.parametrize("name", CONFIGS)
def test_the_next_one_with_the_same_config(folders, name, tmp_path):
    """PEFT need not load it: where its tensors go is known. The result is the same, whatever was done in between."""
    kind, (first, second, *_) = kind_for(name), folders(name)
    others = [save_random_adapter_of(CONFIGS[name][0], tmp_path / f"{seed}", seed, kind) for seed in (21, 22, 23)]
    model = load(kind, first)
    hotswap_adapter(model, others[0], "default")
    with no_donor_for(name):
        hotswap_adapter(model, others[1], "default")
    assert_equals_fresh_load(model, kind, others[1], margin=10)
    for module in model.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling.update({key: 3 * value for key, value in module.scaling.items()})
    for folder in (others[2], second, first):
        hotswap_adapter(model, folder, "default", add_layers=True)
        assert_equals_fresh_load(model, kind, folder, margin=10)


def _assert_saved_and_verified(model, kind, old: str, new: str, saved, is_lossy: bool) -> None:
    save_adapter(model, saved)
    if not is_lossy:
        assert_same_outputs(model, load(kind, str(saved)), kind, margin=10)
    verdict = verify_hotswap(model, new, inputs=kind.inputs())
    assert verdict, verdict
    assert not verify_hotswap(model, old, inputs=kind.inputs())


def _assert_damaged_are_refused(model, adapter: Adapter) -> None:
    """One tensor less than PEFT would save, or one that nobody knows."""
    before = snapshot(model)
    fewer = {key: tensor for key, tensor in adapter.tensors.items() if key != _indispensable(adapter.tensors)}
    more = {**adapter.tensors, "base_model.model.nowhere.lora_A.weight": torch.ones(2, 2)}
    for tensors in (fewer, more):
        if not tensors:
            continue
        damaged = Adapter.from_state_dict(tensors, adapter.config)
        refused(r"found: [\s\S]*expected: [\s\S]*next: ", hotswap_adapter, model, damaged, "default", add_layers=True)
        assert_untouched(model, before)


def _indispensable(tensors: dict[str, torch.Tensor]) -> str:
    """A tensor that no other key of the file names, too: some methods share tensors between layers."""
    return next(
        key
        for key, tensor in tensors.items()
        if tensor.is_floating_point()
        and not any(
            other != key and each.shape == tensor.shape and torch.equal(each, tensor) for other, each in tensors.items()
        )
    )


def _assert_values_are_written_in_place(model, other: str) -> None:
    """With the same config, a swap writes values only: the same objects at the same addresses."""
    before = {key: (id(each), each.data_ptr()) for key, each in model.named_parameters()}
    values = {key: each.clone() for key, each in model.named_parameters()}
    plan = plan_hotswap(model, other)
    assert plan.writes_values_only
    assert plan.nbytes
    hotswap_adapter(model, other, "default")
    assert {key: (id(each), each.data_ptr()) for key, each in model.named_parameters()} == before
    assert any(not torch.equal(values[key], each) for key, each in model.named_parameters())


#: methods whose files are more than a copy of their tensors, or have one under several names: PEFT must read each
READ_BY_PEFT = (
    *("PromptTuning", "PTuning", "PrefixTuning", "MultitaskPromptTuning", "CPT", "Cartridge"),
    *("RandLora", "SHiRA", "Lily"),
)


@contextlib.contextmanager
def no_donor_for(name: str):
    """Makes loading a donor an error, but for methods that need one each time."""
    with pytest.MonkeyPatch.context() as patch:
        if name not in READ_BY_PEFT:
            patch.setattr("hotswap_lab.beyond.decide.load_donor", None)
        yield


def test_what_is_refused(folders):
    """Another method than the loaded one, in PEFT's words."""
    model = load(kind_for("LoHa"), folders("LoHa")[0])
    with untouched(model), pytest.raises(ValueError, match="Incompatible PEFT types found: LOHA and LOKR"):
        hotswap_adapter(model, folders("LoKr")[0], "default")
