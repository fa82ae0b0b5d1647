"""loaded(model), and the log: one record for each swap, refusal and preparation."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import hashlib
import json
import logging
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter as pefts_hotswap
from peft.utils.save_and_load import load_peft_weights
from refusals import refused
from safetensors.torch import save_file

from hotswap_lab import (
    Adapter,
    AdapterPool,
    ModelInUseError,
    demo,
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
    loaded,
    prepare_model_for_compiled_hotswap,
    prepare_pipeline_for_compiled_hotswap,
    save_adapter,
    waiting_at_most,
)
from hotswap_lab.files.reading import File

SORT, SHOUT = (demo.adapter_path(name) for name in ("sort", "shout"))
WEIGHTS = "adapter_model.safetensors"
HASHES = {each: hashlib.sha256(Path(each, WEIGHTS).read_bytes()).hexdigest() for each in (SORT, SHOUT)}


def the(model):
    (now,) = loaded(model)
    return now


def in_rows(model) -> list:
    return [row.member or row.mix for row in the(model).rows]


def model_with(*adapters: str, **how):
    model, _ = demo.load("reverse")
    return model, AdapterPool(model, adapters={Path(each).name: each for each in adapters}, progress=False, **how)


@pytest.mark.parametrize("way", ["plain", "prepared", "from memory", "pool"])
def test_a_swap_says_what_it_put_in(way, tmp_path):
    model, _ = demo.load("reverse")
    before = the(model)
    assert (before.source, before.when, before.sha256, before.ranks) == ("unknown", None, None, (8,))
    if way == "prepared":
        prepare_model_for_compiled_hotswap(model, adapters=[SORT])
        assert the(model) == before
    if way == "from memory":
        adapter = Adapter.load(SORT)
        hotswap_adapter_from_state_dict(model, adapter.tensors, "default", adapter.config)
    elif way == "pool":
        AdapterPool(model, adapters={"sort": SORT}, progress=False).swap("sort")
    else:
        hotswap_adapter(model, SORT)
    now, source = the(model), "a state dict" if way == "from memory" else SORT
    assert (now.adapter_name, now.method, now.ranks, now.strength) == ("default", "LORA", (6, 16, 24), 1)
    assert (now.source, now.sha256) == (source, HASHES.get(source))
    assert now.member == ("sort" if way == "pool" else None)
    assert json.loads(json.dumps(now.as_dict()))["when"][:19] == f"{now.when:%Y-%m-%dT%H:%M:%S}"
    assert f"strength 1, from {source}, since {now.when:%Y-%m-%d %H:%M:%S}" in repr(loaded(SimpleNamespace(unet=model)))
    assert source in loaded(model)._repr_html_()
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert (the(again).source, the(again).when) == (source, now.when)
    save_adapter(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "pefts")
    for each in ("ours", "pefts"):
        assert "_hotswap" not in (tmp_path / each / "adapter_config.json").read_text()
    other = demo.load("reverse")[0]
    hotswap_adapter(other, SHOUT)
    model.add_adapter("other", other.peft_config["default"])  # what another model's swap noted holds there alone
    assert [each.source for each in loaded(model)] == [source, "unknown"]
    hotswap_adapter(model, SHOUT, "other", add_layers=True)
    assert [each.source for each in loaded(model)] == [source, SHOUT]


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(use_dora=True, target_modules=["q_proj"]),
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_of_other_methods(config, tmp_path):
    model = get_peft_model(demo.load_base(), config)
    model.save_pretrained(tmp_path)
    hotswap_adapter(model, tmp_path)
    now, is_lora = the(model), config.peft_type == "LORA"
    assert (now.method, now.source) == (config.peft_type.value, str(tmp_path))
    assert (now.ranks, now.strength) == (((8,), 1) if is_lora else ((), None))
    assert now.sha256 == hashlib.sha256((tmp_path / WEIGHTS).read_bytes()).hexdigest()


def test_of_a_pool(tmp_path):
    model, pool = model_with(SORT, SHOUT, target_rank=32, rows=3)
    pool.swap("shout", strength=0.5)
    assert (the(pool).member, the(model).source, the(model).strength, pool.mix) == ("shout", SHOUT, 0.5, None)
    weights = {"shout": 0.75, "sort": 0.25}
    pool.swap(weights)
    assert (pool.active, pool.mix, the(model).mix, the(model).sha256) == (None, weights, weights, None)
    assert [line[-1] for line in pool.table] == ["0.25 of the mix", "0.75 of the mix"]
    assert "0.25 of the mix" in str(pool)
    assert "0.75 shout + 0.25 sort" in str(loaded(model))
    pool.off()
    assert (pool.mix, the(model).strength) == (None, 0)
    pool.assign(["sort", None, weights])
    assert in_rows(model) == ["sort", None, weights]
    assert the(model).member is the(model).mix is pool.mix is None
    with pool.using("sort"):
        assert the(model).member == "sort"
        assert the(model).sha256 == HASHES[SORT]
    assert in_rows(model) == ["sort", None, weights]
    pool.swap("shout")
    adapter = Adapter.load(SHOUT)
    pool.update("shout", adapter.tensors)
    assert (the(model).member, the(model).source) == ("shout", "a state dict")


def test_each_row_by_itself():
    """Also in JSON: what a row has, how strongly, and from where; and when the rows were assigned."""
    model, pool = model_with(SORT, SHOUT, target_rank=32, rows=4)
    assert the(model).source == "unknown"
    pool.assign(["shout", "sort", None, "sort"], [1, 0.5, 1, 0])
    pool.strength = 0.5
    now = the(model)
    found = [(row.ranks, row.strength, row.source, row.rows) for row in now.rows]
    sort = (6, 16, 24)
    assert found == [
        ((8,), 0.5, SHOUT, ()),
        (sort, 0.25, SORT, ()),
        ((), 0, "the base model", ()),
        (sort, 0, SORT, ()),
    ]
    assert (now.ranks, now.strength, now.source) == ((6, 8, 16, 24), 0.5, "the rows of a pool")
    assert ">shout | sort | - | sort</td>" in loaded(model)._repr_html_()
    rows = json.loads(json.dumps(now.as_dict()))["rows"]
    assert [(row["member"], row["sha256"]) for row in rows[:3]] == [
        ("shout", HASHES[SHOUT]),
        ("sort", HASHES[SORT]),
        (None, None),
    ]
    since = f", since {now.when:%Y-%m-%d %H:%M:%S}"
    assert str(now).split("; ") == [
        f"default, row 0: shout, LORA of rank 8, strength 0.5, from {SHOUT}{since}",
        f"default, row 1: sort, LORA of rank 6 16 24, strength 0.25, from {SORT}{since}",
        f"default, row 2: LORA of rank -, strength 0, from the base model{since}",
        f"default, row 3: sort, LORA of rank 6 16 24, strength 0, from {SORT}{since}",
    ]
    assert rows[0]["when"] == now.as_dict()["when"]
    pool.assign(["shout", "sort", None, "shout"])  # row 0 keeps its adapter
    assert the(model).when > now.when
    for number, each in enumerate(each for each in model.modules() if hasattr(each, "lora_A")):
        each.set_scale("default", number)
    assert [row.strength for row in the(model).rows] == [None, None, 0, None]
    pool.off()
    pool.assign(["shout", None, None, None])
    assert the(model).strength == the(model).rows[0].strength == 1
    model.delete_adapter("default")
    assert repr(loaded(model)) == "no adapters"


@pytest.mark.parametrize("state", ["active", "inactive", "disabled", "merged"])
def test_what_is_done_with_it(state):
    """A model that computes with something else says something else."""
    model, _ = demo.load("reverse")
    model.load_adapter(SORT, "other")
    with model.disable_adapter() if state == "disabled" else contextlib.nullcontext():
        if state == "inactive":
            model.set_adapter("other")
        elif state == "merged":
            model.merge_adapter()
        now, html = loaded(model)[0], loaded(model)._repr_html_()
    assert now.state == now.as_dict()["state"] == state
    assert str(now).startswith("default: LORA" if state == "active" else f"default ({state}): LORA")
    assert f">{state}</td>" in html


def test_what_is_off_everywhere_has_no_strength(tmp_path):
    model, _ = demo.load("caesar")  # on the MLP only, and the next one on the attention only
    prepare_model_for_compiled_hotswap(model, adapters=[demo.adapter_path("pig_latin")])
    config = Adapter.load(SORT).config
    empty = Adapter(copy.deepcopy(model.peft_config["default"]), {}, "nothing")
    hotswap_adapter(model, empty)
    assert (the(model).ranks, the(model).strength, config.r > 0) == ((), 0, True)


def test_the_pool_knows_where_the_first_adapter_came_from():
    first = demo.adapter_path("reverse")
    model, _ = model_with(first, SORT)
    assert (the(model).member, the(model).source, the(model).strength) == ("reverse", first, 1)


def again_under_its_name(model, folder: str, parameters: list) -> None:
    config = model.peft_config["default"]  # with what a swap has noted on it
    model.delete_adapter("default")
    model.add_adapter("default", config)
    model.set_adapter("default")


def by_training(model, folder: str, parameters: list) -> None:
    for each in parameters:
        each.requires_grad_(True)
        each.grad = torch.ones_like(each)
    torch.optim.SGD(parameters, lr=1e-3).step()
    for each in parameters:
        each.grad = None


def in_state_dict(model, folder: str, parameters: list) -> None:
    model.load_state_dict({key: 2 * each for key, each in get_peft_model_state_dict(model).items()}, strict=False)
    model.load_state_dict({key: 2 * each for key, each in model.state_dict().items() if "lora_" in key}, strict=False)


#: what replaces the weights of an adapter under its name, and tells nobody
OTHERS = {
    "PEFT's load_adapter": lambda model, folder, parameters: model.load_adapter(folder, "default"),
    "deleted and added again": again_under_its_name,
    "set_peft_model_state_dict": lambda model, folder, parameters: set_peft_model_state_dict(
        model, load_peft_weights(folder), "default"
    ),
    "PEFT's hotswap": lambda model, folder, parameters: pefts_hotswap(model, folder, "default"),
    "load_state_dict": in_state_dict,
    "training": by_training,
    "a write": lambda model, folder, parameters: torch.no_grad()(parameters[3].mul_)(2),
    "a write through .data": lambda model, folder, parameters: parameters[3].data.mul_(2),
    "the last number alone": lambda model, folder, parameters: parameters[-1].data[-1, -1].add_(1e-3),
    "other memory": lambda model, folder, parameters: setattr(parameters[3], "data", 2 * parameters[3].data),
}


@pytest.mark.parametrize("way", ["plain", "prepared", "pool"])
@pytest.mark.parametrize("other", OTHERS)
def test_no_file_is_named_whose_weights_are_not_in_the_model(other, way, tmp_path):
    """It named the old one, with its hash."""
    config, folders = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False), []
    for seed in range(2):
        torch.manual_seed(seed)
        get_peft_model(demo.load_base(), config).save_pretrained(tmp_path / f"{seed}")
        folders.append(str(tmp_path / f"{seed}"))
    model = PeftModel.from_pretrained(demo.load_base(), folders[1])
    if way == "prepared":
        prepare_model_for_compiled_hotswap(model, target_rank=4)
    if way == "pool":
        AdapterPool(model, adapters={"new": folders[0]}, target_rank=4, progress=False).swap("new")
    else:
        hotswap_adapter(model, folders[0])
    before = the(model)
    assert (before.source, before.member) == (folders[0], "new" if way == "pool" else None)
    assert before.sha256 == hashlib.sha256(Path(folders[0], WEIGHTS).read_bytes()).hexdigest()
    parameters = [each for name, each in model.named_parameters() if "lora_" in name]
    OTHERS[other](model, folders[1], parameters)
    now = the(model)
    assert (now.source, now.when, now.file, now.sha256, now.member) == ("unknown", None, None, None, None)
    if other != "deleted and added again" or way == "plain":
        assert f"the last swap put in {folders[0]}; it can't be shown" in now.note
    if other in ("a write through .data", "a write"):  # what is looked at is what is there
        parameters[3].data.mul_(0.5)
        assert (the(model).source, the(model).member, the(model).note) == (folders[0], before.member, None)


def test_an_adapter_that_transformers_loads_itself(tmp_path):
    for seed in range(2):
        torch.manual_seed(seed)
        config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
        get_peft_model(demo.load_base(), config).save_pretrained(tmp_path / f"{seed}")
    model = demo.load_base()
    model.load_adapter(str(tmp_path / "1"), adapter_name="default")
    hotswap_adapter(model, tmp_path / "0")
    assert the(model).source == str(tmp_path / "0")
    model.load_adapter(str(tmp_path / "1"), adapter_name="default", hotswap=True)
    assert the(model).source == "unknown"


@pytest.mark.parametrize("what", ["gone", "another", "saved again"])
def test_a_source_is_what_its_file_has_now(what, tmp_path):
    model, _ = demo.load("reverse")
    folder = shutil.copytree(SORT, tmp_path / "adapter")
    hotswap_adapter(model, folder)
    if what == "gone":
        shutil.rmtree(folder)
    elif what == "another":
        shutil.copyfile(Path(SHOUT, WEIGHTS), folder / WEIGHTS)
    else:
        save_adapter(model, folder)
        assert (the(model).source, the(model).sha256) == (str(folder), None)  # the same weights, in another file
        return
    assert (the(model).source, the(model).sha256) == ("unknown", None)
    assert f"put in {folder};" in the(model).note
    assert "can't be shown" in repr(loaded(model))
    pool = AdapterPool(model, adapters={"sort": shutil.copytree(SORT, tmp_path / "other")}, progress=False)
    pool.swap("sort")
    shutil.rmtree(tmp_path / "other")
    assert (the(model).member, the(model).source) == ("sort", str(tmp_path / "other"))  # compared with the packed one


@pytest.mark.parametrize("name", ["DoRA and a head", "an embedding", "tokens", "bin", "key_mapping", "another dtype"])
def test_whatever_a_file_has_is_found_in_the_model(name, tmp_path):
    how = dict(r=4, target_modules=["q_proj"], init_lora_weights=False)
    if name == "DoRA and a head":
        how |= dict(use_dora=True, modules_to_save=["lm_head"])
    elif name == "an embedding":
        how |= dict(target_modules=["embed_tokens", "q_proj"])
    elif name == "tokens":
        how |= dict(trainable_token_indices=[1, 2])
    for seed in range(2):
        torch.manual_seed(seed)
        model = get_peft_model(demo.load_base(), LoraConfig(**how))
        for key, each in model.named_parameters():
            if "modules_to_save" in key or "delta" in key:
                torch.nn.init.normal_(each.data)
        model.save_pretrained(tmp_path / f"{seed}")
    folder, mapping = tmp_path / "1", {}
    tensors = load_peft_weights(folder)
    if name == "bin":
        torch.save(tensors, folder / "adapter_model.bin")
        (folder / WEIGHTS).unlink()
    elif name == "another dtype":
        save_file({key: each.bfloat16() for key, each in tensors.items()}, folder / WEIGHTS)
    elif name == "key_mapping":
        save_file({key.replace("self_attn", "attention"): each for key, each in tensors.items()}, folder / WEIGHTS)
        mapping = dict(key_mapping={"attention": "self_attn"})
    model = PeftModel.from_pretrained(demo.load_base(), tmp_path / "0")
    originals = {key: each.clone() for key, each in demo.load_base().state_dict().items()}
    hotswap_adapter(model, folder, base_weights=originals, **mapping)
    assert (the(model).source, the(model).note) == (str(folder), None)
    written = [each for key, each in model.named_parameters() if "default" in key][-1]
    written.data.mul_(1.5)
    assert the(model).source == "unknown"


def test_of_rows_the_first_is_what_other_code_writes_to():
    model, pool = model_with(SORT, SHOUT, target_rank=32, rows=2)
    pool.assign(["sort", "sort"])
    assert [row.source for row in the(model).rows] == [SORT, SORT]
    next(each for name, each in model.named_parameters() if "lora_B" in name).data.mul_(1.5)
    assert [(row.source, row.member) for row in the(model).rows] == [("unknown", None), (SORT, "sort")]


def test_a_swap_that_is_logged_reads_no_file_again(caplog, monkeypatch):
    caplog.set_level(logging.INFO, logger="hotswap_lab")
    model, _ = demo.load("reverse")
    monkeypatch.setattr(File, "is_in", None)
    hotswap_adapter(model, SORT)
    assert caplog.records[-1].source == SORT


def test_another_file_has_no_hash_of_the_loaded_one(tmp_path):
    model, _ = demo.load("reverse")
    folder = shutil.copytree(SORT, tmp_path / "adapter")
    hotswap_adapter(model, folder)
    assert the(model).sha256 == HASHES[SORT]
    (folder / WEIGHTS).rename(folder / "kept")
    assert the(model).sha256 is None
    shutil.copyfile(Path(SHOUT, WEIGHTS), folder / WEIGHTS)
    assert the(model).sha256 is None
    (folder / "kept").rename(folder / WEIGHTS)
    assert the(model).sha256 == HASHES[SORT]
    whole = bytearray((folder / WEIGHTS).read_bytes())
    whole[-1] ^= 1
    (folder / WEIGHTS).write_bytes(whole)  # the same file, as long as before
    assert the(model).sha256 is None


def test_the_log_is_a_history(caplog, tmp_path):
    caplog.set_level(logging.INFO, logger="hotswap_lab")
    model, pool = model_with(SORT, SHOUT, target_rank=32)
    pool.swap("shout")
    hotswap_adapter(model, SORT)
    before = the(model)
    refused("no folder", hotswap_adapter, model, nowhere := tmp_path / "nowhere")
    refused("no adapter called", pool.swap, "nobody")
    assert the(model) == before
    pool.swap({"shout": 0.5, "sort": 0.5})
    pool.strength = 0.25
    with pool.using("sort"):
        pass
    refused("is in the model", pool.remove, "sort")
    refused("Adapter other", hotswap_adapter, model, SORT, "other")
    refused("pipeline", prepare_pipeline_for_compiled_hotswap, model)
    told = [(each.event, each.levelname, each.member or each.mix, each.strength) for each in caplog.records]
    mix = {"shout": 0.5, "sort": 0.5}
    assert told == [
        ("prepare", "INFO", None, 1),
        ("swap", "INFO", "shout", 1),
        ("swap", "INFO", None, 1),
        *4 * [("refusal", "WARNING", None, 1)],  # of two operations, each asked for twice
        ("swap", "INFO", mix, 1),
        ("strength", "INFO", mix, 0.25),
        ("swap", "INFO", "sort", 1),
        ("swap", "INFO", mix, 0.25),
        *2 * [("refusal", "WARNING", mix, 0.25)],
        *2 * [("refusal", "WARNING", None, None)],
        *2 * [("refusal", "WARNING", mix, 0.25)],
    ]
    assert caplog.records[2].source == SORT
    refusals = [each for each in caplog.records if each.event == "refusal"]
    assert [each.wanted for each in refusals[::2]] == [str(nowhere), "nobody", "sort", SORT, None]  # not what is there
    assert refusals[0].getMessage().startswith(f"refusal: {nowhere}: ")
    assert "no folder" in caplog.records[3].getMessage()
    assert caplog.records[3].error.refusals
    assert not any("\n" in each.getMessage() for each in caplog.records)
    assert " | found: " in caplog.records[3].getMessage()


@pytest.mark.parametrize("way", ["swap", "with", "async with"])
def test_a_wait_that_is_refused_is_told_once(caplog, way):
    _, pool = model_with(SORT, SHOUT)

    async def with_async() -> None:
        async with pool.using("shout"):
            pass

    def put_in() -> None:
        with waiting_at_most(0):
            if way == "async with":
                asyncio.run(with_async())
            else:
                with pool.using("shout") if way == "with" else contextlib.nullcontext(pool.swap("shout")):
                    pass

    with ThreadPoolExecutor(1) as thread, pool.using("sort"), pytest.raises(ModelInUseError):
        thread.submit(put_in).result(30)
    assert [(each.event, each.member, each.wanted) for each in caplog.records] == [("refusal", "sort", "shout")]


def test_a_handler_that_fails_fails_no_swap(tmp_path, monkeypatch, caplog):
    """The swap is done by then: an error would say that it isn't, and hide why another one was refused."""

    class Broken(logging.Handler):
        def emit(self, record):
            raise OSError("no space left on device")

    monkeypatch.setattr(logging.getLogger("hotswap_lab"), "handlers", [Broken()])
    caplog.set_level(logging.INFO, logger="hotswap_lab")
    model, pool = model_with(SORT, SHOUT)
    hotswap_adapter(model, SORT)
    refused("no folder", hotswap_adapter, model, tmp_path / "nowhere")
    with pool.using("shout"):
        assert the(model).source == SHOUT
    assert the(model).source == SORT


@pytest.mark.long
def test_a_new_process_prints_nothing_and_needs_no_private_name_to_start():
    code = "import hotswap_lab.bench, hotswap_lab.lessons, hotswap_lab.widgets\n"
    code += "from hotswap_lab import compat, demo, hotswap_adapter\n"
    # the listener for freezing is there from the start, and does without where a version lacks it
    code += (
        "assert compat.NAMES.keys() & vars(compat).keys() <= {'dynamo_callbacks'}\nmodel, _ = demo.load('reverse')\n"
    )
    code += f"hotswap_adapter(model, {SORT!r})\ntry: hotswap_adapter(model, './no')\nexcept ValueError: pass"
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=300)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
