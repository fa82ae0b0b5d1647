"""What few adapters meet: names of other base models, experts of a router."""

from __future__ import annotations

import json
import logging
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from models import KINDS, Kind, copied, gpt2, load, save_random_adapter
from oracle import assert_equals_fresh_load
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import create_arrow_model
from peft.tuners.lora.config import ArrowConfig
from refusals import refused
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification

from hotswap_lab import (
    AdapterPool,
    get_strength,
    hotswap_adapter,
    loaded,
    plan_hotswap,
    prepare_model_for_compiled_hotswap,
    save_adapter,
    set_strength,
    verify_hotswap,
)

KIND = KINDS["llama"]


def adapter_for(base: object, folder: Path, seed: int) -> str:
    save_random_adapter(KIND, folder, seed, r=4, target_modules=["q_proj"])
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": base}))
    return str(folder)


@pytest.mark.parametrize(
    ("old", "new", "noted", "warned"),
    [
        ("team/base", "team/other", 1, 1),  # once there, and not on the way back
        ("team/base", "another/base", 1, 1),  # of one name, and not of one model
        ("team/base", "team/base", 0, 0),
        ("team/base", None, 0, 0),
        (None, "team/base", 0, 0),
        ("/models/base", "team/base", 0, 0),  # most likely a copy
        ("/models/mine", "team/base", 1, 0),
        ("tests/core", "other/core", 0, 0),  # here, it is a folder
        ("team/base", "", 0, 0),  # these are not names
        ("team/base", 7, 0, 0),
    ],
)
def test_an_adapter_of_another_base_model_is_noted_and_warned_of_once_for_each_pair(
    tmp_path, monkeypatch, old, new, noted, warned
):
    monkeypatch.chdir(Path(__file__).parents[2])
    folders = [adapter_for(name, tmp_path / str(seed), seed) for seed, name in enumerate((old, new))]
    model = load(KIND, folders[0])
    text = f"the adapter was made for {new}, and the model is {old}; that the shapes fit does not make it right"
    assert plan_hotswap(model, folders[1]).notes == [text] * noted
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for folder in (*folders[::-1], *folders[::-1]):
            hotswap_adapter(model, folder, "default")
    assert_equals_fresh_load(model, KIND, folders[0])
    messages = [str(each.message) for each in caught if "was made for" in str(each.message)]
    assert len(messages) == warned
    assert not warned or text in messages[0]


def wider_for(name: str, folder: Path) -> str:
    file = Path(adapter_for(name, folder, 5), "adapter_model.safetensors")
    save_file({key: torch.cat([each, each], int("lora_A" in key)) for key, each in load_file(file).items()}, file)
    return str(folder)


@pytest.mark.parametrize("way", ["swap", "pool"])
def test_where_the_shapes_do_not_fit_both_base_models_are_named(tmp_path, way):
    folders = [adapter_for("team/base", tmp_path / "old", 1), wider_for("other/base", tmp_path / "new")]
    model, both = load(KIND, folders[0]), "the adapter was made for other/base, and the model is team/base"
    if way == "swap":
        error = refused("does not fit", hotswap_adapter, model, folders[1])
        assert plan_hotswap(model, folders[1]).notes == [both]
        assert "shapes fit" not in str(plan_hotswap(model, folders[1]))
    else:
        error = refused("does not fit", AdapterPool, model, adapters={"new": folders[1]}, progress=False)
    assert all(each.found.endswith(f"; {both}") for each in error.refusals)
    same = refused("does not fit", hotswap_adapter, model, wider_for("team/base", tmp_path / "same"))
    assert "was made for team" not in str(same)


@pytest.fixture
def head_or_none(tmp_path) -> list[str]:
    """Two adapters: one with a head of its own, one without."""
    head = dict(modules_to_save=["lm_head"])
    return [save_random_adapter(KIND, tmp_path / name, 1, r=4, **how) for name, how in (("a", head), ("b", {}))]


@pytest.mark.parametrize(
    ("loaded", "found"),
    [
        (0, "b: modules_to_save, which only the loaded adapter has"),
        (1, "a: modules_to_save, which the loaded adapter lacks"),
    ],
)
def test_which_of_a_family_has_what_the_others_lack(head_or_none, loaded, found):
    model = load(KIND, head_or_none[loaded])
    error = refused("of another kind", prepare_model_for_compiled_hotswap, model, adapters=head_or_none)
    assert [each.found for each in error.refusals] == [found]


def test_which_of_a_family_is_damaged(head_or_none, tmp_path):
    folders = head_or_none
    config = json.loads(Path(folders[1], "adapter_config.json").read_text())
    Path(folders[1], "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": "8"}))
    model = load(KIND, adapter_for(None, tmp_path / "c", 1))
    error = refused("damaged at", prepare_model_for_compiled_hotswap, model, adapters=folders[::-1])
    assert error.refusals[0].found == "b: lora_alpha='8'"


@pytest.mark.parametrize("labels", [3, 5])
def test_a_head_of_other_labels_says_so(tmp_path, labels):
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=20)
    folders = []
    for number in (labels, 4):
        base = BertForSequenceClassification(BertConfig(**sizes, num_labels=number))
        model = get_peft_model(base, LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
        model.save_pretrained(tmp_path / str(number))
        folders.append(tmp_path / str(number))
    error = refused("head for other labels", hotswap_adapter, model, folders[0])
    assert f"for {labels} labels" in error.refusals[0].found
    assert error.refusals[0].expected.startswith("4 labels")


def test_a_base_model_whose_name_is_none(tmp_path):
    model = load(KIND, adapter_for(None, tmp_path / "old", 1))
    model.get_base_model().name_or_path = 7
    assert not plan_hotswap(model, adapter_for("team/base", tmp_path / "new", 2)).notes


@pytest.mark.parametrize("way", ["plain", "copied", "pool", "mix", "rows"])
def test_what_a_swap_put_in_does_not_say_what_the_base_model_is(tmp_path, way, caplog):
    """The note would be of the right adapter, and none of the wrong one."""
    names = {"right": "team/base", "wrong": "other/base", "again": "team/base"}
    folders = {each: adapter_for(names[each], tmp_path / each, seed) for seed, each in enumerate(names)}
    note = "the adapter was made for other/base, and the model is team/base; that the shapes fit does not make it right"
    model = load(KIND, folders["right"])
    model.get_base_model().name_or_path = str(tmp_path)  # a folder may have any name
    assert loaded(model)[0].note is None
    assert plan_hotswap(model, folders["wrong"]).notes == [note]
    caplog.set_level(logging.INFO, logger="hotswap_lab")
    if way in ("plain", "copied"):
        hotswap_adapter(model, folders["wrong"])
        model = copied(model, "pickle") if way == "copied" else model
    else:
        how = dict(rows=2) if way == "rows" else dict(target_rank=8)
        pool = AdapterPool(
            model, adapters={"right": folders["right"], "wrong": folders["wrong"]}, progress=False, **how
        )
        if way == "rows":
            pool.assign(["right", "wrong"])
        else:
            pool.swap("wrong" if way == "pool" else {"right": 0.5, "wrong": 0.5})
    (now,) = loaded(model)
    assert now.note == caplog.records[-1].note == note
    assert all(note in text for text in (str(now), loaded(model)._repr_html_(), caplog.text))
    if way == "rows":
        pool.swap("wrong")
    assert plan_hotswap(model, folders["again"]).notes == []
    assert plan_hotswap(model, folders["wrong"]).notes == [note]
    hotswap_adapter(model, folders["again"])
    assert loaded(model)[0].note is caplog.records[-1].note is None


def test_an_expert_of_an_arrow_router_is_refused(tmp_path):
    folders = [adapter_for(None, tmp_path / str(seed), seed) for seed in range(3)]
    model = create_arrow_model(KIND.base(), folders[:2], ArrowConfig(top_k=1))
    refused("expert of an Arrow router", hotswap_adapter, model, folders[2], "task_0")


def test_a_pool_notes_and_warns_of_another_base_model_too(tmp_path):
    folders = [adapter_for(name, tmp_path / name, seed) for seed, name in enumerate(("team/base", "team/other"))]
    model = load(KIND, folders[0])
    with pytest.warns(UserWarning, match="made for team/other"):
        pool = AdapterPool(model, adapters={"same": folders[0], "other": folders[1]}, progress=False)
    assert "other: the adapter was made for team/other" in str(pool)
    assert "other: the adapter was made for team/other" in pool._repr_html_()
    assert "same: " not in str(pool)


def test_the_only_adapter_needs_no_name(tmp_path):
    folders = [adapter_for(None, tmp_path / str(seed), seed) for seed in (1, 2)]
    model = PeftModel.from_pretrained(KIND.base(), folders[0], adapter_name="mine")
    assert plan_hotswap(model, folders[1]).ok
    hotswap_adapter(model, folders[1])
    assert verify_hotswap(model, folders[1])
    set_strength(model, 0.5)
    assert get_strength(model) == 0.5
    set_strength(model, 1)
    save_adapter(model, tmp_path / "saved")
    assert verify_hotswap(model, str(tmp_path / "saved"))
    model.load_adapter(folders[0], "second")
    refused("default", set_strength, model, 0.5)


UNTIED = Kind(partial(gpt2, tie_word_embeddings=False), KINDS["gpt2"].make_inputs, ("c_attn",))


@pytest.mark.parametrize("new", [["c_attn", "lm_head"], ["lm_head"], ["c_attn"]], ids="-".join)
@pytest.mark.parametrize("old", [["c_attn"], ["lm_head"], ["lm_head", "c_attn"]], ids="-".join)
def test_layers_of_both_ways_to_store_a_weight(tmp_path, old, new):
    """PEFT leaves in the config what the last of them needs."""
    first, second = (
        save_random_adapter(UNTIED, tmp_path / str(seed), seed, r=4, target_modules=targets)
        for seed, targets in enumerate((old, new))
    )
    model = load(UNTIED, first)
    hotswap_adapter(model, second, "default", add_layers=True, base_weights=UNTIED.base().state_dict())
    assert_equals_fresh_load(model, UNTIED, second, margin=10)


def test_the_config_goes_by_the_last_layer_of_the_model_not_of_the_slot(tmp_path):
    """Layers that were reserved come last in a prepared slot, wherever they are in the model."""
    kind = KINDS["gpt2"]
    old = save_random_adapter(kind, tmp_path / "old", seed=1, r=4, target_modules=["lm_head"])
    new = save_random_adapter(kind, tmp_path / "new", seed=2, r=4, target_modules=["c_attn", "lm_head"])
    model = load(kind, old)
    prepare_model_for_compiled_hotswap(model, adapters=[new])
    hotswap_adapter(model, new, "default")
    assert_equals_fresh_load(model, kind, new, prepared=True)
