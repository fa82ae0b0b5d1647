"""prepare_model_for_compiled_hotswap, without a compiler: room for a family, and everything else as it was."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from models import COPIES, KINDS, call, copied, load, randomize, save_random_adapter
from oracle import assert_equals_fresh_load, assert_same_outputs, assert_same_tensors, assert_untouched, snapshot
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file

from hotswap_lab import (
    Adapter,
    AdapterPool,
    HotswapError,
    hotswap_adapter,
    plan_hotswap,
    prepare_model_for_compiled_hotswap,
    resolve_slot,
    save_adapter,
    verify_hotswap,
)
from hotswap_lab.beyond.places import places_of

LLAMA, LINEAR, CONV = KINDS["llama"], KINDS["linear"], KINDS["conv"]
#: ranks that the grouped convolutions of the test model can have are multiples of 4
RANKS = (4, 8, 16)


def layers(model) -> list[LoraLayer]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


@pytest.fixture
def family(kind, tmp_path):
    """Adapters of several ranks, the last with patterns and rsLoRA, on all layers of the model."""
    folders = [
        save_random_adapter(kind, tmp_path / f"r{rank}", seed=rank, r=rank, lora_alpha=3 * rank - 5) for rank in RANKS
    ]
    patterns = dict(rank_pattern={kind.modules[0]: 12}, alpha_pattern={kind.modules[-1]: 5}, use_rslora=True)
    folders.append(save_random_adapter(kind, tmp_path / "patterns", seed=7, r=8, lora_alpha=6, **patterns))
    return folders


def test_every_kind_of_layer_swaps_in_any_order_at_the_same_addresses(kind, family):
    model = load(kind, family[0])
    prepare_model_for_compiled_hotswap(model, target_rank=16)
    assert_equals_fresh_load(model, kind, family[0], prepared=True)
    slot = resolve_slot(model, "default")
    addresses, shapes = slot.data_ptrs(), [tensor.parameter.shape for tensor in slot.tensors]
    for number in (1, 0, 2, 3, 2, 0, 3, 1):
        hotswap_adapter(model, family[number], "default")
        assert_equals_fresh_load(model, kind, family[number], prepared=True)
        assert slot.data_ptrs() == addresses
        assert [tensor.parameter.shape for tensor in slot.tensors] == shapes


def test_what_preparing_leaves_alone(kind, family):
    model = load(kind, family[1], is_trainable=True).train()
    handle = layers(model)[0].register_forward_hook(lambda *_: None)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(5)  # GPT-2 has dropouts of its own
    outputs = call(model, kind.inputs())
    parameters = {name: (id(p), p.requires_grad, p.dtype) for name, p in model.named_parameters()}
    modules = [(name, id(module), module.training) for name, module in model.named_modules() if "dropout" not in name]
    config = model.peft_config["default"].to_dict()
    prepare_model_for_compiled_hotswap(model, target_rank=16)
    torch.manual_seed(5)
    torch.testing.assert_close(call(model, kind.inputs()), outputs, rtol=1e-5, atol=1e-6)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert {name: (id(p), p.requires_grad, p.dtype) for name, p in model.named_parameters()} == parameters
    now = [(name, id(module), module.training) for name, module in model.named_modules() if "dropout" not in name]
    assert now == modules
    assert model.training
    assert model.peft_config["default"].to_dict() == config
    assert handle.id in layers(model)[0]._forward_hooks
    assert all(isinstance(layer.scaling["default"], torch.Tensor) for layer in layers(model))


def test_preparing_twice_changes_nothing_and_more_room_can_be_made_later(kind, family):
    model = load(kind, family[0])
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    slot = resolve_slot(model, "default")
    addresses, before = slot.data_ptrs(), snapshot(model)
    scalings = [layer.scaling["default"].data_ptr() for layer in layers(model)]
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    prepare_model_for_compiled_hotswap(model, target_rank=4)
    assert_untouched(model, before)
    assert slot.data_ptrs() == addresses
    assert [layer.scaling["default"].data_ptr() for layer in layers(model)] == scalings
    with pytest.raises(HotswapError, match="higher than the model was prepared for"):
        hotswap_adapter(model, family[2], "default")
    prepare_model_for_compiled_hotswap(model, target_rank=16)
    hotswap_adapter(model, family[2], "default")
    assert_equals_fresh_load(model, kind, family[2], prepared=True)


def test_a_family_with_other_layers_is_found_by_itself(tmp_path):
    """Adapters that have no layer in common, and another rank in each."""
    folders = [
        save_random_adapter(LLAMA, tmp_path / "q", seed=1, r=2, target_modules=["q_proj"]),
        save_random_adapter(LLAMA, tmp_path / "mlp", seed=2, r=6, target_modules=["up_proj", "down_proj"]),
        save_random_adapter(LLAMA, tmp_path / "one", seed=3, r=3, target_modules=r".*layers\.1\.self_attn\.v_proj"),
        save_random_adapter(LLAMA, tmp_path / "all", seed=4, r=4, rank_pattern={"q_proj": 9}, use_rslora=True),
    ]
    for first in range(4):
        model = load(LLAMA, folders[first])
        prepare_model_for_compiled_hotswap(model, adapters=folders)
        assert_equals_fresh_load(model, LLAMA, folders[first], prepared=True)
        slot = resolve_slot(model, "default")
        room = {layer.path: layer.tensors[0].capacity for layer in slot.layers}
        assert len(room) == 14
        assert room["model.layers.0.self_attn.q_proj"] == 9
        assert room["model.layers.1.mlp.up_proj"] == 6
        assert room["model.layers.0.self_attn.v_proj"] == 4
        addresses = slot.data_ptrs()
        for folder in (*folders, *reversed(folders)):
            hotswap_adapter(model, folder, "default")
            assert_equals_fresh_load(model, LLAMA, folder, prepared=True)
        assert slot.data_ptrs() == addresses


@pytest.mark.parametrize("form", ["folder", "adapter", "config", "one folder", "a dict"])
def test_the_family_in_any_form(tmp_path, form):
    first = save_random_adapter(LINEAR, tmp_path / "first", seed=1, r=2, target_modules=["first"])
    second = save_random_adapter(LINEAR, tmp_path / "second", seed=2, r=5, target_modules=["last"])
    adapters = {
        "folder": [tmp_path / "second"],
        "adapter": [Adapter.load(second)],
        "config": [LoraConfig.from_pretrained(second)],
        "one folder": second,
        "a dict": {"second": second},
    }[form]
    model = load(LINEAR, first)
    prepare_model_for_compiled_hotswap(model, adapters=adapters)
    hotswap_adapter(model, second, "default")
    assert_equals_fresh_load(model, LINEAR, second, prepared=True)


def test_reserved_layers_are_saved_by_nobody(tmp_path):
    first = save_random_adapter(LINEAR, tmp_path / "first", seed=1, r=2, target_modules=["first"])
    model = load(LINEAR, first)
    keys = set(model.state_dict())
    prepare_model_for_compiled_hotswap(model, adapters=[LoraConfig(r=3, target_modules=["last", "blocks.0"])])
    assert set(model.state_dict()) - keys == {  # PEFT's wrapper renames what is in the layer
        "base_model.model.last.base_layer.weight",
        "base_model.model.last.base_layer.bias",
        "base_model.model.blocks.0.base_layer.weight",
    }
    assert len(resolve_slot(model, "default").layers) == 3
    assert_equals_fresh_load(model, LINEAR, first, prepared=True)


@pytest.mark.parametrize("way", ["save_adapter", "save_pretrained"])
def test_saved_files_reload_as_the_live_model(kind, family, tmp_path, way):
    model = load(kind, family[2])
    prepare_model_for_compiled_hotswap(model, target_rank=32, config=model.peft_config)
    for number, folder in enumerate((family[2], family[3], family[0])):
        hotswap_adapter(model, folder, "default")
        target = tmp_path / f"saved{number}"
        if way == "save_adapter":
            save_adapter(model, target)
        else:
            model.save_pretrained(target)
        reloaded = PeftModel.from_pretrained(kind.base(), target).eval()
        assert_same_outputs(model, reloaded, kind)
        config = json.loads((target / "adapter_config.json").read_text())
        original = json.loads((type(target)(folder) / "adapter_config.json").read_text())
        assert {key: config[key] for key in ("r", "lora_alpha", "rank_pattern")} == {
            key: original[key] for key in ("r", "lora_alpha", "rank_pattern")
        }
        assert_same_tensors(
            load_file(target / "adapter_model.safetensors"), load_file(f"{folder}/adapter_model.safetensors")
        )


@pytest.mark.parametrize("way", COPIES)
def test_copies_of_a_prepared_model_are_prepared(kind, family, way):
    model = load(kind, family[0])
    prepare_model_for_compiled_hotswap(model, target_rank=16)
    twin = copied(model, way)
    hotswap_adapter(twin, family[2], "default")
    assert_equals_fresh_load(twin, kind, family[2], prepared=True)
    assert_equals_fresh_load(model, kind, family[0], prepared=True)
    slot = resolve_slot(twin, "default")
    addresses = slot.data_ptrs()
    hotswap_adapter(twin, family[1], "default")
    assert slot.data_ptrs() == addresses


@pytest.mark.long
@pytest.mark.parametrize("way", COPIES)
def test_copies_after_an_adapter_that_peft_has_loaded_beside_the_model(tmp_path, way):
    """What is noted then about the tables of the live model is of no use to a copy, and can't be pickled."""
    plain, *heads = (
        save_random_adapter(LLAMA, tmp_path / f"{seed}", seed=seed, r=4, modules_to_save=modules)
        for seed, modules in enumerate((None, ["lm_head"], ["lm_head"]))
    )
    model = load(LLAMA, plain)
    prepare_model_for_compiled_hotswap(model)
    model.load_adapter(heads[0], "other")
    hotswap_adapter(model, heads[1], "other")
    assert places_of(resolve_slot(model, "other")) is not None
    twin = copied(model, way)
    assert places_of(resolve_slot(twin, "other")) is None
    hotswap_adapter(twin, heads[0], "other")
    for each, expected in ((model, heads[1]), (twin, heads[0])):
        each.set_adapter("other")
        assert_same_outputs(each, load(LLAMA, expected), LLAMA)
        each.set_adapter("default")
        assert_same_outputs(each, load(LLAMA, plain), LLAMA)


def test_reserved_embeddings_are_not_saved(tmp_path):
    """PEFT's own saving takes the weight of any embedding that is wrapped."""
    first, on_one, on_both = (
        save_random_adapter(LLAMA, tmp_path / f"{seed}", seed=seed, r=2, target_modules=targets)
        for seed, targets in enumerate((["q_proj"], ["embed_tokens"], ["embed_tokens", "lm_head"]))
    )
    model = load(LLAMA, first)
    prepare_model_for_compiled_hotswap(model, adapters=[on_one, on_both])
    hotswap_adapter(model, on_one, "default")
    save_adapter(model, tmp_path / "saved")
    saved, expected = (load_file(f"{folder}/adapter_model.safetensors") for folder in (tmp_path / "saved", on_one))
    assert_same_tensors(saved, expected)
    assert verify_hotswap(model, on_one, inputs=LLAMA.inputs(), base=LLAMA.base)


def test_a_state_dict_goes_back_in_strictly(kind, family):
    model = load(kind, family[0])
    prepare_model_for_compiled_hotswap(model, target_rank=16)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        for tensor in resolve_slot(model, "default").tensors:
            tensor.parameter.normal_()
    result = model.load_state_dict(state, strict=True)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert_equals_fresh_load(model, kind, family[0], prepared=True)


def test_training_a_padded_model_never_fills_the_padding(kind, family):
    """Otherwise what was trained would not be what is saved."""
    model = load(kind, family[0], is_trainable=True)
    prepare_model_for_compiled_hotswap(model, target_rank=16)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=0.01)
    before = call(model, kind.inputs())
    for _ in range(3):
        inputs = kind.inputs()
        outputs = model(**inputs) if isinstance(inputs, dict) else model(inputs)
        getattr(outputs, "logits", outputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.allclose(call(model, kind.inputs()), before)
    for tensor in resolve_slot(model, "default").tensors:
        assert tensor.parameter.any()
        assert not tensor.padding(tensor.parameter, 4).any()


def test_several_adapters_on_one_model(tmp_path):
    folders = [save_random_adapter(LLAMA, tmp_path / str(rank), seed=rank, r=rank) for rank in (2, 4, 8)]
    few = save_random_adapter(LLAMA, tmp_path / "few", seed=9, r=3, target_modules=["q_proj"])
    model = load(LLAMA, folders[0], "a")
    model.load_adapter(few, "b")
    prepare_model_for_compiled_hotswap(model, adapters=folders)
    slots = {name: resolve_slot(model, name) for name in "ab"}
    assert len(slots["b"].layers) == 14
    addresses = {name: slot.data_ptrs() for name, slot in slots.items()}
    for first, second in itertools.permutations([*folders, few], 2):
        hotswap_adapter(model, first, "a")
        hotswap_adapter(model, second, "b")
        for name, folder in (("a", first), ("b", second)):
            model.set_adapter(name)
            fresh = load(LLAMA, folder, name)
            assert_same_outputs(model, fresh, LLAMA)
            assert_same_tensors(
                get_peft_model_state_dict(model, adapter_name=name),
                get_peft_model_state_dict(fresh, adapter_name=name),
            )
    assert {name: slot.data_ptrs() for name, slot in slots.items()} == addresses


def test_only_the_named_adapter_is_prepared(tmp_path):
    folder = save_random_adapter(LINEAR, tmp_path / "a", seed=1, r=2)
    model = load(LINEAR, folder, "a")
    model.load_adapter(folder, "b")
    prepare_model_for_compiled_hotswap(model, target_rank=4, adapter_name="b")
    assert {tensor.capacity for tensor in resolve_slot(model, "a").tensors} == {2}
    assert {tensor.capacity for tensor in resolve_slot(model, "b").tensors} == {4}
    assert isinstance(layers(model)[0].scaling["a"], float)


def test_other_adapters_come_and_go_on_a_prepared_model(tmp_path):
    folders = [save_random_adapter(LINEAR, tmp_path / str(rank), seed=rank, r=rank) for rank in (2, 4, 6)]
    few = save_random_adapter(LINEAR, tmp_path / "few", seed=9, r=3, target_modules=["last"])
    model = load(LINEAR, folders[0])
    prepare_model_for_compiled_hotswap(model, target_rank=4)
    model.load_adapter(folders[1], "second")
    model.set_adapter("second")
    assert_same_outputs(model, load(LINEAR, folders[1], "second"), LINEAR)
    model.delete_adapter("second")
    model.set_adapter("default")
    hotswap_adapter(model, few, "default")
    assert_equals_fresh_load(model, LINEAR, few, prepared=True)
    # the same name, used anew: what was noted about the old adapter must not stick to the new one
    model.delete_adapter("default")
    model.load_adapter(folders[2], "default")
    model.set_adapter("default")
    assert_same_outputs(model, load(LINEAR, folders[2]), LINEAR)
    assert_same_tensors(get_peft_model_state_dict(model), get_peft_model_state_dict(load(LINEAR, folders[2])))
    hotswap_adapter(model, folders[1], "default")
    assert_same_outputs(model, load(LINEAR, folders[1]), LINEAR)


@pytest.mark.parametrize("kind", [kind for kind in KINDS.values() if kind is not CONV])
def test_merging_a_prepared_model(kind, family):
    """Not on grouped convolutions: there PEFT can't merge anything."""
    model = load(kind, family[0])
    prepare_model_for_compiled_hotswap(model, target_rank=16)
    hotswap_adapter(model, family[1], "default")
    expected = call(load(kind, family[1]), kind.inputs())
    model.merge_adapter()
    torch.testing.assert_close(call(model, kind.inputs()), expected, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    hotswap_adapter(model, family[2], "default")
    merged = model.merge_and_unload()
    expected = call(load(kind, family[2]), kind.inputs())
    torch.testing.assert_close(call(merged, kind.inputs()), expected, rtol=1e-4, atol=1e-3)


def test_half_precision_and_conversions(tmp_path):
    folders = [save_random_adapter(LLAMA, tmp_path / str(rank), seed=rank, r=rank) for rank in (2, 5)]
    model = load(LLAMA, folders[0])
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    model.to(torch.bfloat16)
    scaling = layers(model)[0].scaling["default"]
    assert scaling.dtype == torch.float64, "a scaling keeps its precision whatever the model is converted to"
    hotswap_adapter(model, folders[1], "default")
    assert all(tensor.parameter.dtype == torch.bfloat16 for tensor in resolve_slot(model, "default").tensors)
    fresh = load(LLAMA, folders[1]).to(torch.bfloat16)
    assert_same_outputs(model, fresh, LLAMA, tolerance=1e-3)


def test_scalings_follow_the_model_to_another_device(tmp_path):
    """The meta device stands for any other one."""
    model = load(LINEAR, save_random_adapter(LINEAR, tmp_path / "a", seed=1, r=2))
    prepare_model_for_compiled_hotswap(model, target_rank=4)
    model.to("meta")
    for layer in layers(model):
        assert layer.scaling["default"].device.type == "meta"
        assert layer.lora_A["default"].weight.device.type == "meta"


def test_inference_tensors(tmp_path):
    folders = [save_random_adapter(LINEAR, tmp_path / str(rank), seed=rank, r=rank) for rank in (2, 5)]
    with torch.inference_mode():
        model = load(LINEAR, folders[0])
    prepare_model_for_compiled_hotswap(model, target_rank=5)
    with torch.inference_mode():
        hotswap_adapter(model, folders[1], "default")
    hotswap_adapter(model, folders[0], "default")
    assert_same_outputs(model, load(LINEAR, folders[0]), LINEAR)


def test_a_model_prepared_in_inference_mode_stays_trainable(tmp_path):
    folders = [save_random_adapter(LINEAR, tmp_path / str(rank), seed=rank, r=rank) for rank in (2, 5)]
    model = load(LINEAR, folders[0], is_trainable=True)
    with torch.inference_mode():
        prepare_model_for_compiled_hotswap(model, target_rank=5)
        hotswap_adapter(model, folders[1], "default")
    model(LINEAR.inputs()).sum().backward()
    hotswap_adapter(model, folders[0], "default")
    assert all(parameter.grad is None for parameter in model.parameters())
    assert_same_outputs(model, load(LINEAR, folders[0]), LINEAR)


def test_models_without_a_peft_model_around_them(tmp_path):
    folders = [save_random_adapter(LINEAR, tmp_path / str(rank), seed=rank, r=rank) for rank in (2, 5)]
    model = inject_adapter_in_model(LoraConfig(r=2, target_modules=list(LINEAR.modules)), LINEAR.base())
    randomize(model, "default", seed=3)
    prepare_model_for_compiled_hotswap(torch.nn.ModuleDict({"unet": model}), target_rank=5)
    hotswap_adapter(model, folders[1], "default")
    assert_same_outputs(model, load(LINEAR, folders[1]), LINEAR)


def test_a_model_that_peft_prepared(tmp_path):
    """diffusers calls PEFT's function in ``enable_lora_hotswap``; what it made can be swapped into just as well."""
    from peft.utils.hotswap import prepare_model_for_compiled_hotswap as pefts

    folders = [save_random_adapter(LLAMA, tmp_path / str(rank), seed=rank, r=rank, lora_alpha=7) for rank in (2, 5, 9)]
    model = load(LLAMA, folders[0])
    pefts(model, target_rank=8)
    slot = resolve_slot(model, "default")
    addresses, scaling = slot.data_ptrs(), layers(model)[0].scaling["default"]
    hotswap_adapter(model, folders[1], "default")
    assert_same_outputs(model, load(LLAMA, folders[1]), LLAMA)
    assert slot.data_ptrs() == addresses
    assert layers(model)[0].scaling["default"] is scaling
    assert_same_tensors(get_peft_model_state_dict(model), get_peft_model_state_dict(load(LLAMA, folders[1])))
    assert verify_hotswap(model, folders[1], inputs=LLAMA.inputs())
    with pytest.raises(HotswapError, match="target_rank=9"):
        hotswap_adapter(model, folders[2], "default")
    prepare_model_for_compiled_hotswap(model, target_rank=9)
    hotswap_adapter(model, folders[2], "default")
    assert_equals_fresh_load(model, LLAMA, folders[2], prepared=True)


def test_configs_follow_as_with_peft_but_the_live_ones_never(tmp_path):
    model = load(LINEAR, save_random_adapter(LINEAR, tmp_path / "a", seed=1, r=2))
    mine = LoraConfig(r=3, rank_pattern={"last": 1}, target_modules=["last"])
    prepare_model_for_compiled_hotswap(model, target_rank=6, config=mine)
    assert (mine.r, mine.rank_pattern) == (6, {"last": 6})
    other = LoraConfig(r=3, target_modules=["last"])
    prepare_model_for_compiled_hotswap(model, target_rank=6, config={"other": other, **model.peft_config})
    assert other.r == 6
    assert model.peft_config["default"].r == 2
    mine = LoraConfig(r=3)
    prepare_model_for_compiled_hotswap(model, config=mine)
    assert mine.r == 3


# ---- refusals: PEFT's words, and a model that is untouched


def refused(model, match, **arguments):
    before = snapshot(model)
    with pytest.raises(HotswapError, match=match) as caught:
        prepare_model_for_compiled_hotswap(model, **arguments)
    assert_untouched(model, before)
    return caught.value


def test_a_target_below_the_loaded_rank(kind, family):
    refused(
        load(kind, family[1]),
        r"Trying to pad the adapter to the target rank 4, but the original rank is larger \(8\)",
        target_rank=4,
    )


def test_each_kind_of_layer_is_turned_off_and_on_again(kind, tmp_path):
    """Which of them are grouped convolutions makes a difference to what is left of a layer that is off."""
    full = save_random_adapter(kind, tmp_path / "full", seed=1, r=4)
    model = load(kind, full)
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    for number, name in enumerate(kind.modules if len(kind.modules) > 1 else ()):
        part = save_random_adapter(kind, tmp_path / str(number), seed=2, r=4, target_modules=[name])
        for folder in (part, full):
            hotswap_adapter(model, folder, "default")
            assert_equals_fresh_load(model, kind, folder, prepared=True, margin=10)


def test_a_target_that_does_not_fit_a_grouped_convolution(tmp_path):
    model = load(CONV, save_random_adapter(CONV, tmp_path / "a", seed=1, r=4))
    error = refused(model, "with groups=4 to target rank 6, but the target rank is not divisible by 4", target_rank=6)
    assert "target_rank=8" in str(error)


def test_a_target_below_the_family(tmp_path):
    model = load(LINEAR, save_random_adapter(LINEAR, tmp_path / "a", seed=1, r=2))
    refused(
        model,
        "the original rank is larger \\(5\\)",
        target_rank=4,
        adapters=[LoraConfig(r=2, target_modules=["first"], rank_pattern={"first": 5})],
    )


@pytest.mark.parametrize("target_rank", [0, -1, 2.0, True, "8"])
def test_a_target_that_is_no_rank(tmp_path, target_rank):
    model = load(LINEAR, save_random_adapter(LINEAR, tmp_path / "a", seed=1, r=2))
    refused(model, "not a rank", target_rank=target_rank)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (LoraConfig(r=2, target_modules=["nowhere"]), "no layer in this model"),
        (LoraConfig(r=2, target_modules=["last"], use_dora=True), "use_dora"),
        (LoraConfig(r=2, target_modules=["blocks"]), "can't be added to the model"),
        (IA3Config(target_modules=["last"], feedforward_modules=[]), "Incompatible PEFT types found: LORA and IA3"),
    ],
)
def test_families_that_can_not_be_had(tmp_path, config, match):
    model = load(LINEAR, save_random_adapter(LINEAR, tmp_path / "a", seed=1, r=2, target_modules=["first"]))
    refused(model, match, target_rank=8, adapters=[LoraConfig(r=4, target_modules=["last"]), config])


def test_a_family_member_that_can_not_be_read(tmp_path):
    model = load(LINEAR, save_random_adapter(LINEAR, tmp_path / "a", seed=1, r=2))
    refused(model, "Can't find 'adapter_config.json'", adapters=[tmp_path / "nothing"])


def test_a_loaded_adapter_that_can_not_be_prepared():
    model = get_peft_model(LINEAR.base(), LoraConfig(r=2, target_modules=["last"], bias="all"))
    refused(model, "can't be prepared for the loaded adapter", target_rank=8)


@pytest.mark.parametrize("kind_of_model", ["plain", "IA3"])
def test_models_without_lora(kind_of_model):
    model = LINEAR.base()
    if kind_of_model == "IA3":
        model = get_peft_model(model, IA3Config(target_modules=["last"], feedforward_modules=[]))
    with pytest.raises(ValueError, match="No adapter layers found on the model, make sure call"):
        prepare_model_for_compiled_hotswap(model, target_rank=8)


def test_a_rank_above_the_room_is_refused_with_the_number_to_prepare_for(tmp_path):
    folders = [save_random_adapter(LLAMA, tmp_path / str(rank), seed=rank, r=rank) for rank in (2, 16)]
    model = load(LLAMA, folders[0])
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    before = snapshot(model)
    with pytest.raises(HotswapError) as caught:
        hotswap_adapter(model, folders[1], "default")
    assert len(caught.value.refusals) == 1
    assert "rank 16" in caught.value.refusals[0].found
    assert "rank 8" in caught.value.refusals[0].expected
    assert "target_rank=16" in caught.value.refusals[0].next_step
    assert_untouched(model, before)


def test_the_plan_says_what_is_padded(tmp_path):
    folders = [save_random_adapter(LLAMA, tmp_path / str(rank), seed=rank, r=rank) for rank in (8, 3)]
    few = save_random_adapter(LLAMA, tmp_path / "few", seed=9, r=8, target_modules=["q_proj"])
    model = load(LLAMA, folders[0])
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    assert plan_hotswap(model, folders[1]).counts == {"copy": 0, "pad": 14, "resize": 0, "off": 0, "add": 0}
    hotswap_adapter(model, folders[1], "default")
    plan = plan_hotswap(model, few)
    assert plan.counts == {"copy": 2, "pad": 0, "resize": 0, "off": 12, "add": 0}
    assert ("off", 12, "3 -> off", "-") in plan.rows
    hotswap_adapter(model, few, "default")
    assert ("pad", 12, "none -> 3", f"{8 / 3:.4g}") in plan_hotswap(model, folders[1]).rows
    assert ("off", 12, "off", "-") in plan_hotswap(model, few).rows


# ---- a model that is compiled already


def compiled_forms():
    def in_place(model):
        model.compile(backend="eager")
        return model

    def a_layer(model):
        model.get_base_model().first.compile(backend="eager")
        return model

    def a_wrapped_part(model):
        base = model.get_base_model()
        base.blocks = torch.compile(base.blocks, backend="eager")
        return model

    def forward(model):
        model.forward = torch.compile(model.forward, backend="eager")
        return model

    def by_generate(model):
        """transformers keeps the compiled call that ``generate`` makes under this name."""
        base = model.get_base_model()
        base._compiled_call = torch.compile(base.__call__, backend="eager")
        return model

    return {
        "by generate": by_generate,
        "wrapper": lambda model: torch.compile(model, backend="eager"),
        "in place": in_place,
        "a layer": a_layer,
        "a wrapped part": a_wrapped_part,
        "forward": forward,
    }


@pytest.mark.parametrize("form", compiled_forms())
def test_a_compiled_model_is_noticed_in_every_form(tmp_path, form):
    folder = save_random_adapter(LINEAR, tmp_path / "a", seed=1, r=2)
    compiled = compiled_forms()[form](load(LINEAR, folder))
    with pytest.raises(ValueError, match=r"Call prepare_model_for_compiled_hotswap \*before\* compiling the model"):
        prepare_model_for_compiled_hotswap(compiled, target_rank=4)
    with pytest.warns(UserWarning, match="called with a model that is already compiled"):
        prepare_model_for_compiled_hotswap(compiled, target_rank=4, check_compiled="warn")
    prepare_model_for_compiled_hotswap(compiled, target_rank=6, check_compiled="ignore")
    assert {tensor.capacity for tensor in resolve_slot(compiled, "default").tensors} == {6}


def test_a_base_that_was_compiled_before_peft_wrapped_it():
    model = get_peft_model(torch.compile(LINEAR.base(), backend="eager"), LoraConfig(r=2, target_modules=["last"]))
    with pytest.raises(ValueError, match="before"):
        prepare_model_for_compiled_hotswap(model, target_rank=4)


def test_check_compiled_has_three_values(tmp_path):
    model = load(LINEAR, save_random_adapter(LINEAR, tmp_path / "a", seed=1, r=2))
    refused(
        model, "check_compiles should be one of 'error', 'warn', or 'ignore', got 'no' instead", check_compiled="no"
    )


def test_a_scaling_is_a_named_buffer(tmp_path):
    folders = [save_random_adapter(LLAMA, tmp_path / str(rank), seed=rank, r=rank) for rank in (2, 5)]
    model = load(LLAMA, folders[0])
    keys = model.state_dict().keys()
    prepare_model_for_compiled_hotswap(model, adapters=folders)
    hotswap_adapter(model, folders[1], "default")
    scalings = {name: each for name, each in model.named_buffers() if "hotswap_scaling" in name}
    assert len(scalings) == len(layers(model))
    assert {tuple(each.shape) for each in scalings.values()} == {(1, 1)}
    assert model.state_dict().keys() == keys, "a state dict is that of a fresh load"
    # who puts other values in the place of a model's, an export too, reaches the scalings
    off = {name: torch.zeros_like(each) for name, each in scalings.items()}
    without = torch.func.functional_call(model, off, kwargs={**LLAMA.inputs(), "use_cache": False}).logits
    torch.testing.assert_close(without, call(LLAMA.base(), LLAMA.inputs()), rtol=0, atol=1e-5)
    program = torch.export.export(model, (), {**LLAMA.inputs(), "use_cache": False}, strict=False)
    assert set(program.graph_signature.buffers) >= scalings.keys()
    assert_same_outputs(model, load(LLAMA, folders[1]), LLAMA)
    model.delete_adapter("default")
    assert not [name for name, _ in model.named_buffers() if "hotswap_scaling" in name]


@pytest.mark.parametrize("rows", [1, 2])
def test_what_is_prepared_is_as_exact_as_the_model(tmp_path, rows):
    # 5 / 3 and 7 / sqrt(5) are no numbers of float32
    configs = dict(r=3, lora_alpha=5), dict(r=5, lora_alpha=7, use_rslora=True)
    folders = [save_random_adapter(LLAMA, tmp_path / f"{each['r']}", seed=2, **each) for each in configs]
    model = load(LLAMA, folders[0]).double()
    pool = AdapterPool(model, adapters=dict(zip("ab", folders, strict=True)), rows=rows, progress=False)
    pool.swap("b")
    fresh = load(LLAMA, folders[1]).double()
    assert_same_outputs(model, fresh, LLAMA, tolerance=1e-14)
    pool.strength = 0.3
    for layer in layers(fresh):
        layer.scaling["default"] *= 0.3
    assert_same_outputs(model, fresh, LLAMA, tolerance=1e-14)
