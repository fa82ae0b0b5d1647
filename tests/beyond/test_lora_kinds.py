"""Every kind of LoRA: variants, whole modules, biases, embeddings, tokens, parameters; and from each to the others."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import torch
from adapters import save_random_adapter_of
from lengths import long
from lora_kinds import ATTENTION, FAMILIES, LLAMA, MODELS, variant
from models import Kind, call, load
from oracle import (
    assert_equals_fresh_load,
    assert_same_files,
    assert_same_outputs,
    assert_untouched,
    nothing_else_changes,
    snapshot,
    untouched,
)
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from refusals import refused

from hotswap_lab import HotswapError, hotswap_adapter, save_adapter, verify_hotswap


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    cache: dict[str, list[str]] = {}

    def folders_of(name: str) -> list[str]:
        if name not in cache:
            root, (model, configs) = tmp_path_factory.mktemp("adapters"), FAMILIES[name]
            cache[name] = [
                save_random_adapter_of(config, root / str(number), number + 1, MODELS[model])
                for number, config in enumerate(configs)
            ]
        return cache[name]

    return folders_of


def overwritten(name: str) -> dict[str, torch.Tensor]:
    """The base weights that files of this family bring."""
    names = r"embed_tokens\.|lm_head\." if name.startswith("embeddings") else r"bias$"
    weights = MODELS[FAMILIES[name][0]].base().state_dict()
    return {key: value for key, value in weights.items() if re.search(names, key)}


def compare(name: str, model, folder: str) -> None:
    kind = MODELS[FAMILIES[name][0]]
    if name == "MultiheadAttention":  # PEFT merges at each call, and rounds the base weights
        fresh = load(kind, folder)
        assert_same_outputs(model, fresh, kind, margin=10)
        assert_same_files(model, fresh, "default")
    else:
        assert_equals_fresh_load(model, kind, folder, margin=10)


@pytest.mark.long
@pytest.mark.parametrize("name", FAMILIES)
def test_every_pair(folders, name):
    kind = MODELS[FAMILIES[name][0]]
    originals = overwritten(name)
    for old, new in itertools.product(folders(name), repeat=2):
        model = load(kind, old)
        call(model, kind.inputs())
        hotswap_adapter(model, new, "default", add_layers=True, base_weights=originals)
        compare(name, model, new)
        hotswap_adapter(model, old, "default", base_weights=originals)
        compare(name, model, old)


@pytest.mark.parametrize("name", FAMILIES)
def test_there_and_back(folders, name, tmp_path):
    """To each of the family in turn and back to the first; no random numbers are drawn, and what is saved is equal."""
    kind, (first, second, *others) = MODELS[FAMILIES[name][0]], folders(name)
    originals = overwritten(name)
    model = load(kind, first)
    call(model, kind.inputs())
    with nothing_else_changes(Path(second), originals, may_warn=name == "lora_bias"):  # PEFT does, of shapes
        hotswap_adapter(model, second, "default", add_layers=True, base_weights=originals)
    compare(name, model, second)
    save_adapter(model, tmp_path / "saved")
    assert_same_outputs(model, load(kind, str(tmp_path / "saved")), kind, margin=10)
    verdict = verify_hotswap(model, second, inputs=kind.inputs(), base=kind.base)
    assert verdict, verdict
    for folder in (*others, first):
        hotswap_adapter(model, folder, "default", add_layers=True, base_weights=originals)
        compare(name, model, folder)


EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def test_parameters_whose_order_a_forward_has_changed(tmp_path):
    """A forward puts the parameter that it adapts behind the others; PEFT nests and names its layers by their order."""
    kind = MODELS["mixtral"]
    configs = [LoraConfig(r=rank, target_parameters=EXPERTS[:rank], target_modules=["q_proj"]) for rank in (1, 2)]
    first, both = (save_random_adapter_of(each, tmp_path / str(each.r), each.r, kind) for each in configs)
    model = load(kind, first)
    call(model, kind.inputs())
    experts = model.get_base_model().model.layers[0].mlp.experts.get_base_layer()
    assert next(iter(experts._parameters)) == "down_proj"
    for folder in (both, first, both):
        hotswap_adapter(model, folder, "default", add_layers=True)
        call(model, kind.inputs())
        assert_equals_fresh_load(model, kind, folder, margin=10)
        assert verify_hotswap(model, folder, inputs=kind.inputs())


class Unordered(torch.nn.Module):
    """Two parameters whose order only running the constructor shows."""

    def __init__(self):
        super().__init__()
        for number in (1, 2):
            setattr(self, f"weight{number}", torch.nn.Parameter(torch.randn(12, 12)))

    def forward(self, x):
        return torch.tanh(x @ self.weight1) @ self.weight2


def test_parameters_whose_order_nobody_knows_are_refused(tmp_path):
    kind = Kind(lambda: torch.nn.Sequential(Unordered()), lambda: torch.randn(5, 12), ())
    names = ["0.weight1", "0.weight2"]
    configs = [LoraConfig(r=rank, target_parameters=names[:rank], target_modules=[]) for rank in (1, 2)]
    first, both = (save_random_adapter_of(each, tmp_path / str(each.r), each.r, kind) for each in configs)
    model = load(kind, first)
    before = snapshot(model)
    with pytest.raises(HotswapError, match="an order of parameters that the base model may have lost"):
        hotswap_adapter(model, both, "default", add_layers=True)
    assert_untouched(model, before)


def test_biases_of_the_base_come_back(folders):
    """From bias="all" to "lora_only" and back, and to none: all that PEFT overwrote is as it was."""
    kind, (everything, some, _) = MODELS["bert"], folders("bias")
    plain, *_ = folders("lora_bias")[2:]
    model, originals = load(kind, plain), kind.base().state_dict()
    for folder in (everything, plain, some, everything, plain):
        hotswap_adapter(model, folder, "default")
        assert_equals_fresh_load(model, kind, folder, margin=10)
    live = {key.replace("base_layer.", ""): value for key, value in model.get_base_model().state_dict().items()}
    for key, value in originals.items():
        assert torch.equal(live[key], value), key


TARGETS = {"query": ["query"], "both": ["query", "value"], "dense": ["dense"]}


@pytest.mark.parametrize(("old", "new"), list(itertools.permutations(TARGETS, 2)))
def test_biases_are_saved_for_the_layers_that_a_fresh_load_saves_them_for(tmp_path, old, new):
    """``lora_only`` means the biases of layers that have LoRA: of other target modules, the file has other keys."""
    kind, folders = MODELS["bert"], {}
    for seed, (name, modules) in enumerate(TARGETS.items()):
        config = LoraConfig(r=4, target_modules=modules, bias="lora_only")
        folders[name] = save_random_adapter_of(config, tmp_path / name, seed, kind)
    model, fresh = load(kind, folders[old]), load(kind, folders[new])
    hotswap_adapter(model, folders[new], "default", add_layers=True, base_weights=kind.base().state_dict())
    assert_equals_fresh_load(model, kind, folders[new], margin=10)
    ours, theirs = get_peft_model_state_dict(model), get_peft_model_state_dict(fresh)
    assert any(key.endswith("bias") for key in theirs)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())


def test_biases_that_nobody_knows_any_more_are_refused(folders):
    """What PEFT overwrote at the first load is gone, unless the caller has it."""
    kind, (everything, some, _) = MODELS["bert"], folders("bias")
    model = load(kind, everything)
    with untouched(model):
        with pytest.raises(HotswapError, match="pass base_weights=") as error:
            hotswap_adapter(model, some, "default")
        assert re.search(r"found:    1\d base weights", str(error.value))
    hotswap_adapter(model, some, "default", base_weights=kind.base().state_dict())
    assert_equals_fresh_load(model, kind, some, margin=10)


def test_what_peft_overwrites_after_a_swap_is_refused_as_well(folders):
    """Swaps had left nothing overwritten, then PEFT loaded another adapter by the same name."""
    kind, (everything, *_) = MODELS["bert"], folders("bias")
    plain, *_ = folders("lora_bias")[2:]
    model = load(kind, plain)
    hotswap_adapter(model, everything, "default")
    hotswap_adapter(model, plain, "default")
    model.delete_adapter("default")
    model.load_adapter(everything, "default")
    model.set_adapter("default")
    before = snapshot(model.eval())
    refused("pass base_weights=", hotswap_adapter, model, plain, "default")
    assert_untouched(model, before)
    hotswap_adapter(model, plain, "default", base_weights=kind.base().state_dict())
    assert_equals_fresh_load(model, kind, plain, margin=10, activated=True)


def test_biases_stay_unknown_whatever_is_swapped_in(folders, tmp_path):
    """One adapter after another brings all of them: the originals are no better known for that."""
    kind, (everything, *_) = MODELS["bert"], folders("bias")
    plain, *_ = folders("lora_bias")[2:]
    config = LoraConfig(r=2, target_modules=["query"], bias="all")
    other = save_random_adapter_of(config, tmp_path / "other", 9, kind)
    model = load(kind, everything)
    for folder in (other, everything, other):
        hotswap_adapter(model, folder, "default", add_layers=True)
    refused("pass base_weights=", hotswap_adapter, model, plain, "default", add_layers=True)
    hotswap_adapter(model, plain, "default", add_layers=True, base_weights=kind.base().state_dict())
    assert_equals_fresh_load(model, kind, plain, margin=10)


KINDS_OF_LLAMA = (
    "DoRA",
    "modules_to_save",
    "trainable tokens",
    "BD-LoRA",
    "VeLoRA",
    "MonteCLoRA",
    "embeddings, untied",
)


@pytest.mark.parametrize("steps", [8, long(40)])
def test_from_any_kind_to_any_other(folders, steps):
    """A walk over all kinds that go on one model, with no reload in between."""
    walk = [folders(name)[0] for name in KINDS_OF_LLAMA if name in FAMILIES]
    order = [step for start in range(1, len(walk)) for step in range(0, len(walk) * start, start)]
    model = load(LLAMA, walk[1])
    for step in order[:steps]:
        new = walk[step % len(walk)]
        hotswap_adapter(model, new, "default", add_layers=True)
        assert_equals_fresh_load(model, LLAMA, new, margin=10)


#: which layers of the base model an adapter has it made of: repeated, in another order, as they are, unsaid
REPLICATIONS = {
    "two ends": [[0, 2], [1, 2]],
    "two beginnings": [[0, 1], [0, 2]],
    "backwards": [[1, 2], [0, 1]],
    "once": [[0, 2]],
    "unsaid": None,
}


def _replicated(tmp_path, name: str, **lora) -> str:
    config = LoraConfig(**{"r": 4, "target_modules": ATTENTION, "layer_replication": REPLICATIONS[name], **lora})
    return save_random_adapter_of(config, tmp_path / f"{name} {len(list(tmp_path.iterdir()))}", seed=len(name))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("two ends", "backwards"),
        ("once", "two beginnings"),
        *itertools.starmap(long, itertools.permutations(REPLICATIONS, 2)),
    ],
)
def test_other_layers_of_the_base_are_refused(tmp_path, old, new):
    """Some of these have as many layers as the others, with the same names: the live ones would stay silently."""
    model = load(LLAMA, _replicated(tmp_path, old))
    with untouched(model), pytest.raises(HotswapError, match="for other layers of the base model than the model has"):
        hotswap_adapter(model, _replicated(tmp_path, new), "default", add_layers=True)


def test_an_adapter_that_is_on_none_of_the_repeated_layers_is_refused_as_well(tmp_path):
    model = load(LLAMA, _replicated(tmp_path, "two ends"))
    with untouched(model), pytest.raises(HotswapError, match="for other layers of the base model than the model has"):
        hotswap_adapter(model, _replicated(tmp_path, "unsaid", target_modules=["lm_head"]), "default", add_layers=True)


@pytest.mark.parametrize("name", REPLICATIONS)
def test_the_same_layers_of_the_base(tmp_path, name):
    """Also where the live config has tuples, as somebody writes them, and the file lists."""
    new = _replicated(tmp_path, name, r=6)
    for ranges in (REPLICATIONS[name], REPLICATIONS[name] and tuple(map(tuple, REPLICATIONS[name]))):
        model = load(LLAMA, _replicated(tmp_path, name))
        model.peft_config["default"].layer_replication = ranges
        hotswap_adapter(model, new, "default")
        assert_equals_fresh_load(model, LLAMA, new, margin=10)


def test_layers_are_not_added_unasked(tmp_path):
    old = save_random_adapter_of(LoraConfig(r=4, target_modules=["q_proj"], use_dora=True), tmp_path / "old", 1)
    new = save_random_adapter_of(LoraConfig(r=4, target_modules=ATTENTION), tmp_path / "new", 2)
    model = load(LLAMA, old)
    refused("add_layers=True", hotswap_adapter, model, new, "default")


def test_another_adapter_keeps_all_of_its_own(folders, tmp_path):
    """Its DoRA, its saved modules and its config, while its neighbour goes through every kind."""
    mine = save_random_adapter_of(
        LoraConfig(r=3, target_modules=ATTENTION, use_dora=True, modules_to_save=["lm_head"]), tmp_path / "mine", 7
    )
    model = load(LLAMA, folders("DoRA")[0])
    model.load_adapter(mine, "default_0")
    # DoRA comes before BD-LoRA: the layers that its last adapter turns off have no bias after that
    for name in ("modules_to_save", "VeLoRA", "DoRA", "BD-LoRA"):
        for new in folders(name) if name in FAMILIES else ():
            model.set_adapter("default")
            model.requires_grad_(False)
            hotswap_adapter(model, new, "default", add_layers=True)
            assert_equals_fresh_load(model, LLAMA, new, margin=10)
            model.set_adapter("default_0")
            model.requires_grad_(False)
            assert_equals_fresh_load(model, LLAMA, mine, "default_0", margin=10)


@pytest.mark.skipif(variant("KasaConfig") is None, reason="this version of PEFT has no KaSA")
def test_kasa_changes_the_base_and_is_refused(tmp_path):
    kasa = save_random_adapter_of(
        LoraConfig(r=4, target_modules=ATTENTION, kasa_config=variant("KasaConfig")), tmp_path / "kasa", 1
    )
    plain = save_random_adapter_of(LoraConfig(r=4, target_modules=ATTENTION), tmp_path / "plain", 2)
    for old, new in ((plain, kasa), (kasa, plain)):
        model = load(LLAMA, old)
        refused("changes the base model's own weights", hotswap_adapter, model, new, "default")
