"""Every PEFT method: any adapter can be swapped for any other of its kind, and the model equals a fresh load."""

from __future__ import annotations

import itertools
import re
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from adapters import BROKEN, LLAMA, METHODS, save_all, save_random_adapter_of
from lengths import long
from lora_kinds import FAMILIES
from models import call, load
from oracle import (
    assert_equals_fresh_load,
    assert_same_files,
    assert_same_outputs,
    nothing_else_changes,
)
from peft import LoHaConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lycoris_utils import LycorisLayer
from refusals import refused

from hotswap_lab import Adapter, hotswap_adapter, plan_hotswap, save_adapter, verify_hotswap

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
#: methods whose files are more than a copy of their tensors, or have one under several names: PEFT must read each
READ_BY_PEFT = (
    *("PromptTuning", "PTuning", "PrefixTuning", "MultitaskPromptTuning", "CPT", "Cartridge"),
    *("RandLora", "SHiRA", "Lily"),
    *(["VeRA"] if version("peft").startswith("0.20.") else []),
)
#: of each way to load, write and save, those that the short form walks wholly
WHOLE = ("LoHa", "IA3", "PromptTuning", "DoRA")
#: PEFT warns at a load: of shapes, and of what the file lacks
WARNED_OF = ("lora_bias", "VeRA, projection not saved")


def test_all_methods_of_this_peft_are_here():
    here = {config.peft_type for _, configs in METHODS.values() for config in configs}
    # X-LoRA can't be swapped, see test_configs.py
    assert here | {PeftType.XLORA, *BROKEN} == set(PEFT_TYPE_TO_TUNER_MAPPING)


def overwritten(name: str) -> dict[str, torch.Tensor]:
    """The base weights that files of this family bring."""
    names = r"embed_tokens\.|lm_head\." if name.startswith("embeddings") else r"bias$"
    weights = METHODS[name][0].base().state_dict()
    return {key: value for key, value in weights.items() if re.search(names, key)}


def compare(name: str, model, folder: str, **options) -> None:
    kind, _ = METHODS[name]
    if name == "MultiheadAttention":  # PEFT merges at each call, and rounds the base weights
        fresh = load(kind, folder)
        assert_same_outputs(model, fresh, kind, margin=10)
        assert_same_files(model, fresh, "default")
    else:
        assert_equals_fresh_load(model, kind, folder, margin=10, **options)


@pytest.mark.long
@pytest.mark.parametrize("name", METHODS)
def test_every_pair(method_folders, name):
    kind, _ = METHODS[name]
    originals = overwritten(name)
    for old, new in itertools.product(method_folders(name), repeat=2):
        model = load(kind, old)
        call(model, kind.inputs())  # whatever a method caches is cached now
        hotswap_adapter(model, new, "default", add_layers=True, base_weights=originals)
        compare(name, model, new)
        hotswap_adapter(model, old, "default", base_weights=originals)  # back, to layers that it was on before
        compare(name, model, old)


def test_back_over_two_swaps_to_the_layers_of_the_first(tmp_path):
    targets = ["q_proj", "v_proj", "up_proj"]
    configs = [LoHaConfig(r=2, target_modules=targets[:count]) for count in (3, 2, 1)]
    first, second, third = save_all(tmp_path, *configs)
    model = load(LLAMA, first)
    for folder in (second, third, first):  # without add_layers, because they were there before
        hotswap_adapter(model, folder, "default")
        compare("LoHa", model, folder)


@pytest.mark.parametrize(
    ("name", "whole"),
    [
        *((name, True) if name in WHOLE else long(name, True) for name in METHODS),
        *[(name, False) for name in METHODS if name not in WHOLE][::4],
    ],
)
def test_there_and_back(method_folders, name, whole, tmp_path):
    """One walk answers for a method: equal there and back, saved, verified, damaged files refused, values in place.

    If it is not a ``whole`` one, it goes there and back.
    """
    (kind, configs), (first, second, *others) = METHODS[name], method_folders(name)
    is_lora, originals = name in FAMILIES, overwritten(name)
    base, options = (kind.base, {}) if is_lora else (None, dict(is_trainable=name not in UNTRAINABLE))
    model = load(kind, first, **options)
    call(model, kind.inputs())
    with nothing_else_changes(Path(second), originals, may_warn=name in WARNED_OF):
        hotswap_adapter(model, second, "default", add_layers=True, base_weights=originals)
    compare(name, model, second, **options)
    if not whole:
        hotswap_adapter(model, first, "default", add_layers=True, base_weights=originals)
        assert_same_outputs(model, load(kind, first), kind, margin=10)
        return

    save_adapter(model, tmp_path / "saved")
    if name not in LOSSY:
        assert_same_outputs(model, load(kind, str(tmp_path / "saved")), kind, margin=10)
    verdict = verify_hotswap(model, second, inputs=kind.inputs(), base=base)
    assert verdict, verdict
    assert not verify_hotswap(model, first, inputs=kind.inputs(), base=base)
    if not is_lora:
        _assert_damaged_are_refused(model, Adapter.load(first))
        _halve_scales(model)
    for folder in (*others, first) if is_lora else (first,):
        hotswap_adapter(model, folder, "default", add_layers=True, base_weights=originals)
        compare(name, model, folder, **options)
    if not is_lora:
        other = save_random_adapter_of(configs[0], tmp_path / "other", 9, kind)
        _assert_values_are_written_in_place(model, other)
        with pytest.MonkeyPatch.context() as patch:
            if name not in READ_BY_PEFT:  # where the tensors go is known by now
                patch.setattr("hotswap_lab.beyond.decide.load_fresh_adapter", None)
            hotswap_adapter(model, first, "default")
        compare(name, model, first, **options)
        _halve_scales(model)
        hotswap_adapter(model, other, "default")
        compare(name, model, other, **options)


def _halve_scales(model) -> None:
    """As a user may; it is gone after a swap, also between adapters with the same config."""
    for layer in model.modules():
        if isinstance(layer, LycorisLayer):
            layer.set_scale("default", 0.5)


def _assert_damaged_are_refused(model, adapter: Adapter) -> None:
    """One tensor less than PEFT would save, or one that nobody knows."""
    fewer = {key: tensor for key, tensor in adapter.tensors.items() if key != _indispensable(adapter.tensors)}
    more = {**adapter.tensors, "base_model.model.nowhere.lora_A.weight": torch.ones(2, 2)}
    for tensors in (fewer, more):
        if not tensors:
            continue
        damaged = Adapter.from_state_dict(tensors, adapter.config)
        refused(r"found: [\s\S]*expected: [\s\S]*next: ", hotswap_adapter, model, damaged, "default", add_layers=True)


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
