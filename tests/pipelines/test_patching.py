"""``patch_peft``: code written for PEFT's hotswap, and the ``hotswap=True`` of transformers and diffusers, uses ours.

``PEFT_TESTS`` and ``DIFFUSERS_TESTS`` name folders with the tests of the installed versions: those about hotswapping
run here as they are, with the patch, and fail exactly where this package differs on purpose.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import re
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import oracle
import peft.utils.hotswap
import pytest
import torch
from diffusers.hooks import apply_group_offloading
from models import KINDS, call, load, save_family
from oracle import untouched
from peft import LoraConfig
from peft.utils import hotswap as through_its_package
from safetensors.torch import load_file
from test_pipeline import ATTENTION, SD, assert_same_latents, lora
from transformers.integrations import PeftAdapterMixin

import hotswap_lab
from hotswap_lab import (
    HotswapError,
    RecompileWatch,
    hotswap_pipeline,
    patch_peft,
    prepare_pipeline_for_compiled_hotswap,
)
from hotswap_lab.__main__ import compare
from hotswap_lab.pipelines.lora_files import components_of

LLAMA = KINDS["llama"]
FUNCTIONS = ("hotswap_adapter", "hotswap_adapter_from_state_dict", "prepare_model_for_compiled_hotswap")
#: PEFT's and diffusers' own tests that fail with the patch, and why
DIFFERENT = {
    "test_hotswap_wrong_peft_types_raises": "adapters of another type than LoRA are swapped, not refused",
    "test_hotswap_missing_key_works": "a file with a lora_B but no lora_A is damaged: PEFT turns that layer off",
    "test_prepare_model_for_compiled_hotswap_scalings_update_config": "the live config is that of the loaded adapter",
}


@pytest.fixture
def family(tmp_path) -> list[str]:
    """Three adapters: the second differs in alpha alone, the third in everything."""
    one = dict(r=4, target_modules=["q_proj", "v_proj"])
    return save_family(LLAMA, tmp_path, one, one | dict(lora_alpha=40), dict(r=6, target_modules=["q_proj"]))


def loaded(folder: str):
    """By transformers alone, without a PeftModel."""
    model = LLAMA.base()
    model.load_adapter(folder, "default")
    return model


def assert_is(model, folder: str) -> None:
    expected = call(loaded(folder), LLAMA.inputs())
    torch.testing.assert_close(call(model, LLAMA.inputs()), expected, rtol=0, atol=1e-6)
    assert (expected - call(LLAMA.base(), LLAMA.inputs())).abs().max() > 1e-3


# ---- what is replaced, and that it is put back


def test_the_functions_are_replaced_until_the_end():
    importer = types.ModuleType("a_users_module")
    importer.swap = peft.utils.hotswap.hotswap_adapter
    sys.modules["a_users_module"] = importer
    before = {name: getattr(peft.utils.hotswap, name) for name in FUNCTIONS}
    method = PeftAdapterMixin.load_adapter
    try:
        with patch_peft() as patch, patch_peft():  # the second one finds nothing to replace, and puts nothing back
            for name in FUNCTIONS:
                replaced = getattr(through_its_package, name)
                assert inspect.unwrap(replaced) is getattr(hotswap_lab, name)
            assert inspect.unwrap(importer.swap) is hotswap_lab.hotswap_adapter
            assert PeftAdapterMixin.load_adapter is not method
        assert importer.swap is before["hotswap_adapter"]
    finally:
        del sys.modules["a_users_module"]
    assert {name: getattr(peft.utils.hotswap, name) for name in FUNCTIONS} == before
    assert PeftAdapterMixin.load_adapter is method
    patch.undo()  # once more does nothing
    assert PeftAdapterMixin.load_adapter is method


def test_the_inner_one_leaves_the_outer_one_in_place():
    with patch_peft():
        with pytest.raises(ZeroDivisionError), patch_peft():
            raise ZeroDivisionError
        assert inspect.unwrap(peft.utils.hotswap.hotswap_adapter) is hotswap_lab.hotswap_adapter
    assert peft.utils.hotswap.hotswap_adapter.__module__ == "peft.utils.hotswap"


@pytest.mark.parametrize("first_undone", [0, 1])
def test_two_patches_end_in_any_order(first_undone):
    """What another module has imported in the meantime is put back, too."""
    theirs, method = peft.utils.hotswap.hotswap_adapter, PeftAdapterMixin.load_adapter
    importer = types.ModuleType("a_users_module")
    sys.modules["a_users_module"] = importer
    patches = [patch_peft(), patch_peft()]
    try:
        importer.swap = peft.utils.hotswap.hotswap_adapter
        patches.pop(first_undone).undo()
        assert importer.swap is peft.utils.hotswap.hotswap_adapter
        assert inspect.unwrap(importer.swap) is hotswap_lab.hotswap_adapter
        assert PeftAdapterMixin.load_adapter is not method
    finally:
        patches.pop().undo()
        del sys.modules["a_users_module"]
    assert importer.swap is peft.utils.hotswap.hotswap_adapter is theirs
    assert PeftAdapterMixin.load_adapter is method


def test_measurements_still_measure_peft():
    """PEFT's function calls others of its module, which are replaced: it would not refuse anything then."""
    with patch_peft():
        ours, theirs, _ = compare("sort", 2)
    assert (ours.state, theirs.state) == ("right", "refused")
    assert theirs.note.startswith("Configs are incompatible")


def test_a_swap_through_pefts_name(family):
    model = load(LLAMA, family[0])
    with patch_peft():
        peft.utils.hotswap.hotswap_adapter(model, family[2], "default")
    oracle.assert_equals_fresh_load(model, LLAMA, family[2])


# ---- transformers


def test_transformers_alone_is_wrong_or_refuses(family):
    """Why its method is replaced as well. If this fails, transformers has changed."""
    model = loaded(family[0])
    model.load_adapter(family[1], "default", hotswap=True)
    with pytest.raises(AssertionError):
        assert_is(model, family[1])
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        loaded(family[0]).load_adapter(family[2], "default", hotswap=True)


@pytest.mark.parametrize("new", [1, 2])
@pytest.mark.parametrize("how", ["a folder", "a subfolder", "a state dict", "a folder and a config"])
def test_transformers_load_adapter(family, new, how):
    folder, config = Path(family[new]), LoraConfig.from_pretrained(family[new])
    tensors = load_file(folder / "adapter_model.safetensors")
    given = {
        "a folder": ((family[new], "default"), {}),
        "a subfolder": ((str(folder.parent), "default"), dict(adapter_kwargs={"subfolder": folder.name})),
        "a state dict": ((None, "default"), dict(adapter_state_dict=tensors, peft_config=config)),
        "a folder and a config": ((family[new],), dict(adapter_name="default", peft_config=config)),
    }
    model, (arguments, keywords) = loaded(family[0]), given[how]
    pointers = {name: each.data_ptr() for name, each in model.named_parameters() if "lora_" not in name}
    with patch_peft():
        report = model.load_adapter(*arguments, hotswap=True, **keywords)
    assert_is(model, family[new])
    assert model.peft_config["default"].lora_alpha == config.lora_alpha
    assert {name: each.data_ptr() for name, each in model.named_parameters() if "lora_" not in name} == pointers
    assert not any([report.missing_keys, report.unexpected_keys, report.mismatched_keys, report.error_msgs])


@pytest.mark.usefixtures("fresh_compiler")
def test_transformers_compiled(family):
    """``enable_peft_hotswap`` makes room, and later loads of the same name swap without being told to."""
    model = LLAMA.base()
    with patch_peft():
        model.enable_peft_hotswap(target_rank=8)
        model.load_adapter(family[0], adapter_name="default")
        model.compile(backend="eager")
        assert_is(model, family[0])
        with RecompileWatch(allow=0):
            for folder in (family[1], family[2], family[0]):
                model.load_adapter(folder, adapter_name="default")
                assert_is(model, folder)
        model.load_adapter(family[1], adapter_name="other")  # another name is still loaded by transformers
        assert set(model.peft_config) == {"default", "other"}


def test_too_little_room_is_said_once(family):
    model = LLAMA.base()
    with patch_peft():
        model.enable_peft_hotswap(target_rank=2)
        with pytest.raises(HotswapError, match="rank"):
            model.load_adapter(family[0], "default")
        assert_is(model, family[0])
        model.load_adapter(family[1], "other")


def test_what_is_refused(family):
    model = loaded(family[2])
    with patch_peft():
        with pytest.raises(HotswapError, match=r"call hotswap_adapter\(model, .*add_layers"), untouched(model):
            model.load_adapter(family[0], "default", hotswap=True)
        with pytest.raises(ValueError, match="already be an existing adapter"):
            model.load_adapter(family[0], "absent", hotswap=True)
        with pytest.raises(ValueError, match="already exists"):
            model.load_adapter(family[0], "default")


def test_every_argument_of_transformers_is_known():
    """A new argument needs a look: it may be one that changes what is loaded."""
    names = list(inspect.signature(PeftAdapterMixin.load_adapter).parameters)
    known = "self peft_model_id adapter_name peft_config adapter_state_dict low_cpu_mem_usage is_trainable hotswap"
    assert names == [*known.split(), "local_files_only", "adapter_kwargs", "load_config", "kwargs"]


# ---- diffusers


def test_diffusers_swaps_what_peft_refuses_or_gets_wrong():
    first, second = lora(SD, components={"unet": ATTENTION}), lora(SD, seed=2, rank=7, components={"unet": ATTENTION})
    second = {key: tensor for key, tensor in second.items() if "mid_block" not in key}  # fewer layers as well
    pipe = SD.loaded(first)
    with patch_peft():
        pipe.load_lora_weights(second, adapter_name="style", hotswap=True)
    assert_same_latents(pipe, SD.loaded(second))


def test_diffusers_compiled():
    first, second = (lora(SD, seed=seed, rank=seed + 1, components={"unet": ATTENTION}) for seed in (1, 2))
    pipe = SD()
    with patch_peft():
        pipe.enable_lora_hotswap(target_rank=8)
        pipe.load_lora_weights(first, adapter_name="style")
        pipe.unet.compile(backend="eager")
        assert_same_latents(pipe, SD.loaded(first))
        with RecompileWatch(allow=0):
            pipe.load_lora_weights(second, adapter_name="style", hotswap=True)
            assert_same_latents(pipe, SD.loaded(second))


class AnotherError(Exception):
    """An error that is not about the swap."""


@contextlib.contextmanager
def untouched_pipeline(pipe) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for model in components_of(pipe).values():
            stack.enter_context(untouched(model))
        yield


def narrow_and_wide() -> list[dict]:
    """The second one is on two projections that the first one lacks."""
    return [lora(SD, seed=1, components={"unet": ATTENTION[:2]}), lora(SD, seed=2, components={"unet": ATTENTION})]


@pytest.mark.parametrize("compiled", [False, True])
def test_diffusers_keeps_the_adapter_where_a_swap_is_refused(compiled):
    """diffusers deletes an adapter after any error, and with a refusal the pipeline would be left without one."""
    first, second = narrow_and_wide()
    pipe = SD.loaded(first)
    if compiled:
        pipe.unet.compile(backend="eager")
        assert_same_latents(pipe, SD.loaded(first))
    advice = r"prepare_pipeline_for_compiled_hotswap" if compiled else r"call hotswap_pipeline\(.*add_layers=True\)"
    with patch_peft(), untouched_pipeline(pipe), pytest.raises(HotswapError, match=advice):
        pipe.load_lora_weights(second, adapter_name="style", hotswap=True)
    assert_same_latents(pipe, SD.loaded(first))
    if compiled:  # what the advice says
        pipe = SD.loaded(first)
        prepare_pipeline_for_compiled_hotswap(pipe, [second])
        pipe.unet.compile(backend="eager")
        with patch_peft():
            pipe.load_lora_weights(second, adapter_name="style", hotswap=True)
    else:
        hotswap_pipeline(pipe, second, "style", add_layers=True)
    assert_same_latents(pipe, SD.loaded(second))


def test_a_component_alone_keeps_its_adapter(monkeypatch):
    first, second = narrow_and_wide()
    pipe = SD.loaded(first)
    same = lora(SD, seed=3, components={"unet": ATTENTION[:2]})
    given = dict(adapter_name="style", prefix="unet", hotswap=True)
    with patch_peft():
        with untouched_pipeline(pipe), pytest.raises(HotswapError, match="call hotswap_pipeline"):
            pipe.unet.load_lora_adapter(second, **given)
        monkeypatch.setattr("hotswap_lab.swap.apply", raising(AnotherError))
        with untouched_pipeline(pipe), pytest.raises(AnotherError):
            pipe.unet.load_lora_adapter(same, **given)
        monkeypatch.undo()
        pipe.unet.load_lora_adapter(same, **given)
    assert_same_latents(pipe, SD.loaded(same))


def raising(error: type[Exception]):
    def function(*_: object) -> None:
        raise error

    return function


def test_diffusers_swaps_all_components_or_none():
    """By itself it swaps the UNet first, and then refuses the text encoder's part."""
    first, second, unet_alone = (
        lora(SD, seed=1),
        lora(SD, seed=2, rank=3),
        lora(SD, seed=3, components={"unet": ATTENTION}),
    )
    pipe = SD.loaded(first)
    with patch_peft():
        pipe.load_lora_weights(second, adapter_name="style", hotswap=True, low_cpu_mem_usage=True)
        assert_same_latents(pipe, SD.loaded(second))
        with pytest.warns(UserWarning, match="text_encoder keep the adapter 'style'"):
            pipe.load_lora_weights(unet_alone, adapter_name="style", hotswap=True)
        pipe = SD.loaded(unet_alone)
        with untouched_pipeline(pipe), pytest.raises(HotswapError, match="components without an adapter"):
            pipe.load_lora_weights(second, adapter_name="style", hotswap=True)
        with untouched_pipeline(pipe), pytest.raises(ValueError, match="no existing adapter by that name"):
            pipe.load_lora_weights(unet_alone, adapter_name="absent", hotswap=True)


def test_diffusers_swaps_what_is_offloaded_in_groups():
    """It applies its hooks again, which :func:`hotswap_pipeline` doesn't: what can't be swapped so is refused."""
    options = dict.fromkeys(("onload_device", "offload_device"), torch.device("cpu"))
    first, second = (lora(SD, seed=seed, components={"unet": ATTENTION}) for seed in (1, 2))
    pipe = SD.loaded(first)
    apply_group_offloading(pipe.unet, offload_type="leaf_level", **options)
    with patch_peft():
        pipe.load_lora_weights(second, adapter_name="style", hotswap=True)
        assert_same_latents(pipe, SD.loaded(second))
        pipe = SD.loaded(lora(SD))
        apply_group_offloading(pipe.unet, offload_type="leaf_level", **options)
        with untouched_pipeline(pipe), pytest.raises(HotswapError, match="offloaded in groups"):
            pipe.load_lora_weights(lora(SD, seed=2), adapter_name="style", hotswap=True)


# ---- the tests of others


def run_tests_of_others(folder: str, tmp_path: Path, *arguments: str) -> tuple[int, set[str]]:
    """Run them in a copy, with the patch. How many passed, and the names of those that failed."""
    (tmp_path / "patched.py").write_text("import hotswap_lab\nhotswap_lab.patch_peft()\n")
    # their helpers import it for other tests
    (tmp_path / "datasets.py").write_text("def load_dataset(*args, **kwargs):\n    raise OSError\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    shutil.copytree(folder, tmp_path / "tests")
    (tmp_path / "tests" / "__init__.py").touch()  # a released archive lacks it
    path = os.pathsep.join([str(tmp_path), str(Path(hotswap_lab.__file__).parents[1])])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "patched", "-p", "no:cacheprovider", *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path, "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
    )
    failed = set(re.findall(r"^(?:FAILED|ERROR) \S+::(\w+)", done.stdout, re.MULTILINE))
    return int((re.search(r"(\d+) passed", done.stdout) or [0, 0])[1]), failed


@pytest.mark.long
@pytest.mark.skipif("PEFT_TESTS" not in os.environ, reason="PEFT_TESTS names no folder with PEFT's tests")
def test_pefts_own_tests(tmp_path):
    arguments = ["-k", "TestHotSwapping", "tests/test_initialization.py"]
    passed, failed = run_tests_of_others(os.environ["PEFT_TESTS"], tmp_path, *arguments)
    assert failed == set(DIFFERENT)
    assert passed > 30


@pytest.mark.long
@pytest.mark.skipif("DIFFUSERS_TESTS" not in os.environ, reason="DIFFUSERS_TESTS names no folder with diffusers' tests")
def test_diffusers_own_tests(tmp_path):
    arguments = ["-k", "hotswap or HotSwap", "tests/models/transformers/test_models_transformer_flux.py"]
    passed, failed = run_tests_of_others(os.environ["DIFFUSERS_TESTS"], tmp_path, *arguments)
    assert not failed
    assert passed
