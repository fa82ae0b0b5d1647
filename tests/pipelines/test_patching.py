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
from operator import attrgetter
from pathlib import Path

import peft.utils.hotswap
import pytest
import torch
from accelerate import cpu_offload
from models import KINDS, call, save_family
from oracle import assert_close, untouched
from peft import LoraConfig
from peft.utils import hotswap as through_its_package
from safetensors.torch import load_file
from test_pipeline import ATTENTION, SD, assert_same_latents, lora, offload_in_groups
from transformers.integrations import PeftAdapterMixin

import hotswap_lab
from hotswap_lab import (
    HotswapError,
    RecompileWatch,
    hotswap_pipeline,
    patch_peft,
)
from hotswap_lab.lessons.tour import compare
from hotswap_lab.pipelines.lora_files import components_of

LLAMA = KINDS["llama"]
FUNCTIONS = ("hotswap_adapter", "hotswap_adapter_from_state_dict", "prepare_model_for_compiled_hotswap")
#: PEFT's and diffusers' own tests that fail with the patch, and why
DIFFERENT = {
    "test_hotswap_wrong_peft_types_raises": "adapters of another type than LoRA are swapped, not refused",
    "test_hotswap_extra_key_raises": "the first line says how many layers are missing; the names come after it",
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
    assert_close(call(model, LLAMA.inputs()), expected)
    assert (expected - call(LLAMA.base(), LLAMA.inputs())).abs().max() > 1e-3


# ---- what is replaced, and that it is put back


@pytest.mark.parametrize("first_undone", [0, 1])
def test_two_patches_end_in_any_order(first_undone):
    """What other modules have imported before, and in the meantime, is put back, too."""
    theirs, method = {name: getattr(peft.utils.hotswap, name) for name in FUNCTIONS}, PeftAdapterMixin.load_adapter
    importer = types.ModuleType("a_users_module")
    importer.early = theirs["hotswap_adapter"]
    sys.modules["a_users_module"] = importer
    patches = [patch_peft(), patch_peft()]
    try:
        importer.late = peft.utils.hotswap.hotswap_adapter
        for number in (None, first_undone):
            if number is not None:
                patches.pop(number).undo()
            for name in FUNCTIONS:
                replaced = getattr(through_its_package, name)
                assert inspect.unwrap(replaced) is getattr(hotswap_lab, name)
            assert importer.early == importer.late
            assert inspect.unwrap(importer.late) is hotswap_lab.hotswap_adapter
            assert PeftAdapterMixin.load_adapter is not method
        patches[0].undo()
        assert importer.early is importer.late is theirs["hotswap_adapter"]
    finally:
        del sys.modules["a_users_module"]
        patches[0].undo()  # once more does nothing
    assert {name: getattr(peft.utils.hotswap, name) for name in FUNCTIONS} == theirs
    assert PeftAdapterMixin.load_adapter is method


def test_an_error_ends_a_patch_and_no_other():
    with patch_peft():
        with pytest.raises(ZeroDivisionError), patch_peft():
            raise ZeroDivisionError
        assert inspect.unwrap(peft.utils.hotswap.hotswap_adapter) is hotswap_lab.hotswap_adapter
    assert peft.utils.hotswap.hotswap_adapter.__module__ == "peft.utils.hotswap"


@pytest.mark.long
def test_measurements_still_measure_peft():
    """PEFT's function calls others of its module, which are replaced: it would not refuse anything then."""
    with patch_peft():
        ours, theirs, _ = compare("sort", 2)
    assert (ours.state, theirs.state) == ("right", "refused")
    assert theirs.note.startswith("Configs are incompatible")


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
@pytest.mark.parametrize("how", ["a folder", "a subfolder", "as a download", "a state dict", "a folder and a config"])
def test_transformers_load_adapter(family, new, how):
    folder, config = Path(family[new]), LoraConfig.from_pretrained(family[new])
    tensors = load_file(folder / "adapter_model.safetensors")
    given = {
        "a folder": ((family[new], "default"), {}),
        "a subfolder": ((str(folder.parent), "default"), dict(adapter_kwargs={"subfolder": folder.name})),
        "as a download": ((str(folder.parent), "default"), dict(download_kwargs={"subfolder": folder.name})),
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


@pytest.mark.long
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


def test_what_is_refused(family):
    model = loaded(family[2])
    with patch_peft():
        with pytest.raises(HotswapError, match=r"call hotswap_adapter\(model, .*add_layers"), untouched(model):
            model.load_adapter(family[0], "default", hotswap=True)
        with pytest.raises(ValueError, match="already be an existing adapter"):
            model.load_adapter(family[0], "absent", hotswap=True)
        with pytest.raises(ValueError, match="already exists"):
            model.load_adapter(family[0], "default")
        model = LLAMA.base()
        model.enable_peft_hotswap(target_rank=2)
        with pytest.raises(HotswapError, match="rank"):  # which is said once
            model.load_adapter(family[0], "default")
        assert_is(model, family[0])
        model.load_adapter(family[1], "other")


def test_every_argument_of_transformers_is_known():
    """A new argument needs a look: it may be one that changes what is loaded."""
    names = list(inspect.signature(PeftAdapterMixin.load_adapter).parameters)
    known = "self peft_model_id adapter_name peft_config adapter_state_dict low_cpu_mem_usage is_trainable hotswap"
    assert names == [*known.split(), "local_files_only", "adapter_kwargs", "load_config", "kwargs"]


# ---- diffusers


def on_unet(*seeds: int, ends: tuple[str, ...] = ATTENTION) -> list[dict]:
    """LoRAs for the UNet alone, of other ranks."""
    return [lora(SD, seed=seed, rank=seed + 1, components={"unet": ends}) for seed in seeds]


def load_with_patch(pipe, source: dict, name: str = "style", **options) -> None:
    with patch_peft():
        pipe.load_lora_weights(source, adapter_name=name, hotswap=True, **options)


def test_diffusers_swaps_what_peft_refuses_or_gets_wrong():
    first, second = on_unet(1, 2)
    second = {key: tensor for key, tensor in second.items() if "mid_block" not in key}  # fewer layers as well
    pipe = SD.loaded(first)
    load_with_patch(pipe, second)
    assert_same_latents(pipe, SD.loaded(second))


class AnotherError(Exception):
    """An error that is not about the swap."""


def refused(pipe, error: type[Exception], match: str, method: str, source: dict, **options: object) -> None:
    """The swap is refused, and no component is touched."""
    with contextlib.ExitStack() as stack:
        for model in components_of(pipe).values():
            stack.enter_context(untouched(model))
        with patch_peft(), pytest.raises(error, match=match):
            attrgetter(method)(pipe)(source, adapter_name="style", hotswap=True, **options)


def test_diffusers_keeps_the_adapter_where_a_swap_is_refused():
    """diffusers deletes an adapter after any error, and with a refusal the pipeline would be left without one."""
    (first,), (second,) = on_unet(1, ends=ATTENTION[:2]), on_unet(2)  # on two more projections
    pipe = SD.loaded(first)
    refused(pipe, HotswapError, r"call hotswap_pipeline\(.*add_layers=True\)", "load_lora_weights", second)
    assert_same_latents(pipe, SD.loaded(first))
    hotswap_pipeline(pipe, second, "style", add_layers=True)
    assert_same_latents(pipe, SD.loaded(second))


@pytest.mark.long
def test_a_component_alone_keeps_its_adapter(monkeypatch):
    (first, same), (second,) = on_unet(1, 3, ends=ATTENTION[:2]), on_unet(2)
    pipe = SD.loaded(first)
    refused(pipe, HotswapError, "call hotswap_pipeline", "unet.load_lora_adapter", second, prefix="unet")

    def fails(*_: object, **__: object) -> None:
        raise AnotherError

    monkeypatch.setattr("hotswap_lab.swap.apply", fails)
    refused(pipe, AnotherError, "", "unet.load_lora_adapter", same, prefix="unet")
    monkeypatch.undo()
    with patch_peft():
        pipe.unet.load_lora_adapter(same, adapter_name="style", hotswap=True, prefix="unet")
    assert_same_latents(pipe, SD.loaded(same))


def test_diffusers_swaps_all_components_or_none():
    """By itself it swaps the UNet first, and then refuses the text encoder's part."""
    first, second, (unet_alone,) = lora(SD, seed=1), lora(SD, seed=2, rank=3), on_unet(3)
    pipe = SD.loaded(first)
    load_with_patch(pipe, second, low_cpu_mem_usage=True)
    assert_same_latents(pipe, SD.loaded(second))
    with pytest.warns(UserWarning, match="text_encoder keep the adapter 'style'"):
        load_with_patch(pipe, unet_alone)
    pipe = SD.loaded(unet_alone)
    refused(pipe, HotswapError, "components without an adapter", "load_lora_weights", second)
    with pytest.raises(ValueError, match="no existing adapter by that name"):
        load_with_patch(pipe, unet_alone, "absent")
    with patch_peft(), untouched(pipe.unet), pytest.raises(ValueError, match="already in use"):
        pipe.load_lora_weights(second, adapter_name="style")


@pytest.mark.long
def test_diffusers_swaps_what_is_offloaded_in_groups():
    """It applies its hooks again, which :func:`hotswap_pipeline` doesn't: what can't be swapped so is refused."""
    first, second = on_unet(1, 2)
    for old, new in ((first, second), (lora(SD), lora(SD, seed=2))):
        pipe = SD.loaded(old)
        offload_in_groups(pipe.unet)
        if new is second:
            load_with_patch(pipe, new)
            assert_same_latents(pipe, SD.loaded(new))
        else:
            refused(pipe, HotswapError, "offloaded in groups", "load_lora_weights", new)


def test_diffusers_swaps_what_is_offloaded_one_by_one(monkeypatch):
    """It takes its hooks off and puts them on again."""
    first, second = on_unet(1, 2)
    pipe = SD.loaded(first)
    offload = lambda pipe, **_: cpu_offload(pipe.unet, execution_device=torch.device("cpu"))  # noqa: E731
    monkeypatch.setattr(type(pipe), "enable_sequential_cpu_offload", offload)  # which needs a GPU
    pipe.enable_sequential_cpu_offload()
    load_with_patch(pipe, second)
    assert all(each.is_meta for each in pipe.unet.parameters())
    assert_same_latents(pipe, SD.loaded(second))


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
