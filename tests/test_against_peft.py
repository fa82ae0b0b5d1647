"""README's table: what PEFT's hotswap and ours make of the same case, seen and not remembered.

Each case runs PEFT's own function and puts what happened into the words of the table's middle column; ours must
equal a fresh load or refuse as its right column says.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from adapters import CONFIGS, kind_for, save_random_adapter_of
from models import KINDS, call, load, save_random_adapter
from oracle import assert_equals_fresh_load, assert_untouched, snapshot
from peft import LoHaConfig, LoraConfig, PeftConfig, PeftModel, XLoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.config import ArrowConfig
from peft.utils.hotswap import hotswap_adapter as peft_hotswap
from peft.utils.hotswap import hotswap_adapter_from_state_dict as peft_hotswap_from_state_dict
from peft.utils.hotswap import prepare_model_for_compiled_hotswap as peft_prepare
from peft.utils.save_and_load import _insert_adapter_name_into_state_dict, load_peft_weights
from safetensors.torch import load_file, save_file

from hotswap_lab import (
    Adapter,
    HotswapError,
    RecompileWatch,
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
    prepare_model_for_compiled_hotswap,
    resolve_slot,
)

README = (Path(__file__).parent.parent / "README.md").read_text()
LLAMA = KINDS["llama"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]

pytestmark = pytest.mark.skipif(
    not version("peft").startswith("0.21."), reason="the table says what PEFT 0.21 does; another version is installed"
)


def row(case: str) -> tuple[str, str]:
    """What README says of a case: PEFT's column and ours."""
    match = re.search(rf"^\| {re.escape(case)} \| (.*?) \| (.*?) \|$", README, re.MULTILINE)
    assert match, f"README has no row for {case!r}"
    return match.group(1), match.group(2)


def same_outputs(model, folder: str, kind=LLAMA) -> bool:
    return torch.allclose(call(model, kind.inputs()), call(load(kind, folder), kind.inputs()), rtol=0, atol=1e-5)


def what_peft_does(model: PeftModel, new: str, kind=LLAMA) -> str:
    try:
        peft_hotswap(model, new, adapter_name="default", torch_device="cpu")
    except (ValueError, RuntimeError):
        return "refused"
    if not same_outputs(model, new, kind):
        return "other outputs, no error"
    config, fresh = model.peft_config["default"].to_dict(), load(kind, new).peft_config["default"].to_dict()
    return "equal outputs" if config == fresh else "equal outputs, old config"


PAIRS = {
    "same rank, other `lora_alpha`": (dict(r=4, lora_alpha=8), dict(r=4, lora_alpha=3)),
    "to or from rsLoRA": (dict(r=4), dict(r=4, use_rslora=True)),
    "other `lora_dropout`": (dict(r=4), dict(r=4, lora_dropout=0.1)),
}


@pytest.mark.parametrize("case", PAIRS)
def test_pairs(tmp_path, case):
    for first, second in (PAIRS[case], PAIRS[case][::-1]):
        old = save_random_adapter(LLAMA, tmp_path / "old", seed=1, **first)
        new = save_random_adapter(LLAMA, tmp_path / "new", seed=2, **second)
        assert (what_peft_does(load(LLAMA, old), new), "equals a fresh load") == row(case)
        model = load(LLAMA, old)
        hotswap_adapter(model, new, "default")
        assert_equals_fresh_load(model, LLAMA, new)


def test_rank_grows_or_shrinks(tmp_path):
    folders = [save_random_adapter(LLAMA, tmp_path / str(rank), seed=rank, r=rank) for rank in (4, 8)]
    for old, new in (folders, folders[::-1]):
        assert (what_peft_does(load(LLAMA, old), new), "equals a fresh load") == row("rank grows or shrinks")
        model = load(LLAMA, old)
        hotswap_adapter(model, new, "default")
        assert_equals_fresh_load(model, LLAMA, new)


def test_full_names_in_alpha_pattern(tmp_path):
    pattern = {r"^model\.layers\.0\.self_attn\.q_proj": 64}
    folder = save_random_adapter(LLAMA, tmp_path / "adapter", seed=1, r=4, alpha_pattern=pattern)
    case = "`alpha_pattern` with a full module name, file swapped into itself"
    assert (what_peft_does(load(LLAMA, folder), folder), "equals a fresh load") == row(case)
    model = load(LLAMA, folder)
    hotswap_adapter(model, folder, "default")
    assert_equals_fresh_load(model, LLAMA, folder)


def test_fewer_target_modules(tmp_path):
    old = save_random_adapter(LLAMA, tmp_path / "old", seed=1, r=4)
    new = save_random_adapter(LLAMA, tmp_path / "new", seed=2, r=4, target_modules=ATTENTION)
    theirs, ours = row("fewer target modules")
    model = load(LLAMA, old)
    peft_hotswap(model, new, adapter_name="default", torch_device="cpu")
    assert theirs == "equal outputs; the zeros are saved"
    assert same_outputs(model, new)
    model.save_pretrained(tmp_path / "theirs")
    assert len(load_file(tmp_path / "theirs" / "adapter_model.safetensors")) == 28
    assert ours == "equals a fresh load, saved files too"
    model = load(LLAMA, old)
    hotswap_adapter(model, new, "default")
    assert_equals_fresh_load(model, LLAMA, new)


def test_more_target_modules(tmp_path):
    old = save_random_adapter(LLAMA, tmp_path / "old", seed=1, r=4, target_modules=ATTENTION)
    new = save_random_adapter(LLAMA, tmp_path / "new", seed=2, r=4)
    assert row("more target modules") == (
        what_peft_does(load(LLAMA, old), new),
        "refused, or added with `add_layers=True`",
    )
    model = load(LLAMA, old)
    with pytest.raises(HotswapError):
        hotswap_adapter(model, new, "default")
    hotswap_adapter(model, new, "default", add_layers=True)
    assert_equals_fresh_load(model, LLAMA, new)


def _second_adapter(tmp_path) -> tuple[PeftModel, str, Callable[[], bool]]:
    folder = save_random_adapter(LLAMA, tmp_path / "first", seed=1, r=4)
    model = load(LLAMA, folder)
    model.load_adapter(save_random_adapter(LLAMA, tmp_path / "second", seed=2, r=4), "default_0")
    before = {key: value.clone() for key, value in model.state_dict().items() if ".default_0." in key}
    new = save_random_adapter(LLAMA, tmp_path / "new", seed=3, r=4)

    def untouched() -> bool:
        return all(torch.equal(model.state_dict()[key], value) for key, value in before.items())

    return model, new, untouched


def test_a_second_adapter_with_a_similar_name(tmp_path):
    theirs, ours = row("a second adapter whose name contains the first one's")
    model, new, untouched = _second_adapter(tmp_path)
    peft_hotswap(model, new, adapter_name="default", torch_device="cpu")
    assert theirs == "the second one is filled with zeros"
    assert not untouched()
    assert all(not value.any() for key, value in model.state_dict().items() if ".default_0." in key)
    model, new, untouched = _second_adapter(tmp_path)
    hotswap_adapter(model, new, "default")
    assert ours == "untouched"
    assert untouched()


def test_the_callers_tensors(tmp_path):
    theirs, ours = row("the tensors you passed, when the rank grows")
    old = save_random_adapter(LLAMA, tmp_path / "old", seed=1, r=4)
    new = save_random_adapter(LLAMA, tmp_path / "new", seed=2, r=8)
    config = Adapter.load(new).config

    def shared(swap) -> bool:
        model = load(LLAMA, old)
        named = _insert_adapter_name_into_state_dict(load_peft_weights(new, device="cpu"), "default", "lora_")
        copies = {key: value.clone() for key, value in named.items()}
        swap(model, named, "default", config)
        for parameter in model.parameters():
            parameter.data.add_(1)
        return any(
            not torch.equal(value, copies[key]) for key, value in named.items() if value.shape == copies[key].shape
        ) or any(value.shape != copies[key].shape for key, value in named.items())

    assert theirs == "taken over by the model"
    assert shared(peft_hotswap_from_state_dict)
    assert ours == "only read"
    assert not shared(hotswap_adapter_from_state_dict)


def test_a_damaged_file(tmp_path):
    theirs, ours = row("damaged file: a tensor of another shape")
    old = save_random_adapter(LLAMA, tmp_path / "old", seed=1, r=4)
    new = save_random_adapter(LLAMA, tmp_path / "new", seed=2, r=4)
    file = f"{new}/adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight"
    tensors[key] = tensors[key][:, :7].clone()[:3]
    save_file(tensors, file)

    def changed(swap) -> bool:
        model = load(LLAMA, old)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(Exception):  # noqa: B017, PT011 - whatever it is, the state after it is what counts
            swap(model)
        return any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())

    assert theirs == "half swapped"
    assert changed(lambda model: peft_hotswap(model, new, adapter_name="default", torch_device="cpu"))
    assert ours == "refused, untouched"
    assert not changed(lambda model: hotswap_adapter(model, new, "default"))


def test_merged_and_other_types(tmp_path):
    assert row("merged adapter, other PEFT type") == ("refused", "refused, in PEFT's words")
    folder = save_random_adapter(LLAMA, tmp_path / "lora", seed=1, r=4)
    get_peft_model(LLAMA.base(), LoHaConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "loha")
    merged = load(LLAMA, folder)
    merged.merge_adapter()
    for model, new in ((merged, folder), (load(LLAMA, folder), str(tmp_path / "loha"))):
        messages = []
        for swap in (
            lambda m, f: peft_hotswap(m, f, adapter_name="default", torch_device="cpu"),
            lambda m, f: hotswap_adapter(m, f, "default"),
        ):
            with pytest.raises(ValueError, match=r"Cannot hot-swap|Incompatible PEFT types"):
                swap(model, new)
            try:
                swap(model, new)
            except ValueError as error:
                messages.append(str(error).splitlines()[0])
        assert messages[0].startswith(messages[1].rstrip("."))


LAYERS = {
    "LoRA on Linear, Conv1D": ["linear", "gpt2"],
    "LoRA on Embedding": ["embedding"],
    "LoRA on Conv1d, Conv3d, grouped, rank shrinks": ["conv"],
}


@pytest.mark.parametrize("case", LAYERS)
def test_layer_types(tmp_path, case):
    for name in LAYERS[case]:
        kind = KINDS[name]
        old = save_random_adapter(kind, tmp_path / f"{name}-old", seed=1, r=8, lora_alpha=8)
        new = save_random_adapter(kind, tmp_path / f"{name}-new", seed=2, r=4, lora_alpha=4)
        try:
            seen = what_peft_does(load(kind, old), new, kind)
        except (AttributeError, NotImplementedError, KeyError) as error:
            seen = type(error).__name__
        assert row(case) == (seen, "yes")
        model = load(kind, old)
        hotswap_adapter(model, new, "default")
        assert_equals_fresh_load(model, kind, new)


# ---- prepared and compiled


def test_saving_a_prepared_model(tmp_path):
    folder = save_random_adapter(LLAMA, tmp_path / "a", seed=1, r=4)
    seen = []
    for prepare in (peft_prepare, prepare_model_for_compiled_hotswap):
        model = load(LLAMA, folder)
        prepare(model, target_rank=8)
        model.save_pretrained(tmp_path / "saved")
        ranks = {
            t.shape[0] for key, t in load_file(tmp_path / "saved/adapter_model.safetensors").items() if "_A" in key
        }
        config = PeftConfig.from_pretrained(str(tmp_path / "saved"))
        if (ranks, config.r) == ({8}, 4):
            seen.append("padded weights, wrong config")
        elif (ranks, config.r) == ({4}, 4) and same_outputs(model, str(tmp_path / "saved")):
            seen.append("the adapter's own rank; reload equals the live model")
    assert tuple(seen) == row("prepared, then saved with `save_pretrained`")


def test_live_configs(tmp_path):
    folder = save_random_adapter(LLAMA, tmp_path / "a", seed=1, r=4)
    words = {8: "the live config says the target rank", 4: "live configs are left alone"}
    seen = []
    for prepare in (peft_prepare, prepare_model_for_compiled_hotswap):
        model = load(LLAMA, folder)
        prepare(model, target_rank=8, config=model.peft_config)
        seen.append(words[model.peft_config["default"].r])
    assert tuple(seen) == row("prepared, `config=model.peft_config`")


FAMILIES = {
    "adapters whose layers don't overlap": (dict(r=4, target_modules=ATTENTION), dict(r=8, target_modules=["up_proj"])),
    "adapters with other dropout": (dict(r=4), dict(r=8, lora_dropout=0.2)),
}


@pytest.mark.parametrize("case", FAMILIES)
def test_families(tmp_path, case):
    torch.compiler.reset()
    old, new = (
        save_random_adapter(LLAMA, tmp_path / str(number), seed=number, **config)
        for number, config in enumerate(FAMILIES[case])
    )
    model = load(LLAMA, old)
    peft_prepare(model, target_rank=8)
    assert (what_peft_does(model, new), "equals a fresh load, 0 recompiles") == row(case)
    model = load(LLAMA, old)
    prepare_model_for_compiled_hotswap(model, adapters=[new])
    compiled = torch.compile(model, backend="aot_eager")
    call(compiled, LLAMA.inputs())
    with RecompileWatch(allow=0):
        hotswap_adapter(compiled, new, "default")
        assert same_outputs(compiled, new)
    assert_equals_fresh_load(model, LLAMA, new, prepared=True)


def test_set_scale(tmp_path):
    folder = save_random_adapter(LLAMA, tmp_path / "a", seed=1, r=4)
    seen = []
    for prepare in (peft_prepare, prepare_model_for_compiled_hotswap):
        torch.compiler.reset()
        model = load(LLAMA, folder)
        prepare(model, target_rank=8)
        compiled = torch.compile(model, backend="eager")
        call(compiled, LLAMA.inputs())
        with RecompileWatch() as watch:
            for module in model.modules():
                if isinstance(module, LoraLayer):
                    module.set_scale("default", 0.5)
            call(compiled, LLAMA.inputs())
        seen.append("recompiles" if watch.recompiles else "0 recompiles")
    assert tuple(seen) == row("`set_scale` on a prepared model")


def test_freezing(tmp_path):
    torch.compiler.reset()
    kind = KINDS["linear"]
    old, new = (save_random_adapter(kind, tmp_path / str(r), seed=r, r=r, lora_alpha=r) for r in (4, 8))
    with torch._inductor.config.patch(freezing=True):
        model = load(kind, old)
        peft_prepare(model, target_rank=8)
        compiled = torch.compile(model)
        before = call(compiled, kind.inputs())
        peft_hotswap(model, new, adapter_name="default", torch_device="cpu")
        went_on = torch.equal(call(compiled, kind.inputs()), before)
        with pytest.raises(HotswapError, match="go on with the old adapter"):
            hotswap_adapter(compiled, old, "default")
    assert row("compiled with freezing") == ("old outputs go on, no error" if went_on else "", "refused")


def test_one_layer_that_can_not_be_padded(tmp_path):
    kind = KINDS["conv"]
    folder = save_random_adapter(kind, tmp_path / "a", seed=1, r=4)
    sizes = []
    for prepare in (peft_prepare, prepare_model_for_compiled_hotswap):
        model = load(kind, folder)
        with pytest.raises(ValueError, match="not divisible"):
            prepare(model, target_rank=6)
        sizes.append({tensor.capacity for tensor in resolve_slot(model, "default").tensors})
    words = ("others are padded already" if sizes[0] != {4} else "", "refused, untouched" if sizes[1] == {4} else "")
    assert words == row("one layer can't be padded")


#: README's rows, and the family of adapters that are swapped for one another in each
FAMILY_OF_ROW = {
    "DoRA: other rank, fewer layers, to and from plain LoRA": "DoRA",
    "DoRA on convolutions, to and from plain LoRA": "DoRA on convolutions",
    "`lora_bias`, other rank, to and from none": "lora_bias",
    '`bias="all"` and `"lora_only"`, fewer layers': "bias",
    "`modules_to_save`, other modules, back to none": "modules_to_save",
    "SEQ_CLS adapters with their classifier, back to none": "SEQ_CLS",
    "embeddings, other layers, back to none": "embeddings, untied",
    "tied embeddings, other layers, back to none": "embeddings, tied",
    "`trainable_token_indices`, other tokens, back to none": "trainable tokens",
    "trainable tokens of tied embeddings": "trainable tokens, tied",
    "MultiheadAttention, other rank, fewer layers": "MultiheadAttention",
    "`target_parameters` (Mixtral's experts), other rank, fewer, none": "target_parameters",
    "`layer_replication`, other rank": "layer_replication",
    "BD-LoRA, other blocks, to and from plain LoRA": "BD-LoRA",
    "aLoRA, other tokens, to and from plain LoRA": "aLoRA",
    "VeLoRA, to and from plain LoRA": "VeLoRA",
    "MonteCLoRA, to and from plain LoRA": "MonteCLoRA",
}

#: how a swap by PEFT can end, the worst first
OUTCOMES = [
    "KeyError",
    "TypeError",
    "broken model",
    "other outputs, no error",
    "refused",
    "equal outputs, old config",
    "equal outputs",
]


def what_peft_makes_of(model: PeftModel, new: str, kind) -> str:
    try:
        return what_peft_does(model, new, kind)
    except (KeyError, TypeError) as error:
        return type(error).__name__
    except RuntimeError:
        return "broken model"  # it raises when it is called: errors of the swap itself are "refused"


@pytest.mark.parametrize("case", FAMILY_OF_ROW)
def test_kinds_of_lora(tmp_path, case):
    """PEFT's column; that ours equals a fresh load in every pair is what ``methods/test_lora_kinds.py`` shows."""
    from lora_kinds import FAMILIES, MODELS

    name, configs = FAMILIES[FAMILY_OF_ROW[case]]
    kind, seen = MODELS[name], set()
    folders = [
        save_random_adapter_of(config, tmp_path / str(number), number + 1, kind)
        for number, config in enumerate(configs)
    ]
    for old, new in itertools.permutations(folders, 2):
        seen.add(what_peft_makes_of(load(kind, old), new, kind))
    theirs, ours = row(case)
    assert theirs == "; ".join(outcome for outcome in OUTCOMES if outcome in seen)
    assert ours.startswith("equals a fresh load")


def test_other_methods(tmp_path):
    """PEFT's column; ours is what ``methods/test_every_method.py`` shows for each of them."""
    types = {config.peft_type for configs in CONFIGS.values() for config in configs}
    assert row(f"each of the {len(types)} other methods of PEFT, other settings") == ("refused", "equals a fresh load")
    for name, (first, second, *_) in CONFIGS.items():
        kind = kind_for(name)
        old = save_random_adapter_of(first, tmp_path / name / "old", 1, kind)
        new = save_random_adapter_of(second, tmp_path / name / "new", 2, kind)
        assert what_peft_makes_of(load(kind, old), new, kind) == "refused", name


def what_ours_does(old: str, new: str, match: str = "") -> str:
    """The words for a swap that is refused, and for nothing else."""
    model = load(LLAMA, old)
    before = snapshot(model)
    with pytest.raises(HotswapError, match=match):
        hotswap_adapter(model, new, "default")
    assert_untouched(model, before)
    return "refused, untouched"


def test_adapters_that_change_the_base(tmp_path):
    """PEFT's hotswap goes on with the base as it is, so the outputs are those of neither adapter's fresh load."""
    plain = save_random_adapter_of(LoraConfig(r=4, target_modules=ATTENTION), tmp_path / "plain", 1)
    changed = save_random_adapter_of(
        LoraConfig(r=4, target_modules=ATTENTION, init_lora_weights="pissa"), tmp_path / "pissa", 2
    )
    theirs, ours = row("PiSSA, OLoRA, CorDA, LoftQ, KaSA: loading them changes the base")
    assert theirs == what_peft_does(load(LLAMA, plain), changed)
    assert ours == what_ours_does(plain, changed, "changes the base model's own weights")


def test_other_layers_of_the_base(tmp_path):
    """The live model's layers stay, in their order, whatever the new adapter's config says."""
    old, new = (
        save_random_adapter_of(
            LoraConfig(r=4, target_modules=ATTENTION, layer_replication=ranges), tmp_path / str(seed), seed
        )
        for seed, ranges in enumerate(([[0, 2], [1, 2]], [[0, 1], [0, 2]]))
    )
    theirs, ours = row("`layer_replication`, other layers of the base, as many")
    assert theirs == what_peft_does(load(LLAMA, old), new)
    assert ours == what_ours_does(old, new, "for other layers of the base model")


ROUTERS = {
    "X-LoRA, a router between adapters": lambda folder: XLoraConfig(
        hidden_size=16, adapters={"a": folder}, task_type="CAUSAL_LM"
    ),
    "Arrow, a router between adapters": lambda folder: LoraConfig(
        r=4, target_modules=ATTENTION, arrow_config=ArrowConfig(top_k=1)
    ),
}


@pytest.mark.parametrize("case", ROUTERS)
def test_routers(tmp_path, case):
    """They are made of other adapters of the model."""
    plain = save_random_adapter_of(LoraConfig(r=4, target_modules=ATTENTION), tmp_path / "plain", 1)
    config, new = ROUTERS[case](plain), tmp_path / "router"
    config.save_pretrained(new)
    save_file(load_file(f"{plain}/adapter_model.safetensors"), new / "adapter_model.safetensors")
    try:
        peft_hotswap(load(LLAMA, plain), str(new), adapter_name="default", torch_device="cpu")
        theirs = "no error"
    except ValueError:
        theirs = "refused"
    assert row(case) == (theirs, what_ours_does(plain, new))
