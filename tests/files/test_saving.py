"""What is saved after a swap is what would be saved after a fresh load."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from adapters import METHODS, save_random_adapter_of
from lengths import long
from models import ARCHITECTURES, KINDS, Kind, load, save_family, save_random_adapter
from oracle import assert_equals_fresh_load, assert_same, assert_same_outputs, assert_same_tensors, config_of, files_in
from peft import (
    AdaptionPromptConfig,
    LNTuningConfig,
    LoHaConfig,
    LoraConfig,
    PeftConfig,
    PeftMixedModel,
    PeftModel,
    ShiraConfig,
    TrainableTokensConfig,
    VeraConfig,
    get_peft_model,
)
from peft.utils import get_peft_model_state_dict
from refusals import refused
from safetensors.torch import load_file

from hotswap_lab import (
    Adapter,
    HotswapError,
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
    prepare_model_for_compiled_hotswap,
    resolve_slot,
    save_adapter,
    verify_hotswap,
)
from hotswap_lab.files import reading
from hotswap_lab.files import saving as saving_module
from hotswap_lab.files.sources import LOCK

LLAMA, MLP = KINDS["llama"], KINDS["linear"]


def tensors_of(folder) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "adapter_model.safetensors")


def assert_saves(model, folder: str, name: str = "default") -> None:
    """``save_adapter`` writes the tensors that PEFT wrote to ``folder``."""
    target = Path(f"{folder} saved")
    save_adapter(model, target, name)
    assert sorted(path.name for path in target.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert_same_tensors(tensors_of(target), tensors_of(folder))


def test_after_a_swap(kind, tmp_path):
    """The config names the base model if PEFT has not: older transformers gives a new model the name ""."""
    old, new = save_family(kind, tmp_path, dict(r=4), dict(r=8, target_modules=list(kind.modules)[:2]))
    model = load(kind, old)
    model.get_base_model().name_or_path = "my/base"
    hotswap_adapter(model, new, "default")
    assert_saves(model, new)
    ours, theirs = (config_of(PeftConfig.from_pretrained(each)) for each in (f"{new} saved", new))
    named = theirs.pop("base_model_name_or_path")
    assert ours.pop("base_model_name_or_path") == ("my/base" if named is None else named)
    assert ours == theirs


def with_compiled_base(model):
    model.base_model.model = torch.compile(model.base_model.model, backend="eager")
    return model


#: the forms that a model with an adapter may have
FORMS = {
    "a PeftModel": lambda model: model,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "a compiled base": with_compiled_base,
    "a tuner": lambda model: model.base_model,
    "injected": lambda model: model.get_base_model(),
}
PLAIN = LoraConfig(r=4, target_modules=["q_proj"])
#: with the embedding where PEFT knows its name, and trained tokens without it
CONFIGS = {
    "LoHa": LoHaConfig(r=4, target_modules=["q_proj", "down_proj"]),
    "LoRA with a head": LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "LoRA with an embedding": LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"]),
    "an embedding alone": LoraConfig(r=4, target_modules=["embed_tokens"]),
    "an embedding by a pattern": LoraConfig(r=4, target_modules=r".*\.embed_tokens"),
    "an embedding by its full name": LoraConfig(r=4, target_modules=["model.embed_tokens"]),
    "LoRA on the head": LoraConfig(r=4, target_modules=["lm_head", "q_proj"]),
    "LoRA with tokens": LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[1, 2, 3]),
    "LoRA on the head, with tokens": LoraConfig(
        r=4, target_modules=["lm_head", "q_proj"], trainable_token_indices={"embed_tokens": [1, 2]}
    ),
    "trained tokens": TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=[1, 2]),
    "VeRA": VeraConfig(r=4, target_modules=["q_proj", "o_proj"]),
    "AdaptionPrompt": AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=4, adapter_layers=2),
}


def is_possible(name: str, form: str) -> bool:
    """Some keep parts beside the layers, which an injected one doesn't find; prompts have no base to compile."""
    return not (form == "injected" and name in ("VeRA", "AdaptionPrompt"))


POSSIBLE = [(name, form) for name in CONFIGS for form in FORMS if is_possible(name, form)]


@pytest.mark.parametrize(
    ("name", "form"), [each if number % 3 == 0 else long(*each) for number, each in enumerate(POSSIBLE)]
)
def test_what_is_saved_is_what_peft_saves(name, form, tmp_path):
    folder = save_random_adapter_of(CONFIGS[name], tmp_path / "made", seed=1)
    model = FORMS[form](load(LLAMA, folder))
    assert_saves(model, folder)
    if name != "AdaptionPrompt" and "compiled" not in form:
        assert verify_hotswap(model, folder, inputs=LLAMA.inputs(), base=LLAMA.base)


@pytest.mark.parametrize("target", ["decoder", "word_embeddings"])
def test_embeddings_by_names_that_peft_does_not_know_are_not_saved(tmp_path, target):
    bert = ARCHITECTURES["bert"]
    folder = save_random_adapter(bert, tmp_path / "made", seed=1, r=4, target_modules=[target])
    assert_saves(load(bert, folder), folder)


@pytest.mark.parametrize("save_projection", [True, False])
def test_what_the_layers_of_an_injected_adapter_share_is_not_left_out(tmp_path, save_projection):
    config = VeraConfig(r=4, target_modules=["q_proj", "o_proj"], save_projection=save_projection)
    folder = save_random_adapter_of(config, tmp_path / "made", seed=1)
    model = load(LLAMA, folder).get_base_model()
    if save_projection:
        with pytest.raises(ValueError, match="vera_A"):  # PEFT's own
            save_adapter(model, tmp_path / "saved")
        assert not (tmp_path / "saved").exists()
    else:
        save_adapter(model, tmp_path / "saved")
        assert_same_outputs(load(LLAMA, str(tmp_path / "saved")), load(LLAMA, folder), LLAMA)


@pytest.mark.parametrize("outer", ["lora", "loha"])
def test_from_a_mixed_model(tmp_path, outer):
    """The layers of one method are around those of the other one."""
    targets = list(MLP.modules)
    configs = {"lora": LoraConfig(r=4, target_modules=targets), "loha": LoHaConfig(r=4, target_modules=targets)}
    folders = {name: save_random_adapter_of(config, tmp_path / name, 1, MLP) for name, config in configs.items()}
    (inner,) = configs.keys() - {outer}
    model = PeftMixedModel.from_pretrained(MLP.base(), folders[inner], adapter_name=inner)
    model.load_adapter(folders[outer], adapter_name=outer)
    for name, folder in folders.items():
        assert_saves(model, folder, name)
        model.set_adapter(name)
        assert verify_hotswap(model, folder, name, inputs=MLP.inputs(), base=MLP.base)


#: a table of PEFT's, a module of the base model, and what PEFT keeps by name on each layer
@pytest.mark.parametrize("name", ["lora_A", "model", "other"])
@pytest.mark.parametrize("method", ["LoHa", "LoRA with tokens", "SHiRA", *({"Shadow"} & METHODS.keys())])
def test_the_names_of_other_adapters_take_nothing_away(tmp_path, method, name):
    if (method, name) == ("LoRA with tokens", "lora_A") and version("peft").startswith("0.20."):
        pytest.skip("PEFT 0.20 loads no tokens under this name")
    shira = ShiraConfig(r=2, target_modules=["q_proj"], random_seed=1)
    config = {**CONFIGS, "SHiRA": shira}[method] if method != "Shadow" else METHODS["Shadow"][1][0]
    folders = [save_random_adapter_of(config, tmp_path / str(seed), seed=seed) for seed in (1, 2)]
    model = load(LLAMA, folders[0])
    model.load_adapter(folders[1], name)
    for folder, each in zip(folders, ("default", name), strict=True):
        assert_saves(model, folder, each)


class Towers(torch.nn.ModuleDict):
    """A base model that is itself of a type that PEFT's tables are of."""

    def __init__(self):
        super().__init__({name: torch.nn.Linear(8, 8) for name in ("text", "image")})

    def forward(self, x):
        return self["text"](x) + self["image"](x)


def test_an_adapter_with_the_name_of_a_module_of_a_base_that_is_a_dict(tmp_path):
    kind = Kind(Towers, lambda: torch.randn(3, 8), ("text", "image"))
    folders = [save_random_adapter(kind, tmp_path / str(seed), seed=seed, r=2) for seed in (1, 2)]
    model = load(kind, folders[0])
    model.load_adapter(folders[1], "image")
    for folder, each in zip(folders, ("default", "image"), strict=True):
        assert_saves(model, folder, each)


def test_an_adapter_with_the_name_of_a_module_in_one_that_it_saves(tmp_path):
    def base() -> torch.nn.Module:
        head = torch.nn.Sequential(OrderedDict(image=torch.nn.Linear(8, 8)))
        return torch.nn.Sequential(OrderedDict(body=torch.nn.Linear(8, 8), head=head))

    kind = Kind(base, lambda: torch.ones(2, 8), ())
    first = save_random_adapter(kind, tmp_path / "1", seed=1, target_modules=["body", "head.image"])
    model = load(kind, first)
    model.add_adapter("image", LoraConfig(target_modules=["body"], modules_to_save=["head"]))
    assert_saves(model, first)


def test_the_saved_tensors_share_no_memory_with_the_model(tmp_path):
    slot = resolve_slot(load(MLP, save_random_adapter(MLP, tmp_path / "old", seed=1, r=4)), "default")
    saved = saving_module.saved_tensors(slot).values()
    assert not {tensor.data_ptr() for tensor in saved} & set(slot.data_ptrs())


MERGED = {
    "an embedding": CONFIGS["LoRA with an embedding"],
    "a head": CONFIGS["LoRA on the head"],
    "a norm": LNTuningConfig(target_modules=["input_layernorm", "norm"]),
}


@pytest.mark.parametrize("merged", ["default", "other"])
@pytest.mark.parametrize("where", MERGED)
def test_base_weights_with_a_merged_adapter_are_not_saved(tmp_path, where, merged):
    folder = save_random_adapter_of(MERGED[where], tmp_path / "made", seed=1)
    model = load(LLAMA, folder)
    if merged == "other":
        model.load_adapter(folder, "other")
        model.set_adapter("other")
    model.merge_adapter()
    found = f"base weights that are saved, too(.|\\n)*merged into some: {merged}"
    refused(found, save_adapter, model, tmp_path / "saved")
    model.unmerge_adapter()
    save_adapter(model, tmp_path / "saved")
    assert_same_outputs(load(LLAMA, str(tmp_path / "saved")), load(LLAMA, folder), LLAMA)


@pytest.mark.parametrize("config", [PLAIN, CONFIGS["LoHa"]])
def test_a_merged_adapter_is_saved_without_base_weights(tmp_path, config):
    folder = save_random_adapter_of(config, tmp_path / "made", seed=1)
    model = load(LLAMA, folder)
    model.merge_adapter()
    assert_saves(model, folder)


def test_links_of_others_in_the_folder_are_left_alone(tmp_path):
    target = tmp_path / "target"
    (target / "below").mkdir(parents=True)
    links = {"latest": ".", "up": "..", "inner": "below", "nowhere": "not/there", "itself": "itself"}
    for name, leads_to in links.items():
        (target / name).symlink_to(leads_to)
    for folder in save_family(MLP, tmp_path, dict(r=4), dict(r=4)):
        save_adapter(load(MLP, folder), target)
        assert {name: os.readlink(target / name) for name in links} == links
        files = {"adapter_config.json", "adapter_model.safetensors"}
        assert {path.name for path in target.iterdir()} == files | {"below"} | links.keys()
        assert_equals_fresh_load(load(MLP, str(target / "latest")), MLP, folder)


@pytest.mark.parametrize("inner", ["", "below/it"])
def test_a_file_in_place_of_the_folder(tmp_path, inner):
    (folder,) = save_family(MLP, tmp_path, dict(r=4))
    file = tmp_path / "file"
    file.write_text("mine")
    error = refused("can't be saved to", save_adapter, load(MLP, folder), file / inner)
    assert f"the file {file}" in str(error)
    assert file.read_text() == "mine"


def test_a_save_that_fails_leaves_no_folder(tmp_path, monkeypatch):
    (folder,) = save_family(MLP, tmp_path / "made", dict(r=4))
    (tmp_path / "there").mkdir()

    def fails(*_, **__):
        raise OSError("no space left on device")

    real, before, moved = os.replace, files_in(tmp_path), []
    # neither while a file is written, nor between the moves of two
    second_fails = lambda *paths: (moved.append(paths), fails() if len(moved) % 4 == 2 else real(*paths))  # noqa: E731
    for module, name, failing in ((saving_module, "save_file", fails), (os, "replace", second_fails)):
        for path in ("adapter", "runs/one/adapter", "there/adapter"):
            moved.clear()
            with monkeypatch.context() as patch:
                patch.setattr(module, name, failing)
                with pytest.raises(OSError, match="no space"):
                    save_adapter(load(MLP, folder), tmp_path / path)
            assert_same(files_in(tmp_path), before)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
@pytest.mark.parametrize("kind", ["folder", "link to a folder", "pipe"])
def test_what_is_no_file_is_not_replaced(tmp_path, name, kind):
    """A folder of this name was deleted with all that was in it."""
    (folder,) = save_family(MLP, tmp_path / "made", dict(r=4))
    there = tmp_path / "there" if kind == "link to a folder" else tmp_path / "target" / name
    (tmp_path / "target").mkdir()
    if kind == "pipe":
        os.mkfifo(there)
    else:
        there.mkdir()
        (there / "notes.txt").write_text("mine")
    if kind == "link to a folder":
        (tmp_path / "target" / name).symlink_to(there)
    refused(f"a folder, a pipe or a device named {name} there", save_adapter, load(MLP, folder), tmp_path / "target")
    assert kind == "pipe" or (there / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("leads_to", ["file", "nowhere"])
def test_a_link_is_replaced_and_what_it_leads_to_is_not(tmp_path, leads_to):
    (folder,) = save_family(MLP, tmp_path / "made", dict(r=4))
    (tmp_path / "file").write_text("mine")
    target = tmp_path / "target"
    target.mkdir()
    (target / "adapter_model.safetensors").symlink_to(tmp_path / leads_to)
    save_adapter(load(MLP, folder), target)
    assert_same_tensors(tensors_of(target), tensors_of(folder))
    assert (tmp_path / "file").read_text() == "mine"


# ---- several at once


def test_who_comes_while_another_process_saves_is_refused(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    (folder,) = save_family(MLP, tmp_path / "made", dict(r=4))
    model, target = load(MLP, folder), tmp_path / "target"
    target.mkdir()
    monkeypatch.setattr(saving_module, "PATIENCE", 0.05)
    with open(target / LOCK, "wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # as another process has it
        refused("which other processes have held", save_adapter, model, target)
    save_adapter(model, target)  # a process that was killed leaves the file, and no lock
    assert {path.name for path in target.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


def test_a_lock_whose_file_was_removed_meanwhile_is_none(tmp_path, monkeypatch):
    """The process that had it has removed the file, and a third one may have locked the next."""
    fcntl = pytest.importorskip("fcntl")
    real, path = fcntl.flock, tmp_path / LOCK

    def removed_first(file, how):
        path.unlink()
        real(file, how)

    with contextlib.ExitStack() as opened:
        with monkeypatch.context() as patch:
            patch.setattr(fcntl, "flock", removed_first)
            assert not saving_module._is_locked(path, opened)
        assert saving_module._is_locked(path, opened)


@pytest.mark.parametrize("moment", ["between the files", "while one is missing"])
def test_a_reader_gets_no_mixture(tmp_path, monkeypatch, moment):
    """A folder is saved to while it is read: the config was one adapter's, and the weights the other's."""
    folders = save_family(MLP, tmp_path / "made", dict(r=4, lora_alpha=3), dict(r=4, lora_alpha=8))
    old, new = (saving_module.files_of(resolve_slot(load(MLP, each), "default")) for each in folders)
    target, real, times = tmp_path / "target", reading.read_tensors, []
    saving_module.save(target, *old)

    def read_tensors(*arguments):
        times.append(0)
        if moment == "between the files" and len(times) == 1:
            saving_module.save(target, *new)
        elif moment == "while one is missing" and len(times) < 3:
            (target / "adapter_model.safetensors").unlink(missing_ok=True)
            (target / LOCK).touch()
        elif moment == "while one is missing" and len(times) == 3:
            (target / LOCK).unlink(missing_ok=True)
            saving_module.save(target, *new)
        return real(*arguments)

    monkeypatch.setattr(reading, "read_tensors", read_tensors)
    adapter = Adapter.load(target)
    assert adapter.config.lora_alpha == 8
    assert_same_tensors(adapter.tensors, tensors_of(folders[1]))
    if moment == "between the files":

        def always(*arguments):
            saving_module.save(target, *new)
            return real(*arguments)

        monkeypatch.setattr(reading, "TRIES", 2)
        monkeypatch.setattr(reading, "read_tensors", always)
        with pytest.raises(HotswapError, match="is being replaced"):
            Adapter.load(target)


#: a process that saves one adapter to a folder again and again, once it is told to
SAVES = """
import sys
from hotswap_lab import Adapter
from hotswap_lab.files.saving import save
from pathlib import Path
target, source, times = sys.argv[1:]
adapter = Adapter.load(source)
print("ready", flush=True)
input()
for _ in range(int(times)):
    save(Path(target), adapter.config, dict(adapter.tensors))
"""


@pytest.mark.parametrize("times", [30, long(1000)])
def test_processes_that_save_to_one_folder(tmp_path, times):
    """Each time that it is read, it has one of the two; one's config came with the other's weights."""
    folders = save_family(MLP, tmp_path / "made", dict(r=4, lora_alpha=3), dict(r=4, lora_alpha=8))
    expected = {3: tensors_of(folders[0]), 8: tensors_of(folders[1])}
    target, pipes = tmp_path / "target", dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    paths = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    save_adapter(load(MLP, folders[0]), target)
    with contextlib.ExitStack() as stack:
        command, environment = [sys.executable, "-c", SAVES, target], os.environ | {"PYTHONPATH": paths}
        started = [
            stack.enter_context(subprocess.Popen([*command, each, str(times)], text=True, env=environment, **pipes))
            for each in folders
        ]
        assert [each.stdout.readline() for each in started] == ["ready\n"] * 2
        for each in started:
            each.stdin.write("\n")
            each.stdin.flush()
        read = 0
        while any(each.poll() is None for each in started):
            adapter, read = Adapter.load(target), read + 1
            assert_same_tensors(adapter.tensors, expected[adapter.config.lora_alpha])
        assert [each.stderr.read() for each in started] == ["", ""]
    assert read > 3
    assert {path.name for path in target.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.parametrize("table", ["lora_A", "lora_B"])
def test_what_is_written_to_the_padding_is_not_lost_in_silence(tmp_path, table):
    (folder,) = save_family(MLP, tmp_path / "made", dict(r=4))
    model = load(MLP, folder)
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    weight = getattr(resolve_slot(model, "default").layers[1].module, table)["default"].weight.data
    (weight if table == "lora_A" else weight.T)[6] = 1
    refused(f"{table}.* is not zero|{table}", save_adapter, model, tmp_path / "saved")


def test_a_path_that_is_the_end_of_another(tmp_path):
    """PEFT takes a name for the end of a path, so the one layer that is on has to be named as a whole."""

    def model_with(adapter: Callable) -> torch.nn.Module:
        torch.manual_seed(0)
        inner = torch.nn.ModuleDict({"a": torch.nn.Linear(8, 8)})
        return adapter(torch.nn.ModuleDict({"a": torch.nn.Linear(8, 8), "block": inner}))

    config = LoraConfig(r=4, target_modules=["a"], init_lora_weights=False)
    model = model_with(lambda base: get_peft_model(base, config))
    outer = {key: each.clone() for key, each in get_peft_model_state_dict(model).items() if "block" not in key}
    hotswap_adapter_from_state_dict(model, outer, "default", LoraConfig(r=4, target_modules=["a"]))
    save_adapter(model, tmp_path)
    fresh = model_with(lambda base: PeftModel.from_pretrained(base, tmp_path))
    assert [key for key in get_peft_model_state_dict(fresh) if "lora_A" in key] == [
        key for key in outer if "lora_A" in key
    ]
