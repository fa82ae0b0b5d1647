"""The oracle of the tests. It knows nothing of hotswap_lab: a fresh load by PEFT is the truth."""

from __future__ import annotations

import json
import tempfile
from operator import attrgetter
from pathlib import Path

import torch
from models import Kind, call, load
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, get_peft_model_state_dict
from safetensors.torch import load_file

TABLES = ("r", "lora_alpha", "scaling", "use_rslora", "use_dora", "lora_bias")


def assert_equals_fresh_load(
    model,
    kind: Kind,
    folder: str,
    adapter_name: str = "default",
    *,
    prepared: bool = False,
    margin: float = 1000,
    **load_kwargs,
) -> None:
    """Outputs, config, scalars, tensors and saved files of ``model`` equal those of a fresh load of ``folder``.

    The modules of a ``prepared`` model show another size than a fresh load's; all else must be equal there, too.
    """
    fresh = load(kind, folder, adapter_name, **load_kwargs)
    assert_equals(model, fresh, kind, adapter_name, prepared=prepared, margin=margin)


def assert_equals(
    model,
    fresh,
    kind: Kind,
    adapter_name: str = "default",
    *,
    prepared: bool = False,
    tolerance: float = 1e-5,
    margin: float = 1000,
) -> None:
    """:func:`assert_equals_fresh_load` for whoever has the fresh load already."""
    assert_same_outputs(model, fresh, kind, tolerance, margin)
    live_config, fresh_config = (_config(each, adapter_name) for each in (model, fresh))
    assert live_config == fresh_config
    assert_same_scalars(model, fresh, adapter_name, () if prepared else ("lora_dropout", "lora_A", "lora_B"))
    if not prepared:
        assert_same_tables(model, fresh, adapter_name)
    assert_same_tensors(
        get_peft_model_state_dict(model, adapter_name=adapter_name),
        get_peft_model_state_dict(fresh, adapter_name=adapter_name),
    )
    assert_same_files(model, fresh, adapter_name)


def _config(model, adapter_name: str) -> dict:
    """For some architectures PEFT makes a set of what the file has as a list."""
    config = model.peft_config[adapter_name].to_dict()
    names = {key for key, value in config.items() if isinstance(value, list) and all(isinstance(e, str) for e in value)}
    return {key: set(value) if key in names else value for key, value in config.items()}


def assert_same_outputs(model, fresh, kind: Kind, tolerance: float = 1e-5, margin: float = 1000) -> None:
    expected = call(fresh, kind.inputs())
    without = call(kind.base(), kind.inputs())
    scale = expected.abs().max().item()
    # a test that passes whatever the adapter does is worth nothing; prompts even make the outputs longer
    change = (expected - without).abs().max().item() if expected.shape == without.shape else scale
    assert change > margin * tolerance * scale, f"the adapter changes the outputs by {change} only"
    torch.testing.assert_close(call(model, kind.inputs()), expected, rtol=0, atol=tolerance * scale)


def assert_same_scalars(model, fresh, adapter_name: str, modules: tuple[str, ...]) -> None:
    live = dict(model.named_modules())
    for name, layer in fresh.named_modules():
        if isinstance(layer, LoraLayer) and adapter_name in layer.scaling and not isinstance(layer, AdaLoraLayer):
            for table in TABLES:
                assert getattr(live[name], table)[adapter_name] == getattr(layer, table)[adapter_name], (name, table)
            for part in modules:
                if adapter_name in (expected := getattr(layer, part)):
                    assert repr(getattr(live[name], part)[adapter_name]) == repr(expected[adapter_name]), (name, part)


def assert_same_tables(live, fresh, adapter_name: str) -> None:
    """Whatever PEFT keeps under the adapter's name on any layer is the same: parameters, buffers, scalars, indices."""
    modules, seen = dict(live.named_modules()), 0
    for path, module in fresh.named_modules():
        if not isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            continue
        for name in (*module.adapter_layer_names, *module.other_param_names):
            expected = _entry(module, name, adapter_name)
            if expected is not None:
                assert _are_equal(_entry(modules[path], name, adapter_name), expected), (path, name)
                seen += 1
    for path, module in live.named_modules():
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            assert not module.merged_adapters, path
    assert seen or adapter_name in getattr(fresh, "prompt_encoder", ()) or hasattr(fresh.base_model, "_parents")


def _entry(module, table: str, adapter_name: str):
    try:
        entries = attrgetter(table)(module)
    except AttributeError:  # variants of LoRA bring tables of their own
        return None
    return entries[adapter_name] if hasattr(entries, "keys") and adapter_name in entries else None


def _are_equal(live, fresh) -> bool:
    if isinstance(fresh, torch.nn.Module):
        return repr(live) == repr(fresh) and _are_equal(dict(live.state_dict()), dict(fresh.state_dict()))
    if isinstance(fresh, torch.Tensor):
        return live.dtype == fresh.dtype and torch.equal(live, fresh)
    if isinstance(fresh, dict):
        return live.keys() == fresh.keys() and all(_are_equal(live[key], fresh[key]) for key in fresh)
    if isinstance(fresh, (list, tuple)):
        return len(live) == len(fresh) and all(map(_are_equal, live, fresh))
    return live == fresh


def assert_same_tensors(live: dict, fresh: dict) -> None:
    assert live.keys() == fresh.keys()
    for key, expected in fresh.items():
        assert live[key].dtype == expected.dtype, key
        assert torch.equal(live[key], expected), key


def assert_same_files(model, fresh, adapter_name: str) -> None:
    """``save_pretrained`` writes the same config and the same tensors for both."""
    with tempfile.TemporaryDirectory() as folder:
        contents = []
        for number, each in enumerate((model, fresh)):
            target = Path(folder, str(number))
            each.save_pretrained(target, selected_adapters=[adapter_name])
            target = target if adapter_name == "default" else target / adapter_name
            config = json.loads((target / "adapter_config.json").read_text())
            for value in config.values():
                if isinstance(value, list) and all(isinstance(each, str) for each in value):
                    value.sort()
            contents.append((config, load_file(target / "adapter_model.safetensors")))
        assert contents[0][0] == contents[1][0], adapter_name
        assert_same_tensors(contents[0][1], contents[1][1])


def snapshot(model) -> dict:
    """Everything of a model that a refused swap must leave alone, bit for bit."""
    # what is saved, and what is in memory: the padding of a prepared model is not in its state dict
    saved = {key: value.clone() for key, value in model.state_dict().items()}
    memory = {
        name: (tensor.data_ptr(), tensor.detach().clone())
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }
    flags = {key: (parameter.requires_grad, parameter.grad) for key, parameter in model.named_parameters()}
    scalars = {
        (name, table): {
            key: (type(value), float(value), value.data_ptr() if torch.is_tensor(value) else 0)
            for key, value in getattr(layer, table).items()
        }
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
        for table in TABLES
    }
    structure = repr(model), [(name, id(module), module.training) for name, module in model.named_modules()]
    configs = {name: (id(config), config.to_dict()) for name, config in model.peft_config.items()}
    attributes = {name: sorted(module.__dict__) for name, module in model.named_modules()}
    return dict(
        saved=saved,
        memory=memory,
        flags=flags,
        scalars=scalars,
        structure=structure,
        configs=configs,
        attributes=attributes,
    )


def assert_untouched(model, before: dict) -> None:
    after = snapshot(model)
    assert after["saved"].keys() == before["saved"].keys()
    for key, value in before["saved"].items():
        assert _same_bits(after["saved"][key], value), key
    assert after["memory"].keys() == before["memory"].keys()
    for name, (address, value) in before["memory"].items():
        assert after["memory"][name][0] == address, name
        assert _same_bits(after["memory"][name][1], value), name
    for part in ("flags", "scalars", "structure", "configs", "attributes"):
        assert after[part] == before[part], part


def _same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    """NaN must stay NaN, and -0.0 must stay -0.0."""
    one, two = (each.contiguous().view(-1).view(torch.uint8) for each in (first, second))
    return first.dtype == second.dtype and torch.equal(one, two)
