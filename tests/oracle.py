"""The oracle of the tests. It knows nothing of hotswap_lab: a fresh load by PEFT is the truth."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from models import Kind, call, load
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file

TABLES = ("r", "lora_alpha", "scaling", "use_rslora", "use_dora", "lora_bias")


def assert_equals_fresh_load(
    model, kind: Kind, folder: str, adapter_name: str = "default", *, prepared: bool = False, **load_kwargs
) -> None:
    """Outputs, config, scalars, tensors and saved files of ``model`` equal those of a fresh load of ``folder``.

    The modules of a ``prepared`` model show another size than a fresh load's; all else must be equal there, too.
    """
    fresh = load(kind, folder, adapter_name, **load_kwargs)
    assert_same_outputs(model, fresh, kind)
    live_config, fresh_config = (_config(each, adapter_name) for each in (model, fresh))
    assert live_config == fresh_config
    assert_same_scalars(model, fresh, adapter_name, () if prepared else ("lora_dropout", "lora_A", "lora_B"))
    assert_same_tensors(
        get_peft_model_state_dict(model, adapter_name=adapter_name),
        get_peft_model_state_dict(fresh, adapter_name=adapter_name),
    )
    assert_same_files(model, fresh, adapter_name)


def _config(model, adapter_name: str) -> dict:
    """For some architectures PEFT makes a set of what the file has as a list."""
    config = model.peft_config[adapter_name].to_dict()
    return {key: set(value) if isinstance(value, list) else value for key, value in config.items()}


def assert_same_outputs(model, fresh, kind: Kind, tolerance: float = 1e-5, margin: float = 1000) -> None:
    expected = call(fresh, kind.inputs())
    without = call(kind.base(), kind.inputs())
    scale = expected.abs().max().item()
    # a test that passes whatever the adapter does is worth nothing
    change = (expected - without).abs().max().item()
    assert change > margin * tolerance * scale, f"the adapter changes the outputs by {change} only"
    torch.testing.assert_close(call(model, kind.inputs()), expected, rtol=0, atol=tolerance * scale)


def assert_same_scalars(model, fresh, adapter_name: str, modules: tuple[str, ...]) -> None:
    live = dict(model.named_modules())
    for name, layer in fresh.named_modules():
        if isinstance(layer, LoraLayer) and adapter_name in layer.scaling:
            for table in TABLES:
                assert getattr(live[name], table)[adapter_name] == getattr(layer, table)[adapter_name], (name, table)
            for part in modules:
                if adapter_name in (expected := getattr(layer, part)):
                    assert repr(getattr(live[name], part)[adapter_name]) == repr(expected[adapter_name]), (name, part)


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
            if isinstance(config["target_modules"], list):
                config["target_modules"].sort()
            contents.append((config, load_file(target / "adapter_model.safetensors")))
        assert contents[0][0] == contents[1][0]
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
            key: (type(value), float(value), id(value) if torch.is_tensor(value) else 0)
            for key, value in getattr(layer, table).items()
        }
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
        for table in TABLES
    }
    structure = [(name, id(module), module.training, repr(module)) for name, module in model.named_modules()]
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
    return first.dtype == second.dtype and first.numpy().tobytes() == second.numpy().tobytes()
